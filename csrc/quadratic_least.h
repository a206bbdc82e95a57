// The least value of a quadratic form.
#pragma once

#include "quadratic_forms.h"

namespace {
namespace quadratic {

constexpr int64_t rounds = 3;  // SETTLED of quadratic.py

// The least value of g ε + h T(ε).
MK_INLINE Doubles least(Doubles g, Doubles h) {
  const Doubles steep = size_of(g);
  const auto inside = steep < 4.0 * h;
  return inside ? -(steep * steep) / (8.0 * (inside ? h : splat(1.0))) - h : h - steep;
}

// Σ_i (g_i ε_i + h_i T(ε_i)) + ½ Σ_ij h_ij ε_i ε_j and where it is lowest: _least_of in quadratic.py.
// Rows have m numbers, padded with zeros to whole vectors; `pairs`, the h_ij, and their sizes have m rows.
struct Symmetric {
  int64_t m, ld;
  double *g, *h, *pairs, *sizes;
  double *open,
      *corner;  // 1 for a column that is not known to rise or fall, and the end of one that is
  double *slope, *first;

  static MK_INLINE void times(int64_t m, int64_t ld, const double* pairs, const double* v,
                              double* to) {
    for (int64_t j = 0; j < ld; j += at_once) {
      Doubles total = Doubles{};
      for (int64_t i = 0; i < m; ++i) total += v[i] * load(pairs + i * ld + j);
      store(to + j, total);
    }
  }
  void negate() const {
    for (int64_t j = 0; j < ld; j += at_once)
      store(g + j, -load(g + j)), store(h + j, -load(h + j));
    for (int64_t j = 0; j < m * ld; j += at_once) store(pairs + j, -load(pairs + j));
  }
  double lowest() const {
    for (int64_t j = 0; j < ld; ++j) open[j] = j < m, corner[j] = 0;
    for (int64_t i = 0; i < rounds; ++i) {
      times(m, ld, pairs, corner, slope);
      times(m, ld, sizes, open, first);  // which is free until the end of the first round
      for (int64_t j = 0; j < ld; j += at_once) {
        const Doubles rate = load(g + j) + load(slope + j), free = load(open + j);
        const Doubles moves = 4.0 * size_of(load(h + j)) + load(first + j);
        const auto settles = (size_of(rate) >= moves) & (free > 0.0);
        const Doubles end = rate > 0.0 ? splat(-1.0) : (rate < 0.0 ? splat(1.0) : Doubles{});
        store(corner + j, settles ? end : load(corner + j));
        store(open + j, settles ? Doubles{} : free);
      }
    }
    times(m, ld, pairs, corner, slope);
    times(m, ld, sizes, open, first);
    Doubles ends = Doubles{}, settled = Doubles{}, others = Doubles{}, total = Doubles{};
    for (int64_t j = 0; j < ld; j += at_once) {
      const Doubles g_j = load(g + j), h_j = load(h + j), tied = load(slope + j);
      const Doubles free = load(open + j);
      ends += free > 0.0 ? least(g_j + tied, h_j) : g_j * load(corner + j) + h_j;
      settled += load(corner + j) * tied;
      others += free * load(first + j);
      total += size_of(g_j) + size_of(h_j);
    }
    for (int64_t j = 0; j < m * ld; j += at_once) total += load(sizes + j);
    return sum<double>(ends) + 0.5 * sum<double>(settled) - 0.5 * sum<double>(others) -
           double(4 * (m * m + 16)) * roundoff * sum<double>(total);
  }
  // Sets `first` to 1 for each column that is not known to rise or to fall as the form stands.
  void unsettled() const {
    for (int64_t j = 0; j < ld; ++j) open[j] = j < m;
    times(m, ld, sizes, open, slope);
    for (int64_t j = 0; j < ld; j += at_once) {
      const Doubles moves = 4.0 * size_of(load(h + j)) + load(slope + j);
      const auto settles = size_of(load(g + j)) >= moves;
      store(first + j, settles ? Doubles{} : load(open + j));
    }
  }
};

}  // namespace quadratic
}  // namespace
