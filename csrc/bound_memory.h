// What a pass over a program's intervals works on: where each value lies, and what its node keeps.
//
// Letters are those of docs/mathematics.md: v is a value, u the input of its node, y the last value, H a
// number of columns, θ (theta) a parameter, g the cotangent of what a value's ends are. i is a row of
// all R, j a column, b a box of B; o an output of D, c a constrained column of k. z and r are centre and
// radius, t an interval of a tangent, as in docs/sure.md.
#pragma once

#include "interval_norms.h"
#include "interval_products.h"
#include "nodes.h"

namespace {

// Rows of a value are its intervals over the B boxes and then the k·B intervals of its tangents; all of
// them go through a node together. `saved` is what forward leaves for backward: the bound as it was
// given, then of each value its ends and what its node keeps.
template <class T> struct Bounded {
  const Problem& problem;
  const Box& box;
  const void* const* params;
  const int64_t* sizes;
  int64_t B, R, y;
  // Where each value begins in `saved`, and its cotangents among all; null while memory is counted.
  int64_t *at, *cotangent_at;
  int64_t saved_size, cotangents_size = 0, widest = 0;
  double* saved = nullptr;

  Bounded(const Problem& p, const Box& b, const void* const* given, const int64_t* elements,
          Bump& memory)
      : problem(p), box(b), params(given), sizes(elements), B(b.B), R((1 + b.k) * b.B), y(p.count) {
    at = memory.take<int64_t>(y + 1);
    cotangent_at = memory.take<int64_t>(y + 1);
    saved_size = round_up(p.D * b.k, 8);
    for (int64_t v = 0; v <= y; ++v) {
      if (at) at[v] = saved_size, cotangent_at[v] = cotangents_size;
      saved_size += 2 * R * ld(v) + kept(v);
      cotangents_size += v ? 2 * R * ld(v) : 0;
      widest = max_of(widest, ld(v));
    }
  }

  const Node& node_of(int64_t v) const { return problem.nodes[v - 1]; }
  int64_t width(int64_t v) const { return problem.width(v); }
  int64_t ld(int64_t v) const { return round_up(width(v), 8); }
  int64_t kept(int64_t v) const {
    if (v == 0) return 0;
    const Node& node = node_of(v);
    if (node.kind == node_linear) return 2 * R * ld(node.input[0]);
    if (normalises(node.kind)) return round_up(2 * B, 8);
    return is_elementwise(node.kind) || node.kind == node_prelu ? 10 * B * ld(v) : 0;
  }

  Pair ends(int64_t v) const { return {saved + at[v], saved + at[v] + R * ld(v), ld(v)}; }
  double* more(int64_t v) const { return saved + at[v] + 2 * R * ld(v); }
  // Of a linear node: centres and widened radii of its input.
  Pair balls(int64_t v) const {
    const int64_t columns = ld(node_of(v).input[0]);
    return {more(v), more(v) + R * columns, columns};
  }
  // Of an activation: what its slope lies in, for each box.
  Pair slopes(int64_t v) const { return {more(v), more(v) + B * ld(v), ld(v)}; }
  // And how its ends (0, 1) and those of its slope (2, 3) follow the ends of its input.
  Pair rates(int64_t v, int64_t end) const {
    const int64_t size = B * ld(v);
    double* from = more(v) + 2 * size * (1 + end);
    return {from, from + size, ld(v)};
  }

  // Of a norm: its r over a box.
  Interval root(int64_t v, int64_t b) const { return {more(v)[2 * b], more(v)[2 * b + 1]}; }

  const T* parameter(const Node& node, int64_t nth = 0) const {
    return static_cast<const T*>(params[node.place[nth]]);
  }
  // One number for all columns, or one for each, from column j on. An infinite one says nothing: 0 times
  // it is not 0.
  Doubles parameter_from(const Node& node, int64_t j) const {
    const bool one = sizes[node.place[0]] == 1;
    const Doubles theta =
        one ? splat(double(*parameter(node))) : widened(parameter(node) + j, node.width - j);
    return is_infinite(theta) ? splat(not_a_number) : theta;
  }
  static Intervals mask(const Node& node) {
    const double p = node.numbers[0];
    return spread({0, (1 + 4 * epsilon) * (p == 1 ? 0 : 1 / (1 - p))});
  }
  // A product of n columns is rounded outwards by this share of the sizes of its terms: twice the γ_n of
  // Higham (2002), section 3.1.
  static double gamma(int64_t n) { return double(n + 8) * epsilon; }

  // f(i, j) for so many rows, and columns from j on in whole vectors.
  template <class F> MK_INLINE static void each(int64_t rows, int64_t H, const F& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < H; j += at_once) f(i, j);
    }
  }
  // One by one, where columns move.
  template <class F> MK_INLINE static void each_alone(int64_t rows, int64_t H, const F& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < H; ++j) f(i, j);
    }
  }
  // f(i, b, j) for the rows of the tangents, b the row of their values.
  template <class F> MK_INLINE void each_tangent(int64_t H, const F& f) const {
    for (int64_t i = B; i < R; ++i) {
      const int64_t b = i % B;
      for (int64_t j = 0; j < H; j += at_once) f(i, b, j);
    }
  }

  int64_t scratch_size() const { return 8 * B * widest; }
  int64_t products_size() const { return 4 * R * widest; }

  static Intervals below_zero(Intervals a) {
    return {min_zero<double>(a.low), min_zero<double>(a.high)};
  }
  static Norm norm_of(const Node& node) {
    return {node.width, node.kind == node_normalise, node.numbers[0]};
  }

  // The rest is in the files that are named.

  // bound_forward.h
  void forward(double* scratch) const;
  void value(int64_t v, double* scratch) const;
  void linear(int64_t v, Pair u, Pair to) const;
  void activation(int64_t v, Pair u, Pair to, double* scratch) const;
  void push_slopes(int64_t v, Pair u, Pair to) const;

  // bound_backward.h; `of` gives the cotangents of a value.
  void backward(const T* of_bound, double* cotangents, double* products, void* const* grads) const;
  void add_to(const Node& node, int64_t j, Doubles g, void* const* grads) const;
  template <class Of>
  void pull(int64_t v, const Of& of, double* products, void* const* grads) const;
  template <class Of> void pull_activation(int64_t v, const Of& of, double* products) const;
  template <class Of>
  void pull_linear(int64_t v, const Of& of, double* products, void* const* grads) const;

  // bound_norms.h
  void normalise(int64_t v, Pair u, Pair to, double* scratch) const;
  template <class Of> void pull_norm(int64_t v, const Of& of, double* products) const;

  // bound_lift.h
  double sign(int64_t o, int64_t c) const { return box.direction[o * box.k + c]; }
  double least(int64_t o, int64_t c, int64_t* box_of) const;
  void bound(T* to) const;
  T lift(int64_t o, int64_t c, T* rate) const;
};

}  // namespace
