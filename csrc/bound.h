// Sound bounds of a program's slopes over boxes, and the linear term that monokernel/monotone.py adds.
//
// Rows are few, so this is about calls avoided and not about rates, and one thread does it.
#pragma once

#include "bound_backward.h"
#include "bound_forward.h"
#include "bound_lift.h"
#include "bound_norms.h"

namespace {

// 0 where a node's kind has no rule here.
template <class T> int64_t bound_size(const Problem& problem, const Box& box) {
  for (int64_t i = 0; i < problem.count; ++i) {
    switch (problem.nodes[i].kind) {
      case node_softmax:
      case node_log_softmax: return 0;
    }
  }
  Bump counting;
  return Bounded<T>(problem, box, nullptr, nullptr, counting).saved_size;
}

// The bound (D, k), and y (N, D) += Σ_c sign·lift·(x_c - middle).
template <class T>
Status lift_forward(const Problem& problem, const Box& box, const LiftCall& call,
                    const Runtime& runtime) {
  Bump counting;
  const Bounded<T> counted(problem, box, call.params, call.sizes, counting);
  counting.take<double>(counted.scratch_size());
  char* memory = static_cast<char*>(runtime.acquire(counting.lines()));
  if (!memory) return out_of_memory;
  Bump handing{memory, 0};
  Bounded<T> net(problem, box, call.params, call.sizes, handing);
  net.saved = call.saved;
  net.forward(handing.take<double>(net.scratch_size()));
  net.bound(static_cast<T*>(call.bound));
  const int64_t D = problem.D, d = problem.d;
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
  double *products, *cotangents;

  BoundedBackward(const Problem& problem, const Box& box, const LiftBackwardCall& call,
                  Bump& memory)
      : net(problem, box, call.params, call.sizes, memory),
        of_bound(memory.take<T>(problem.D * box.k)),
        products(memory.take<double>(net.products_size())),
        cotangents(memory.take<double>(net.cotangents_size)) {
    net.saved = const_cast<double*>(call.saved);
  }
};

// Σ_i g_i (x_i - middle), in four chains: an addition waits for the one before it.
template <class T>
MK_INLINE double moment(int64_t N, const T* g, int64_t D, const T* x, int64_t d, T middle) {
  double total[4] = {};
  int64_t i = 0;
  for (; i + 4 <= N; i += 4) {
    for (int64_t chain = 0; chain < 4; ++chain) {
      total[chain] += double(g[(i + chain) * D] * (x[(i + chain) * d] - middle));
    }
  }
  for (; i < N; ++i) total[0] += double(g[i * D] * (x[i * d] - middle));
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <class T>
Status lift_backward(const Problem& problem, const Box& box, const LiftBackwardCall& call,
                     const Runtime& runtime) {
  Bump counting;
  const BoundedBackward<T> counted(problem, box, call, counting);
  char* memory = static_cast<char*>(runtime.acquire(counting.lines()));
  if (!memory) return out_of_memory;
  Bump handing{memory, 0};
  const BoundedBackward<T> pass(problem, box, call, handing);
  const int64_t D = problem.D, d = problem.d;
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
    clear(pass.cotangents, pass.net.cotangents_size);
    pass.net.backward(pass.of_bound, pass.cotangents, pass.products, call.grads);
  }
  runtime.release(memory, counting.lines());
  return ok;
}

}  // namespace
