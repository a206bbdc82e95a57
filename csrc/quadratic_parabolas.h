// Parabolas along σ and σ' between the ends of a neuron's argument, in place of which forms have them.
#pragma once

#include "apply.h"
#include "quadratic_memory.h"

namespace {
namespace quadratic {

constexpr double shares[] = {1, 0.5, 0};  // BENT of quadratic.py

// σ'' or σ''' on an interval.
struct Range {
  Doubles low, high;
};
// σ'' on [lower, upper], from what it is at both ends.
MK_INLINE Range second_on(const Curve& f, Doubles lower, Doubles upper, Doubles at_lower,
                          Doubles at_upper) {
  const Doubles none = 0.0 * (at_lower + at_upper);  // or NaN
  Doubles low = lesser(at_lower, at_upper) + none, high = greater(at_lower, at_upper) + none;
  for (int64_t i = 0; i < f.turns; ++i) {
    const double place = f.turn[3 * i], near = 4 * epsilon * size_of(place);
    const auto inside = (lower <= place + near) & (upper >= place - near);
    low = inside ? lesser(low, splat(f.turn[3 * i + 1])) : low;
    high = inside ? greater(high, splat(f.turn[3 * i + 2])) : high;
  }
  low -= epsilon * f.relative * size_of(low) + f.absolute;
  high += epsilon * f.relative * size_of(high) + f.absolute;
  const auto is_one = lower <= upper;
  return {is_one ? low : splat(not_a_number), is_one ? high : splat(not_a_number)};
}

// σ''' there: the ends are 2ρ apart.
MK_INLINE Range third_on(const ChainLayer& layer, Doubles rho, Doubles at_lower, Doubles at_upper) {
  const Curve& f = layer.curve[2];
  const Doubles largest = greater(size_of(at_lower), size_of(at_upper));
  Doubles off = 2.0 * (epsilon * f.relative * largest + f.absolute);
  const Doubles mean = (at_upper - at_lower) / (2.0 * rho);
  off = (off + 8 * roundoff * largest) / rho + 2 * layer.fourth * rho * (1 + 8 * roundoff);
  off += 16 * roundoff * size_of(mean);
  const Doubles most = splat(layer.third);
  Doubles low = mean - off, high = mean + off;
  low = low > -most ? low : -most;  // as it is where that is NaN
  high = high < most ? high : most;
  return {lesser(low, most), greater(high, -most)};
}

// Where a knot lies between the ends, in [-1, 1].
constexpr double share(int64_t knot) { return double(2 * knot - (knots - 1)) / double(knots - 1); }

// The arguments of some neurons: both ends, how far the middle is away from c, and ρ, half of their
// distance.
struct Spot {
  Doubles lower, upper, away, rho;
};
MK_INLINE Spot spot_of(const Work& w, const Form& a, int64_t j) {
  const double* const ends = w.places + knots * w.wide;
  Spot spot;
  spot.lower = load(ends + j), spot.upper = load(ends + w.wide + j);
  spot.away = 0.5 * spot.lower + 0.5 * spot.upper - load(a.c() + j);
  spot.rho = (0.5 * spot.upper - 0.5 * spot.lower) * (1 + 4 * roundoff) +
             8 * roundoff * (size_of(spot.lower) + size_of(spot.upper));
  return spot;
}

// The pairs of columns along which a rises or falls everywhere: there each is one number at each end.
struct Pairs {
  Doubles shift, same;  // the sum of these numbers, and of their sizes
};
MK_INLINE Pairs pairs_of(const Work& w, const Form& a, int64_t j) {
  const int64_t m = w.m;
  const double sure = 1 + double(4 * (m + 2)) * roundoff;
  Doubles shift = Doubles{}, same = Doubles{};
  double* const signs = w.signs;  // before they are known, how far the columns may turn
  for (int64_t i = 0; i < m; ++i) store(signs + i * at_once, 4.0 * size_of(load(a.G(m + i) + j)));
  int64_t pair = 2 * m;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t other = i + 1; other < m; ++other, ++pair) {
      const Doubles both = size_of(load(a.G(pair) + j));
      store(signs + i * at_once, load(signs + i * at_once) + both);
      store(signs + other * at_once, load(signs + other * at_once) + both);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    const Doubles g = load(a.G(i) + j);
    const Doubles one = g > 0.0 ? splat(1.0) : (g < 0.0 ? splat(-1.0) : Doubles{});
    store(signs + i * at_once, size_of(g) >= load(signs + i * at_once) * sure ? one : Doubles{});
  }
  pair = 2 * m;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t other = i + 1; other < m; ++other, ++pair) {
      const Doubles there =
          load(signs + i * at_once) * load(signs + other * at_once) * load(a.G(pair) + j);
      shift += there, same += size_of(there);
    }
  }
  return {shift, same};
}

// Sets the sizes of the parts of a, both ends of it, and the knots between them.
MK_INLINE void ends_of(const Work& w, const Form& a, int64_t j) {
  const int64_t m = w.m;
  const double narrow = double(4 * (w.terms + 8)) * roundoff;
  Doubles linear = Doubles{}, rest = Doubles{}, squares = Doubles{}, low = Doubles{},
          high = Doubles{};
  for (int64_t i = 0; i < m; ++i) {
    const Doubles g = load(a.G(i) + j), h = a.terms > m ? load(a.G(m + i) + j) : Doubles{};
    linear += size_of(g), squares += size_of(h);
    low += least(g, h), high += least(g, -h);
  }
  for (int64_t i = m; i < a.terms; ++i) rest += size_of(load(a.G(i) + j));
  linear *= w.more(), rest *= w.more();
  store(a.linear() + j, linear), store(a.bent() + j, rest);
  rest += load(a.e() + j);
  const Pairs pairs = a.terms > m ? pairs_of(w, a, j) : Pairs{};
  const Doubles c = load(a.c() + j), others = max_zero<double>(rest - squares - pairs.same);
  const Doubles rounding = (size_of(c) + rest - low - high) * narrow;
  double* const ends = w.places + knots * w.wide;
  store(ends + j, c + low + pairs.shift - others - rounding);
  store(ends + w.wide + j, c - high + pairs.shift + others + rounding);
  const Spot spot = spot_of(w, a, j);
  MK_UNROLL
  for (int64_t knot = 0; knot < knots; ++knot) {
    store(w.places + knot * w.wide + j, spot.away + share(knot) * spot.rho + c);
  }
}

// Closest in the mean, the ends counting more as they do for the largest error.
struct Means {
  double weight[knots], s_0 = 0, s_2 = 0, s_4 = 0;

  Means() {
    for (int64_t knot = 0; knot < knots; ++knot) {
      const double square = share(knot) * share(knot);
      weight[knot] = 1 / __builtin_sqrt(1.08 - square);
      s_0 += weight[knot], s_2 += weight[knot] * square, s_4 += weight[knot] * square * square;
    }
  }
};

// What of some neurons is the same for the parabolas of both orders. (l + q)², with l what is linear in
// a and q what is quadratic, is l² + 2 l q and at most q² more.
struct Argument {
  Spot spot;
  Doubles c, far_off, e, linear, bent;
  Doubles half, lost;          // of q², and of 2 l q and that
  Doubles between;             // what f is off between two knots for each of |f'' - 2 bend|
  Doubles at_lower, at_upper;  // σ''
};
MK_INLINE Argument argument_of(const Work& w, const Form& a, int64_t j) {
  Argument x;
  x.spot = spot_of(w, a, j);
  x.c = load(a.c() + j), x.far_off = size_of(x.spot.away) + x.spot.rho, x.e = load(a.e() + j);
  x.linear = load(a.linear() + j), x.bent = load(a.bent() + j);
  x.half = 0.5 * x.bent * x.bent, x.lost = 2.0 * x.linear * x.bent + x.half;
  const Doubles gap = x.spot.rho / double(knots - 1);
  x.between = 0.5 * gap * gap;
  const double* const ends = w.values[2] + knots * w.wide;
  x.at_lower = load(ends + j), x.at_upper = load(ends + w.wide + j);
  return x;
}

// The closest of some parabolas along the curve of an order, as _parabola of quadratic.py finds it.
MK_INLINE void closest(const Work& w, const ChainLayer& layer, int order, const Means& means,
                       const Argument& x, int64_t j, const Curved& to) {
  const Curve& f = layer.curve[order];
  const Spot& spot = x.spot;
  Doubles value[knots], largest = Doubles{}, none = Doubles{};
  Doubles b_0 = Doubles{}, b_1 = Doubles{}, b_2 = Doubles{};
  MK_UNROLL
  for (int64_t knot = 0; knot < knots; ++knot) {
    value[knot] = load(w.values[order] + knot * w.wide + j);
    const Doubles weighted = means.weight[knot] * value[knot];
    b_0 += weighted, b_1 += share(knot) * weighted, b_2 += share(knot) * share(knot) * weighted;
    largest = greater(largest, size_of(value[knot])), none += 0.0 * value[knot];
  }
  const double s_0 = means.s_0, s_2 = means.s_2, s_4 = means.s_4;
  const Doubles slope = finite(b_1 / (s_2 * spot.rho));
  const Doubles bend =
      finite((s_0 * b_2 - s_2 * b_0) / ((s_0 * s_4 - s_2 * s_2) * spot.rho * spot.rho));
  // The knots are rounded, and so is what is computed of them.
  Doubles noise = 2.0 * (epsilon * f.relative * largest + f.absolute) +
                  16 * roundoff * (size_of(x.c) + x.far_off);
  noise += 16 * roundoff *
           (largest + size_of(slope) * x.far_off + 3.0 * size_of(bend) * x.far_off * x.far_off);
  noise += least_size + none;
  const Range bent_by =
      order == 0 ? second_on(layer.curve[2], spot.lower, spot.upper, x.at_lower, x.at_upper)
                 : third_on(layer, spot.rho, x.at_lower, x.at_upper);
  Doubles best_at = Doubles{}, best_slope = Doubles{}, best_bend = Doubles{};
  Doubles best_off = splat(infinity), fewest = best_off;
  for (const double part : shares) {
    const Doubles bent = bend * part, twice = 2.0 * bent;
    Doubles low = splat(infinity), high = splat(-infinity), every = Doubles{};
    MK_UNROLL
    for (int64_t knot = 0; knot < knots; ++knot) {
      const Doubles place = spot.away + share(knot) * spot.rho;
      Doubles off = value[knot] - place * slope;
      if (part) off -= place * (place - 2.0 * spot.away) * bent;
      low = lesser(low, off), high = greater(high, off), every += 0.0 * off;
    }
    // NaN where any number is: no comparison above sees it.
    const Doubles most = greater(size_of(bent_by.low - twice), size_of(bent_by.high - twice)) +
                         0.0 * (bent_by.low + bent_by.high) + every;
    const Doubles off = (0.5 * high - 0.5 * low + most * x.between) * (1 + 16 * roundoff) + noise;
    const Doubles every_off = off + size_of(bent) * x.lost;
    const auto closer = every_off < fewest;
    best_at = closer ? 0.5 * low + 0.5 * high : best_at;
    best_slope = closer ? slope - twice * spot.away : best_slope;
    best_bend = closer ? bent : best_bend;
    best_off = closer ? off : best_off;
    fewest = closer ? every_off : fewest;
  }
  const Doubles sized = size_of(best_bend);
  store(to.at + j, best_at), store(to.slope + j, best_slope), store(to.bend + j, best_bend);
  store(to.all + j, best_off + sized * x.lost), store(to.left + j, best_off + sized * x.half);
  store(to.steep + j, size_of(best_slope) + sized * (2.0 * (x.linear + x.bent) + x.e));
}

// Parabolas along σ' and, unless it is of the last layer, σ between the ends of an argument a.
void parabolas(const Work& w, const Layer& of, const ChainLayer& layer, int64_t H, bool both) {
  const int64_t columns = whole_vectors<double>(H), ld = w.wide;
  for (int64_t j = 0; j < columns; j += at_once) ends_of(w, of.a, j);
  const Numbers<double> numbers{layer.numbers[0], layer.numbers[1], layer.numbers[2]};
  orders_of<double>(int(layer.kind))[all_orders](
      {knots + 2, columns, w.places, ld, w.values[0], w.values[1], w.values[2], ld}, numbers);
  const Means means;
  for (int64_t j = 0; j < columns; j += at_once) {
    const Argument x = argument_of(w, of.a, j);
    for (int order = both ? 0 : 1; order < 2; ++order) {
      closest(w, layer, order, means, x, j, order ? of.first : of.value);
    }
  }
  // Beyond the last neuron nothing was bounded.
  const Curved curves[] = {of.first, of.value};
  for (const Curved& to : curves) {
    double* const rows[] = {to.at, to.slope, to.bend, to.all, to.left, to.steep};
    for (double* row : rows) clear(row + H, columns - H);
  }
}

}  // namespace quadratic
}  // namespace
