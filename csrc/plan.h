// The plain data between the binding and the kernels: what monokernel/problem.py is to the backends.
//
// A Plan holds every static fact of a problem; a call adds pointers. No tensor type appears: all
// operands are contiguous, of the plan's dtype, and never null unless said so.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr int kinds = 14;  // rows of the activation table

// A chain of L linear layers: widths w[0] = d, ..., w[L] = D. x2 is the last k columns of x (N, d).
struct Plan {
  int64_t L, k;
  const int64_t* widths;    // L + 1
  const int64_t* kind;      // L codes of the activation table
  const double* numbers;    // (L, 3): p, q, r of each activation
  bool adjoint;             // mode: one chain for each output, else one for each monotone column
  bool hinge, squared, elementwise;
  double margin;
  const double* direction;  // (D, k) in {-1, 0, 1}, present with hinge
};

// What benchmarks/ablation.py can switch off: that one product takes primal and tangent rows, and
// that only rows which violate take part in the slopes' backward.
struct Switches {
  bool stacks, compacts;
};
extern Switches switches;

// What forward leaves for backward: at most this many buffers, of so many elements for each row.
constexpr int max_saved = 3;
struct Saved {
  int64_t size[max_saved];
};

struct ForwardCall {
  int64_t N;
  int threads;
  const void* x;
  const void* weight;       // (D, k), or (N, D, k) if weight_per_row; or null: all ones
  bool weight_per_row;
  const void* const* params;  // W1, b1, ..., each b may be null
  void *y, *out;            // (N, D) and (N, D, k), or the scalar penalty
  void* const* saved;       // null: nothing is saved
};

struct BackwardCall {
  int64_t N;
  int threads;
  const void* x;
  const void* const* params;
  const void *gy, *gout;    // may be null
  void* const* saved;
  void* gx;                 // may be null
  void* const* grads;       // as params, null where no gradient is wanted
};

// What the kernels need of the process: PyTorch's thread pool and one block of memory.
typedef void (*Task)(int64_t begin, int64_t end, void* context);
struct Runtime {
  void (*parallel)(int64_t tasks, Task task, void* context);
  void* (*acquire)(size_t bytes);  // aligned to a cache line; null if there is no memory
  void (*release)(void* memory, size_t bytes);
};

enum Status { ok = 0, out_of_memory = 1 };

// The kernels of one instruction set and one dtype.
struct Kernels {
  void (*saved)(const Plan&, Saved*);
  Status (*forward)(const Plan&, const ForwardCall&, const Runtime&);
  Status (*backward)(const Plan&, const BackwardCall&, const Runtime&);
  void (*activation)(int kind, const double* numbers, int64_t n, const void* a, void* h, void* s,
                     void* c);
};

struct InstructionSet {
  const char* name;
  Kernels float32, float64;
};

extern const InstructionSet baseline_kernels;
#if defined(__x86_64__)
extern const InstructionSet avx2_kernels, avx512_kernels;
#endif
