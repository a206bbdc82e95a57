// The gradients of the parameters: where they are added up by each thread, and how they leave.
#pragma once

#include "crew.h"

namespace {

// Where each parameter's gradient lies among one thread's sums. W (out, in) is kept transposed where
// that fills vectors better, and where x is one of the factors, whose rows are not whole vectors.
template <class T> struct GradientLayout {
  struct Place {
    int64_t at, out, in;  // a row of `in` where out is 0
    bool transposed;
    int64_t rows() const { return out == 0 ? 1 : transposed ? in : out; }
    int64_t columns() const { return out && transposed ? out : in; }
    int64_t ld() const { return whole_vectors<T>(columns()); }
  };
  Place* place;
  int64_t size;

  GradientLayout(Bump& memory, const Problem& problem, const int64_t* sizes)
      : place(memory.take<Place>(problem.params)), size(0) {
    if (!place) return;
    for (int64_t p = 0; p < problem.params; ++p) place[p] = Place{0, 0, 0, false};
    for (int64_t i = 0; i < problem.count; ++i) {
      const Node& node = problem.nodes[i];
      for (int64_t nth = 0; nth < node.params; ++nth) {
        Place& to = place[node.place[nth]];
        if (node.kind != node_linear || nth == 1) {
          if (node.kind != node_dropout) to.in = sizes[node.place[nth]] == 1 ? 1 : node.width;
          continue;
        }
        to.out = node.width, to.in = problem.width(node.input[0]);
        const int64_t lanes = Simd<T>::lanes;
        to.transposed |= node.input[0] == 0 || to.in * ((to.out + lanes - 1) / lanes) <
                                                   to.out * ((to.in + lanes - 1) / lanes);
      }
    }
    for (int64_t p = 0; p < problem.params; ++p) {
      place[p].at = size;
      size += place[p].rows() * place[p].ld();
    }
    size = round_up(size + int64_t(gap / sizeof(T)), 64);
  }
};

// Adds up the threads' sums in their order and lays them out as the parameters are.
template <class T> struct ProgramReduction {
  const BackwardCall& call;
  const GradientLayout<T>& layout;
  const T* sums;  // thread after thread
  int64_t params, threads;

  void run(const Runtime& runtime) const {
    const int64_t helpers = layout.size < shared_from ? 1 : threads;
    auto work = [&](int64_t t) {
      for (int64_t p = 0; p < params; ++p) {
        if (call.grads[p]) parameter(p, helpers, t);
      }
    };
    on_threads(runtime, helpers, work);
  }

 private:
  // One helper's share of a parameter's rows.
  void parameter(int64_t p, int64_t helpers, int64_t helper) const {
    const typename GradientLayout<T>::Place& place = layout.place[p];
    T* to = static_cast<T*>(call.grads[p]);
    const int64_t n = place.out ? place.out : 1;
    const int64_t end = n * (helper + 1) / helpers;
    for (int64_t i = n * helper / helpers; i < end; ++i) {
      if (place.transposed) {
        for (int64_t j = 0; j < place.in; ++j) {
          to[i * place.in + j] = element(place.at + j * place.ld() + i);
        }
      } else {
        row(to + i * place.in, place.at + i * place.ld(), place.in);
      }
    }
  }
  T element(int64_t at) const {
    T total = sums[at];
    for (int64_t t = 1; t < threads; ++t) total += sums[t * layout.size + at];
    return total;
  }
  void row(T* to, int64_t at, int64_t n) const {
    copy(to, sums + at, n);
    for (int64_t t = 1; t < threads; ++t) {
      const T* more = sums + t * layout.size + at;
      for (int64_t j = 0; j < n; ++j) to[j] += more[j];
    }
  }
};

}  // namespace
