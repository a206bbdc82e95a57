// LayerNorm and RMSNorm on both ways. z and r are here what they are in the mathematics of the norms: z
// the centred row, or the row itself, and r one over the root of its mean square.
#pragma once

#include "bound_memory.h"

namespace {

template <class T>
inline void Bounded<T>::normalise(int64_t v, Pair u, Pair to, double* scratch) const {
  const Norm norm = norm_of(node_of(v));
  const int64_t H = norm.H, whole = ld(v);
  double *low = scratch, *high = scratch + whole;
  const double most = norm.most();
  for (int64_t i = 0; i < B; ++i) {
    norm.centre(u.a + i * u.ld, u.b + i * u.ld, low, high);
    const Interval r = norm.inverse_root(low, high);
    more(v)[2 * i] = r.low, more(v)[2 * i + 1] = r.high;
    for (int64_t j = 0; j < H; j += at_once) {
      const Intervals z{load(low + j), load(high + j)};
      to.put(i, j, Norm::within(Corners(z, spread(r)).interval(), most));
    }
  }
  for (int64_t i = B; i < R; ++i) {
    const int64_t b = i % B;
    const Interval r = root(v, b);
    norm.centre(u.a + i * u.ld, u.b + i * u.ld, low, high);
    const Interval along = Norm::within(norm.terms(low, high, to, b), norm.norm(low, high));
    for (int64_t j = 0; j < H; j += at_once) {
      const Intervals taken = Corners(to.from(b, j), spread(along)).interval();
      const Intervals left = outward(load(low + j) - taken.high, load(high + j) - taken.low);
      to.put(i, j, Corners(spread(r), left).interval());
    }
  }
}

template <class T>
template <class Of>
inline void Bounded<T>::pull_norm(int64_t v, const Of& of, double* products) const {
  const Norm norm = norm_of(node_of(v));
  const int64_t H = norm.H, whole = ld(v), first = node_of(v).input[0];
  const Pair g = of(v), e = ends(v), u = ends(first);
  double *low = products, *high = low + whole;  // of z
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
    const Interval r = root(v, b);
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
    const Interval r = root(v, b);
    norm.centre(u.a + b * u.ld, u.b + b * u.ld, low, high);
    double to_r[2];
    add_up(H, to_r, [&](int64_t j, Doubles* each) {
      const Intervals z{load(low + j), load(high + j)}, given = g.from(b, j);
      const Corners product(z, spread(r));
      const Intervals value = product.interval();
      Intervals to_z{}, by_r{};
      product.pull(
          {where(~(value.low < -most), given.low), where(~(value.high > most), given.high)}, z,
          spread(r), &to_z, &by_r);
      store(to_low + j, to_z.low), store(to_high + j, to_z.high);
      each[0] = by_r.low, each[1] = by_r.high;
    });
    norm.pull_inverse_root({of_r[2 * b] + to_r[0], of_r[2 * b + 1] + to_r[1]}, r, low, high, to_low,
                           to_high);
    give(b);
  }
}

}  // namespace
