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
    double middle = 0, radius = 0, size = 0;
    int64_t down = 0, up = 0;
    for (int64_t j = 0; j < H; ++j) {
      down += low[j] == -infinity, up += high[j] == infinity;
      const Interval a = finite_part({low[j], high[j]});
      middle += 0.5 * a.low + 0.5 * a.high, radius += 0.5 * a.high - 0.5 * a.low;
      size += size_of(a.low) + size_of(a.high);
    }
    middle /= double(H), radius /= double(H);
    const double rounding = double(H + 16) * epsilon * size / double(H);
    for (int64_t j = 0; j < H; ++j) {
      const Interval a = finite_part({low[j], high[j]});
      const double c = (0.5 * a.low + 0.5 * a.high) - middle;
      const double own = 0.5 * a.high - 0.5 * a.low, r = own * (1 - 2 / double(H)) + radius;
      const double wide = r + (rounding + 8 * epsilon * (size_of(c) + size_of(middle) + own) + tiny);
      const bool alone = H == 1, falls = low[j] == -infinity, rises = high[j] == infinity;
      to_low[j] = !alone && (falls || up > rises) ? -infinity : c - wide;
      to_high[j] = !alone && (rises || down > falls) ? infinity : c + wide;
    }
  }
  // The adjoint of the row, in place; symmetric as c is. What stood in the place of an infinite end was
  // the other one.
  void pull_centre(const double* low, const double* high, double* to_low, double* to_high) const {
    if (!centres) return;
    double middle = 0, radius = 0;
    for (int64_t j = 0; j < H; ++j) {
      middle += to_low[j] + to_high[j], radius += to_high[j] - to_low[j];
    }
    middle /= double(H), radius /= double(H);
    for (int64_t j = 0; j < H; ++j) {
      const double c = (to_low[j] + to_high[j]) - middle;
      const double r = (to_high[j] - to_low[j]) * (1 - 2 / double(H)) + radius;
      const Interval to = pulled_finite({0.5 * (c - r), 0.5 * (c + r)}, {low[j], high[j]});
      to_low[j] = to.low, to_high[j] = to.high;
    }
  }

  // r of a row of c.
  Interval inverse_root(const double* low, const double* high) const {
    double least = 0, greatest = 0;
    for (int64_t j = 0; j < H; ++j) {
      const double a = low[j] * low[j], b = high[j] * high[j];
      least += low[j] <= 0 && high[j] >= 0 ? 0 : a < b ? a : b;
      greatest += a > b ? a : b;
      if (!(low[j] <= high[j])) least = greatest = not_a_number;
    }
    const double units = double(H + 16);
    const Interval mean = outward(least / double(H), greatest / double(H), units);
    const Interval sum = outward((mean.low < 0 ? 0 : mean.low) + more, mean.high + more, 4);
    return outward(1 / __builtin_sqrt(sum.high),
                   1 / __builtin_sqrt(sum.low < 0 ? 0 : sum.low), 16);
  }
  // Adds to the adjoints of c what those of r make of them. What is infinite has no gradient.
  void pull_inverse_root(Interval g, Interval r, const double* low, const double* high,
                         double* to_low, double* to_high) const {
    const double by_greatest = is_infinite(r.low) ? 0 : -g.low * r.low * r.low * r.low / double(H);
    const double by_least = is_infinite(r.high) ? 0 : -g.high * r.high * r.high * r.high / double(H);
    for (int64_t j = 0; j < H; ++j) {
      const bool negative = low[j] * low[j] > high[j] * high[j];  // the low end is the larger one
      const double larger = negative ? low[j] : high[j], smaller = negative ? high[j] : low[j];
      if (!is_infinite(larger)) (negative ? to_low[j] : to_high[j]) += by_greatest * larger;
      if ((low[j] <= 0 && high[j] >= 0) || is_infinite(smaller)) continue;
      (negative ? to_high[j] : to_low[j]) += by_least * smaller;
    }
  }

  // The norm of b over sqrt(H), b a row of intervals.
  double norm(const double* low, const double* high) const {
    double square = double(H) * tiny;
    for (int64_t j = 0; j < H; ++j) {
      const double size = larger(low[j], high[j]);
      square += size * size;
    }
    return __builtin_sqrt(square) * (scale() * (1 + double(H + 32) * epsilon));
  }
  double scale() const { return 1 / __builtin_sqrt(double(H)); }
  static double larger(double low, double high) {
    const double a = size_of(low), b = size_of(high);
    return a > b || is_nan(a) ? a : b;
  }
  // What the mean of x̂∘b lies in by its terms, and by that and the norm.
  Interval terms(const double* low, const double* high, Pair v, int64_t row) const {
    double least = 0, greatest = 0, size = 0;
    for (int64_t j = 0; j < H; ++j) {
      const Interval each = Corners(v.at(row, j), {low[j], high[j]}).interval();
      least += each.low, greatest += each.high, size += size_of(each.low) + size_of(each.high);
    }
    const double rounding = double(H + 8) * epsilon * size + tiny;
    return outward((least - rounding) / double(H), (greatest + rounding) / double(H));
  }
  static Interval within(Interval a, double most) {
    return {a.low < -most ? -most : a.low, a.high > most ? most : a.high};
  }
};

}  // namespace
