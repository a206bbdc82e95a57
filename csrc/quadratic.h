// Sound bounds of a chain's slopes to the second order, quadratic forms in double, box by box: what
// monokernel/quadratic.py says, where the mathematics is described, and with its rounding.
//
// A form lies in rows of one stride, each over the neurons of a layer. Rows go through a layer by one
// product; all between two products is done in one or two passes over rows that are in the cache.
#pragma once

#include "quadratic_backward.h"
#include "quadratic_conclusion.h"

namespace {
namespace quadratic {

// One function, and so is `meet`: cut in two, what is inlined where decides which of two products is
// fused with their sum, and bounds change in the last place.
void one_box(Work& w, int64_t box) {
  const SlopesCall& call = w.call;
  const int64_t L = w.L, d = w.chain.layer[0].in, m = w.m;
  int64_t count = 0;
  for (int64_t k = 0; k < w.K; ++k) {
    if (!call.wanted || call.wanted[box * w.K + k]) w.wanted[count++] = k;
  }
  if (!count) return;
  // Forwards: forms, and how much the slopes change with σ' ∘ P of each layer.
  start(w, count);
  for (int64_t l = 0; l < L; ++l) {
    Layer& here = w.layer[l];
    Form& a = here.a;
    const int64_t H = w.out(l);
    if (l == 0) {
      first_layer(w, call.c + box * d, call.r + box * d, a);
    } else {
      rates_forward(w, l, count);
      through(w, w.bends(l - 1) ? w.h : w.layer[l - 1].a, l, a);
    }
    if (!w.bends(l)) {
      for (; a.terms < w.terms; ++a.terms) clear(a.G(a.terms), w.wide);
      measure(w, a, H);
      continue;
    }
    parabolas(w, here, w.chain.layer[l], H, l < L - 1);
    along(w, a, here.first, H, here.s);
    if (l < L - 1) along(w, a, here.value, H, w.h);
  }
  // Backwards: P, and how much the slopes change with σ of each layer.
  w.P.terms = 0;
  clear(w.P.base, Form::before * w.P.ld);
  w.P.c()[0] = 1;
  clear(w.M, (w.terms - m) * w.ld_M), clear(w.blame, w.K * m), clear(w.third, w.K);
  Form last{w.last, w.ld_last, 0};
  double rounding = 0;
  bool further = false;
  for (int64_t l = L - 1; l >= 0; --l) {
    const Layer& here = w.layer[l];
    const Form &a = here.a, &P = w.P;
    const int64_t H = w.out(l);
    const double off = rounding_of(w.chain, max_of(w.in(l), H), m), *bias = w.bias(l);
    const bool bends = w.bends(l), values = further;
    if (bends) {
      meet(w, here, P, further, H, count);
      multiply(w, P, here.s, H, w.p);
      further = true;
    }
    const Rates& q = bends ? w.q_a : w.q_h;
    for (int64_t j = 0; j < H; ++j) {
      const double whole = size_of(P.c()[j]) + P.linear()[j] + P.bent()[j];
      const double own = size_of(a.c()[j]);
      double value = own + a.linear()[j] + a.bent()[j] + a.e()[j];
      if (bends) value = here.value.whole[j];
      rounding += 2 * off * here.t.whole(count)[j] * whole * (bends ? here.first.whole[j] : 1);
      if (values) rounding += 2 * off * w.q_h.whole(count)[j] * value;
      if (further) {
        rounding += q.whole(count)[j] * (off * (own + size_of(bias[j])) + (l ? 0 : a.e()[j]));
      }
    }
    const Form& from = bends ? w.p : P;
    Form& to = l ? w.h : last;
    if (further && l) {
      const Rates before = w.q_h;
      through(w, q, w.backward[l], count, bends ? before : w.scratch);
      if (!bends) w.q_h = w.scratch, w.scratch = before;
    }
    product(1 + from.terms, from.c(), from.ld, w.backward[l].signed_.matrix(), to.c(), to.ld);
    to.terms = from.terms;
    if (l) {
      measure(w, to, w.in(l));
      const Form before = w.P;
      w.P = w.h, w.h = before;
    }
  }
  for (; last.terms < w.terms; ++last.terms) clear(last.G(last.terms), last.ld);
  for (int64_t nth = 0; nth < count; ++nth) conclude(w, last, box, nth, w.third[nth] + rounding);
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
  for (int64_t box = 0; box < call.B; ++box) quadratic::one_box(work, box);
  runtime.release(memory, bytes);
  return ok;
}

}  // namespace
