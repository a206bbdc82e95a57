// Quadratic forms of a chain's layers over one box, and what they are measured by: the data of
// monokernel/quadratic.py, in its letters and those of docs/sure.md.
//
// ε_i are the m columns in which the box has an extent; j is a neuron of a layer's H, l a layer, k a
// slope, of which some are asked for: `nth` counts those. Of layer l are a = W h + b, s = σ'(a), h =
// σ(a), P and p = P∘s as in docs/mathematics.md, and how much the slopes change with them: t with p,
// which is the tangent of a, q_h and q_a with h and a, the chain of the curvature alone.
#pragma once

#include "blocks.h"
#include "intervals.h"

namespace {
namespace quadratic {

// U and TINY of monokernel/enclosures.py.
constexpr double roundoff = 0x1p-53, least_size = 1e-300;

MK_INLINE double gamma(int64_t n) { return double(n) * roundoff / (1 - double(n) * roundoff); }
// How many terms a form has.
MK_INLINE int64_t terms_of(int64_t m) { return 2 * m + m * (m - 1) / 2; }
// What n products and all that goes before and after them may be rounded by.
MK_INLINE double rounding_of(const Chain& chain, int64_t n, int64_t m) {
  return 4 * gamma(n + m * m + 32 + chain.folded);
}
MK_INLINE Doubles lesser(Doubles a, Doubles b) { return a < b ? a : b; }
MK_INLINE Doubles greater(Doubles a, Doubles b) { return a > b ? a : b; }
// What is not finite becomes 0.
MK_INLINE Doubles finite(Doubles a) { return size_of(a) < infinity ? a : Doubles{}; }

// c + Σ g_i ε_i + Σ h_i T(ε_i) + Σ h_ij ε_i ε_j ± e of each neuron, T(ε) = 2ε² - 1, in rows of one
// stride: how large what is linear in the box can be and what is quadratic, e, c, and the coefficients
// G of the terms in this order.
struct Form {
  double* base;
  int64_t ld, terms;

  static constexpr int64_t before = 4;  // rows before the terms
  double* linear() const { return base; }
  double* bent() const { return base + ld; }
  double* e() const { return base + 2 * ld; }
  double* c() const { return base + 3 * ld; }
  double* G(int64_t term) const { return base + (before + term) * ld; }
};

// f = σ or σ' of an a, rows over the neurons: Curved of quadratic.py, but for the form.
struct Curved {
  double *at, *slope, *bend, *all, *left, *steep, *whole;
};

// How much the slopes change with a row of neurons, rows over these: Weights of quadratic.py. For each
// slope that is asked for 1 + m rows, what it is in the middle and what is linear in the box; then a row
// for each with the size of all else, and one with how large those of any are in any case.
struct Rates {
  double *rows, *rest;
  int64_t ld, m;

  double* at(int64_t nth) const { return rows + nth * (1 + m) * ld; }
  double* rest_of(int64_t nth) const { return rest + nth * ld; }
  double* whole(int64_t count) const { return rest + count * ld; }
};

// A layer of one box.
struct Layer {
  Form a, s;
  Curved first, value;  // along σ' and σ
  Rates t;
};

}  // namespace quadratic
}  // namespace
