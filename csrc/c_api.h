// The C interface of the library: what boundary.cpp calls by address and backends/cpu.py with ctypes.
//
// A plan is named by its handle, an opaque number. Who calls may read and write at every pointer: the
// library sees no sizes. Shapes are those of docs/mathematics.md; params are W_1, b_1, ... in order.
#pragma once

#include <stdint.h>

extern "C" {

// What a caller must know of a plan; `widths` (L + 1 numbers) lives as long as the plan.
struct mk_shape {
  int64_t L, k;
  int64_t is_double, summed;  // summed: the second output is one number
  int64_t saved[3];           // elements for each row of x of the a_l, the P_l and ∂penalty/∂J
  const int64_t* widths;
};

// flags: is_double, adjoint, hinge, squared, elementwise. Arrays as in Plan (plan.h); copied. Returns
// the handle, 0 where there is no memory.
int64_t mk_plan_new(const int64_t* flags, int64_t L, int64_t k, const int64_t* widths,
                    const int64_t* kind, const double* numbers, double margin,
                    const double* direction);
// A plan has one owner at first. `keep` adds one, unless the number is no plan's handle: it returns
// 0 then, and 1 otherwise. Each owner drops it once.
int64_t mk_plan_keep(int64_t plan);
void mk_plan_drop(int64_t plan);
void mk_plan_shape(int64_t plan, mk_shape* shape);

// Memory for what forward saves, from the library's pool; null where there is none.
void* mk_take(int64_t bytes);
void mk_give_back(void* memory);

// Both return 0, or 1 where there is no memory for scratch. Null may be: weight (all ones), saved
// (nothing is), a bias; gy, gout, gx and the gradients that are not wanted.
int mk_forward(int64_t plan, int64_t N, int64_t threads, const void* x, const void* weight,
               int64_t weight_per_row, const void* const* params, void* y, void* out,
               void* const* saved);
int mk_backward(int64_t plan, int64_t N, int64_t threads, const void* x, const void* const* params,
                const void* gy, const void* gout, void* const* saved, void* gx,
                void* const* grads);
}
