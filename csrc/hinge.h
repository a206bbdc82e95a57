// The slopes' end of both kernels: the hinge over J (rows, D, k) of a block on the way forward, its
// derivative and the pairs that take part in the loss on the way back.
#pragma once

#include "blocks.h"

namespace {

// Forward: directions, margins and weights, (D, k) repeated until they fill whole vectors, D·k·lanes of
// each.
template <class T> struct Hinge {
  const Problem* problem;
  const ForwardCall* call;
  const T *signs = nullptr, *margins = nullptr, *weights = nullptr;

  Hinge(const Problem& p, const ForwardCall& c, Bump& memory) : problem(&p), call(&c) {
    if (!p.hinge) return;
    const int64_t Dk = p.D * p.k, n = Dk * Simd<T>::lanes;
    T *sign = memory.take<T>(n), *margin = memory.take<T>(n), *weight = memory.take<T>(n);
    if (!sign) return;
    const T* given = c.weight_per_row ? nullptr : static_cast<const T*>(c.weight);
    for (int64_t i = 0; i < n; ++i) {
      sign[i] = T(p.direction[i % Dk]);
      margin[i] = T(p.margin[i % Dk]);
      weight[i] = given ? given[i % Dk] : T(1);
    }
    signs = sign;
    margins = margin;
    weights = weight;
  }

  // Where J of a block is computed: in its own place of the output, or in `scratch` if that is a sum.
  T* slopes(int64_t row0, T* scratch) const {
    const bool summed = problem->hinge && !problem->elementwise;
    return summed ? scratch : static_cast<T*>(call->out) + row0 * problem->D * problem->k;
  }

  // Of J of a block, which has its values y (rows, D): what the call asks for. Their sum goes to
  // `partial`, one number for each block.
  void run(int64_t block, int64_t rows, int64_t row0, const T* y, T* slopes,
           double* partial) const {
    spread_nan(rows, y, slopes);
    if (problem->hinge) hinge(block, rows, row0, slopes, partial);
  }

 private:
  // An output that is NaN has no slope: no NaN may turn into a zero penalty.
  void spread_nan(int64_t rows, const T* y, T* slopes) const {
    for (int64_t i = 0; i < rows * problem->D; ++i) {
      if (y[i] == y[i]) continue;
      for (int64_t c = 0; c < problem->k; ++c) slopes[i * problem->k + c] = y[i];
    }
  }

  // e = w·h(margin - direction·J); what is saved is ∂e/∂J, zero wherever the slope is inactive.
  void hinge(int64_t block, int64_t rows, int64_t row0, const T* slopes, double* partial) const {
    constexpr int64_t lanes = Simd<T>::lanes;
    const int64_t Dk = problem->D * problem->k, n = rows * Dk, at = row0 * Dk;
    const bool per_row = call->weight && call->weight_per_row;
    const T* weight = per_row ? static_cast<const T*>(call->weight) + at : nullptr;
    T* derivative = call->saved ? static_cast<T*>(call->saved[2]) + at : nullptr;
    T* each = problem->elementwise ? static_cast<T*>(call->out) + at : nullptr;
    Vec<T> total = Vec<T>{};
    for (int64_t i = 0, phase = 0; i < n; i += lanes) {
      const Vec<T> sign = load(signs + phase);
      T rest[3][lanes];  // the ragged end goes through here
      const int64_t some = min_of(lanes, n - i);
      Vec<T> J, w = load(weights + phase);
      if (some == lanes) {
        J = load(slopes + i);
        if (per_row) w = load(weight + i);
      } else {
        for (int64_t j = 0; j < lanes; ++j) {
          rest[0][j] = j < some ? slopes[i + j] : T(0);
          rest[1][j] = j < some && per_row ? weight[i + j] : T(1);
        }
        J = load(rest[0]);
        if (per_row) w = load(rest[1]);
        w = within(some, w);
      }
      const Vec<T> r = load(margins + phase) - sign * J, zero = Vec<T>{};
      const auto on = (sign != T(0)) & ~(r <= T(0));  // NaN counts
      const bool squared = problem->squared;
      const Vec<T> e = on ? w * (squared ? r * r : r) : zero;
      const Vec<T> de = on ? -sign * w * (squared ? r + r : zero + T(1)) : zero;
      total += some == lanes ? e : within(some, e);
      keep(each, i, some, e, rest[0]);
      keep(derivative, i, some, de, rest[0]);
      phase += lanes;
      if (phase == Dk * lanes) phase = 0;
    }
    if (partial) partial[block] = double(sum<T>(total));
  }

  // The first `some` lanes of v, zero after them.
  static Vec<T> within(int64_t some, Vec<T> v) {
    for (int64_t j = some; j < Simd<T>::lanes; ++j) v[j] = 0;
    return v;
  }
  static void keep(T* to, int64_t at, int64_t some, Vec<T> v, T* rest) {
    if (!to) return;
    if (some == Simd<T>::lanes) return store(to + at, v);
    store(rest, v);
    for (int64_t j = 0; j < some; ++j) to[at + j] = rest[j];
  }
};

// The pairs (row, column or output) of a block that take part in the loss by their slopes.
template <class T> struct Pairs {
  int32_t* row;
  T *dot, *seed;  // ẋ in the columns of x2 (pairs, k), s (pairs, D)
  int64_t ld_dot, ld_seed;

  Pairs(Bump& memory, const Problem& problem, int64_t capacity) {
    row = memory.take<int32_t>(capacity);
    ld_dot = scratch_ld<T>(problem.k), ld_seed = scratch_ld<T>(problem.D);
    dot = memory.take<T>(capacity * ld_dot);
    seed = memory.take<T>(capacity * ld_seed);
  }

  // Takes pairs of gJ (rows, D, k) from candidate `next` on until `capacity` is full.
  int64_t gather(const Problem& problem, const T* gJ, int64_t rows, int64_t capacity,
                 int64_t* next) const {
    const int64_t D = problem.D, k = problem.k, each = problem.adjoint ? D : k;
    int64_t m = 0;
    for (; *next < rows * each && m < capacity; ++*next) {
      const int64_t i = *next / each, which = *next % each;
      const T* g = gJ + i * D * k;
      T *x = dot + m * ld_dot, *s = seed + m * ld_seed;
      bool any = false;
      if (problem.adjoint) {
        for (int64_t c = 0; c < k; ++c) any |= g[which * k + c] != T(0);
        if (!any && switches.compacts) continue;
        copy_few(x, g + which * k, k);
        for (int64_t d = 0; d < D; ++d) s[d] = d == which ? T(1) : T(0);
      } else {
        for (int64_t d = 0; d < D; ++d) any |= (s[d] = g[d * k + which]) != T(0);
        if (!any && switches.compacts) continue;
        for (int64_t c = 0; c < k; ++c) x[c] = c == which ? T(1) : T(0);
      }
      row[m++] = int32_t(i);
    }
    return m;
  }
};

// gJ of a block; false if it is zero throughout. Zero slopes stay zero whatever gout is.
template <class T>
bool slope_gradients(const Problem& problem, const BackwardCall& call, T* to, int64_t rows,
                     int64_t row0) {
  const int64_t n = rows * problem.D * problem.k, at = row0 * problem.D * problem.k;
  const T* out = static_cast<const T*>(call.gout);
  const auto times = [](T e, T g) { return e == T(0) ? T(0) : e * g; };
  if (!problem.hinge) {
    copy(to, out + at, n);
  } else {
    const T* derivative = static_cast<const T*>(call.saved[2]) + at;
    if (problem.elementwise) {
      for (int64_t i = 0; i < n; ++i) to[i] = times(derivative[i], out[at + i]);
    } else {
      const T one = out[0];
      for (int64_t i = 0; i < n; ++i) to[i] = times(derivative[i], one);
    }
  }
  int any = 0;
  for (int64_t i = 0; i < n; ++i) any |= to[i] != T(0);
  return any || !switches.compacts;
}

template <class T> bool any_slope_gradient(const Problem& problem, const BackwardCall& call) {
  if (!call.gout) return false;
  if (!problem.hinge || !switches.compacts) return true;
  const T* derivative = static_cast<const T*>(call.saved[2]);
  for (int64_t i = 0; i < call.N * problem.D * problem.k; ++i) {
    if (derivative[i] != T(0)) return true;
  }
  return false;
}

}  // namespace
