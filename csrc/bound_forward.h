// The way forward: intervals of every value and of its tangents.
#pragma once

#include "bound_memory.h"

namespace {

// No square or cube of it overflows in an activation.
MK_INLINE double near(double a) { return a < -far ? -far : a > far ? far : a; }

template <class T>
inline void Bounded<T>::forward(double* scratch) const {
  const Pair x = ends(0);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = 0; j < problem.d; ++j) {
      const int64_t one = b * problem.d + j;
      x.put(b, j, {box.ends[one], box.ends[B * problem.d + one]});
    }
  }
  for (int64_t i = B; i < R; ++i) {
    for (int64_t j = 0; j < problem.d; ++j) {
      const double unit = box.columns[i / B - 1] == j;
      x.put(i, j, {unit, unit});
    }
  }
  for (int64_t v = 1; v <= y; ++v) value(v, scratch);
}

template <class T>
inline void Bounded<T>::value(int64_t v, double* scratch) const {
  const Node& node = node_of(v);
  const Pair to = ends(v), u = ends(node.input[0]);
  const int64_t H = node.width;
  if (node.kind < kinds) return activation(v, u, to, scratch);
  switch (node.kind) {
    case node_linear: return linear(v, u, to);
    case node_prelu:
      each(B, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j);
        const Doubles theta = parameter_from(node, j), one = splat(1.0);
        const Doubles none = splat(not_a_number);
        const Mask up = a.low > 0.0, down = a.high < 0.0, bad = ~(a.low <= a.high) | is_nan(theta);
        const Doubles low = down ? theta : up ? one : theta < 1.0 ? theta : one;
        const Doubles high = down ? theta : up ? one : theta > 1.0 ? theta : one;
        slopes(v).put(i, j, Intervals{bad ? none : low, bad ? none : high});
        const Intervals below = Corners(below_zero(a), {theta, theta}).interval();
        to.put(i, j,
               outward(max_zero<double>(a.low) + below.low, max_zero<double>(a.high) + below.high));
      });
      return push_slopes(v, u, to);
    case node_scale:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Doubles theta = parameter_from(node, j);
        to.put(i, j, Corners(u.from(i, j), {theta, theta}).interval());
      });
    case node_dropout:
      each(B, H, [&](int64_t i, int64_t j) {
        to.put(i, j, Corners(u.from(i, j), mask(node)).interval());
      });
      return each_tangent(H, [&](int64_t i, int64_t, int64_t j) {
        to.put(i, j, sloped(mask(node), u.from(i, j)));
      });
    case node_shift:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j);
        if (i >= B) return to.put(i, j, a);
        const Doubles theta = parameter_from(node, j);
        to.put(i, j, outward(a.low + theta, a.high + theta));
      });
    case node_line:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Intervals a = scaled(u.from(i, j), node.numbers[0]);
        const double tau = i < B ? node.numbers[1] : 0;
        to.put(i, j, tau ? outward(a.low + tau, a.high + tau, 4) : a);
      });
    case node_sum:
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const Pair from = ends(node.input[nth]);
        each(R, H, [&](int64_t i, int64_t j) {
          const Intervals a = scaled(from.from(i, j), node.numbers[nth]);
          if (nth == 0) return to.put(i, j, a);
          const Intervals before = to.from(i, j);
          to.put(i, j, outward(before.low + a.low, before.high + a.high));
        });
      }
      return;
    case node_product: {
      const Pair u_2 = ends(node.input[1]);
      const bool square = node.input[0] == node.input[1];
      each(B, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j);
        Intervals v = Corners(a, u_2.from(i, j)).interval();
        if (square) v.low = where(~((a.low <= 0.0) & (a.high >= 0.0)), v.low);
        to.put(i, j, v);
      });
      return each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
        const Intervals first = Corners(u_2.from(b, j), u.from(i, j)).interval();
        const Intervals second = Corners(u.from(b, j), u_2.from(i, j)).interval();
        to.put(i, j, outward(first.low + second.low, first.high + second.high));
      });
    }
    case node_expand:
      return each(R, H, [&](int64_t i, int64_t j) { to.put(i, j, spread(u.at(i, 0))); });
    case node_normalise:
    case node_root_mean_square: return normalise(v, u, to, scratch);
    case node_total: {
      const int64_t inputs = width(node.input[0]);
      for (int64_t i = 0; i < R; ++i) {
        double of[3];  // Σ of the ends, and of their sizes
        add_up(inputs, of, [&](int64_t j, Doubles* each) {
          const Intervals a = u.from(i, j);
          each[0] = a.low, each[1] = a.high, each[2] = size_of(a.low) + size_of(a.high);
        });
        const double rounding = gamma(inputs) * of[2] + tiny;
        to.put(i, 0, Interval{of[0] - rounding, of[1] + rounding});
      }
      return;
    }
    case node_concat: {
      int64_t start = 0;
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const Pair from = ends(node.input[nth]);
        const int64_t columns = width(node.input[nth]);
        each_alone(R, columns, [&](int64_t i, int64_t j) { to.put(i, start + j, from.at(i, j)); });
        start += columns;
      }
      return;
    }
    case node_columns: {
      const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
      return each_alone(R, H,
                        [&](int64_t i, int64_t j) { to.put(i, j, u.at(i, start + j * step)); });
    }
  }
}

template <class T>
inline void Bounded<T>::linear(int64_t v, Pair u, Pair to) const {
  const Node& node = node_of(v);
  const int64_t in = width(node.input[0]), out = node.width;
  const T *W = parameter(node), *bias = parameter(node, 1);
  const Pair ball = balls(v);
  const double share = gamma(in);
  each(R, in, [&](int64_t i, int64_t j) {
    const Intervals a = i < B ? finite_part(u.from(i, j)) : u.from(i, j);
    const Doubles z = 0.5 * a.low + 0.5 * a.high, r = 0.5 * a.high - 0.5 * a.low;
    const Mask there = first_lanes<double>(min_of(in - j, at_once));
    ball.put(i, j, Intervals{where(there, z), where(there, r + (share * (size_of(z) + r) + tiny))});
  });
  push_product(R, in, out, W, ball, to);
  each(R, out, [&](int64_t i, int64_t j) {
    const Intervals found = to.from(i, j);
    const Doubles z = bias && i < B ? found.low + widened(bias + j, out - j) : found.low;
    const Doubles r = found.high + (share * (found.high + 2 * size_of(z)) + tiny);
    to.put(i, j, Intervals{z - r, z + r});
  });
  // An infinite end counts where its weight is not zero.
  each_alone(B, in, [&](int64_t i, int64_t j) {
    const Interval a = u.at(i, j);
    if (!is_infinite(a.low) && !is_infinite(a.high)) return;
    for (int64_t o = 0; o < out; ++o) {
      const double w = double(W[o * in + j]);
      Interval ends = to.at(i, o);
      if (is_infinite(w > 0 ? a.low : w < 0 ? a.high : 0)) ends.low -= infinity;
      if (is_infinite(w > 0 ? a.high : w < 0 ? a.low : 0)) ends.high += infinity;
      to.put(i, o, ends);
    }
  });
}

template <class T>
inline void Bounded<T>::activation(int64_t v, Pair u, Pair to, double* scratch) const {
  const Node& node = node_of(v);
  const int64_t H = node.width, whole = ld(v), all = 2 * B * whole;
  double *args = scratch, *values = args + all, *firsts = values + all, *seconds = firsts + all;
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t j = 0; j < whole; ++j) {
      const Interval a = j < H ? u.at(i, j) : Interval{0, 0};
      args[2 * i * whole + j] = near(a.low), args[(2 * i + 1) * whole + j] = near(a.high);
    }
  }
  orders_of<double>(int(node.kind))[all_orders](
      {2 * B, whole, args, whole, values, firsts, seconds, whole},
      {node.numbers[0], node.numbers[1], node.numbers[2]});
  const Curve *of_values = box.curves + 2 * (v - 1), *of_slopes = of_values + 1;
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t j = 0; j < H; ++j) {
      Interval a = u.at(i, j);
      const int64_t low = 2 * i * whole + j, high = low + whole;
      Interval value{values[low], values[high]}, first{firsts[low], firsts[high]};
      Interval second{seconds[low], seconds[high]};
      Interval rate = first;
      if (a.low < -far) {
        a.low = -infinity, value.low = of_values->limits[0], first.low = of_slopes->limits[0];
      }
      if (a.high > far) {
        a.high = infinity, value.high = of_values->limits[1], first.high = of_slopes->limits[1];
      }
      // No gradient comes from what is infinite.
      if (size_of(a.low) > far) rate.low = second.low = 0;
      if (size_of(a.high) > far) rate.high = second.high = 0;
      Range of_value = range_of(*of_values, a, value, rate);
      Range of_slope = range_of(*of_slopes, a, first, second);
      if (!(a.low <= a.high)) of_value.of = of_slope.of = {not_a_number, not_a_number};
      to.put(i, j, of_value.of);
      slopes(v).put(i, j, of_slope.of);
      rates(v, 0).put(i, j, {of_value.low_by_low, of_value.low_by_high});
      rates(v, 1).put(i, j, {of_value.high_by_low, of_value.high_by_high});
      rates(v, 2).put(i, j, {of_slope.low_by_low, of_slope.low_by_high});
      rates(v, 3).put(i, j, {of_slope.high_by_low, of_slope.high_by_high});
    }
  }
  push_slopes(v, u, to);
}

template <class T>
inline void Bounded<T>::push_slopes(int64_t v, Pair u, Pair to) const {
  const Pair s = slopes(v);
  each_tangent(node_of(v).width, [&](int64_t i, int64_t b, int64_t j) {
    to.put(i, j, sloped(s.from(b, j), u.from(i, j)));
  });
}

}  // namespace
