// Sound bounds of a chain's slopes to the second order, quadratic forms in double, box by box: what
// monokernel/quadratic.py says, where the mathematics is described, and with its rounding.
//
// A form lies in rows of one stride, each over the neurons of a layer: how large what is linear in the
// box can be and what is quadratic, then e, c and the terms. Rows go through a layer by one product; all
// between two products is done in one or two passes over rows that are in the cache.
#pragma once

#include "apply.h"
#include "blocks.h"
#include "intervals.h"

namespace {
namespace quadratic {

typedef Vec<double> V;
constexpr int64_t lanes = Simd<double>::lanes;
constexpr double u = 0x1p-53, least_size = 1e-300;  // U and TINY of monokernel/enclosures.py
// KNOTS, SETTLED and BENT of quadratic.py.
constexpr int64_t knots = 9, rounds = 3;
constexpr double shares[] = {1, 0.5, 0};

MK_INLINE double gamma(int64_t n) { return double(n) * u / (1 - double(n) * u); }
MK_INLINE int64_t terms(int64_t m) { return 2 * m + m * (m - 1) / 2; }
// What n products and all that goes before and after them may be rounded by.
MK_INLINE double rounding_of(const Chain& chain, int64_t n, int64_t m) {
  return 4 * gamma(n + m * m + 32 + chain.folded);
}
MK_INLINE V size(V a) { return abs_of<double>(a); }
MK_INLINE V lesser(V a, V b) { return a < b ? a : b; }
MK_INLINE V greater(V a, V b) { return a > b ? a : b; }
// NaN stays NaN.
MK_INLINE V at_least_zero(V a) { return a < 0.0 ? V{} : a; }
// What is not finite becomes 0.
MK_INLINE V finite(V a) { return size(a) < infinity ? a : V{}; }

struct Form {
  double* base;
  int64_t ld, S;  // S: terms

  static constexpr int64_t before = 4;  // rows before the terms
  double* linear() const { return base; }
  double* bent() const { return base + ld; }
  double* e() const { return base + 2 * ld; }
  double* c() const { return base + 3 * ld; }
  double* G(int64_t s) const { return base + (before + s) * ld; }
};

MK_INLINE V at(const double* row, int64_t j) { return load(row + j); }

// f = σ or σ' of an a, rows over the neurons: Curved of quadratic.py, but for the form.
struct Curved {
  double *at, *slope, *bend, *all, *left, *steep, *whole;
};

// How much the slopes change with a row of neurons, rows over these: Weights of quadratic.py. For each
// slope that is asked for 1 + m rows, what it is in the middle and what is linear in the box; then a row
// for each with the size of all else, and one with how large those of any are in any case.
struct Rates {
  double *rows, *rest;
  int64_t ld, m;

  double* at(int64_t q) const { return rows + q * (1 + m) * ld; }
  double* whole(int64_t count) const { return rest + count * ld; }
};

// A weight as products read it, and its sizes.
struct Weight {
  Packing<double> signed_, sizes;
  int64_t in, out;

  void pack() const {
    for (int64_t p = 0; p < signed_.panels(); ++p) signed_.panel(p);
    const int64_t n = packed_size<double>(in, out);
    for (int64_t i = 0; i < n; i += lanes) store(sizes.to + i, size(load(signed_.to + i)));
  }
  // f(column, vector) along row j of the matrix that multiplies from the right.
  template <class F> static MK_INLINE void each(const Matrix<double>& b, int64_t j, const F& f) {
    for (int64_t first = 0; first < b.N; first += panel_width<double>) {
      const double* row = b.panel(first) + j * b.stride(first);
      for (int64_t i = 0; i < b.width(first); i += lanes) f(first + i, load(row + i));
    }
  }
};

// The least value of g ε + h T(ε), T(ε) = 2ε² - 1.
MK_INLINE V least(V g, V h) {
  const V steep = size(g);
  const auto inside = steep < 4.0 * h;
  return inside ? -(steep * steep) / (8.0 * (inside ? h : splat(1.0))) - h : h - steep;
}

// Σ_i (g_i ε_i + h_i T(ε_i)) + ½ εᵀHε and where it is lowest: _least_of in quadratic.py. Rows have m
// numbers, padded with zeros to whole vectors; H and its sizes have m rows.
struct Symmetric {
  int64_t m, ld;
  double *g, *h, *H, *sizes, *open, *at, *slope, *first;

  static MK_INLINE void times(int64_t m, int64_t ld, const double* H, const double* v, double* to) {
    for (int64_t j = 0; j < ld; j += lanes) {
      V total = V{};
      for (int64_t i = 0; i < m; ++i) total += v[i] * load(H + i * ld + j);
      store(to + j, total);
    }
  }
  void negate() const {
    for (int64_t j = 0; j < ld; j += lanes) store(g + j, -load(g + j)), store(h + j, -load(h + j));
    for (int64_t j = 0; j < m * ld; j += lanes) store(H + j, -load(H + j));
  }
  double lowest() const {
    for (int64_t j = 0; j < ld; ++j) open[j] = j < m, at[j] = 0;
    for (int64_t i = 0; i < rounds; ++i) {
      times(m, ld, H, at, slope);
      times(m, ld, sizes, open, first);  // which is free until the end of the first round
      for (int64_t j = 0; j < ld; j += lanes) {
        const V s = load(g + j) + load(slope + j), free = load(open + j);
        const V moves = 4.0 * size(load(h + j)) + load(first + j);
        const auto settles = (size(s) >= moves) & (free > 0.0);
        const V end = s > 0.0 ? splat(-1.0) : (s < 0.0 ? splat(1.0) : V{});
        store(at + j, settles ? end : load(at + j));
        store(open + j, settles ? V{} : free);
      }
    }
    times(m, ld, H, at, slope);
    times(m, ld, sizes, open, first);
    V ends = V{}, settled = V{}, others = V{}, total = V{};
    for (int64_t j = 0; j < ld; j += lanes) {
      const V G = load(g + j), bent = load(h + j), tied = load(slope + j), free = load(open + j);
      ends += free > 0.0 ? least(G + tied, bent) : G * load(at + j) + bent;
      settled += load(at + j) * tied;
      others += free * load(first + j);
      total += size(G) + size(bent);
    }
    for (int64_t j = 0; j < m * ld; j += lanes) total += load(sizes + j);
    return sum<double>(ends) + 0.5 * sum<double>(settled) - 0.5 * sum<double>(others) -
           double(4 * (m * m + 16)) * u * sum<double>(total);
  }
  // Sets `first` to 1 for each column that is not known to rise or to fall as the form stands.
  void unsettled() const {
    for (int64_t j = 0; j < ld; ++j) open[j] = j < m;
    times(m, ld, sizes, open, slope);
    for (int64_t j = 0; j < ld; j += lanes) {
      const V moves = 4.0 * size(load(h + j)) + load(slope + j);
      const auto settles = size(load(g + j)) >= moves;
      store(first + j, settles ? V{} : load(open + j));
    }
  }
};

// A layer of one box.
struct Layer {
  Form a, s;            // s = σ'(a)
  Curved first, value;  // along σ' and σ
  Rates t;              // of σ' ∘ P
};

// All that a call works in: packed weights and, for one box at a time, the forms.
struct Work {
  const Chain& chain;
  const SlopesCall& call;
  // T: terms of a form; wide: the stride of forms.
  int64_t m, T, L, K, wide;
  Weight *forward, *backward;  // of each layer
  Layer* layer;
  Packing<double> square;  // what the cubic products multiply by
  Form h, P, p;
  Rates u, alpha, scratch;   // alpha: of a
  double *knot, *values[3];  // arguments of curves and what these are
  double* signs;             // of a vector of neurons, for each column
  double *left, *scaled, *weight;
  double* errors;  // of each slope that is asked for, over the neurons
  double* M;       // (T - m, K m): what is cubic, a row for each quadratic term
  double* last;    // the slopes' own form
  int64_t ld_M, ld_last;
  double *blame, *third;  // of the slopes that are asked for, (K, m) and (K,)
  int64_t* wanted;
  Symmetric of;

  Work(const Chain& given, const SlopesCall& asked, Bump& memory)
      : chain(given), call(asked), m(asked.m), T(terms(m)), L(given.layers), K(asked.K) {
    wide = 0;
    for (int64_t l = 0; l < L; ++l) wide = max_of(wide, max_of(in(l), out(l)));
    wide = max_of(wide, max_of(K, chain.layer[0].in));
    wide = scratch_ld<double>(wide);
    forward = memory.take<Weight>(L), backward = memory.take<Weight>(L),
    layer = memory.take<Layer>(L);
    for (int64_t l = 0; l < L; ++l) {
      const ChainLayer& of_l = chain.layer[l];
      // Of the last layer one row, of the first the columns that are asked for.
      const double* W = of_l.W + (l == L - 1 ? call.output * of_l.in : 0);
      const Weight to = weight_of(memory, W, 1, of_l.in, of_l.in, out(l), nullptr);
      const Weight from =
          weight_of(memory, W, of_l.in, 1, out(l), l ? of_l.in : K, l ? nullptr : call.columns);
      const Layer here{form(memory), form(memory), curved(memory), curved(memory), rates(memory)};
      if (forward) forward[l] = to, backward[l] = from, layer[l] = here;
    }
    h = form(memory), P = form(memory), p = form(memory);
    u = rates(memory), alpha = rates(memory), scratch = rates(memory);
    knot = memory.take<double>((knots + 2) * wide);
    for (double*& of_order : values) of_order = memory.take<double>((knots + 2) * wide);
    signs = memory.take<double>(m * lanes), left = memory.take<double>(wide);
    const int64_t rows = round_up(max_of<int64_t>(K * m, 1), lanes);
    scaled = memory.take<double>(rows * wide);
    square = {
        memory.take<double>(packed_size<double>(wide, rows)), nullptr, 1, wide, 0, 0, nullptr};
    weight = memory.take<double>(K * wide), errors = memory.take<double>(K * wide);
    ld_M = scratch_ld<double>(rows), ld_last = scratch_ld<double>(K);
    M = memory.take<double>((T - m) * ld_M);
    last = memory.take<double>((Form::before + T) * ld_last);
    blame = memory.take<double>(rows), third = memory.take<double>(K);
    wanted = memory.take<int64_t>(K);
    const int64_t n = round_up(m, lanes);
    of = {m, n, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    double** const rows_of[] = {&of.g, &of.h, &of.open, &of.at, &of.slope, &of.first};
    for (double** row : rows_of) *row = memory.take<double>(n);
    of.H = memory.take<double>(m * n), of.sizes = memory.take<double>(m * n);
  }

  int64_t in(int64_t l) const { return chain.layer[l].in; }
  int64_t out(int64_t l) const { return l == L - 1 ? 1 : chain.layer[l].out; }
  bool bends(int64_t l) const { return chain.layer[l].kind != 0; }
  const double* bias(int64_t l) const { return chain.layer[l].b + (l == L - 1 ? call.output : 0); }

  void pack() const {
    for (int64_t l = 0; l < L; ++l) forward[l].pack(), backward[l].pack();
  }
  Form form(Bump& memory) const {
    return {memory.take<double>((Form::before + T) * wide), wide, 0};
  }
  Curved curved(Bump& memory) const {
    Curved f;
    double** const rows[] = {&f.at, &f.slope, &f.bend, &f.all, &f.left, &f.steep, &f.whole};
    for (double** row : rows) *row = memory.take<double>(wide);
    return f;
  }
  Rates rates(Bump& memory) const {
    double* rows = memory.take<double>(K * (1 + m) * wide);
    return {rows, memory.take<double>((K + 1) * wide), wide, m};
  }
  Weight weight_of(Bump& memory, const double* W, int64_t row, int64_t column, int64_t n,
                   int64_t to, const int64_t* chosen) const {
    const int64_t size = packed_size<double>(n, to);
    double *one = memory.take<double>(size), *other = memory.take<double>(size);
    return {{one, W, row, column, n, to, chosen}, {other, W, row, column, n, to, chosen}, n, to};
  }
};

MK_INLINE void product(int64_t rows, const double* from, int64_t ld, const Matrix<double>& by,
                       double* to, int64_t ld_to) {
  gemm<false, double>(rows, by.K, from, ld, by, 0, from_zero<double>(), to, ld_to, Nothing{});
}

// x over one box: behind the first layer, W x + b.
void first_layer(const Work& w, const double* c, const double* r, Form& to) {
  const Weight& W = w.forward[0];
  const ChainLayer& layer = w.chain.layer[0];
  const double rounding = gamma(W.in + 2 + w.chain.folded), more = 1 + double(2 * (w.T + 2)) * u;
  for (int64_t j = 0; j < W.in; ++j) w.left[j] = r[j] * more;
  for (int64_t i = 0; i < w.m; ++i) w.left[w.call.moving[i]] = 0;
  for (int64_t j = 0; j < W.in; ++j) {
    w.left[j] += rounding * (size_of(c[j]) + r[j] * more);
  }
  product(1, c, W.in, W.signed_.matrix(), to.c(), to.ld);
  product(1, w.left, w.wide, W.sizes.matrix(), to.e(), to.ld);
  for (int64_t j = 0; j < W.out; ++j) {
    const double b = layer.b[w.L == 1 ? w.call.output : j];
    to.c()[j] += b;
    to.e()[j] =
        to.e()[j] * (1 + 2 * rounding) + least_size + rounding * (size_of(b) + size_of(to.c()[j]));
  }
  to.S = w.m;
  for (int64_t i = 0; i < w.m; ++i) {
    const int64_t x = w.call.moving[i];
    Weight::each(W.signed_.matrix(), x, [&](int64_t j, V v) { store(to.G(i) + j, r[x] * v); });
  }
}

// W h + b.
void through(const Work& w, const Form& h, int64_t l, Form& to) {
  const Weight& W = w.forward[l];
  const double rounding = gamma(W.in + 2 + w.chain.folded), *b = w.bias(l);
  product(1 + h.S, h.c(), h.ld, W.signed_.matrix(), to.c(), to.ld);
  to.S = h.S;
  for (int64_t j = 0; j < W.in; ++j) {
    const double size = size_of(h.c()[j]) + h.linear()[j] + h.bent()[j] + h.e()[j];
    w.left[j] = h.e()[j] + rounding * size;
  }
  product(1, w.left, w.wide, W.sizes.matrix(), to.e(), to.ld);
  for (int64_t j = 0; j < W.out; ++j) {
    to.c()[j] += b[j];
    to.e()[j] = to.e()[j] * (1 + 2 * rounding) + least_size +
                rounding * (size_of(b[j]) + size_of(to.c()[j]));
  }
}

// Sets how large the parts of a form are.
void measure(const Work& w, const Form& a, int64_t H) {
  const double more = 1 + double(2 * (w.T + 2)) * u;
  const int64_t m = min_of(w.m, a.S);
  for (int64_t j = 0; j < H; j += lanes) {
    V linear = V{}, bent = V{};
    for (int64_t i = 0; i < m; ++i) linear += size(at(a.G(i), j));
    for (int64_t i = m; i < a.S; ++i) bent += size(at(a.G(i), j));
    store(a.linear() + j, linear * more);
    store(a.bent() + j, bent * more);
  }
}

// σ'' on [lower, upper], from what it is at both ends.
struct Range {
  V low, high;
};
MK_INLINE Range second_on(const Curve& f, V lower, V upper, V at_lower, V at_upper) {
  const V none = 0.0 * (at_lower + at_upper);  // or NaN
  V low = lesser(at_lower, at_upper) + none, high = greater(at_lower, at_upper) + none;
  for (int64_t i = 0; i < f.turns; ++i) {
    const double place = f.turn[3 * i], near = 4 * epsilon * size_of(place);
    const auto inside = (lower <= place + near) & (upper >= place - near);
    low = inside ? lesser(low, splat(f.turn[3 * i + 1])) : low;
    high = inside ? greater(high, splat(f.turn[3 * i + 2])) : high;
  }
  low -= epsilon * f.relative * size(low) + f.absolute;
  high += epsilon * f.relative * size(high) + f.absolute;
  const auto is_one = lower <= upper;
  return {is_one ? low : splat(not_a_number), is_one ? high : splat(not_a_number)};
}

// σ''' there: the ends are 2ρ apart.
MK_INLINE Range third_on(const ChainLayer& layer, V radius, V at_lower, V at_upper) {
  const Curve& f = layer.curve[2];
  const V largest = greater(size(at_lower), size(at_upper));
  V off = 2.0 * (epsilon * f.relative * largest + f.absolute);
  const V mean = (at_upper - at_lower) / (2.0 * radius);
  off = (off + 8 * u * largest) / radius + 2 * layer.fourth * radius * (1 + 8 * u);
  off += 16 * u * size(mean);
  const V most = splat(layer.third);
  V low = mean - off, high = mean + off;
  low = low > -most ? low : -most;  // as it is where that is NaN
  high = high < most ? high : most;
  return {lesser(low, most), greater(high, -most)};
}

// Parabolas along σ' and, unless it is of the last layer, σ between the ends of an argument a.
void parabolas(const Work& w, const Layer& of, const ChainLayer& layer, int64_t H, bool both) {
  const Form& a = of.a;
  const int64_t m = w.m, columns = whole_vectors<double>(H), ld = w.wide;
  const double narrow = double(4 * (w.T + 8)) * u, sure = 1 + double(4 * (m + 2)) * u;
  double *lower_row = w.knot + knots * ld, *upper_row = lower_row + ld;
  const auto share = [](int64_t k) { return double(2 * k - (knots - 1)) / double(knots - 1); };
  const auto spot = [&](int64_t j, V& lower, V& upper, V& away, V& radius) {
    lower = load(lower_row + j), upper = load(upper_row + j);
    away = 0.5 * lower + 0.5 * upper - at(a.c(), j);
    radius = (0.5 * upper - 0.5 * lower) * (1 + 4 * u) + 8 * u * (size(lower) + size(upper));
  };
  for (int64_t j = 0; j < columns; j += lanes) {
    V linear = V{}, rest = V{}, squares = V{}, low = V{}, high = V{};
    for (int64_t i = 0; i < m; ++i) {
      const V g = at(a.G(i), j), h = a.S > m ? at(a.G(m + i), j) : V{};
      linear += size(g), squares += size(h);
      low += least(g, h), high += least(g, -h);
    }
    for (int64_t i = m; i < a.S; ++i) rest += size(at(a.G(i), j));
    const double more = 1 + double(2 * (w.T + 2)) * u;
    linear *= more, rest *= more;
    store(a.linear() + j, linear), store(a.bent() + j, rest);
    rest += at(a.e(), j);
    // Both ends are at those of each column along which a rises or falls everywhere; there the pairs
    // of such columns are the same number.
    V shift = V{}, same = V{};
    if (a.S > m) {
      double* const signs = w.signs;  // before they are known, how far the columns may turn
      for (int64_t i = 0; i < m; ++i) store(signs + i * lanes, 4.0 * size(at(a.G(m + i), j)));
      int64_t pair = 2 * m;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t k = i + 1; k < m; ++k, ++pair) {
          const V both = size(at(a.G(pair), j));
          store(signs + i * lanes, load(signs + i * lanes) + both);
          store(signs + k * lanes, load(signs + k * lanes) + both);
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        const V g = at(a.G(i), j), one = g > 0.0 ? splat(1.0) : (g < 0.0 ? splat(-1.0) : V{});
        store(signs + i * lanes, size(g) >= load(signs + i * lanes) * sure ? one : V{});
      }
      pair = 2 * m;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t k = i + 1; k < m; ++k, ++pair) {
          const V there = load(signs + i * lanes) * load(signs + k * lanes) * at(a.G(pair), j);
          shift += there, same += size(there);
        }
      }
    }
    const V c = at(a.c(), j), others = at_least_zero(rest - squares - same);
    const V rounding = (size(c) + rest - low - high) * narrow;
    store(lower_row + j, c + low + shift - others - rounding);
    store(upper_row + j, c - high + shift + others + rounding);
    V lower, upper, away, radius;
    spot(j, lower, upper, away, radius);
    MK_UNROLL
    for (int64_t k = 0; k < knots; ++k) {
      store(w.knot + k * ld + j, away + share(k) * radius + c);
    }
  }
  const Numbers<double> numbers{layer.numbers[0], layer.numbers[1], layer.numbers[2]};
  orders_of<double>(int(layer.kind))[all_orders](
      {knots + 2, columns, w.knot, ld, w.values[0], w.values[1], w.values[2], ld}, numbers);

  // Closest in the mean, the ends counting more as they do for the largest error.
  double weight[knots], s_0 = 0, s_2 = 0, s_4 = 0;
  for (int64_t k = 0; k < knots; ++k) {
    const double x = share(k) * share(k);
    weight[k] = 1 / __builtin_sqrt(1.08 - x);
    s_0 += weight[k], s_2 += weight[k] * x, s_4 += weight[k] * x * x;
  }
  for (int64_t j = 0; j < columns; j += lanes) {
    V lower, upper, away, radius;
    spot(j, lower, upper, away, radius);
    const V c = at(a.c(), j), far_off = size(away) + radius, e = at(a.e(), j);
    // (l + q)², with l what is linear in a and q what is quadratic, is l² + 2 l q and at most q² more.
    const V linear = at(a.linear(), j), bent_a = at(a.bent(), j);
    const V half = 0.5 * bent_a * bent_a, lost = 2.0 * linear * bent_a + half;
    const V gap = radius / double(knots - 1), between = 0.5 * gap * gap;
    const double* const ends = w.values[2] + knots * ld;
    const V at_lower = at(ends, j), at_upper = at(ends + ld, j);
    for (int order = both ? 0 : 1; order < 2; ++order) {
      const Curve& f = layer.curve[order];
      V value[knots], b_0 = V{}, b_1 = V{}, b_2 = V{}, largest = V{}, none = V{};
      MK_UNROLL
      for (int64_t k = 0; k < knots; ++k) {
        value[k] = at(w.values[order] + k * ld, j);
        const V weighted = weight[k] * value[k];
        b_0 += weighted, b_1 += share(k) * weighted, b_2 += share(k) * share(k) * weighted;
        largest = greater(largest, size(value[k])), none += 0.0 * value[k];
      }
      const V slope = finite(b_1 / (s_2 * radius));
      const V bend = finite((s_0 * b_2 - s_2 * b_0) / ((s_0 * s_4 - s_2 * s_2) * radius * radius));
      // The knots are rounded, and so is what is computed of them.
      V noise = 2.0 * (epsilon * f.relative * largest + f.absolute) + 16 * u * (size(c) + far_off);
      noise += 16 * u * (largest + size(slope) * far_off + 3.0 * size(bend) * far_off * far_off);
      noise += least_size + none;
      const Range bent_by = order == 0 ? second_on(layer.curve[2], lower, upper, at_lower, at_upper)
                                       : third_on(layer, radius, at_lower, at_upper);
      V best_at = V{}, best_slope = V{}, best_bend = V{}, best_off = splat(infinity);
      V fewest = best_off;
      for (const double part : shares) {
        const V bent = bend * part, twice = 2.0 * bent;
        V low = splat(infinity), high = splat(-infinity), every = V{};
        MK_UNROLL
        for (int64_t k = 0; k < knots; ++k) {
          const V t = away + share(k) * radius;
          V off = value[k] - t * slope;
          if (part) off -= t * (t - 2.0 * away) * bent;
          low = lesser(low, off), high = greater(high, off), every += 0.0 * off;
        }
        // NaN where any number is: no comparison above sees it.
        const V most = greater(size(bent_by.low - twice), size(bent_by.high - twice)) +
                       0.0 * (bent_by.low + bent_by.high) + every;
        const V off = (0.5 * high - 0.5 * low + most * between) * (1 + 16 * u) + noise;
        const V every_off = off + size(bent) * lost;
        const auto closer = every_off < fewest;
        best_at = closer ? 0.5 * low + 0.5 * high : best_at;
        best_slope = closer ? slope - twice * away : best_slope;
        best_bend = closer ? bent : best_bend;
        best_off = closer ? off : best_off;
        fewest = closer ? every_off : fewest;
      }
      const Curved& to = order ? of.first : of.value;
      const V sized = size(best_bend);
      store(to.at + j, best_at), store(to.slope + j, best_slope), store(to.bend + j, best_bend);
      store(to.all + j, best_off + sized * lost), store(to.left + j, best_off + sized * half);
      store(to.steep + j, size(best_slope) + sized * (2.0 * (linear + bent_a) + e));
    }
  }
  // Beyond the last neuron nothing was bounded.
  const Curved curves[] = {of.first, of.value};
  for (const Curved& to : curves) {
    double* const rows[] = {to.at, to.slope, to.bend, to.all, to.left, to.steep};
    for (double* row : rows) clear(row + H, columns - H);
  }
}

// f(a), and how large it is.
void along(const Work& w, const Form& a, const Curved& f, int64_t H, Form& to) {
  const int64_t m = w.m;
  to.S = w.T;
  const bool straight = a.S == m;  // a has only what is linear
  const double more = 1 + double(2 * (w.T + 2)) * u, short_ = double(16 + 2 * m) * u;
  for (int64_t j = 0; j < H; j += lanes) {
    const V slope = at(f.slope, j), bend = at(f.bend, j);
    const V linear_a = at(a.linear(), j), bent_a = at(a.bent(), j), e_a = at(a.e(), j);
    V c = at(f.at, j) + bend * (0.5 * bent_a * bent_a), linear = V{}, bent = V{};
    for (int64_t i = 0; i < m; ++i) {
      const V g = at(a.G(i), j), half = 0.5 * bend * g * g, grown = slope * g;
      c += half, linear += size(grown);
      store(to.G(i) + j, grown);
      const V square = straight ? half : slope * at(a.G(m + i), j) + half;
      bent += size(square);
      store(to.G(m + i) + j, square);
    }
    int64_t pair = 2 * m;
    for (int64_t i = 0; i < m; ++i) {
      const V twice = 2.0 * bend * at(a.G(i), j);
      for (int64_t q = i + 1; q < m; ++q, ++pair) {
        const V g = straight ? V{} : slope * at(a.G(pair), j);
        const V both = g + twice * at(a.G(q), j);
        bent += size(both);
        store(to.G(pair) + j, both);
      }
    }
    const V steep = at(f.steep, j), all = at(f.all, j);
    const V whole = size(c) + size(at(f.at, j)) + steep * (linear_a + bent_a + e_a) + all;
    const V e = (steep * e_a + all) * (1 + 16 * u) + short_ * whole + least_size;
    store(to.c() + j, c), store(to.e() + j, e), store(f.whole + j, whole);
    store(to.linear() + j, linear * more), store(to.bent() + j, bent * more);
  }
}

// `from` times W.
void through(const Work& w, const Rates& from, const Weight& W, int64_t count, const Rates& to) {
  const double off = rounding_of(w.chain, W.in, w.m);
  product((1 + w.m) * count, from.rows, from.ld, W.signed_.matrix(), to.rows, to.ld);
  product(1 + count, from.rest, from.ld, W.sizes.matrix(), to.rest, to.ld);
  double* const whole = to.whole(count);
  for (int64_t j = 0; j < W.out; j += lanes) {
    const V most = at(whole, j) * (1 + 2 * off) + least_size;
    store(whole + j, most);
    for (int64_t q = 0; q < count; ++q) {
      double* const rest = to.rest + q * to.ld + j;
      store(rest, load(rest) * (1 + 2 * off) + off * most + least_size);
    }
  }
}

// How much the slopes change with σ' ∘ P of layer l, from what they do with that of the layer before.
void forwards(const Work& w, int64_t l, int64_t count) {
  const Layer& before = w.layer[l - 1];
  const Rates &from = before.t, &to = w.scratch;
  if (!w.bends(l - 1)) return through(w, from, w.forward[l], count, w.layer[l].t);
  const Form& s = before.s;
  const int64_t m = w.m, H = w.out(l - 1);
  for (int64_t j = 0; j < H; j += lanes) {
    const V c = at(s.c(), j), l_s = at(s.linear(), j), r_s = at(s.bent(), j) + at(s.e(), j);
    for (int64_t q = 0; q < count; ++q) {
      const double* row = from.at(q) + j;
      double* new_row = to.at(q) + j;
      const V t = load(row), rest = at(from.rest + q * from.ld, j);
      V varies = rest;
      store(new_row, t * c);
      for (int64_t i = 0; i < m; ++i) {
        row += from.ld, new_row += to.ld;
        const V g = load(row);
        varies += size(g);
        store(new_row, g * c + at(s.G(i), j) * t);
      }
      store(to.rest + q * to.ld + j, rest * size(c) + l_s * varies + r_s * (size(t) + varies));
    }
    store(to.whole(count) + j, at(from.whole(count), j) * at(before.first.whole, j));
  }
  through(w, to, w.forward[l], count, w.layer[l].t);
}

// Those of the first layer: its own weights.
void start(const Work& w, int64_t count) {
  const Rates& t = w.layer[0].t;
  const int64_t H = w.out(0), d = w.in(0);
  const double* W = w.backward[0].signed_.w;
  clear(t.rows, count * (1 + w.m) * t.ld), clear(t.rest, (count + 1) * t.ld);
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t j = 0; j < H; ++j) t.at(q)[j] = W[j * d + w.call.columns[w.wanted[q]]];
  }
  double* const whole = t.whole(count);
  for (int64_t k = 0; k < w.K; ++k) {
    for (int64_t j = 0; j < H; ++j) {
      const double one = size_of(W[j * d + w.call.columns[k]]);
      whole[j] = one > whole[j] ? one : whole[j];
    }
  }
}

// P∘s as a form, but for what it is off; P has no terms where it is a constant.
void multiply(const Work& w, const Form& P, const Form& s, int64_t H, Form& to) {
  const int64_t m = w.m;
  const bool constant = P.S == 0;
  to.S = w.T;
  for (int64_t j = 0; j < H; j += lanes) {
    const V p = at(P.c(), j), q = at(s.c(), j);
    V c = p * q;
    if (constant) {
      for (int64_t i = 0; i < s.S; ++i) store(to.G(i) + j, p * at(s.G(i), j));
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const V a = at(P.G(i), j), b = at(s.G(i), j), half = 0.5 * a * b;
        c += half;
        store(to.G(i) + j, a * q + b * p);
        store(to.G(m + i) + j, at(P.G(m + i), j) * q + at(s.G(m + i), j) * p + half);
      }
      int64_t pair = 2 * m;
      for (int64_t i = 0; i < m; ++i) {
        const V a = at(P.G(i), j), b = at(s.G(i), j);
        for (int64_t k = i + 1; k < m; ++k, ++pair) {
          const V g =
              at(P.G(pair), j) * q + at(s.G(pair), j) * p + a * at(s.G(k), j) + b * at(P.G(k), j);
          store(to.G(pair) + j, g);
        }
      }
    }
    store(to.c() + j, c);
  }
}

// Adds to M the products of what is linear in one form and quadratic in another, weighted by a row for
// each slope.
void add_cubic(const Work& w, const double* weight, int64_t stride, const Form& linear,
               const Form& quadratic, int64_t H, int64_t count) {
  const int64_t m = w.m, rows = round_up(count * m, lanes);
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t i = 0; i < m; ++i) {
      double* row = w.scaled + (q * m + i) * w.wide;
      for (int64_t j = 0; j < H; j += lanes) {
        store(row + j, at(linear.G(i), j) * load(weight + q * stride + j));
      }
    }
  }
  clear(w.scaled + count * m * w.wide, (rows - count * m) * w.wide);
  Packing<double> packing = w.square;
  packing.w = w.scaled, packing.K = H, packing.N = rows;
  for (int64_t p = 0; p < packing.panels(); ++p) packing.panel(p);
  gemm<false, double>(w.T - m, H, quadratic.G(m), quadratic.ld, packing.matrix(), 0,
                      Init<double>{w.M, w.ld_M}, w.M, w.ld_M, Nothing{});
}

// Where P and s = σ'(a) meet, and σ(a), on which the slopes depend by w.u if `further`: how much they
// change with a, and what is added to their errors. What is of the third order goes into M.
void meet(const Work& w, const Layer& here, const Form& P, bool further, int64_t H, int64_t count) {
  const int64_t m = w.m;
  const Form &a = here.a, &s = here.s;
  const Curved &f = here.first, &v = here.value;
  const bool constant = P.S == 0;
  for (int64_t j = 0; j < H; j += lanes) {
    const V p = at(P.c(), j), l_P = at(P.linear(), j), r_P = at(P.bent(), j);
    const V l_s = at(s.linear(), j), r_s = at(s.bent(), j), linear = 2.0 * at(a.linear(), j);
    const V beyond = 2.0 * at(a.bent(), j) + at(a.e(), j);
    const V slope = at(f.slope, j), bend = at(f.bend, j), all = at(f.all, j), left = at(f.left, j);
    const V quartic = r_P * r_s, rest_of = l_P * r_s + r_P * (l_s + r_s);
    V whole = at(here.t.whole(count), j) * (size(p) + l_P + r_P) * at(f.steep, j);
    if (further) whole += at(w.u.whole(count), j) * at(v.steep, j);
    store(w.alpha.whole(count) + j, whole);
    for (int64_t q = 0; q < count; ++q) {
      const double* t_row = here.t.at(q) + j;
      const double* u_row = w.u.at(q) + j;
      double* to = w.alpha.at(q) + j;
      const V t = load(t_row), t_rest = at(here.t.rest + q * here.t.ld, j), by = t * p;
      const V bent = 2.0 * bend * by;
      V bends = bent, varies = t_rest, by_linear = V{}, u_linear = V{};
      V slope_v = V{}, bent_v = V{}, u_at = V{};
      if (further) {
        u_at = load(u_row), slope_v = at(v.slope, j), bent_v = 2.0 * at(v.bend, j) * u_at;
        bends += bent_v;
      }
      store(to, by * slope + u_at * slope_v);
      for (int64_t i = 0; i < m; ++i) {
        t_row += here.t.ld, u_row += w.u.ld, to += w.alpha.ld;
        const V g = load(t_row), by_i = constant ? g * p : t * at(P.G(i), j) + g * p;
        varies += size(g), by_linear += size(by_i);
        V sum = by_i * slope + bends * at(a.G(i), j);
        if (further) {
          const V u_i = load(u_row);
          u_linear += size(u_i), sum += u_i * slope_v;
        }
        store(to, sum);
      }
      const V by_rest = size(t) * r_P + varies * (l_P + r_P) + t_rest * size(p);
      const V by_varies = by_linear + by_rest;
      V error = size(t) * quartic + varies * rest_of + size(by) * left + by_varies * all;
      V rest = by_rest * size(slope) +
               size(bend) * (linear * by_varies + beyond * (size(by) + by_varies));
      if (further) {
        const V u_rest = at(w.u.rest + q * w.u.ld, j), u_varies = u_linear + u_rest;
        error += size(u_at) * at(v.left, j) + u_varies * at(v.all, j);
        rest += u_rest * size(slope_v) +
                size(at(v.bend, j)) * (linear * u_varies + beyond * (size(u_at) + u_varies));
      }
      store(w.alpha.rest + q * w.alpha.ld + j, rest);
      store(w.errors + q * w.wide + j, error), store(w.weight + q * w.wide + j, bends);
    }
  }
  if (a.S > m) add_cubic(w, w.weight, w.wide, a, a, H, count);
  if (!constant) {
    const int64_t stride = (1 + m) * here.t.ld;
    add_cubic(w, here.t.rows, stride, s, P, H, count);
    add_cubic(w, here.t.rows, stride, P, s, H, count);
  }
  for (int64_t j = 0; j < H; j += lanes) {
    store(w.left + j, 1.0 / (at(a.linear(), j) + least_size));
  }
  for (int64_t q = 0; q < count; ++q) {
    const double* errors = w.errors + q * w.wide;
    V total = V{};
    for (int64_t j = 0; j < H; j += lanes) total += load(errors + j);
    w.third[q] += sum<double>(total);
    for (int64_t i = 0; i < m; ++i) {
      total = V{};
      for (int64_t j = 0; j < H; j += lanes) {
        total += load(errors + j) * (size(at(a.G(i), j)) * load(w.left + j));
      }
      w.blame[q * m + i] += sum<double>(total);
    }
  }
}

// Takes what is cubic into the form of a slope: what of it is linear, and returns the size of the rest.
// ε T(ε) and ε_i ε_i ε_j are half an ε and half something within 1, and the three ways to come by ε_i
// ε_j ε_k are one number.
double reduce(const Work& w, int64_t q, int64_t k, Form& F) {
  const int64_t m = w.m, ld = w.ld_M;
  const double* M = w.M + q * m;  // of ε_i and a quadratic term
  double* blame = w.blame + q * m;
  const auto pair = [&](int64_t i, int64_t j) { return m + i * (2 * m - i - 1) / 2 + j - i - 1; };
  double total = 0;
  const auto is_left = [&](double cubic) {
    cubic = size_of(cubic), total += cubic;
    return cubic;
  };
  for (int64_t i = 0; i < m; ++i) {
    const double half = 0.5 * M[i * ld + i];
    F.G(i)[k] += half, blame[i] += 3 * is_left(half);
    for (int64_t j = i + 1; j < m; ++j) {
      const double* const both = M + pair(i, j) * ld;
      const double to_i = 0.5 * both[j], to_j = 0.5 * both[i];
      F.G(i)[k] += to_i, F.G(j)[k] += to_j;
      const double one = is_left(M[j * ld + i] + to_i), other = is_left(M[i * ld + j] + to_j);
      blame[i] += one + 2 * other, blame[j] += 2 * one + other;
      for (int64_t n = j + 1; n < m; ++n) {
        const double all = is_left(both[n] + M[pair(i, n) * ld + j] + M[pair(j, n) * ld + i]);
        blame[i] += all, blame[j] += all, blame[n] += all;
      }
    }
  }
  return total;
}

// What is known of slope k, the q-th that is asked for, from its form, what that is off and the blame of
// the columns: `found` for box b.
void conclude(const Work& w, Form& F, int64_t b, int64_t q, double error) {
  const int64_t m = w.m, K = w.K, d = w.chain.layer[0].in, n = w.of.ld, k = w.wanted[q];
  const SlopesFound& to = w.call.found;
  const Symmetric& of = w.of;
  const double c = F.c()[k], *blame = w.blame + q * m;
  double third = reduce(w, q, k, F) + error * (1 + 1e-9) + least_size, pairs = 0;
  third *= 1 + double(4 * (w.T + 2) * (m + 2)) * u;
  bool known = true;
  for (int64_t i = 0; i < m * n; ++i) of.H[i] = 0;
  for (int64_t i = 0; i < n; ++i) of.g[i] = of.h[i] = 0;
  int64_t pair = 2 * m;
  for (int64_t i = 0; i < m; ++i) {
    of.g[i] = F.G(i)[k], of.h[i] = F.G(m + i)[k];
    known &= size_of(of.g[i]) < infinity && size_of(of.h[i]) < infinity;
    for (int64_t j = i + 1; j < m; ++j, ++pair) {
      of.H[i * n + j] = of.H[j * n + i] = F.G(pair)[k];
      pairs += size_of(F.G(pair)[k]);
    }
  }
  for (int64_t i = 0; i < m * n; ++i) of.sizes[i] = size_of(of.H[i]);
  error = (pairs + third) * (1 + double(2 * (w.T - 2 * m + 2)) * u);
  known &= size_of(c) < infinity && error < infinity;
  const int64_t at = b * K + k;
  to.centre[at] = known ? c : 0, to.error[at] = known ? error : infinity;
  to.lower[at] = -infinity, to.upper[at] = infinity;
  of.unsettled();
  for (int64_t i = 0; i < m; ++i) {
    double all = 0, tied = 0;
    for (int64_t j = 0; j < m; ++j) {
      all += of.sizes[i * n + j], tied += of.sizes[i * n + j] * of.first[j];
    }
    const int64_t place = (b * d + w.call.moving[i]) * K + k;
    const double rise = size_of(of.g[i]) - 4 * size_of(of.h[i]) - all;
    const double share = blame[i] + of.first[i] * (2 * size_of(of.h[i]) + 0.5 * tied);
    to.slant[place] = known ? of.g[i] : 0, to.bend[place] = known ? of.h[i] : 0;
    to.rise[place] = known && rise > 0 ? rise : 0;
    to.blame[place] = share < infinity ? share : 1;
  }
  if (!known) return;
  const double low = of.lowest();
  of.negate();
  const double high = of.lowest();
  to.lower[at] = c + low - third - 4 * u * (size_of(c) - low + third);
  to.upper[at] = c - high + third + 4 * u * (size_of(c) - high + third);
}

void one_box(Work& w, int64_t b) {
  const SlopesCall& call = w.call;
  const int64_t L = w.L, d = w.chain.layer[0].in, m = w.m;
  int64_t count = 0;
  for (int64_t k = 0; k < w.K; ++k) {
    if (!call.wanted || call.wanted[b * w.K + k]) w.wanted[count++] = k;
  }
  if (!count) return;
  // Forwards: forms, and how much the slopes change with σ' ∘ P of each layer.
  start(w, count);
  for (int64_t l = 0; l < L; ++l) {
    Layer& here = w.layer[l];
    Form& a = here.a;
    const int64_t H = w.out(l);
    if (l == 0) {
      first_layer(w, call.c + b * d, call.r + b * d, a);
    } else {
      forwards(w, l, count);
      through(w, w.bends(l - 1) ? w.h : w.layer[l - 1].a, l, a);
    }
    if (!w.bends(l)) {
      for (; a.S < w.T; ++a.S) clear(a.G(a.S), w.wide);
      measure(w, a, H);
      continue;
    }
    parabolas(w, here, w.chain.layer[l], H, l < L - 1);
    along(w, a, here.first, H, here.s);
    if (l < L - 1) along(w, a, here.value, H, w.h);
  }
  // Backwards: P, and how much the slopes change with σ of each layer.
  w.P.S = 0;
  clear(w.P.base, Form::before * w.P.ld);
  w.P.c()[0] = 1;
  clear(w.M, (w.T - m) * w.ld_M), clear(w.blame, w.K * m), clear(w.third, w.K);
  Form last{w.last, w.ld_last, 0};
  double rounding = 0;
  bool further = false;
  for (int64_t l = L - 1; l >= 0; --l) {
    const Layer& here = w.layer[l];
    const Form &a = here.a, &P = w.P;
    const int64_t H = w.out(l);
    const double off = rounding_of(w.chain, max_of(w.in(l), H), m), *b = w.bias(l);
    const bool bends = w.bends(l), values = further;
    if (bends) {
      meet(w, here, P, further, H, count);
      multiply(w, P, here.s, H, w.p);
      further = true;
    }
    const Rates& alpha = bends ? w.alpha : w.u;
    for (int64_t j = 0; j < H; ++j) {
      const double whole = size_of(P.c()[j]) + P.linear()[j] + P.bent()[j];
      const double own = size_of(a.c()[j]);
      double value = own + a.linear()[j] + a.bent()[j] + a.e()[j];
      if (bends) value = here.value.whole[j];
      rounding += 2 * off * here.t.whole(count)[j] * whole * (bends ? here.first.whole[j] : 1);
      if (values) rounding += 2 * off * w.u.whole(count)[j] * value;
      if (further) {
        rounding += alpha.whole(count)[j] * (off * (own + size_of(b[j])) + (l ? 0 : a.e()[j]));
      }
    }
    const Form& from = bends ? w.p : P;
    Form& to = l ? w.h : last;
    if (further && l) {
      const Rates before = w.u;
      through(w, alpha, w.backward[l], count, bends ? before : w.scratch);
      if (!bends) w.u = w.scratch, w.scratch = before;
    }
    product(1 + from.S, from.c(), from.ld, w.backward[l].signed_.matrix(), to.c(), to.ld);
    to.S = from.S;
    if (l) {
      measure(w, to, w.in(l));
      const Form before = w.P;
      w.P = w.h, w.h = before;
    }
  }
  for (; last.S < w.T; ++last.S) clear(last.G(last.S), last.ld);
  for (int64_t q = 0; q < count; ++q) conclude(w, last, b, q, w.third[q] + rounding);
}

}  // namespace quadratic

Status chain_slopes(const Chain& chain, const SlopesCall& call, const Runtime& runtime) {
  Bump counting;
  const quadratic::Work counted(chain, call, counting);
  const size_t bytes = counting.lines();
  char* memory = static_cast<char*>(runtime.acquire(bytes));
  if (!memory) return out_of_memory;
  Bump at{memory, 0};
  quadratic::Work work(chain, call, at);
  work.pack();
  for (int64_t b = 0; b < call.B; ++b) quadratic::one_box(work, b);
  runtime.release(memory, bytes);
  return ok;
}

}  // namespace
