// The way forward of one box: forms of every a, of σ'(a) and of σ(a), and how much the slopes change
// with p of each layer.
#pragma once

#include "quadratic_parabolas.h"

namespace {
namespace quadratic {

// x over one box: behind the first layer, W x + b.
void first_layer(const Work& w, const double* c, const double* r, Form& to) {
  const Weight& W = w.forward[0];
  const ChainLayer& layer = w.chain.layer[0];
  const double rounding = gamma(W.in + 2 + w.chain.folded), more = w.more();
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
  to.terms = w.m;
  for (int64_t i = 0; i < w.m; ++i) {
    const int64_t x = w.call.moving[i];
    Weight::each(W.signed_.matrix(), x,
                 [&](int64_t j, Doubles v) { store(to.G(i) + j, r[x] * v); });
  }
}

// W h + b.
void through(const Work& w, const Form& h, int64_t l, Form& to) {
  const Weight& W = w.forward[l];
  const double rounding = gamma(W.in + 2 + w.chain.folded), *b = w.bias(l);
  product(1 + h.terms, h.c(), h.ld, W.signed_.matrix(), to.c(), to.ld);
  to.terms = h.terms;
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
  const double more = w.more();
  const int64_t m = min_of(w.m, a.terms);
  for (int64_t j = 0; j < H; j += at_once) {
    Doubles linear = Doubles{}, bent = Doubles{};
    for (int64_t i = 0; i < m; ++i) linear += size_of(load(a.G(i) + j));
    for (int64_t i = m; i < a.terms; ++i) bent += size_of(load(a.G(i) + j));
    store(a.linear() + j, linear * more);
    store(a.bent() + j, bent * more);
  }
}

// f(a), and how large it is.
void along(const Work& w, const Form& a, const Curved& f, int64_t H, Form& to) {
  const int64_t m = w.m;
  to.terms = w.terms;
  const bool straight = a.terms == m;  // a has only what is linear
  const double more = w.more(), short_ = double(16 + 2 * m) * roundoff;
  for (int64_t j = 0; j < H; j += at_once) {
    const Doubles slope = load(f.slope + j), bend = load(f.bend + j);
    const Doubles a_linear = load(a.linear() + j), a_bent = load(a.bent() + j),
                  a_e = load(a.e() + j);
    Doubles c = load(f.at + j) + bend * (0.5 * a_bent * a_bent), linear = Doubles{},
            bent = Doubles{};
    for (int64_t i = 0; i < m; ++i) {
      const Doubles g = load(a.G(i) + j), half = 0.5 * bend * g * g, grown = slope * g;
      c += half, linear += size_of(grown);
      store(to.G(i) + j, grown);
      const Doubles square = straight ? half : slope * load(a.G(m + i) + j) + half;
      bent += size_of(square);
      store(to.G(m + i) + j, square);
    }
    int64_t pair = 2 * m;
    for (int64_t i = 0; i < m; ++i) {
      const Doubles twice = 2.0 * bend * load(a.G(i) + j);
      for (int64_t other = i + 1; other < m; ++other, ++pair) {
        const Doubles g = straight ? Doubles{} : slope * load(a.G(pair) + j);
        const Doubles both = g + twice * load(a.G(other) + j);
        bent += size_of(both);
        store(to.G(pair) + j, both);
      }
    }
    const Doubles steep = load(f.steep + j), all = load(f.all + j);
    const Doubles whole =
        size_of(c) + size_of(load(f.at + j)) + steep * (a_linear + a_bent + a_e) + all;
    const Doubles e = (steep * a_e + all) * (1 + 16 * roundoff) + short_ * whole + least_size;
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
  for (int64_t j = 0; j < W.out; j += at_once) {
    const Doubles most = load(whole + j) * (1 + 2 * off) + least_size;
    store(whole + j, most);
    for (int64_t nth = 0; nth < count; ++nth) {
      double* const rest = to.rest_of(nth) + j;
      store(rest, load(rest) * (1 + 2 * off) + off * most + least_size);
    }
  }
}

// How much the slopes change with p of layer l, from what they do with that of the layer before.
void rates_forward(const Work& w, int64_t l, int64_t count) {
  const Layer& before = w.layer[l - 1];
  const Rates &from = before.t, &to = w.scratch;
  if (!w.bends(l - 1)) return through(w, from, w.forward[l], count, w.layer[l].t);
  const Form& s = before.s;
  const int64_t m = w.m, H = w.out(l - 1);
  for (int64_t j = 0; j < H; j += at_once) {
    const Doubles s_c = load(s.c() + j), s_linear = load(s.linear() + j),
                  s_rest = load(s.bent() + j) + load(s.e() + j);
    for (int64_t nth = 0; nth < count; ++nth) {
      const double* row = from.at(nth) + j;
      double* new_row = to.at(nth) + j;
      const Doubles t = load(row), rest = load(from.rest_of(nth) + j);
      Doubles varies = rest;
      store(new_row, t * s_c);
      for (int64_t i = 0; i < m; ++i) {
        row += from.ld, new_row += to.ld;
        const Doubles g = load(row);
        varies += size_of(g);
        store(new_row, g * s_c + load(s.G(i) + j) * t);
      }
      store(to.rest_of(nth) + j,
            rest * size_of(s_c) + s_linear * varies + s_rest * (size_of(t) + varies));
    }
    store(to.whole(count) + j, load(from.whole(count) + j) * load(before.first.whole + j));
  }
  through(w, to, w.forward[l], count, w.layer[l].t);
}

// Those of the first layer: its own weights.
void start(const Work& w, int64_t count) {
  const Rates& t = w.layer[0].t;
  const int64_t H = w.out(0), d = w.in(0);
  const double* W = w.backward[0].signed_.w;
  clear(t.rows, count * (1 + w.m) * t.ld), clear(t.rest, (count + 1) * t.ld);
  for (int64_t nth = 0; nth < count; ++nth) {
    for (int64_t j = 0; j < H; ++j) t.at(nth)[j] = W[j * d + w.call.columns[w.wanted[nth]]];
  }
  double* const whole = t.whole(count);
  for (int64_t k = 0; k < w.K; ++k) {
    for (int64_t j = 0; j < H; ++j) {
      const double one = size_of(W[j * d + w.call.columns[k]]);
      whole[j] = one > whole[j] ? one : whole[j];
    }
  }
}

}  // namespace quadratic
}  // namespace
