// What the bounds of a chain's slopes work in: packed weights and, for one box at a time, the forms.
#pragma once

#include "quadratic_least.h"

namespace {
namespace quadratic {

constexpr int64_t knots = 9;  // of a parabola along a curve; KNOTS of quadratic.py

// A weight as products read it, and its sizes.
struct Weight {
  Packing<double> signed_, sizes;
  int64_t in, out;

  void pack() const {
    for (int64_t p = 0; p < signed_.panels(); ++p) signed_.panel(p);
    const int64_t n = packed_size<double>(in, out);
    for (int64_t i = 0; i < n; i += at_once) store(sizes.to + i, size_of(load(signed_.to + i)));
  }
  // f(column, vector) along row j of the matrix that multiplies from the right.
  template <class F> static MK_INLINE void each(const Matrix<double>& b, int64_t j, const F& f) {
    for (int64_t first = 0; first < b.N; first += panel_width<double>) {
      const double* row = b.panel(first) + j * b.stride(first);
      for (int64_t i = 0; i < b.width(first); i += at_once) f(first + i, load(row + i));
    }
  }
};

struct Work {
  const Chain& chain;
  const SlopesCall& call;
  int64_t m, terms, L, K, wide;  // terms of a form; wide: the stride of forms
  Weight *forward, *backward;    // of each layer
  Layer* layer;
  Packing<double> square;  // what the cubic products multiply by
  Form h, P, p;
  Rates q_h, q_a, scratch;
  double *places, *values[3];  // arguments of curves and what these are
  double* signs;               // of a vector of neurons, for each column
  double *left, *scaled, *weight;
  double* errors;  // of each slope that is asked for, over the neurons
  double* M;       // (terms - m, K m): what is cubic, a row for each quadratic term
  double* last;    // the slopes' own form
  int64_t ld_M, ld_last;
  double *blame, *third;  // of the slopes that are asked for, (K, m) and (K,)
  int64_t* wanted;
  Symmetric symmetric;  // the quadratic part of one slope

  Work(const Chain& given, const SlopesCall& asked, Bump& memory)
      : chain(given), call(asked), m(asked.m), terms(terms_of(m)), L(given.layers), K(asked.K) {
    wide = 0;
    for (int64_t l = 0; l < L; ++l) wide = max_of(wide, max_of(in(l), out(l)));
    wide = max_of(wide, max_of(K, chain.layer[0].in));
    wide = scratch_ld<double>(wide);
    forward = memory.take<Weight>(L), backward = memory.take<Weight>(L),
    layer = memory.take<Layer>(L);
    for (int64_t l = 0; l < L; ++l) {
      const ChainLayer& of_l = chain.layer[l];
      // Of the last layer one row, of the first the columns that are asked for.
      const double* W = of_l.W + (l == L - 1 ? call.output * of_l.in : 0);
      const Weight to = weight_of(memory, W, 1, of_l.in, of_l.in, out(l), nullptr);
      const Weight from =
          weight_of(memory, W, of_l.in, 1, out(l), l ? of_l.in : K, l ? nullptr : call.columns);
      const Layer here{form(memory), form(memory), curved(memory), curved(memory), rates(memory)};
      if (forward) forward[l] = to, backward[l] = from, layer[l] = here;
    }
    h = form(memory), P = form(memory), p = form(memory);
    q_h = rates(memory), q_a = rates(memory), scratch = rates(memory);
    places = memory.take<double>((knots + 2) * wide);
    for (double*& of_order : values) of_order = memory.take<double>((knots + 2) * wide);
    signs = memory.take<double>(m * at_once), left = memory.take<double>(wide);
    const int64_t rows = round_up(max_of<int64_t>(K * m, 1), at_once);
    scaled = memory.take<double>(rows * wide);
    square = {
        memory.take<double>(packed_size<double>(wide, rows)), nullptr, 1, wide, 0, 0, nullptr};
    weight = memory.take<double>(K * wide), errors = memory.take<double>(K * wide);
    ld_M = scratch_ld<double>(rows), ld_last = scratch_ld<double>(K);
    M = memory.take<double>((terms - m) * ld_M);
    last = memory.take<double>((Form::before + terms) * ld_last);
    blame = memory.take<double>(rows), third = memory.take<double>(K);
    wanted = memory.take<int64_t>(K);
    const int64_t n = round_up(m, at_once);
    symmetric = {m, n, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    double** const rows_of[] = {&symmetric.g,      &symmetric.h,     &symmetric.open,
                                &symmetric.corner, &symmetric.slope, &symmetric.first};
    for (double** row : rows_of) *row = memory.take<double>(n);
    symmetric.pairs = memory.take<double>(m * n), symmetric.sizes = memory.take<double>(m * n);
  }

  int64_t in(int64_t l) const { return chain.layer[l].in; }
  int64_t out(int64_t l) const { return l == L - 1 ? 1 : chain.layer[l].out; }
  bool bends(int64_t l) const { return chain.layer[l].kind != 0; }
  const double* bias(int64_t l) const { return chain.layer[l].b + (l == L - 1 ? call.output : 0); }

  // What a sum over all terms of a form may be rounded by.
  double more() const { return 1 + double(2 * (terms + 2)) * roundoff; }

  void pack() const {
    for (int64_t l = 0; l < L; ++l) forward[l].pack(), backward[l].pack();
  }
  Form form(Bump& memory) const {
    return {memory.take<double>((Form::before + terms) * wide), wide, 0};
  }
  Curved curved(Bump& memory) const {
    Curved f;
    double** const rows[] = {&f.at, &f.slope, &f.bend, &f.all, &f.left, &f.steep, &f.whole};
    for (double** row : rows) *row = memory.take<double>(wide);
    return f;
  }
  Rates rates(Bump& memory) const {
    double* rows = memory.take<double>(K * (1 + m) * wide);
    return {rows, memory.take<double>((K + 1) * wide), wide, m};
  }
  Weight weight_of(Bump& memory, const double* W, int64_t row, int64_t column, int64_t n,
                   int64_t to, const int64_t* chosen) const {
    const int64_t size = packed_size<double>(n, to);
    double *one = memory.take<double>(size), *other = memory.take<double>(size);
    return {{one, W, row, column, n, to, chosen}, {other, W, row, column, n, to, chosen}, n, to};
  }
};

MK_INLINE void product(int64_t rows, const double* from, int64_t ld, const Matrix<double>& by,
                       double* to, int64_t ld_to) {
  gemm<false, double>(rows, by.K, from, ld, by, 0, from_zero<double>(), to, ld_to, Nothing{});
}

}  // namespace quadratic
}  // namespace
