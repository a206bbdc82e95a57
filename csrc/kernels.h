// What one instruction set offers to the binding: isa_*.cpp include this after choosing a vector.
#pragma once

#include "bound.h"
#include "program_backward.h"
#include "program_forward.h"
#include "quadratic.h"

namespace {

template <class T> void saved_sizes(const Problem& problem, Saved* out) {
  Bump counting;
  const Program<T> program(problem, nullptr, nullptr, counting);
  const int64_t derivative = problem.hinge ? problem.D * problem.k : 0;
  *out = {{program.saved_values, program.saved_cotangents, derivative}};
}

// σ, σ', σ'' over n elements, for the test that fixes the table.
template <class T>
void activation(int kind, const double* numbers, int64_t n, const void* a, void* value, void* first,
                void* second) {
  constexpr int64_t lanes = Simd<T>::lanes;
  T in[lanes], out[3][lanes];
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t some = min_of(lanes, n - i);
    for (int64_t j = 0; j < lanes; ++j) in[j] = j < some ? static_cast<const T*>(a)[i + j] : T(0);
    orders_of<T>(kind)[all_orders]({1, lanes, in, lanes, out[0], out[1], out[2], lanes},
                                   {T(numbers[0]), T(numbers[1]), T(numbers[2])});
    copy(static_cast<T*>(value) + i, out[0], some);
    copy(static_cast<T*>(first) + i, out[1], some);
    copy(static_cast<T*>(second) + i, out[2], some);
  }
}

template <class T> constexpr Kernels kernels_of() {
  return {saved_sizes<T>,  forward<T>,       backward<T>,  bound_size<T>,
          lift_forward<T>, lift_backward<T>, activation<T>};
}

}  // namespace
