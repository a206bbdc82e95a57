// Sound bounds of a program's slopes over boxes, and the linear term that monokernel/monotone.py adds.
//
// Rows of a value are its intervals over the B boxes and then the k·B intervals of its tangents; all of
// them go through a node together. They are few, so this is about calls avoided and not about rates,
// and one thread does it. A product of n columns is rounded outwards by γ = (n + 8) ε, twice the γ_n of
// Higham (2002), section 3.1, of the sizes of its terms.
#pragma once

#include "interval_norms.h"
#include "interval_products.h"
#include "nodes.h"

namespace {

// What a pass over a program works on. `saved` is what forward leaves for backward: the bound as it
// was given, then of each value its ends and what its node keeps.
template <class T> struct Bounded {
  const Plan& plan;
  const Box& box;
  const void* const* params;
  const int64_t* sizes;
  int64_t B, R, y;  // boxes, rows, the last value
  // Where each value begins in `saved`, and its adjoints among all; null while memory is counted.
  int64_t *at, *adjoint_at;
  int64_t saved_size, adjoint_size = 0, widest = 0;
  double* saved = nullptr;

  Bounded(const Plan& p, const Box& b, const void* const* given, const int64_t* elements,
          Bump& memory)
      : plan(p), box(b), params(given), sizes(elements), B(b.B), R((1 + b.k) * b.B), y(p.count) {
    at = memory.take<int64_t>(y + 1);
    adjoint_at = memory.take<int64_t>(y + 1);
    saved_size = round_up(p.D * b.k, 8);
    for (int64_t v = 0; v <= y; ++v) {
      if (at) at[v] = saved_size, adjoint_at[v] = adjoint_size;
      saved_size += 2 * R * ld(v) + kept(v);
      adjoint_size += v ? 2 * R * ld(v) : 0;
      widest = max_of(widest, ld(v));
    }
  }

  const Node& node(int64_t v) const { return plan.nodes[v - 1]; }
  int64_t width(int64_t v) const { return plan.width(v); }
  int64_t ld(int64_t v) const { return round_up(width(v), 8); }
  int64_t kept(int64_t v) const {
    if (v == 0) return 0;
    const Node& n = node(v);
    if (n.kind == node_linear) return 2 * R * ld(n.input[0]);
    if (n.kind == node_normalise || n.kind == node_root_mean_square) return round_up(2 * B, 8);
    return n.kind < kinds || n.kind == node_prelu ? 10 * B * ld(v) : 0;
  }

  Pair ends(int64_t v) const { return {saved + at[v], saved + at[v] + R * ld(v), ld(v)}; }
  double* more(int64_t v) const { return saved + at[v] + 2 * R * ld(v); }
  // Of a linear node: centres and widened radii of its input.
  Pair balls(int64_t v) const {
    const int64_t n = ld(node(v).input[0]);
    return {more(v), more(v) + R * n, n};
  }
  // Of an activation: what its slope lies in, for each box.
  Pair slopes(int64_t v) const { return {more(v), more(v) + B * ld(v), ld(v)}; }
  // And how its ends (0, 1) and those of its slope (2, 3) follow the ends of its input.
  Pair rates(int64_t v, int64_t end) const {
    const int64_t n = B * ld(v);
    double* from = more(v) + 2 * n * (1 + end);
    return {from, from + n, ld(v)};
  }
  const T* parameter(const Node& n, int64_t i = 0) const {
    return static_cast<const T*>(params[n.place[i]]);
  }
  // One number for all columns, or one for each, from column j on. An infinite one says nothing: 0 times
  // it is not 0.
  Doubles parameter_from(const Node& n, int64_t j) const {
    const bool one = sizes[n.place[0]] == 1;
    const Doubles t = one ? splat(double(*parameter(n))) : widened(parameter(n) + j, n.width - j);
    return is_infinite(t) ? splat(not_a_number) : t;
  }
  static Intervals mask(const Node& n) {
    const double p = n.numbers[0];
    return spread({0, (1 + 4 * epsilon) * (p == 1 ? 0 : 1 / (1 - p))});
  }
  static double gamma(int64_t n) { return double(n + 8) * epsilon; }

  // f(i, j) for so many rows, and columns from j on in whole vectors.
  template <class F> MK_INLINE static void each(int64_t rows, int64_t n, const F& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; j += at_once) f(i, j);
    }
  }
  // One by one, where columns move.
  template <class F> MK_INLINE static void each_alone(int64_t rows, int64_t n, const F& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) f(i, j);
    }
  }
  // f(i, b, j) for the rows of the tangents, b the row of their values.
  template <class F> MK_INLINE void each_tangent(int64_t n, const F& f) const {
    for (int64_t i = B; i < R; ++i) {
      const int64_t b = i % B;
      for (int64_t j = 0; j < n; j += at_once) f(i, b, j);
    }
  }

  // --- forward ---

  int64_t scratch_size() const { return 8 * B * widest; }

  void forward(double* scratch) const {
    const Pair x = ends(0);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < plan.d; ++j) {
        const int64_t one = b * plan.d + j;
        x.put(b, j, {box.ends[one], box.ends[B * plan.d + one]});
      }
    }
    for (int64_t i = B; i < R; ++i) {
      for (int64_t j = 0; j < plan.d; ++j) {
        const double unit = box.columns[i / B - 1] == j;
        x.put(i, j, {unit, unit});
      }
    }
    for (int64_t v = 1; v <= y; ++v) value(v, scratch);
  }

  void value(int64_t v, double* scratch) const {
    const Node& n = node(v);
    const Pair to = ends(v), u = ends(n.input[0]);
    const int64_t H = n.width;
    if (n.kind < kinds) return activation(v, u, to, scratch);
    switch (n.kind) {
      case node_linear: return linear(v, u, to);
      case node_prelu:
        each(B, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j);
          const Doubles s = parameter_from(n, j), one = splat(1.0), none = splat(not_a_number);
          const Mask up = a.low > 0.0, down = a.high < 0.0, bad = ~(a.low <= a.high) | is_nan(s);
          const Doubles low = down ? s : up ? one : s < 1.0 ? s : one;
          const Doubles high = down ? s : up ? one : s > 1.0 ? s : one;
          slopes(v).put(i, j, Intervals{bad ? none : low, bad ? none : high});
          const Intervals below = Corners(below_zero(a), {s, s}).interval();
          to.put(
              i, j,
              outward(max_zero<double>(a.low) + below.low, max_zero<double>(a.high) + below.high));
        });
        return push_slopes(v, u, to);
      case node_scale:
        return each(R, H, [&](int64_t i, int64_t j) {
          const Doubles s = parameter_from(n, j);
          to.put(i, j, Corners(u.from(i, j), {s, s}).interval());
        });
      case node_dropout:
        each(B, H, [&](int64_t i, int64_t j) {
          to.put(i, j, Corners(u.from(i, j), mask(n)).interval());
        });
        return each_tangent(
            H, [&](int64_t i, int64_t, int64_t j) { to.put(i, j, sloped(mask(n), u.from(i, j))); });
      case node_shift:
        return each(R, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j);
          if (i >= B) return to.put(i, j, a);
          const Doubles t = parameter_from(n, j);
          to.put(i, j, outward(a.low + t, a.high + t));
        });
      case node_line:
        return each(R, H, [&](int64_t i, int64_t j) {
          const Intervals a = scaled(u.from(i, j), n.numbers[0]);
          const double q = i < B ? n.numbers[1] : 0;
          to.put(i, j, q ? outward(a.low + q, a.high + q, 4) : a);
        });
      case node_sum:
        for (int64_t q = 0; q < n.inputs; ++q) {
          const Pair from = ends(n.input[q]);
          each(R, H, [&](int64_t i, int64_t j) {
            const Intervals a = scaled(from.from(i, j), n.numbers[q]);
            if (q == 0) return to.put(i, j, a);
            const Intervals before = to.from(i, j);
            to.put(i, j, outward(before.low + a.low, before.high + a.high));
          });
        }
        return;
      case node_product: {
        const Pair w = ends(n.input[1]);
        const bool square = n.input[0] == n.input[1];
        each(B, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j);
          Intervals v = Corners(a, w.from(i, j)).interval();
          if (square) v.low = where(~((a.low <= 0.0) & (a.high >= 0.0)), v.low);
          to.put(i, j, v);
        });
        return each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
          const Intervals first = Corners(w.from(b, j), u.from(i, j)).interval();
          const Intervals second = Corners(u.from(b, j), w.from(i, j)).interval();
          to.put(i, j, outward(first.low + second.low, first.high + second.high));
        });
      }
      case node_expand:
        return each(R, H, [&](int64_t i, int64_t j) { to.put(i, j, spread(u.at(i, 0))); });
      case node_normalise:
      case node_root_mean_square: return normalise(v, u, to, scratch);
      case node_total: {
        const int64_t inputs = width(n.input[0]);
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
        for (int64_t q = 0; q < n.inputs; ++q) {
          const Pair from = ends(n.input[q]);
          const int64_t columns = width(n.input[q]);
          each_alone(R, columns,
                     [&](int64_t i, int64_t j) { to.put(i, start + j, from.at(i, j)); });
          start += columns;
        }
        return;
      }
      case node_columns: {
        const int64_t start = int64_t(n.numbers[0]), step = int64_t(n.numbers[1]);
        return each_alone(R, H,
                          [&](int64_t i, int64_t j) { to.put(i, j, u.at(i, start + j * step)); });
      }
    }
  }

  static Intervals below_zero(Intervals a) {
    return {min_zero<double>(a.low), min_zero<double>(a.high)};
  }

  void linear(int64_t v, Pair u, Pair to) const {
    const Node& n = node(v);
    const int64_t in = width(n.input[0]), out = n.width;
    const T *W = parameter(n), *b = parameter(n, 1);
    const Pair ball = balls(v);
    const double g = gamma(in);
    each(R, in, [&](int64_t i, int64_t j) {
      const Intervals a = i < B ? finite_part(u.from(i, j)) : u.from(i, j);
      const Doubles c = 0.5 * a.low + 0.5 * a.high, r = 0.5 * a.high - 0.5 * a.low;
      const Mask there = first_lanes<double>(min_of(in - j, at_once));
      ball.put(i, j, Intervals{where(there, c), where(there, r + (g * (size_of(c) + r) + tiny))});
    });
    push_product(R, in, out, W, ball, to);
    each(R, out, [&](int64_t i, int64_t j) {
      const Intervals found = to.from(i, j);
      const Doubles c = b && i < B ? found.low + widened(b + j, out - j) : found.low;
      const Doubles r = found.high + (g * (found.high + 2 * size_of(c)) + tiny);
      to.put(i, j, Intervals{c - r, c + r});
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

  void activation(int64_t v, Pair u, Pair to, double* scratch) const {
    const Node& n = node(v);
    const int64_t H = n.width, whole = ld(v), all = 2 * B * whole;
    double *a = scratch, *h = a + all, *s = h + all, *c = s + all;
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < whole; ++j) {
        const Interval x = j < H ? u.at(i, j) : Interval{0, 0};
        a[2 * i * whole + j] = near(x.low), a[(2 * i + 1) * whole + j] = near(x.high);
      }
    }
    orders_of<double>(int(n.kind))[all_orders]({2 * B, whole, a, whole, h, s, c, whole},
                                               {n.numbers[0], n.numbers[1], n.numbers[2]});
    const Curve *values = box.curves + 2 * (v - 1), *firsts = values + 1;
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < H; ++j) {
        Interval x = u.at(i, j);
        const int64_t low = 2 * i * whole + j, high = low + whole;
        Interval value{h[low], h[high]}, first{s[low], s[high]}, second{c[low], c[high]};
        Interval rate = first;
        if (x.low < -far) {
          x.low = -infinity, value.low = values->limits[0], first.low = firsts->limits[0];
        }
        if (x.high > far) {
          x.high = infinity, value.high = values->limits[1], first.high = firsts->limits[1];
        }
        // No gradient comes from what is infinite.
        if (size_of(x.low) > far) rate.low = second.low = 0;
        if (size_of(x.high) > far) rate.high = second.high = 0;
        Range of_value = range_of(*values, x, value, rate);
        Range of_slope = range_of(*firsts, x, first, second);
        if (!(x.low <= x.high)) of_value.of = of_slope.of = {not_a_number, not_a_number};
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
  static double near(double a) { return a < -far ? -far : a > far ? far : a; }

  void push_slopes(int64_t v, Pair u, Pair to) const {
    const Pair s = slopes(v);
    each_tangent(node(v).width, [&](int64_t i, int64_t b, int64_t j) {
      to.put(i, j, sloped(s.from(b, j), u.from(i, j)));
    });
  }

  static Norm norm_of(const Node& n) { return {n.width, n.kind == node_normalise, n.numbers[0]}; }

  void normalise(int64_t v, Pair u, Pair to, double* scratch) const {
    const Norm norm = norm_of(node(v));
    const int64_t H = norm.H, whole = ld(v);
    double *low = scratch, *high = scratch + whole;
    const double most = norm.most();
    for (int64_t i = 0; i < B; ++i) {
      norm.centre(u.a + i * u.ld, u.b + i * u.ld, low, high);
      const Interval r = norm.inverse_root(low, high);
      more(v)[2 * i] = r.low, more(v)[2 * i + 1] = r.high;
      for (int64_t j = 0; j < H; j += at_once) {
        const Intervals c{load(low + j), load(high + j)};
        to.put(i, j, Norm::within(Corners(c, spread(r)).interval(), most));
      }
    }
    for (int64_t i = B; i < R; ++i) {
      const int64_t b = i % B;
      const Interval r{more(v)[2 * b], more(v)[2 * b + 1]};
      norm.centre(u.a + i * u.ld, u.b + i * u.ld, low, high);
      const Interval along = Norm::within(norm.terms(low, high, to, b), norm.norm(low, high));
      for (int64_t j = 0; j < H; j += at_once) {
        const Intervals taken = Corners(to.from(b, j), spread(along)).interval();
        const Intervals left = outward(load(low + j) - taken.high, load(high + j) - taken.low);
        to.put(i, j, Corners(spread(r), left).interval());
      }
    }
  }

  // --- the bound ---

  double sign(int64_t o, int64_t c) const { return box.direction[o * box.k + c]; }

  // The least slope of all boxes, and in which of them it is. NaN where y is, by the rule for NaN.
  double least(int64_t o, int64_t c, int64_t* box_of) const {
    const Pair e = ends(y);
    double found = infinity;
    *box_of = 0;
    for (int64_t b = 0; b < B; ++b) {
      const Interval value = e.at(b, o), slope = e.at((1 + c) * B + b, o);
      double low = sign(o, c) > 0 ? slope.low : -slope.high;
      if (is_nan(value.low) || is_nan(value.high)) low = not_a_number;
      if (low < found || is_nan(low)) found = low, *box_of = b;
      if (is_nan(low)) break;
    }
    return found;
  }

  void bound(T* to) const {
    for (int64_t o = 0; o < plan.D; ++o) {
      for (int64_t c = 0; c < box.k; ++c) {
        int64_t unused;
        const double exact = least(o, c, &unused);
        to[o * box.k + c] = rounded_down(exact);
        saved[o * box.k + c] = double(to[o * box.k + c]);
      }
    }
  }
  static T rounded_down(double exact) {
    T near = T(exact);
    if (double(near) > exact) {
      near = sizeof(T) == 4 ? T(__builtin_nextafterf(float(near), -__builtin_inff()))
                            : T(__builtin_nextafter(double(near), -infinity));
    }
    return near;
  }

  // relu(margin - bound), rounded up as monotone.py does, and its rate by -bound.
  T lift(int64_t o, int64_t c, T* rate) const {
    constexpr double four = 4 * (sizeof(T) == 4 ? 0x1p-23 : epsilon);
    const T more = T(box.margin + four * size_of(box.margin)), grown = T(1 + four);
    const T gap = more - T(saved[o * box.k + c]);
    const bool free = sign(o, c) == 0;
    *rate = !free && gap > T(0) ? grown : T(0);
    return free ? T(0) : gap > T(0) ? gap * grown : gap == gap ? T(0) : gap;
  }

  // --- backward ---

  // Adds to the gradients of the parameters what the gradient of the bound (D, k) makes of them.
  // `adjoint`: two matrices for each value, as `ends`, all 0.
  void backward(const T* of_bound, double* adjoint, double* products, void* const* grads) const {
    const auto of = [&](int64_t v) {
      double* from = adjoint + adjoint_at[v];
      return Pair{from, from + R * ld(v), ld(v)};
    };
    for (int64_t o = 0; o < plan.D; ++o) {
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
  int64_t products_size() const { return 4 * R * widest; }

  // Adds g to the gradient of a node's parameters from column j on, or of its only one.
  void add_to(const Node& n, int64_t j, Doubles g, void* const* grads) const {
    T* to = static_cast<T*>(grads[n.place[0]]);
    const int64_t left = n.width - j;
    if (!to) return;
    if (sizes[n.place[0]] == 1) {
      *to += T(sum<double>(where(first_lanes<double>(min_of(left, at_once)), g)));
    } else {
      narrowed(widened(to + j, left) + g, to + j, left);
    }
  }

  template <class Of>
  void pull(int64_t v, const Of& of, double* products, void* const* grads) const {
    const Node& n = node(v);
    const int64_t H = n.width, first = n.input[0];
    const Pair g = of(v), e = ends(v), u = ends(first);
    // No gradient comes from what is infinite.
    each(B, H, [&](int64_t i, int64_t j) {
      const Intervals a = e.from(i, j), of_a = g.from(i, j);
      g.put(
          i, j,
          Intervals{where(~is_infinite(a.low), of_a.low), where(~is_infinite(a.high), of_a.high)});
    });
    // Nobody asks for the gradient of the box.
    const auto give = [&](int64_t value, int64_t i, int64_t j, auto a) {
      if (value) of(value).add(i, j, a);
    };
    if (n.kind < kinds) return pull_activation(v, of, products);
    switch (n.kind) {
      case node_linear: return pull_linear(v, of, products, grads);
      case node_normalise:
      case node_root_mean_square: return pull_norm(v, of, products);
      case node_prelu: {
        const Pair s = slopes(v);
        each(B, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j), below = below_zero(a), of_v = g.from(i, j);
          const Doubles t = parameter_from(n, j);
          Intervals to{}, by{};
          Corners(below, {t, t}).pull(of_v, below, {t, t}, &to, &by);
          add_to(n, j, by.low + by.high, grads);
          give(first, i, j,
               Intervals{a.low > 0.0 ? of_v.low : to.low, a.high > 0.0 ? of_v.high : to.high});
        });
        return each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
          const Intervals a = u.from(b, j);
          const Doubles t = parameter_from(n, j);
          Intervals to{}, by{};
          pull_sloped(g.from(i, j), s.from(b, j), u.from(i, j), &by, &to);
          const Mask down = a.high < 0.0, reaches = a.low <= 0.0;
          add_to(n, j,
                 where(reaches & (down | (t <= 1.0)), by.low) +
                     where(reaches & (down | (t > 1.0)), by.high),
                 grads);
          give(first, i, j, to);
        });
      }
      case node_scale:
        return each(R, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j);
          const Doubles t = parameter_from(n, j);
          Intervals to{}, by{};
          Corners(a, {t, t}).pull(g.from(i, j), a, {t, t}, &to, &by);
          add_to(n, j, by.low + by.high, grads);
          give(first, i, j, to);
        });
      case node_dropout:
        return each(R, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j), m = mask(n);
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
          if (i < B) add_to(n, j, a.low + a.high, grads);
          give(first, i, j, a);
        });
      case node_line:
        return each(R, H, [&](int64_t i, int64_t j) {
          give(first, i, j, pulled(g.from(i, j), n.numbers[0]));
        });
      case node_sum:
        for (int64_t q = 0; q < n.inputs; ++q) {
          each(R, H, [&](int64_t i, int64_t j) {
            give(n.input[q], i, j, pulled(g.from(i, j), n.numbers[q]));
          });
        }
        return;
      case node_product: {
        const int64_t second = n.input[1];
        const Pair w = ends(second);
        each(B, H, [&](int64_t i, int64_t j) {
          const Intervals a = u.from(i, j), b = w.from(i, j);
          Intervals of_v = g.from(i, j), to_a{}, to_b{};
          if (first == second) of_v.low = where(~((a.low <= 0.0) & (a.high >= 0.0)), of_v.low);
          Corners(a, b).pull(of_v, a, b, &to_a, &to_b);
          give(first, i, j, to_a), give(second, i, j, to_b);
        });
        return each_tangent(H, [&](int64_t i, int64_t box_of, int64_t j) {
          const Intervals of_v = g.from(i, j), a = u.from(box_of, j), b = w.from(box_of, j);
          const Intervals t = u.from(i, j), r = w.from(i, j);
          Intervals to_a{}, to_b{}, to_t{}, to_r{};
          Corners(b, t).pull(of_v, b, t, &to_b, &to_t);
          Corners(a, r).pull(of_v, a, r, &to_a, &to_r);
          give(first, box_of, j, to_a), give(second, box_of, j, to_b);
          give(first, i, j, to_t), give(second, i, j, to_r);
        });
      }
      case node_expand:
        return each_alone(R, H, [&](int64_t i, int64_t j) { give(first, i, 0, g.at(i, j)); });
      case node_total:
        return each(R, width(first),
                    [&](int64_t i, int64_t j) { give(first, i, j, spread(g.at(i, 0))); });
      case node_concat: {
        int64_t start = 0;
        for (int64_t q = 0; q < n.inputs; ++q) {
          const int64_t columns = width(n.input[q]);
          each_alone(R, columns,
                     [&](int64_t i, int64_t j) { give(n.input[q], i, j, g.at(i, start + j)); });
          start += columns;
        }
        return;
      }
      case node_columns: {
        const int64_t start = int64_t(n.numbers[0]), step = int64_t(n.numbers[1]);
        return each_alone(
            R, H, [&](int64_t i, int64_t j) { give(first, i, start + j * step, g.at(i, j)); });
      }
    }
  }

  template <class Of> void pull_norm(int64_t v, const Of& of, double* products) const {
    const Norm norm = norm_of(node(v));
    const int64_t H = norm.H, whole = ld(v), first = node(v).input[0];
    const Pair g = of(v), e = ends(v), u = ends(first);
    double *low = products, *high = low + whole;  // of c
    double *to_low = high + whole, *to_high = to_low + whole;
    double* of_r = to_high + whole;  // for each box
    clear(of_r, 2 * B);
    const auto give = [&](int64_t i) {
      norm.pull_centre(u.a + i * u.ld, u.b + i * u.ld, to_low, to_high);
      for (int64_t j = 0; first && j < H; j += at_once) {
        of(first).add(i, j, Intervals{load(to_low + j), load(to_high + j)});
      }
    };
    for (int64_t i = B; i < R; ++i) {
      const int64_t b = i % B;
      const Interval r{more(v)[2 * b], more(v)[2 * b + 1]};
      norm.centre(u.a + i * u.ld, u.b + i * u.ld, low, high);
      const Interval terms = norm.terms(low, high, e, b);
      const double most = norm.norm(low, high);
      const Interval along = Norm::within(terms, most);
      double of_row[4];  // what is given to r and to `along`
      add_up(H, of_row, [&](int64_t j, Doubles* each) {
        const Intervals x = e.from(b, j);
        const Corners taken(x, spread(along));
        const Intervals t = taken.interval();
        const Intervals left = outward(load(low + j) - t.high, load(high + j) - t.low);
        Intervals to_left{}, to_x{}, to_r{}, to_along{};
        Corners(spread(r), left).pull(g.from(i, j), spread(r), left, &to_r, &to_left);
        taken.pull({-to_left.high, -to_left.low}, x, spread(along), &to_x, &to_along);
        g.add(b, j, to_x);
        store(to_low + j, to_left.low), store(to_high + j, to_left.high);
        each[0] = to_r.low, each[1] = to_r.high, each[2] = to_along.low, each[3] = to_along.high;
      });
      of_r[2 * b] += of_row[0], of_r[2 * b + 1] += of_row[1];
      Interval to_along{of_row[2], of_row[3]};
      double to_most = 0;
      if (terms.low < -most) to_most -= to_along.low, to_along.low = 0;
      if (terms.high > most) to_most += to_along.high, to_along.high = 0;
      const double each = to_most * norm.scale() * norm.scale() / most;
      const Intervals to_term = spread({to_along.low / double(H), to_along.high / double(H)});
      for (int64_t j = 0; j < H; j += at_once) {
        const Intervals x = e.from(b, j), t{load(low + j), load(high + j)};
        Intervals to_x{}, to_t{};
        Corners(x, t).pull(to_term, x, t, &to_x, &to_t);
        g.add(b, j, to_x);
        if (to_most != 0) {
          const Mask negative = size_of(t.low) > size_of(t.high);
          to_t.low += where(negative, each * t.low), to_t.high += where(~negative, each * t.high);
        }
        store(to_low + j, load(to_low + j) + to_t.low);
        store(to_high + j, load(to_high + j) + to_t.high);
      }
      give(i);
    }
    const double most = norm.most();
    for (int64_t b = 0; b < B; ++b) {
      const Interval r{more(v)[2 * b], more(v)[2 * b + 1]};
      norm.centre(u.a + b * u.ld, u.b + b * u.ld, low, high);
      double to_r[2];
      add_up(H, to_r, [&](int64_t j, Doubles* each) {
        const Intervals c{load(low + j), load(high + j)}, given = g.from(b, j);
        const Corners product(c, spread(r));
        const Intervals value = product.interval();
        Intervals to_c{}, by_r{};
        product.pull(
            {where(~(value.low < -most), given.low), where(~(value.high > most), given.high)}, c,
            spread(r), &to_c, &by_r);
        store(to_low + j, to_c.low), store(to_high + j, to_c.high);
        each[0] = by_r.low, each[1] = by_r.high;
      });
      norm.pull_inverse_root({of_r[2 * b] + to_r[0], of_r[2 * b + 1] + to_r[1]}, r, low, high,
                             to_low, to_high);
      give(b);
    }
  }

  template <class Of> void pull_activation(int64_t v, const Of& of, double* products) const {
    const Node& n = node(v);
    const int64_t H = n.width, first = n.input[0], whole = ld(v);
    const Pair g = of(v), s = slopes(v), u = ends(first), by{products, products + B * whole, whole};
    clear(products, 2 * B * whole);
    each_tangent(H, [&](int64_t i, int64_t b, int64_t j) {
      Intervals to{}, slope{};
      pull_sloped(g.from(i, j), s.from(b, j), u.from(i, j), &slope, &to);
      by.add(b, j, slope);
      if (first) of(first).add(i, j, to);
    });
    if (!first) return;
    const Pair to = of(first);
    each(B, H, [&](int64_t i, int64_t j) {
      const Intervals value = g.from(i, j), slope = by.from(i, j);
      const Intervals a = rates(v, 0).from(i, j), b = rates(v, 1).from(i, j);
      const Intervals c = rates(v, 2).from(i, j), d = rates(v, 3).from(i, j);
      to.add(
          i, j,
          Intervals{
              value.low * a.low + value.high * b.low + slope.low * c.low + slope.high * d.low,
              value.low * a.high + value.high * b.high + slope.low * c.high + slope.high * d.high});
    });
  }

  template <class Of>
  void pull_linear(int64_t v, const Of& of, double* products, void* const* grads) const {
    const Node& n = node(v);
    const int64_t out = n.width, first = n.input[0], in = width(first);
    const T* W = parameter(n);
    const Pair g = of(v), whole{products, products + R * ld(v), ld(v)};
    each(R, out, [&](int64_t i, int64_t j) {
      const Intervals a = g.from(i, j);
      whole.put(i, j, Intervals{a.low + a.high, a.high - a.low});  // of centres and radii
    });
    const int64_t weight = n.place[0], bias = n.place[1];
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
      const Intervals c = ball.from(i, j);
      const Intervals a{0.5 * (c.low - c.high), 0.5 * (c.low + c.high)};
      // What stood in the place of an infinite end was the other one.
      to.add(i, j, i < B ? pulled_finite(a, u.from(i, j)) : a);
    });
  }
};

// 0 where a node's kind has no rule here.
template <class T> int64_t bound_size(const Plan& plan, const Box& box) {
  for (int64_t i = 0; i < plan.count; ++i) {
    switch (plan.nodes[i].kind) {
      case node_softmax:
      case node_log_softmax: return 0;
    }
  }
  Bump counting;
  return Bounded<T>(plan, box, nullptr, nullptr, counting).saved_size;
}

// The bound (D, k), and y (N, D) += Σ_c sign·lift·(x_c - middle).
template <class T>
Status lift_forward(const Plan& plan, const Box& box, const LiftCall& call,
                    const Runtime& runtime) {
  Bump counting;
  const Bounded<T> counted(plan, box, call.params, call.sizes, counting);
  counting.take<double>(counted.scratch_size());
  char* memory = static_cast<char*>(runtime.acquire(counting.lines()));
  if (!memory) return out_of_memory;
  Bump handing{memory, 0};
  Bounded<T> net(plan, box, call.params, call.sizes, handing);
  net.saved = call.saved;
  net.forward(handing.take<double>(net.scratch_size()));
  net.bound(static_cast<T*>(call.bound));
  const int64_t D = plan.D, d = plan.d;
  for (int64_t o = 0; o < D; ++o) {
    T* y = static_cast<T*>(call.y) + o;
    for (int64_t c = 0; c < box.k; ++c) {
      T unused;
      const T slope = T(net.sign(o, c)) * net.lift(o, c, &unused), middle = T(box.middle[c]);
      if (slope == T(0)) continue;
      const T* x = static_cast<const T*>(call.x) + box.columns[c];
      for (int64_t i = 0; i < call.N; ++i) y[i * D] += slope * (x[i * d] - middle);
    }
  }
  runtime.release(memory, counting.lines());
  return ok;
}

// What a backward works in.
template <class T> struct BoundedBackward {
  Bounded<T> net;
  T* of_bound;
  double *products, *adjoint;

  BoundedBackward(const Plan& plan, const Box& box, const LiftBackwardCall& call, Bump& memory)
      : net(plan, box, call.params, call.sizes, memory), of_bound(memory.take<T>(plan.D * box.k)),
        products(memory.take<double>(net.products_size())),
        adjoint(memory.take<double>(net.adjoint_size)) {
    net.saved = const_cast<double*>(call.saved);
  }
};

// Σ_i g_i (x_i - middle), in four chains: an addition waits for the one before it.
template <class T>
MK_INLINE double moment(int64_t N, const T* g, int64_t D, const T* x, int64_t d, T middle) {
  double total[4] = {};
  int64_t i = 0;
  for (; i + 4 <= N; i += 4) {
    for (int64_t q = 0; q < 4; ++q) {
      total[q] += double(g[(i + q) * D] * (x[(i + q) * d] - middle));
    }
  }
  for (; i < N; ++i) total[0] += double(g[i * D] * (x[i * d] - middle));
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <class T>
Status lift_backward(const Plan& plan, const Box& box, const LiftBackwardCall& call,
                     const Runtime& runtime) {
  Bump counting;
  const BoundedBackward<T> counted(plan, box, call, counting);
  char* memory = static_cast<char*>(runtime.acquire(counting.lines()));
  if (!memory) return out_of_memory;
  Bump handing{memory, 0};
  const BoundedBackward<T> pass(plan, box, call, handing);
  const int64_t D = plan.D, d = plan.d;
  bool any = false;
  for (int64_t o = 0; o < D; ++o) {
    const T* g = static_cast<const T*>(call.gy) + o;
    for (int64_t c = 0; c < box.k; ++c) {
      const int64_t one = o * box.k + c;
      T rate, of_bound = call.gbound ? static_cast<const T*>(call.gbound)[one] : T(0);
      const T sign = T(pass.net.sign(o, c)), slope = sign * pass.net.lift(o, c, &rate);
      if (rate != T(0)) {
        const T* x = static_cast<const T*>(call.x) + box.columns[c];
        of_bound -= rate * sign * T(moment(call.N, g, D, x, d, T(box.middle[c])));
      }
      if (T* gx = static_cast<T*>(call.gx)) {
        for (int64_t i = 0; i < call.N; ++i) gx[i * d + box.columns[c]] += g[i * D] * slope;
      }
      pass.of_bound[one] = of_bound;
      any |= of_bound != T(0);
    }
  }
  if (any) {
    clear(pass.adjoint, pass.net.adjoint_size);
    pass.net.backward(pass.of_bound, pass.adjoint, pass.products, call.grads);
  }
  runtime.release(memory, counting.lines());
  return ok;
}

}  // namespace
