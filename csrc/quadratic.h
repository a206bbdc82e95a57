// Sound bounds of a chain's slopes to the second order, quadratic forms in double, box by box: what
// monokernel/quadratic.py says, where the mathematics is described, and with its rounding.
//
// A form lies in rows of one stride, each over the neurons of a layer: how large what is linear in the
// box can be and all else but c, then e, c and the terms. Rows go through a layer by one product; all
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
MK_INLINE int64_t followed(int64_t m) { return 8 + terms(m) / 3; }  // neurons of a layer
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
  double* rest() const { return base + ld; }
  double* e() const { return base + 2 * ld; }
  double* c() const { return base + 3 * ld; }
  double* G(int64_t s) const { return base + (before + s) * ld; }
};

MK_INLINE V at(const double* row, int64_t j) { return load(row + j); }

// f(a) = at + slope·(a - c) + bend·(a - c)² ± off, rows over the neurons.
struct Parabola {
  double *at, *slope, *bend, *off;
};

// A weight as products read it, its sizes, and the sums of these over what comes out.
struct Weight {
  Packing<double> signed_, sizes;
  double* sums;
  int64_t in, out;

  void pack() const {
    for (int64_t p = 0; p < signed_.panels(); ++p) signed_.panel(p);
    const int64_t n = packed_size<double>(in, out);
    for (int64_t i = 0; i < n; i += lanes) store(sizes.to + i, size(load(signed_.to + i)));
    for (int64_t j = 0; j < in; ++j) {
      V total = V{};
      each(sizes.matrix(), j, [&](int64_t, V w) { total += w; });
      sums[j] = sum<double>(total);
    }
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

// All that a call works in: packed weights and, for one box at a time, the forms.
struct Work {
  const Chain& chain;
  const SlopesCall& call;
  // T: terms of the box's own; top: how many neurons of a layer get one; wide: the stride of forms;
  // deepest: the most terms of one.
  int64_t m, T, top, L, K, wide, deepest;
  Weight *forward, *backward;         // of each layer
  Packing<double> square;             // what the last product multiplies by
  Form h, a, P, p;
  Form* s;         // σ' of each layer
  Parabola along[2];
  double *knot, *values[3];  // arguments of curves and what these are
  double* signs;  // of a vector of neurons, for each column
  double *left, *chosen, *scaled;  // chosen: the columns of the first layer, as rows
  double *M, *last;  // products of the contraction, the slopes' own form
  int64_t ld_M, ld_last;
  double *blame, *whose;   // of the columns: (K, m), and a row for each neuron with a term of its own
  int64_t *wanted, *best;  // slopes, and neurons whose error counts most
  double* counts;          // how much
  Symmetric of;

  Work(const Chain& given, const SlopesCall& asked, Bump& memory)
      : chain(given), call(asked), m(asked.m), T(terms(m)), top(followed(m)), L(given.layers),
        K(asked.K) {
    wide = 0;
    for (int64_t l = 0; l < L; ++l) wide = max_of(wide, max_of(in(l), out(l)));
    wide = max_of(wide, max_of(K, chain.layer[0].in));
    wide = scratch_ld<double>(wide);
    deepest = T + 2 * top * L;
    forward = memory.take<Weight>(L), backward = memory.take<Weight>(L), s = memory.take<Form>(L);
    for (int64_t l = 0; l < L; ++l) {
      const ChainLayer& of_l = chain.layer[l];
      // Of the last layer one row, of the first the columns that are asked for.
      const double* W = of_l.W + (l == L - 1 ? call.output * of_l.in : 0);
      const Weight to = weight(memory, W, 1, of_l.in, of_l.in, out(l), nullptr);
      const Weight from = weight(memory, W, of_l.in, 1, out(l), l ? of_l.in : K,
                                 l ? nullptr : call.columns);
      const Form form = take(memory);
      if (forward) forward[l] = to, backward[l] = from, s[l] = form;
    }
    h = take(memory), a = take(memory), P = take(memory), p = take(memory);
    for (Parabola& f : along) {
      f = {memory.take<double>(wide), memory.take<double>(wide), memory.take<double>(wide),
           memory.take<double>(wide)};
    }
    knot = memory.take<double>((knots + 2) * wide);
    for (double*& of_order : values) of_order = memory.take<double>((knots + 2) * wide);
    signs = memory.take<double>(m * lanes), left = memory.take<double>(wide);
    const int64_t rows = round_up(max_of<int64_t>(K * m, 1), lanes);
    chosen = memory.take<double>(K * wide);
    scaled = memory.take<double>(rows * wide);
    square = {memory.take<double>(packed_size<double>(wide, rows)), nullptr, 1, wide, 0, 0, nullptr};
    ld_M = scratch_ld<double>(rows), ld_last = scratch_ld<double>(K);
    M = memory.take<double>(deepest * ld_M);
    last = memory.take<double>((Form::before + deepest) * ld_last);
    blame = memory.take<double>(rows), whose = memory.take<double>((deepest - T) * round_up(m, lanes));
    wanted = memory.take<int64_t>(K);
    best = memory.take<int64_t>(top), counts = memory.take<double>(top);
    const int64_t n = round_up(m, lanes);
    of = {m, n, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    double** const rows_of[] = {&of.g, &of.h, &of.open, &of.at, &of.slope, &of.first};
    for (double** row : rows_of) *row = memory.take<double>(n);
    of.H = memory.take<double>(m * n), of.sizes = memory.take<double>(m * n);
  }

  int64_t in(int64_t l) const { return chain.layer[l].in; }
  int64_t out(int64_t l) const { return l == L - 1 ? 1 : chain.layer[l].out; }
  bool curved(int64_t l) const { return chain.layer[l].kind != 0; }

  void pack() const {
    for (int64_t l = 0; l < L; ++l) forward[l].pack(), backward[l].pack();
    clear(chosen, K * wide);
    const double* W = backward[0].signed_.w;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < out(0); ++j) chosen[k * wide + j] = W[j * in(0) + call.columns[k]];
    }
  }
  Form take(Bump& memory) const {
    return {memory.take<double>((Form::before + deepest) * wide), wide, 0};
  }
  Weight weight(Bump& memory, const double* W, int64_t row, int64_t column, int64_t n, int64_t to,
                const int64_t* chosen) const {
    const int64_t size = packed_size<double>(n, to);
    double *one = memory.take<double>(size), *other = memory.take<double>(size);
    return {{one, W, row, column, n, to, chosen}, {other, W, row, column, n, to, chosen},
            memory.take<double>(n), n, to};
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
    to.e()[j] = to.e()[j] * (1 + 2 * rounding) + least_size +
                rounding * (size_of(b) + size_of(to.c()[j]));
  }
  to.S = w.m;
  for (int64_t i = 0; i < w.m; ++i) {
    const int64_t x = w.call.moving[i];
    Weight::each(W.signed_.matrix(), x, [&](int64_t j, V v) { store(to.G(i) + j, r[x] * v); });
  }
}

// How much of the argument of neuron j, as far as it is linear in the box, is that of one column.
MK_INLINE double share_of(const Form& first, int64_t column, int64_t j) {
  return size_of(first.G(column)[j]) / (first.linear()[j] + least_size);
}

// W h + b. With `keep` what h was off in some neurons becomes a term of theirs; b may be null.
// `from` is σ' of the neurons that h is of, or null.
void through(const Work& w, const Form& h, const Weight& W, const double* b, bool keep,
             const Form* from, Form& to) {
  const double rounding = gamma(W.in + 2 + w.chain.folded);
  product(1 + h.S, h.c(), h.ld, W.signed_.matrix(), to.c(), to.ld);
  to.S = h.S;
  for (int64_t j = 0; j < W.in; ++j) w.left[j] = h.e()[j];
  if (keep && h.S) {
    // The neurons whose error counts most, in no order.
    const int64_t n = min_of(w.top, W.in);
    int64_t found = 0, *best = w.best;
    for (int64_t j = 0; j < W.in; ++j) {
      const double count = h.e()[j] * W.sums[j];
      if (n < W.in && found == n && !(count > w.counts[n - 1])) continue;
      int64_t i = found < n ? found++ : n - 1;
      for (; n < W.in && i > 0 && count > w.counts[i - 1]; --i) {
        w.counts[i] = w.counts[i - 1], best[i] = best[i - 1];
      }
      w.counts[i] = count, best[i] = j;
    }
    for (int64_t i = 0; i < n; ++i) {
      double* whose = w.whose + (to.S - w.T) * w.of.ld;
      for (int64_t q = 0; q < w.of.ld; ++q) {
        whose[q] = from && q < w.m ? share_of(*from, q, best[i]) : 0;
      }
      double* row = to.G(to.S++);
      const double e = h.e()[best[i]];
      Weight::each(W.signed_.matrix(), best[i], [&](int64_t j, V v) { store(row + j, e * v); });
      w.left[best[i]] = 0;
    }
  }
  for (int64_t j = 0; j < W.in; ++j) {
    w.left[j] += rounding * (size_of(h.c()[j]) + h.linear()[j] + h.rest()[j]);
  }
  product(1, w.left, w.wide, W.sizes.matrix(), to.e(), to.ld);
  for (int64_t j = 0; j < W.out; ++j) {
    double e = to.e()[j] * (1 + 2 * rounding) + least_size;
    if (b) {
      to.c()[j] += b[j];
      e += rounding * (size_of(b[j]) + size_of(to.c()[j]));
    }
    to.e()[j] = e;
  }
}

// Sets how large the parts of a form are.
void measure(const Work& w, const Form& a, int64_t H) {
  const double more = 1 + double(2 * (a.S + 2)) * u;
  const int64_t m = min_of(w.m, a.S);
  for (int64_t j = 0; j < H; j += lanes) {
    V linear = V{}, rest = V{};
    for (int64_t i = 0; i < m; ++i) linear += size(at(a.G(i), j));
    for (int64_t i = m; i < a.S; ++i) rest += size(at(a.G(i), j));
    store(a.linear() + j, linear * more);
    store(a.rest() + j, (rest + at(a.e(), j)) * more);
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

// Parabolas along σ and σ' between the ends of an argument a, and along σ' alone for the last layer.
void parabolas(const Work& w, const Form& a, const ChainLayer& layer, int64_t H, bool both) {
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
    const double more = 1 + double(2 * (a.S + 2)) * u;
    linear *= more, rest = (rest + at(a.e(), j)) * more;
    store(a.linear() + j, linear), store(a.rest() + j, rest);
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
    const V c = at(a.c(), j), linear = at(a.linear(), j), rest = at(a.rest(), j);
    // (l + δ)² - l², for |l + δ| is within the ends, too.
    const V far_off = size(away) + radius, most_far = far_off * (1 + 8 * u) + 8 * u * size(c);
    const V above = most_far > rest ? rest * (2.0 * most_far - rest) : most_far * most_far;
    const V below = linear > rest ? rest * (2.0 * linear - rest) : linear * linear;
    const V lost = 0.5 * above + 0.5 * below, shift = 0.5 * above - 0.5 * below;
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
        const V off = (0.5 * high - 0.5 * low + most * between + size(bent) * lost) * (1 + 16 * u) +
                      noise;
        const auto closer = off < best_off;
        best_at = closer ? 0.5 * low + 0.5 * high + bent * shift : best_at;
        best_slope = closer ? slope - twice * away : best_slope;
        best_bend = closer ? bent : best_bend;
        best_off = closer ? off : best_off;
      }
      const Parabola& to = w.along[order];
      store(to.at + j, best_at), store(to.slope + j, best_slope);
      store(to.bend + j, best_bend), store(to.off + j, best_off);
    }
  }
}

// f(a), of which the terms up to T are there.
void along(const Work& w, const Form& a, const Parabola& f, int64_t H, Form& to) {
  const int64_t m = w.m, T = w.T;
  to.S = max_of(a.S, T);
  const bool straight = a.S == m;  // a has only what is linear
  const double more = 1 + double(2 * (to.S + 2)) * u, short_ = double(16 + 2 * m) * u;
  for (int64_t j = 0; j < H; j += lanes) {
    const V slope = at(f.slope, j), bend = at(f.bend, j);
    V c = at(f.at, j), linear = V{}, rest = V{};
    for (int64_t i = 0; i < m; ++i) {
      const V g = at(a.G(i), j), half = 0.5 * bend * g * g, grown = slope * g;
      c += half, linear += size(grown);
      store(to.G(i) + j, grown);
      const V square = straight ? half : slope * at(a.G(m + i), j) + half;
      rest += size(square);
      store(to.G(m + i) + j, square);
    }
    int64_t pair = 2 * m;
    for (int64_t i = 0; i < m; ++i) {
      const V twice = 2.0 * bend * at(a.G(i), j);
      for (int64_t q = i + 1; q < m; ++q, ++pair) {
        const V g = straight ? V{} : slope * at(a.G(pair), j);
        const V both = g + twice * at(a.G(q), j);
        rest += size(both);
        store(to.G(pair) + j, both);
      }
    }
    for (int64_t i = T; i < a.S; ++i) {
      const V g = slope * at(a.G(i), j);
      rest += size(g);
      store(to.G(i) + j, g);
    }
    const V steep = size(slope), l = at(a.linear(), j);
    const V whole = size(at(f.at, j)) + steep * (l + at(a.rest(), j)) + 2.0 * size(bend) * l * l;
    V e = steep * at(a.e(), j) + at(f.off, j);
    e += short_ * (whole + e) + least_size;
    store(to.c() + j, c), store(to.e() + j, e);
    store(to.linear() + j, linear * more), store(to.rest() + j, (rest + e) * more);
  }
}

// P∘s; the terms of s are the first of those of P, which has none where it is a constant.
void multiply(const Work& w, const Form& P, const Form& s, int64_t H, Form& to) {
  const int64_t m = w.m, T = w.T;
  const bool constant = P.S == 0;
  to.S = constant ? s.S : P.S;
  const double more = 1 + double(2 * (to.S + 2)) * u, short_ = double(16 + 2 * m) * u;
  for (int64_t j = 0; j < H; j += lanes) {
    const V p = at(P.c(), j), q = at(s.c(), j);
    V c = p * q, linear = V{}, rest = V{};
    if (constant) {
      for (int64_t i = 0; i < s.S; ++i) {
        const V g = p * at(s.G(i), j);
        (i < m ? linear : rest) += size(g);
        store(to.G(i) + j, g);
      }
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const V a = at(P.G(i), j), b = at(s.G(i), j), half = 0.5 * a * b, g = a * q + b * p;
        c += half, linear += size(g);
        store(to.G(i) + j, g);
        const V square = at(P.G(m + i), j) * q + at(s.G(m + i), j) * p + half;
        rest += size(square);
        store(to.G(m + i) + j, square);
      }
      int64_t pair = 2 * m;
      for (int64_t i = 0; i < m; ++i) {
        const V a = at(P.G(i), j), b = at(s.G(i), j);
        for (int64_t k = i + 1; k < m; ++k, ++pair) {
          const V g = at(P.G(pair), j) * q + at(s.G(pair), j) * p + a * at(s.G(k), j) +
                      b * at(P.G(k), j);
          rest += size(g);
          store(to.G(pair) + j, g);
        }
      }
      for (int64_t i = T; i < P.S; ++i) {
        V g = at(P.G(i), j) * q;
        if (i < s.S) g += at(s.G(i), j) * p;
        rest += size(g);
        store(to.G(i) + j, g);
      }
    }
    const V l_P = at(P.linear(), j), r_P = at(P.rest(), j), l_s = at(s.linear(), j);
    const V r_s = at(s.rest(), j);
    V e = size(q) * at(P.e(), j) + size(p) * at(s.e(), j) + l_P * r_s + r_P * (l_s + r_s);
    e += short_ * ((size(p) + l_P + r_P) * (size(q) + l_s + r_s) + e) + least_size;
    store(to.c() + j, c), store(to.e() + j, e);
    store(to.linear() + j, linear * more), store(to.rest() + j, (rest + e) * more);
  }
}

// Rows g∘W_k for the first m terms of a form and each of the slopes k that are asked for, turned into
// a matrix that multiplies from the right.
Matrix<double> turned(const Work& w, const Form& g, int64_t H, int64_t count) {
  const int64_t rows = round_up(count * w.m, lanes);
  for (int64_t q = 0; q < count; ++q) {
    const double* W = w.chosen + w.wanted[q] * w.wide;
    for (int64_t i = 0; i < w.m; ++i) {
      double* row = w.scaled + (q * w.m + i) * w.wide;
      for (int64_t j = 0; j < H; j += lanes) store(row + j, at(g.G(i), j) * load(W + j));
    }
  }
  clear(w.scaled + count * w.m * w.wide, (rows - count * w.m) * w.wide);
  Packing<double> packing = w.square;
  packing.w = w.scaled, packing.K = H, packing.N = rows;
  for (int64_t p = 0; p < packing.panels(); ++p) packing.panel(p);
  return packing.matrix();
}

// Wᵀ(P∘s) for the slopes that are asked for: the form `to`, K wide, and the blame of its columns.
void contract(const Work& w, const Form& P, const Form& s, int64_t H, int64_t count, Form& joined,
              Form& to) {
  const int64_t m = w.m, T = w.T, Q = T - m, ld = w.ld_M;
  const Weight& W = w.backward[0];
  const double rounding = gamma(H + 4 + w.chain.folded);
  const bool constant = P.S == 0;
  joined.S = constant ? T : P.S;
  for (int64_t j = 0; j < H; j += lanes) {
    const V p = at(P.c(), j), q = at(s.c(), j);
    store(joined.c() + j, p * q);
    for (int64_t i = 0; i < joined.S; ++i) {
      V g = constant ? V{} : at(P.G(i), j) * q;
      if (i < T) g += at(s.G(i), j) * p;
      store(joined.G(i) + j, g);
    }
    const V l_P = at(P.linear(), j), r_P = at(P.rest(), j), l_s = at(s.linear(), j);
    const V r_s = at(s.rest(), j), e_P = at(P.e(), j), e_s = at(s.e(), j);
    const V lumped = size(q) * e_P + size(p) * e_s + l_P * e_s + e_P * l_s + r_P * r_s;
    const V whole = (size(p) + l_P + r_P) * (size(q) + l_s + r_s);
    const V e = lumped * (1 + 16 * u) + whole * (4 * rounding) + least_size;
    store(joined.e() + j, e), store(w.left + j, e / (l_s + least_size));
  }
  product(1 + joined.S, joined.c(), joined.ld, W.signed_.matrix(), to.c(), to.ld);
  product(1, joined.e(), joined.ld, W.sizes.matrix(), to.e(), to.ld);
  to.S = joined.S;
  for (int64_t k = 0; k < w.K; ++k) to.e()[k] *= 1 + 2 * rounding;
  for (int64_t q = 0; q < count; ++q) {
    const double* W_k = w.chosen + w.wanted[q] * w.wide;
    for (int64_t i = 0; i < m; ++i) {
      V total = V{};
      for (int64_t j = 0; j < H; j += lanes) {
        total += size(load(W_k + j) * at(s.G(i), j)) * load(w.left + j);
      }
      w.blame[q * m + i] = sum<double>(total);
    }
  }
  if (constant) return;
  const Matrix<double> square = turned(w, s, H, count);
  product(P.S, P.G(0), P.ld, square, w.M, ld);
  const Matrix<double> cubic = turned(w, P, H, count);
  double* more = w.M + m * ld;
  gemm<false, double>(Q, H, s.G(m), s.ld, cubic, 0, Init<double>{more, ld}, more, ld, Nothing{});
  const double off = 1 + double(4 * (P.S + m)) * u;
  for (int64_t j = 0; j < count * m; j += lanes) {
    V total = V{};
    for (int64_t r = m; r < P.S; ++r) total += size(load(w.M + r * ld + j));
    store(w.scaled + j, total);
  }
  for (int64_t q = 0; q < count; ++q) {
    const int64_t k = w.wanted[q];
    const double* M = w.M + q * m;
    double total = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double half = 0.5 * M[i * ld + i];
      to.c()[k] += half, to.G(m + i)[k] += half;
    }
    int64_t pair = 2 * m;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i + 1; j < m; ++j, ++pair) to.G(pair)[k] += M[i * ld + j] + M[j * ld + i];
    }
    for (int64_t i = 0; i < m; ++i) {
      total += w.scaled[q * m + i];
      w.blame[q * m + i] += w.scaled[q * m + i];
    }
    to.e()[k] += total * off;
  }
}

// What is known of slope k, from its form: `found` for box b.
void conclude(const Work& w, const Form& F, int64_t b, int64_t k, const double* blame) {
  const int64_t m = w.m, K = w.K, d = w.chain.layer[0].in, n = w.of.ld;
  const SlopesFound& to = w.call.found;
  const Symmetric& of = w.of;
  const double c = F.c()[k];
  double third = F.e()[k], others = 0, pairs = 0;
  for (int64_t i = w.T; i < F.S; ++i) others += size_of(F.G(i)[k]);
  third = (others + third) * (1 + double(2 * (F.S + 2)) * u);
  bool known = true;
  for (int64_t i = 0; i < m * n; ++i) of.H[i] = 0;
  for (int64_t i = 0; i < n; ++i) of.g[i] = of.h[i] = 0;
  int64_t pair = 2 * m;
  for (int64_t i = 0; i < m && F.S; ++i) {
    of.g[i] = F.G(i)[k], of.h[i] = F.G(m + i)[k];
    known &= size_of(of.g[i]) < infinity && size_of(of.h[i]) < infinity;
    for (int64_t j = i + 1; j < m; ++j, ++pair) {
      of.H[i * n + j] = of.H[j * n + i] = F.G(pair)[k];
      pairs += size_of(F.G(pair)[k]);
    }
  }
  for (int64_t i = 0; i < m * n; ++i) of.sizes[i] = size_of(of.H[i]);
  const double error = (pairs + third) * (1 + double(2 * (w.T - 2 * m + 2)) * u);
  known &= size_of(c) < infinity && error < infinity;
  const int64_t at = b * K + k;
  to.centre[at] = known ? c : 0, to.error[at] = known ? error : infinity;
  to.lower[at] = -infinity, to.upper[at] = infinity;
  of.unsettled();
  for (int64_t j = 0; j < n; j += lanes) {
    V total = V{};
    for (int64_t r = w.T; r < F.S; ++r) {
      total += size_of(F.G(r)[k]) * load(w.whose + (r - w.T) * n + j);
    }
    store(of.at + j, total);  // which is free until the form is bounded
  }
  for (int64_t i = 0; i < m; ++i) {
    double all = 0, tied = 0;
    for (int64_t j = 0; j < m; ++j) {
      all += of.sizes[i * n + j], tied += of.sizes[i * n + j] * of.first[j];
    }
    const int64_t place = (b * d + w.call.moving[i]) * K + k;
    const double rise = size_of(of.g[i]) - 4 * size_of(of.h[i]) - all;
    double share = blame ? blame[i] : 0;
    share += of.at[i];
    share += of.first[i] * (2 * size_of(of.h[i]) + 0.5 * tied);
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
  const int64_t L = w.L, d = w.chain.layer[0].in;
  int64_t count = 0;
  for (int64_t k = 0; k < w.K; ++k) {
    if (!call.wanted || call.wanted[b * w.K + k]) w.wanted[count++] = k;
  }
  if (!count) return;
  for (int64_t l = 0; l < L; ++l) {
    const ChainLayer& layer = w.chain.layer[l];
    if (l == L - 1 && !w.curved(l)) break;
    Form& a = w.a;
    if (l == 0) {
      first_layer(w, call.c + b * d, call.r + b * d, a);
    } else {
      through(w, w.h, w.forward[l], layer.b + (l == L - 1 ? call.output : 0), true,
              w.curved(l - 1) ? &w.s[l - 1] : nullptr, a);
    }
    const int64_t H = w.out(l);
    if (!w.curved(l)) {
      if (a.S < w.T) {
        for (int64_t i = a.S; i < w.T; ++i) clear(a.G(i), w.wide);
        a.S = w.T;
      }
      measure(w, a, H);
      const Form before = w.h;
      w.h = a, a = before;
      continue;
    }
    parabolas(w, a, layer, H, l < L - 1);
    along(w, a, w.along[1], H, w.s[l]);
    if (l < L - 1) along(w, a, w.along[0], H, w.h);
  }
  Form P = w.P;
  P.S = 0;
  clear(P.base, Form::before * P.ld);
  P.c()[0] = 1;
  Form last{w.last, w.ld_last, 0};
  bool contracted = false;
  for (int64_t l = L - 1; l >= 0; --l) {
    const int64_t H = w.out(l);
    if (l == 0 && w.curved(0)) {
      contract(w, P, w.s[0], H, count, w.p, last);
      contracted = true;
      break;
    }
    if (w.curved(l)) multiply(w, P, w.s[l], H, w.p);
    const Form& from = w.curved(l) ? w.p : P;
    Form& to = l == 0 ? last : w.a;
    through(w, from, w.backward[l], nullptr, l > 0, w.curved(l) ? &w.s[l] : nullptr, to);
    if (l > 0) {
      measure(w, to, w.in(l));
      const Form before = P;
      P = w.a, w.a = before;
    }
  }
  w.P = P;
  for (int64_t q = 0; q < count; ++q) {
    conclude(w, last, b, w.wanted[q], contracted ? w.blame + q * w.m : nullptr);
  }
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
