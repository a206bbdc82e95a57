// The way back: what the gradient of the bound makes of those of the parameters.
#pragma once

#include "bound_memory.h"

namespace {

// Adds to the gradients of the parameters what the gradient of the bound (D, k) makes of them.
// `cotangents`: two matrices for each value, as `ends`, all 0.
template <class T>
inline void Bounded<T>::backward(const T* of_bound, double* cotangents, double* products,
                                 void* const* grads) const {
  const auto of = [&](int64_t v) {
    double* from = cotangents + cotangent_at[v];
    return Pair{from, from + R * ld(v), ld(v)};
  };
  for (int64_t o = 0; o < problem.D; ++o) {
    for (int64_t c = 0; c < box.k; ++c) {
      int64_t b;
      least(o, c, &b);
      const double g = double(of_bound[o * box.k + c]);
      const Interval both = sign(o, c) > 0 ? Interval{g, 0} : Interval{0, -g};
      of(y).put((1 + c) * B + b, o, both);
    }
  }
  for (int64_t v = y; v > 0; --v) pull(v, of, products, grads);
}

// Adds g to the gradient of a node's parameters from column j on, or of its only one.
template <class T>
inline void Bounded<T>::add_to(const Node& node, int64_t j, Doubles g, void* const* grads) const {
  T* to = static_cast<T*>(grads[node.place[0]]);
  const int64_t left = node.width - j;
  if (!to) return;
  if (sizes[node.place[0]] == 1) {
    *to += T(sum<double>(where(first_lanes<double>(min_of(left, at_once)), g)));
  } else {
    narrowed(widened(to + j, left) + g, to + j, left);
  }
}

template <class T>
template <class Of>
inline void Bounded<T>::pull(int64_t v, const Of& of, double* products, void* const* grads) const {
  const Node& node = node_of(v);
  const int64_t H = node.width, first = node.input[0];
  const Pair g = of(v), e = ends(v), u = ends(first);
  // No gradient comes from what is infinite.
  each(B, H, [&](int64_t i, int64_t j) {
    const Intervals a = e.from(i, j), of_a = g.from(i, j);
    g.put(i, j,
          Intervals{where(~is_infinite(a.low), of_a.low), where(~is_infinite(a.high), of_a.high)});
  });
  // Nobody asks for the gradient of the box.
  const auto give = [&](int64_t value, int64_t i, int64_t j, auto a) {
    if (value) of(value).add(i, j, a);
  };
  if (node.kind < kinds) return pull_activation(v, of, products);
  switch (node.kind) {
    case node_linear: return pull_linear(v, of, products, grads);
    case node_normalise:
    case node_root_mean_square: return pull_norm(v, of, products);
    case node_prelu: {
      const Pair s = slopes(v);
      each(B, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j), below = below_zero(a), of_v = g.from(i, j);
        const Doubles theta = parameter_from(node, j);
        Intervals to{}, by{};
        Corners(below, {theta, theta}).pull(of_v, below, {theta, theta}, &to, &by);
        add_to(node, j, by.low + by.high, grads);
        give(first, i, j,
             Intervals{a.low > 0.0 ? of_v.low : to.low, a.high > 0.0 ? of_v.high : to.high});
      });
      return each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
        const Intervals a = u.from(b, j);
        const Doubles theta = parameter_from(node, j);
        Intervals to{}, by{};
        pull_sloped(g.from(i, j), s.from(b, j), u.from(i, j), &by, &to);
        const Mask down = a.high < 0.0, reaches = a.low <= 0.0;
        add_to(node, j,
               where(reaches & (down | (theta <= 1.0)), by.low) +
                   where(reaches & (down | (theta > 1.0)), by.high),
               grads);
        give(first, i, j, to);
      });
    }
    case node_scale:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j);
        const Doubles theta = parameter_from(node, j);
        Intervals to{}, by{};
        Corners(a, {theta, theta}).pull(g.from(i, j), a, {theta, theta}, &to, &by);
        add_to(node, j, by.low + by.high, grads);
        give(first, i, j, to);
      });
    case node_dropout:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j), m = mask(node);
        Intervals to{}, unused{};
        if (i < B) {
          Corners(a, m).pull(g.from(i, j), a, m, &to, &unused);
        } else {
          pull_sloped(g.from(i, j), m, a, &unused, &to);
        }
        give(first, i, j, to);
      });
    case node_shift:
      return each(R, H, [&](int64_t i, int64_t j) {
        const Intervals a = g.from(i, j);
        if (i < B) add_to(node, j, a.low + a.high, grads);
        give(first, i, j, a);
      });
    case node_line:
      return each(R, H, [&](int64_t i, int64_t j) {
        give(first, i, j, pulled(g.from(i, j), node.numbers[0]));
      });
    case node_sum:
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        each(R, H, [&](int64_t i, int64_t j) {
          give(node.input[nth], i, j, pulled(g.from(i, j), node.numbers[nth]));
        });
      }
      return;
    case node_product: {
      const int64_t second = node.input[1];
      const Pair u_2 = ends(second);
      each(B, H, [&](int64_t i, int64_t j) {
        const Intervals a = u.from(i, j), a_2 = u_2.from(i, j);
        Intervals of_v = g.from(i, j), to_a{}, to_a_2{};
        if (first == second) of_v.low = where(~((a.low <= 0.0) & (a.high >= 0.0)), of_v.low);
        Corners(a, a_2).pull(of_v, a, a_2, &to_a, &to_a_2);
        give(first, i, j, to_a), give(second, i, j, to_a_2);
      });
      return each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
        const Intervals of_v = g.from(i, j), a = u.from(b, j), a_2 = u_2.from(b, j);
        const Intervals t = u.from(i, j), t_2 = u_2.from(i, j);
        Intervals to_a{}, to_a_2{}, to_t{}, to_t_2{};
        Corners(a_2, t).pull(of_v, a_2, t, &to_a_2, &to_t);
        Corners(a, t_2).pull(of_v, a, t_2, &to_a, &to_t_2);
        give(first, b, j, to_a), give(second, b, j, to_a_2);
        give(first, i, j, to_t), give(second, i, j, to_t_2);
      });
    }
    case node_expand:
      return each_alone(R, H, [&](int64_t i, int64_t j) { give(first, i, 0, g.at(i, j)); });
    case node_total:
      return each(R, width(first),
                  [&](int64_t i, int64_t j) { give(first, i, j, spread(g.at(i, 0))); });
    case node_concat: {
      int64_t start = 0;
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const int64_t columns = width(node.input[nth]);
        each_alone(R, columns,
                   [&](int64_t i, int64_t j) { give(node.input[nth], i, j, g.at(i, start + j)); });
        start += columns;
      }
      return;
    }
    case node_columns: {
      const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
      return each_alone(
          R, H, [&](int64_t i, int64_t j) { give(first, i, start + j * step, g.at(i, j)); });
    }
  }
}

template <class T>
template <class Of>
inline void Bounded<T>::pull_activation(int64_t v, const Of& of, double* products) const {
  const Node& node = node_of(v);
  const int64_t H = node.width, first = node.input[0], whole = ld(v);
  const Pair g = of(v), s = slopes(v), u = ends(first),
             of_slopes{products, products + B * whole, whole};
  clear(products, 2 * B * whole);
  each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
    Intervals to{}, slope{};
    pull_sloped(g.from(i, j), s.from(b, j), u.from(i, j), &slope, &to);
    of_slopes.add(b, j, slope);
    if (first) of(first).add(i, j, to);
  });
  if (!first) return;
  const Pair to = of(first);
  each(B, H, [&](int64_t i, int64_t j) {
    const Intervals value = g.from(i, j), slope = of_slopes.from(i, j);
    const Intervals by_low = rates(v, 0).from(i, j), by_high = rates(v, 1).from(i, j);
    const Intervals of_low = rates(v, 2).from(i, j), of_high = rates(v, 3).from(i, j);
    to.add(i, j,
           Intervals{value.low * by_low.low + value.high * by_high.low + slope.low * of_low.low +
                         slope.high * of_high.low,
                     value.low * by_low.high + value.high * by_high.high + slope.low * of_low.high +
                         slope.high * of_high.high});
  });
}

template <class T>
template <class Of>
inline void Bounded<T>::pull_linear(int64_t v, const Of& of, double* products,
                                    void* const* grads) const {
  const Node& node = node_of(v);
  const int64_t out = node.width, first = node.input[0], in = width(first);
  const T* W = parameter(node);
  const Pair g = of(v), whole{products, products + R * ld(v), ld(v)};
  each(R, out, [&](int64_t i, int64_t j) {
    const Intervals a = g.from(i, j);
    whole.put(i, j, Intervals{a.low + a.high, a.high - a.low});  // of centres and radii
  });
  const int64_t weight = node.place[0], bias = node.place[1];
  if (T* to = static_cast<T*>(grads[weight])) {
    weight_gradient(R, in, out, W, whole, balls(v), to);
  }
  if (T* to = static_cast<T*>(grads[bias])) {
    for (int64_t j = 0; j < out; ++j) {
      double total = double(to[j]);
      for (int64_t b = 0; b < B; ++b) total += whole.a[b * whole.ld + j];
      to[j] = T(total);
    }
  }
  if (!first) return;
  const int64_t columns = ld(first);
  double* after = products + 2 * R * ld(v);
  const Pair ball{after, after + R * columns, columns}, u = ends(first), to = of(first);
  pull_product(R, in, out, W, whole, ball);
  each(R, in, [&](int64_t i, int64_t j) {
    const Intervals of_ball = ball.from(i, j);
    const Intervals a{0.5 * (of_ball.low - of_ball.high), 0.5 * (of_ball.low + of_ball.high)};
    // What stood in the place of an infinite end was the other one.
    to.add(i, j, i < B ? pulled_finite(a, u.from(i, j)) : a);
  });
}

}  // namespace
