// LayerNorm and RMSNorm over intervals.
#pragma once

#include "blocks.h"
#include "intervals.h"

namespace {

// x̂ = r·c(u), c(u) the centred u or u itself, r = 1/sqrt(mean c(u)² + ε), of one row of H columns.
// |x̂| is at most sqrt(H), and the mean of x̂∘b at most the norm of b over sqrt(H), whatever u is: both
// are taken where they are better than what the intervals say.
struct Norm {
  int64_t H;
  bool centres;
  double more;  // ε

  double most() const { return __builtin_sqrt(double(H)) * (1 + 1e-6); }

  // c of a row: centres and radii, and what an infinite end does to all the others.
  void centre(const double* low, const double* high, double* to_low, double* to_high) const {
    if (!centres) {
      copy(to_low, low, H), copy(to_high, high, H);
      return;
    }
    double of[5];  // Σ of centres, radii, sizes, and how many fall or rise without end
    add_up(H, of, [&](int64_t j, Doubles* each) {
      const Intervals u = row(low, high, j), a = finite_part(u);
      each[0] = 0.5 * a.low + 0.5 * a.high, each[1] = 0.5 * a.high - 0.5 * a.low;
      each[2] = size_of(a.low) + size_of(a.high);
      each[3] = where(u.low == -infinity, splat(1.0)),
      each[4] = where(u.high == infinity, splat(1.0));
    });
    const double n = double(H), middle = of[0] / n, radius = of[1] / n;
    const double rounding = double(H + 16) * epsilon * of[2] / n + 8 * epsilon * size_of(middle);
    const Doubles down = splat(of[3]), up = splat(of[4]);
    const Mask alone = splat(n) == 1.0;
    for (int64_t j = 0; j < H; j += at_once) {
      const Intervals u = row(low, high, j), a = finite_part(u);
      const Doubles c = (0.5 * a.low + 0.5 * a.high) - middle;
      const Doubles own = 0.5 * a.high - 0.5 * a.low, r = own * (1 - 2 / n) + radius;
      const Doubles wide = r + (rounding + 8 * epsilon * (size_of(c) + own) + tiny);
      const Mask falls = u.low == -infinity, rises = u.high == infinity;
      const Mask others_rise = up > where(rises, splat(1.0));
      const Mask others_fall = down > where(falls, splat(1.0));
      store(to_low + j, ~alone & (falls | others_rise) ? splat(-infinity) : c - wide);
      store(to_high + j, ~alone & (rises | others_fall) ? splat(infinity) : c + wide);
    }
  }
  // The adjoint of the row, in place; symmetric as c is. What stood in the place of an infinite end was
  // the other one.
  void pull_centre(const double* low, const double* high, double* to_low, double* to_high) const {
    if (!centres) return;
    double of[2];
    add_up(H, of, [&](int64_t j, Doubles* each) {
      const Intervals to = row(to_low, to_high, j);
      each[0] = to.low + to.high, each[1] = to.high - to.low;
    });
    const double n = double(H), middle = of[0] / n, radius = of[1] / n;
    for (int64_t j = 0; j < H; j += at_once) {
      const Intervals to = row(to_low, to_high, j);
      const Doubles c = (to.low + to.high) - middle;
      const Doubles r = (to.high - to.low) * (1 - 2 / n) + radius;
      const Intervals all = pulled_finite({0.5 * (c - r), 0.5 * (c + r)}, row(low, high, j));
      store(to_low + j, all.low), store(to_high + j, all.high);
    }
  }

  // r of a row of c.
  Interval inverse_root(const double* low, const double* high) const {
    double of[2];  // Σ of the least and the greatest squares
    add_up(H, of, [&](int64_t j, Doubles* each) {
      const Intervals u = row(low, high, j);
      const Doubles a = u.low * u.low, b = u.high * u.high;
      const Mask ordered = u.low <= u.high;
      const Doubles least = where((u.low > 0.0) | (u.high < 0.0), a < b ? a : b);
      each[0] = ordered ? least : splat(not_a_number);
      each[1] = ordered ? (a > b ? a : b) : splat(not_a_number);
    });
    const Interval mean = outward(of[0] / double(H), of[1] / double(H), double(H + 16));
    const Interval sum = outward((mean.low < 0 ? 0 : mean.low) + more, mean.high + more, 4);
    return outward(1 / __builtin_sqrt(sum.high), 1 / __builtin_sqrt(sum.low < 0 ? 0 : sum.low), 16);
  }
  // Adds to the adjoints of c what those of r make of them. What is infinite has no gradient.
  void pull_inverse_root(Interval g, Interval r, const double* low, const double* high,
                         double* to_low, double* to_high) const {
    const double by_greatest = is_infinite(r.low) ? 0 : -g.low * r.low * r.low * r.low / double(H);
    const double by_least =
        is_infinite(r.high) ? 0 : -g.high * r.high * r.high * r.high / double(H);
    for (int64_t j = 0; j < H; j += at_once) {
      const Intervals u = row(low, high, j);
      const Mask negative = u.low * u.low > u.high * u.high;  // the low end is the larger one
      const Doubles larger = negative ? u.low : u.high, smaller = negative ? u.high : u.low;
      const Mask across = (u.low <= 0.0) & (u.high >= 0.0);
      const Doubles by_larger = where(~is_infinite(larger), by_greatest * larger);
      const Doubles by_smaller = where(~(across | is_infinite(smaller)), by_least * smaller);
      store(to_low + j, load(to_low + j) + (negative ? by_larger : by_smaller));
      store(to_high + j, load(to_high + j) + (negative ? by_smaller : by_larger));
    }
  }

  // The norm of b over sqrt(H), b a row of intervals.
  double norm(const double* low, const double* high) const {
    double square[1];
    add_up(H, square, [&](int64_t j, Doubles* each) {
      const Doubles a = size_of(load(low + j)), b = size_of(load(high + j));
      const Doubles size = (a > b) | is_nan(a) ? a : b;
      each[0] = size * size;
    });
    return __builtin_sqrt(square[0] + double(H) * tiny) *
           (scale() * (1 + double(H + 32) * epsilon));
  }
  double scale() const { return 1 / __builtin_sqrt(double(H)); }
  // What the mean of x̂∘b lies in by its terms, and by that and the norm.
  Interval terms(const double* low, const double* high, Pair v, int64_t i) const {
    double of[3];
    add_up(H, of, [&](int64_t j, Doubles* each) {
      const Intervals a = Corners(v.from(i, j), row(low, high, j)).interval();
      each[0] = a.low, each[1] = a.high, each[2] = size_of(a.low) + size_of(a.high);
    });
    const double rounding = double(H + 8) * epsilon * of[2] + tiny;
    return outward((of[0] - rounding) / double(H), (of[1] + rounding) / double(H));
  }
  static Interval within(Interval a, double most) {
    return {a.low < -most ? -most : a.low, a.high > most ? most : a.high};
  }
  static Intervals within(Intervals a, double most) {
    return {a.low < -most ? splat(-most) : a.low, a.high > most ? splat(most) : a.high};
  }

 private:
  static Intervals row(const double* low, const double* high, int64_t j) {
    return {load(low + j), load(high + j)};
  }
};

}  // namespace
