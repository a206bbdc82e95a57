// What is known of a slope by its form.
#pragma once

#include "quadratic_memory.h"

namespace {
namespace quadratic {

// Takes what is cubic into the form of a slope: what of it is linear, and returns the size of the rest.
// ε T(ε) and ε_i ε_i ε_j are half an ε and half something within 1, and the three ways to come by ε_i
// ε_j ε_n are one number.
double reduce(const Work& w, int64_t nth, int64_t k, Form& form) {
  const int64_t m = w.m, ld = w.ld_M;
  const double* M = w.M + nth * m;  // of ε_i and a quadratic term
  double* blame = w.blame + nth * m;
  const auto pair = [&](int64_t i, int64_t j) { return m + i * (2 * m - i - 1) / 2 + j - i - 1; };
  double total = 0;
  const auto is_left = [&](double cubic) {
    cubic = size_of(cubic), total += cubic;
    return cubic;
  };
  for (int64_t i = 0; i < m; ++i) {
    const double half = 0.5 * M[i * ld + i];
    form.G(i)[k] += half, blame[i] += 3 * is_left(half);
    for (int64_t j = i + 1; j < m; ++j) {
      const double* const both = M + pair(i, j) * ld;
      const double to_i = 0.5 * both[j], to_j = 0.5 * both[i];
      form.G(i)[k] += to_i, form.G(j)[k] += to_j;
      const double one = is_left(M[j * ld + i] + to_i), other = is_left(M[i * ld + j] + to_j);
      blame[i] += one + 2 * other, blame[j] += 2 * one + other;
      for (int64_t n = j + 1; n < m; ++n) {
        const double all = is_left(both[n] + M[pair(i, n) * ld + j] + M[pair(j, n) * ld + i]);
        blame[i] += all, blame[j] += all, blame[n] += all;
      }
    }
  }
  return total;
}

// Takes over the g, h and h_ij of slope k; false where any g or h is not finite.
bool take(const Work& w, const Form& form, int64_t k, double* pairs) {
  const int64_t m = w.m;
  const Symmetric& of = w.symmetric;
  bool finite = true;
  for (int64_t i = 0; i < m * of.ld; ++i) of.pairs[i] = 0;
  for (int64_t i = 0; i < of.ld; ++i) of.g[i] = of.h[i] = 0;
  int64_t pair = 2 * m;
  for (int64_t i = 0; i < m; ++i) {
    of.g[i] = form.G(i)[k], of.h[i] = form.G(m + i)[k];
    finite &= size_of(of.g[i]) < infinity && size_of(of.h[i]) < infinity;
    for (int64_t j = i + 1; j < m; ++j, ++pair) {
      of.pairs[i * of.ld + j] = of.pairs[j * of.ld + i] = form.G(pair)[k];
      *pairs += size_of(form.G(pair)[k]);
    }
  }
  for (int64_t i = 0; i < m * of.ld; ++i) of.sizes[i] = size_of(of.pairs[i]);
  return finite;
}

// What is known of slope k, the nth that is asked for, from its form, what that is off and the blame of
// the columns: `found` for a box.
void conclude(const Work& w, Form& form, int64_t box, int64_t nth, double error) {
  const int64_t m = w.m, K = w.K, d = w.chain.layer[0].in, k = w.wanted[nth];
  const SlopesFound& to = w.call.found;
  const Symmetric& of = w.symmetric;
  const double c = form.c()[k], *blame = w.blame + nth * m;
  double third = reduce(w, nth, k, form) + error * (1 + 1e-9) + least_size, pairs = 0;
  third *= 1 + double(4 * (w.terms + 2) * (m + 2)) * roundoff;
  bool known = take(w, form, k, &pairs);
  error = (pairs + third) * (1 + double(2 * (w.terms - 2 * m + 2)) * roundoff);
  known &= size_of(c) < infinity && error < infinity;
  const int64_t at = box * K + k;
  to.centre[at] = known ? c : 0, to.error[at] = known ? error : infinity;
  to.lower[at] = -infinity, to.upper[at] = infinity;
  of.unsettled();
  for (int64_t i = 0; i < m; ++i) {
    double all = 0, tied = 0;
    for (int64_t j = 0; j < m; ++j) {
      all += of.sizes[i * of.ld + j], tied += of.sizes[i * of.ld + j] * of.first[j];
    }
    const int64_t place = (box * d + w.call.moving[i]) * K + k;
    const double rise = size_of(of.g[i]) - 4 * size_of(of.h[i]) - all;
    const double share = blame[i] + of.first[i] * (2 * size_of(of.h[i]) + 0.5 * tied);
    to.slant[place] = known ? of.g[i] : 0, to.bend[place] = known ? of.h[i] : 0;
    to.rise[place] = known && rise > 0 ? rise : 0;
    to.blame[place] = share < infinity ? share : 1;
  }
  if (!known) return;
  const double low = of.lowest();
  of.negate();
  const double high = of.lowest();
  to.lower[at] = c + low - third - 4 * roundoff * (size_of(c) - low + third);
  to.upper[at] = c - high + third + 4 * roundoff * (size_of(c) - high + third);
}

}  // namespace quadratic
}  // namespace
