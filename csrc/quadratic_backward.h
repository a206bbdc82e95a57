// The way back of one box: where P and s meet, the products p, and what of a slope is of the third order.
#pragma once

#include "quadratic_forward.h"

namespace {
namespace quadratic {

// P∘s as a form, but for what it is off; P has no terms where it is a constant.
void multiply(const Work& w, const Form& P, const Form& s, int64_t H, Form& to) {
  const int64_t m = w.m;
  const bool constant = P.terms == 0;
  to.terms = w.terms;
  for (int64_t j = 0; j < H; j += at_once) {
    const Doubles P_c = load(P.c() + j), s_c = load(s.c() + j);
    Doubles c = P_c * s_c;
    if (constant) {
      for (int64_t i = 0; i < s.terms; ++i) store(to.G(i) + j, P_c * load(s.G(i) + j));
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const Doubles P_i = load(P.G(i) + j), s_i = load(s.G(i) + j), half = 0.5 * P_i * s_i;
        c += half;
        store(to.G(i) + j, P_i * s_c + s_i * P_c);
        store(to.G(m + i) + j, load(P.G(m + i) + j) * s_c + load(s.G(m + i) + j) * P_c + half);
      }
      int64_t pair = 2 * m;
      for (int64_t i = 0; i < m; ++i) {
        const Doubles P_i = load(P.G(i) + j), s_i = load(s.G(i) + j);
        for (int64_t other = i + 1; other < m; ++other, ++pair) {
          const Doubles g = load(P.G(pair) + j) * s_c + load(s.G(pair) + j) * P_c +
                            P_i * load(s.G(other) + j) + s_i * load(P.G(other) + j);
          store(to.G(pair) + j, g);
        }
      }
    }
    store(to.c() + j, c);
  }
}

// Adds to M the products of what is linear in one form and quadratic in another, weighted by a row for
// each slope.
void add_cubic(const Work& w, const double* weight, int64_t stride, const Form& linear,
               const Form& quadratic, int64_t H, int64_t count) {
  const int64_t m = w.m, rows = round_up(count * m, at_once);
  for (int64_t nth = 0; nth < count; ++nth) {
    for (int64_t i = 0; i < m; ++i) {
      double* row = w.scaled + (nth * m + i) * w.wide;
      for (int64_t j = 0; j < H; j += at_once) {
        store(row + j, load(linear.G(i) + j) * load(weight + nth * stride + j));
      }
    }
  }
  clear(w.scaled + count * m * w.wide, (rows - count * m) * w.wide);
  Packing<double> packing = w.square;
  packing.w = w.scaled, packing.K = H, packing.N = rows;
  for (int64_t p = 0; p < packing.panels(); ++p) packing.panel(p);
  gemm<false, double>(w.terms - m, H, quadratic.G(m), quadratic.ld, packing.matrix(), 0,
                      Init<double>{w.M, w.ld_M}, w.M, w.ld_M, Nothing{});
}

// Adds up the errors of each slope over the neurons, and which columns are to blame for them.
void add_errors(const Work& w, const Form& a, int64_t H, int64_t count) {
  const int64_t m = w.m;
  for (int64_t j = 0; j < H; j += at_once) {
    store(w.left + j, 1.0 / (load(a.linear() + j) + least_size));
  }
  for (int64_t nth = 0; nth < count; ++nth) {
    const double* errors = w.errors + nth * w.wide;
    Doubles total = Doubles{};
    for (int64_t j = 0; j < H; j += at_once) total += load(errors + j);
    w.third[nth] += sum<double>(total);
    for (int64_t i = 0; i < m; ++i) {
      total = Doubles{};
      for (int64_t j = 0; j < H; j += at_once) {
        total += load(errors + j) * (size_of(load(a.G(i) + j)) * load(w.left + j));
      }
      w.blame[nth * m + i] += sum<double>(total);
    }
  }
}

// Where P and s = σ'(a) meet, and h = σ(a), on which the slopes depend if `further`: how much they change
// with a, and what is added to their errors. What is of the third order goes into M.
void meet(const Work& w, const Layer& here, const Form& P, bool further, int64_t H, int64_t count) {
  const int64_t m = w.m;
  const Form &a = here.a, &s = here.s;
  const Curved &f = here.first, &v = here.value;
  const bool constant = P.terms == 0;
  for (int64_t j = 0; j < H; j += at_once) {
    const Doubles c = load(P.c() + j), P_linear = load(P.linear() + j), P_bent = load(P.bent() + j);
    const Doubles s_linear = load(s.linear() + j), s_bent = load(s.bent() + j);
    // Twice what is linear in a, and twice what is quadratic with what a is off.
    const Doubles linear = 2.0 * load(a.linear() + j);
    const Doubles beyond = 2.0 * load(a.bent() + j) + load(a.e() + j);
    const Doubles slope = load(f.slope + j), bend = load(f.bend + j);
    const Doubles all = load(f.all + j), left = load(f.left + j);
    const Doubles quartic = P_bent * s_bent;
    const Doubles rest_of = P_linear * s_bent + P_bent * (s_linear + s_bent);
    Doubles whole =
        load(here.t.whole(count) + j) * (size_of(c) + P_linear + P_bent) * load(f.steep + j);
    if (further) whole += load(w.q_h.whole(count) + j) * load(v.steep + j);
    store(w.q_a.whole(count) + j, whole);
    for (int64_t nth = 0; nth < count; ++nth) {
      const double* t_row = here.t.at(nth) + j;
      const double* q_row = w.q_h.at(nth) + j;
      double* to = w.q_a.at(nth) + j;
      const Doubles t = load(t_row), t_rest = load(here.t.rest_of(nth) + j), by = t * c;
      const Doubles bent = 2.0 * bend * by;
      Doubles bends = bent, varies = t_rest, by_linear = Doubles{}, q_linear = Doubles{};
      Doubles slope_v = Doubles{}, bent_v = Doubles{}, q_at = Doubles{};
      if (further) {
        q_at = load(q_row), slope_v = load(v.slope + j), bent_v = 2.0 * load(v.bend + j) * q_at;
        bends += bent_v;
      }
      store(to, by * slope + q_at * slope_v);
      for (int64_t i = 0; i < m; ++i) {
        t_row += here.t.ld, q_row += w.q_h.ld, to += w.q_a.ld;
        const Doubles g = load(t_row), by_i = constant ? g * c : t * load(P.G(i) + j) + g * c;
        varies += size_of(g), by_linear += size_of(by_i);
        Doubles sum = by_i * slope + bends * load(a.G(i) + j);
        if (further) {
          const Doubles q_i = load(q_row);
          q_linear += size_of(q_i), sum += q_i * slope_v;
        }
        store(to, sum);
      }
      const Doubles by_rest =
          size_of(t) * P_bent + varies * (P_linear + P_bent) + t_rest * size_of(c);
      const Doubles by_varies = by_linear + by_rest;
      Doubles error =
          size_of(t) * quartic + varies * rest_of + size_of(by) * left + by_varies * all;
      Doubles rest = by_rest * size_of(slope) +
                     size_of(bend) * (linear * by_varies + beyond * (size_of(by) + by_varies));
      if (further) {
        const Doubles q_rest = load(w.q_h.rest_of(nth) + j), q_varies = q_linear + q_rest;
        error += size_of(q_at) * load(v.left + j) + q_varies * load(v.all + j);
        rest +=
            q_rest * size_of(slope_v) +
            size_of(load(v.bend + j)) * (linear * q_varies + beyond * (size_of(q_at) + q_varies));
      }
      store(w.q_a.rest_of(nth) + j, rest);
      store(w.errors + nth * w.wide + j, error), store(w.weight + nth * w.wide + j, bends);
    }
  }
  if (a.terms > m) add_cubic(w, w.weight, w.wide, a, a, H, count);
  if (!constant) {
    const int64_t stride = (1 + m) * here.t.ld;
    add_cubic(w, here.t.rows, stride, s, P, H, count);
    add_cubic(w, here.t.rows, stride, P, s, H, count);
  }
  add_errors(w, a, H, count);
}

}  // namespace quadratic
}  // namespace
