// Arithmetic of intervals in double, with its adjoints: what an end is in exact arithmetic, rounded
// outwards. The rules are those of monokernel/intervals.py and monokernel/ranges.py.
//
// What is added or multiplied once is rounded by 2 ε of its size, σ and σ' by the terms that come with
// their curves. What overflows becomes infinite or NaN, which bounds nothing.
#pragma once

#include "plan.h"
#include "simd.h"

namespace {

// What underflows may lose is far below `tiny`, of which the products with weights are still normal numbers: a
// processor takes a hundred times as long for those that are not.
constexpr double epsilon = 0x1p-52, tiny = 0x1p-400;
constexpr double infinity = __builtin_inf(), not_a_number = __builtin_nan("");
constexpr double largest = 1.7976931348623157e308;
// An end beyond it counts as infinite, so that no square or cube of it overflows in an activation.
constexpr double far = 1e60;

MK_INLINE double size_of(double a) { return __builtin_fabs(a); }
MK_INLINE bool is_infinite(double a) { return size_of(a) == infinity; }
MK_INLINE bool is_nan(double a) { return a != a; }
MK_INLINE double sign_of(double a) { return a > 0 ? 1 : a < 0 ? -1 : 0; }

struct Interval {
  double low, high;
};

// An infinite end is replaced by the other one, or 0.
MK_INLINE Interval finite_part(Interval a) {
  return {!is_infinite(a.low) ? a.low : is_infinite(a.high) ? 0 : a.high,
          !is_infinite(a.high) ? a.high : is_infinite(a.low) ? 0 : a.low};
}
// The adjoint of it.
MK_INLINE Interval pulled_finite(Interval g, Interval a) {
  if (!is_infinite(a.low) && !is_infinite(a.high)) return g;
  const double both = g.low + g.high;
  return {is_infinite(a.low) ? 0 : both, is_infinite(a.high) ? 0 : both};
}

MK_INLINE Interval outward(double low, double high, double units = 2) {
  return {low - (units * epsilon * size_of(low) + tiny),
          high + (units * epsilon * size_of(high) + tiny)};
}

// c·a, and the adjoint of it.
MK_INLINE Interval scaled(Interval a, double c) {
  if (c == 1) return a;
  return c > 0 ? outward(c * a.low, c * a.high) : outward(c * a.high, c * a.low);
}
MK_INLINE Interval pulled(Interval g, double c) {
  return c > 0 ? Interval{c * g.low, c * g.high} : Interval{c * g.high, c * g.low};
}

// Where 0 is multiplied by what is as large as you like, it stays 0.
MK_INLINE double product(double x, double y) {
  const double p = x * y;
  return is_nan(p) && !is_nan(x) && !is_nan(y) ? 0 : p;
}

// The products of all in a with all in b, and at which ends they are least and greatest.
struct Corners {
  double least, greatest;
  int at_least, at_greatest;  // bit 1: the high end of a; bit 0: the high end of b

  Corners(Interval a, Interval b) : at_least(0), at_greatest(0) {
    const double each[] = {product(a.low, b.low), product(a.low, b.high), product(a.high, b.low),
                           product(a.high, b.high)};
    least = greatest = each[0];
    for (int i = 1; i < 4; ++i) {
      if (each[i] < least || is_nan(each[i])) least = each[i], at_least = i;
      if (each[i] > greatest || is_nan(each[i])) greatest = each[i], at_greatest = i;
    }
  }
  Interval interval() const { return outward(least, greatest); }

  // Adds what g makes of a's and b's ends. What is infinite has no gradient.
  void pull(Interval g, Interval a, Interval b, Interval* to_a, Interval* to_b) const {
    one(least, at_least, g.low, a, b, to_a, to_b);
    one(greatest, at_greatest, g.high, a, b, to_a, to_b);
  }

 private:
  static void one(double value, int at, double g, Interval a, Interval b, Interval* to_a,
                  Interval* to_b) {
    const double x = at & 2 ? a.high : a.low, y = at & 1 ? b.high : b.low;
    if (is_infinite(value) || is_infinite(x) || is_infinite(y)) return;
    (at & 2 ? to_a->high : to_a->low) += g * y;
    (at & 1 ? to_b->high : to_b->low) += g * x;
  }
};

// Slopes in s times a tangent in t by centre and radius: up to a tenth wider than the products' own
// range, but without a branch.
MK_INLINE Interval sloped(Interval s, Interval t) {
  const double middle = 0.5 * s.low + 0.5 * s.high, radius = 0.5 * s.high - 0.5 * s.low;
  const double c = 0.5 * t.low + 0.5 * t.high, r = 0.5 * t.high - 0.5 * t.low;
  const double centre = middle * c;
  double spread = size_of(c) * radius + r * (size_of(middle) + radius);
  spread += 8 * epsilon * (size_of(centre) + spread) + tiny;
  return {centre - spread, centre + spread};
}
MK_INLINE void pull_sloped(Interval g, Interval s, Interval t, Interval* to_s, Interval* to_t) {
  const double middle = 0.5 * s.low + 0.5 * s.high, radius = 0.5 * s.high - 0.5 * s.low;
  const double c = 0.5 * t.low + 0.5 * t.high, r = 0.5 * t.high - 0.5 * t.low;
  const double centre = g.low + g.high, spread = g.high - g.low;
  const double to_middle = centre * c + spread * r * sign_of(middle);
  const double to_radius = spread * (size_of(c) + r);
  const double to_c = centre * middle + spread * radius * sign_of(c);
  const double to_r = spread * (size_of(middle) + radius);
  to_s->low += 0.5 * (to_middle - to_radius), to_s->high += 0.5 * (to_middle + to_radius);
  to_t->low += 0.5 * (to_c - to_r), to_t->high += 0.5 * (to_c + to_r);
}

// Two matrices of so many rows side by side: ends, or centres and radii.
struct Pair {
  double *a, *b;
  int64_t ld;

  MK_INLINE Interval at(int64_t i, int64_t j) const { return {a[i * ld + j], b[i * ld + j]}; }
  MK_INLINE void put(int64_t i, int64_t j, Interval v) const {
    a[i * ld + j] = v.low, b[i * ld + j] = v.high;
  }
  MK_INLINE void add(int64_t i, int64_t j, Interval v) const {
    a[i * ld + j] += v.low, b[i * ld + j] += v.high;
  }
};

// --- one curve --------------------------------------------------------------------------------------

// The range of σ or σ' over an interval, and the rate of each of its ends by each end of that.
struct Range {
  Interval of;
  double low_by_low, low_by_high, high_by_low, high_by_high;
};

MK_INLINE bool has_inside(const Curve& curve, double place, Interval u) {
  if (!curve.period) {
    const double near = 4 * epsilon * size_of(place);
    return u.low <= place + near && u.high >= place - near;
  }
  const double first = (u.low - place) / curve.period, last = (u.high - place) / curve.period;
  const double rounded = 4 * epsilon * (1 + max_of(size_of(first), size_of(last)));
  // NaN where an end is infinite: then there is one inside.
  return !(__builtin_ceil(first - rounded) > __builtin_floor(last + rounded));
}

MK_INLINE double error_of(const Curve& curve, double value) {
  if (!curve.relative) return 0;
  return epsilon * curve.relative * min_of(size_of(value), largest / curve.relative) + curve.absolute;
}

// `at` and `rate`: the curve and its derivative at both ends of u. Equal ends share the gradient.
MK_INLINE Range range_of(const Curve& curve, Interval u, Interval at, Interval rate) {
  Range r{{at.low, at.low}, rate.low, 0, rate.low, 0};
  if (at.high == at.low) {
    r.low_by_low = r.high_by_low = 0.5 * rate.low;
    r.low_by_high = r.high_by_high = 0.5 * rate.high;
  }
  if (at.high < r.of.low || is_nan(at.high)) {
    r.of.low = at.high, r.low_by_low = 0, r.low_by_high = rate.high;
  }
  if (at.high > r.of.high || is_nan(at.high)) {
    r.of.high = at.high, r.high_by_low = 0, r.high_by_high = rate.high;
  }
  for (int64_t i = 0; i < curve.turns; ++i) {
    const double *turn = curve.turn + 3 * i, low = turn[1], high = turn[2];
    if (!(low < r.of.low || high > r.of.high) || !has_inside(curve, turn[0], u)) continue;
    if (low < r.of.low) r.of.low = low, r.low_by_low = r.low_by_high = 0;
    if (high > r.of.high) r.of.high = high, r.high_by_low = r.high_by_high = 0;
  }
  // Past the largest number a lower bound is that number.
  r.of.low -= error_of(curve, r.of.low), r.of.high += error_of(curve, r.of.high);
  if (r.of.low > largest) r.of.low = largest;
  if (r.of.high < -largest) r.of.high = -largest;
  return r;
}

}  // namespace
