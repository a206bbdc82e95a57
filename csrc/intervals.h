// Arithmetic of intervals in double, with its adjoints: what an end is in exact arithmetic, rounded
// outwards. The rules are those of monokernel/intervals.py and monokernel/ranges.py.
//
// What is added or multiplied once is rounded by 2 ε of its size, σ and σ' by the terms that come with
// their curves. What overflows becomes infinite or NaN, which bounds nothing.
#pragma once

#include "problem.h"
#include "vmath.h"

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

// As many at a time as a vector has; a Mask is all ones where something holds.
typedef Vec<double> Doubles;
typedef IVec<double> Mask;
constexpr int64_t at_once = Simd<double>::lanes;

MK_INLINE Doubles size_of(Doubles a) { return abs_of<double>(a); }
MK_INLINE Mask is_infinite(Doubles a) { return size_of(a) == infinity; }
MK_INLINE Mask is_nan(Doubles a) { return a != a; }
MK_INLINE Doubles sign_of(Doubles a) {
  return a > 0.0 ? splat(1.0) : a < 0.0 ? splat(-1.0) : Doubles{};
}
MK_INLINE Doubles where(Mask holds, Doubles a) { return holds ? a : Doubles{}; }

template <class V> struct Ends {
  V low, high;
};
typedef Ends<double> Interval;
typedef Ends<Doubles> Intervals;

MK_INLINE Intervals spread(Interval a) { return {splat(a.low), splat(a.high)}; }

// An infinite end is replaced by the other one, or 0.
MK_INLINE Intervals finite_part(Intervals a) {
  const Mask low = is_infinite(a.low), high = is_infinite(a.high);
  return {low ? where(~high, a.high) : a.low, high ? where(~low, a.low) : a.high};
}
// The adjoint of it.
MK_INLINE Intervals pulled_finite(Intervals g, Intervals a) {
  const Mask low = is_infinite(a.low), high = is_infinite(a.high);
  return {where(~low, high ? g.low + g.high : g.low), where(~high, low ? g.low + g.high : g.high)};
}

template <class V> MK_INLINE Ends<V> outward(V low, V high, double units = 2) {
  return {low - (units * epsilon * size_of(low) + tiny),
          high + (units * epsilon * size_of(high) + tiny)};
}

// c·a, and the adjoint of it.
MK_INLINE Intervals scaled(Intervals a, double c) {
  if (c == 1) return a;
  return c > 0 ? outward(c * a.low, c * a.high) : outward(c * a.high, c * a.low);
}
MK_INLINE Intervals pulled(Intervals g, double c) {
  return c > 0 ? Intervals{c * g.low, c * g.high} : Intervals{c * g.high, c * g.low};
}

// Where 0 is multiplied by what is as large as you like, it stays 0.
MK_INLINE Doubles product(Doubles x, Doubles y) {
  const Doubles p = x * y;
  return where(~is_nan(p) | is_nan(x) | is_nan(y), p);
}

// The products of all in a with all in b, and at which ends they are least and greatest.
struct Corners {
  // One of the four products, and whether it is of the high end of a, and of b.
  struct One {
    Doubles value;
    Mask high_a, high_b;

    MK_INLINE void take(Mask better, Doubles other, bool of_high_a, bool of_high_b) {
      value = better ? other : value;
      high_a = of_high_a ? high_a | better : high_a & ~better;
      high_b = of_high_b ? high_b | better : high_b & ~better;
    }
    // Adds what g makes of a's and b's ends. What is infinite has no gradient.
    MK_INLINE void pull(Doubles g, Intervals a, Intervals b, Intervals* to_a,
                        Intervals* to_b) const {
      const Doubles x = high_a ? a.high : a.low, y = high_b ? b.high : b.low;
      const Mask finite = ~(is_infinite(value) | is_infinite(x) | is_infinite(y));
      const Doubles by_x = where(finite, g * y), by_y = where(finite, g * x);
      to_a->low += where(~high_a, by_x), to_a->high += where(high_a, by_x);
      to_b->low += where(~high_b, by_y), to_b->high += where(high_b, by_y);
    }
  };
  One least, greatest;

  MK_INLINE Corners(Intervals a, Intervals b) {
    const Doubles first = product(a.low, b.low);
    least = greatest = {first, Mask{}, Mask{}};
    add(product(a.low, b.high), false, true);
    add(product(a.high, b.low), true, false);
    add(product(a.high, b.high), true, true);
  }
  MK_INLINE Intervals interval() const { return outward(least.value, greatest.value); }
  MK_INLINE void pull(Intervals g, Intervals a, Intervals b, Intervals* to_a,
                      Intervals* to_b) const {
    least.pull(g.low, a, b, to_a, to_b);
    greatest.pull(g.high, a, b, to_a, to_b);
  }

 private:
  MK_INLINE void add(Doubles x, bool high_a, bool high_b) {
    least.take((x < least.value) | is_nan(x), x, high_a, high_b);
    greatest.take((x > greatest.value) | is_nan(x), x, high_a, high_b);
  }
};

// Slopes in s times a tangent in t by centre and radius: up to a tenth wider than the products' own
// range, but without a branch.
MK_INLINE Intervals sloped(Intervals s, Intervals t) {
  const Doubles middle = 0.5 * s.low + 0.5 * s.high, radius = 0.5 * s.high - 0.5 * s.low;
  const Doubles c = 0.5 * t.low + 0.5 * t.high, r = 0.5 * t.high - 0.5 * t.low;
  const Doubles centre = middle * c;
  Doubles spread = size_of(c) * radius + r * (size_of(middle) + radius);
  spread += 8 * epsilon * (size_of(centre) + spread) + tiny;
  return {centre - spread, centre + spread};
}
MK_INLINE void pull_sloped(Intervals g, Intervals s, Intervals t, Intervals* to_s,
                           Intervals* to_t) {
  const Doubles middle = 0.5 * s.low + 0.5 * s.high, radius = 0.5 * s.high - 0.5 * s.low;
  const Doubles c = 0.5 * t.low + 0.5 * t.high, r = 0.5 * t.high - 0.5 * t.low;
  const Doubles centre = g.low + g.high, spread = g.high - g.low;
  const Doubles to_middle = centre * c + spread * r * sign_of(middle);
  const Doubles to_radius = spread * (size_of(c) + r);
  const Doubles to_c = centre * middle + spread * radius * sign_of(c);
  const Doubles to_r = spread * (size_of(middle) + radius);
  to_s->low += 0.5 * (to_middle - to_radius), to_s->high += 0.5 * (to_middle + to_radius);
  to_t->low += 0.5 * (to_c - to_r), to_t->high += 0.5 * (to_c + to_r);
}

// Two matrices of so many rows side by side: ends, or centres and radii. Rows are whole vectors; what
// lies past the last column is anything.
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
  // From column j on.
  MK_INLINE Intervals from(int64_t i, int64_t j) const {
    return {load(a + i * ld + j), load(b + i * ld + j)};
  }
  MK_INLINE void put(int64_t i, int64_t j, Intervals v) const {
    store(a + i * ld + j, v.low), store(b + i * ld + j, v.high);
  }
  MK_INLINE void add(int64_t i, int64_t j, Intervals v) const {
    const Intervals before = from(i, j);
    put(i, j, Intervals{before.low + v.low, before.high + v.high});
  }
};

// to[q] = Σ_j f(j, each)[q] over exactly n columns.
template <int count, class F> MK_INLINE void add_up(int64_t n, double (&to)[count], const F& f) {
  Doubles sums[count] = {};
  for (int64_t j = 0; j < n; j += at_once) {
    Doubles each[count];
    f(j, each);
    const Mask there = first_lanes<double>(min_of(n - j, at_once));
    MK_UNROLL
    for (int q = 0; q < count; ++q) sums[q] += where(there, each[q]);
  }
  for (int q = 0; q < count; ++q) to[q] = sum<double>(sums[q]);
}

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
  return epsilon * curve.relative * min_of(size_of(value), largest / curve.relative) +
         curve.absolute;
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
