// The C interface of the shared library, the choice of instruction set, PyTorch's thread pool.
//
// The library links neither PyTorch nor Python. It is opened with ctypes, which releases the GIL, and
// is given the address of `torch_parallel_for` (LibTorch's stable C interface, torch 2.10 and later),
// so that one binary serves every PyTorch and every Python, and no second thread pool appears.
#include "c_api.h"
#include "problems.h"
#include "pool.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace {

Pool pool;

void* acquire(size_t bytes) { return pool.take(bytes); }
void release(void* memory, size_t) { pool.give_back(memory); }

// --- threads --------------------------------------------------------------------------------------

typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Task, void* context);
ParallelFor parallel_for = nullptr;

void parallel(int64_t tasks, Task task, void* context) {
  if (!parallel_for || parallel_for(0, tasks, 1, task, context) != 0) task(0, tasks, context);
}

const Runtime runtime = {parallel, acquire, release};

// --- instruction sets -------------------------------------------------------------------------------

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    sets.push_back(&avx512_kernels);
  }
  if (avx2) sets.push_back(&avx2_kernels);
#endif
  sets.push_back(&baseline_kernels);
  return sets;
}

// The widest this processor has, unless MONOKERNEL_ISA names another that it has.
const InstructionSet* choose() {
  const std::vector<const InstructionSet*> sets = supported();
  if (const char* wanted = std::getenv("MONOKERNEL_ISA")) {
    for (const InstructionSet* set : sets) {
      if (std::strcmp(set->name, wanted) == 0) return set;
    }
  }
  return sets[0];
}

const InstructionSet& chosen() {
  static const InstructionSet* set = choose();
  return *set;
}

}  // namespace

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

Switches switches = {true, true};

MK_EXPORT void mk_switch(int64_t stacks, int64_t compacts) {
  switches = {stacks != 0, compacts != 0};
}

MK_EXPORT const char* mk_isa() { return chosen().name; }

MK_EXPORT void* mk_take(int64_t bytes) { return pool.take(size_t(bytes)); }
MK_EXPORT void mk_give_back(void* memory) { pool.give_back(memory); }

MK_EXPORT void mk_use_parallel_for(void* address) {
  parallel_for = reinterpret_cast<ParallelFor>(address);
}

MK_EXPORT const char* mk_node_names() { return node_names; }

MK_EXPORT int64_t mk_problem_new(const int64_t* flags, int64_t d, int64_t k, const int64_t* columns,
                                 int64_t count, const int64_t* nodes, const double* numbers,
                                 const double* margin, const double* direction) {
  OwnedProblem* owned = new (std::nothrow) OwnedProblem{};
  if (!owned) return 0;
  owned->kernels = flags[0] ? &chosen().float64 : &chosen().float32;
  describe(owned, flags, d, k, columns, count, nodes, numbers, margin, direction);
  Saved saved;
  owned->kernels->saved(owned->problem, &saved);
  static_assert(sizeof(saved.size) == sizeof(owned->shape.saved), "one number for each buffer");
  std::memcpy(owned->shape.saved, saved.size, sizeof(saved.size));
  return Problems::problems().add(owned);
}

MK_EXPORT int64_t mk_problem_keep(int64_t problem) { return Problems::problems().keep(problem); }
MK_EXPORT void mk_problem_drop(int64_t problem) { Problems::problems().drop(problem); }

MK_EXPORT void mk_problem_shape(int64_t problem, mk_shape* shape) {
  *shape = Problems::problems().find(problem)->shape;
}

MK_EXPORT int mk_forward(int64_t problem, int64_t N, int64_t threads, const void* x,
                         const void* weight, int64_t weight_per_row, const void* const* params,
                         const int64_t* sizes, void* y, void* out, void* const* saved) {
  const OwnedProblem* owned = Problems::problems().find(problem);
  const ForwardCall call{N,      int(threads), x, weight, weight_per_row != 0,
                         params, sizes,        y, out,    saved};
  return owned->kernels->forward(owned->problem, call, runtime);
}

MK_EXPORT int mk_backward(int64_t problem, int64_t N, int64_t threads, const void* x,
                          const void* const* params, const int64_t* sizes, const void* gy,
                          const void* gout, void* const* saved, void* gx, void* const* grads) {
  const OwnedProblem* owned = Problems::problems().find(problem);
  const std::vector<Way> way = way_down(owned->problem, gx != nullptr, grads);
  const BackwardCall call{N,    int(threads), x,  params, sizes,     gy,
                          gout, saved,        gx, grads,  way.data()};
  return owned->kernels->backward(owned->problem, call, runtime);
}

MK_EXPORT int mk_problem_box(int64_t problem, int64_t boxes, int64_t k, const double* ends,
                             const int64_t* columns, const double* direction, const double* middle,
                             double margin, const double* curves) {
  OwnedProblem* owned = Problems::problems().find(problem);
  describe_box(owned, boxes, k, ends, columns, direction, middle, margin, curves);
  owned->shape.bounded = k;
  owned->shape.bound = owned->kernels->bound_size(owned->problem, owned->box);
  return owned->shape.bound != 0;
}

MK_EXPORT int mk_lift(int64_t problem, int64_t N, const void* x, const void* const* params,
                      const int64_t* sizes, void* y, void* bound, void* saved) {
  const OwnedProblem* owned = Problems::problems().find(problem);
  const LiftCall call{N, x, params, sizes, y, bound, static_cast<double*>(saved)};
  return owned->kernels->lift_forward(owned->problem, owned->box, call, runtime);
}

MK_EXPORT int mk_lift_backward(int64_t problem, int64_t N, const void* x, const void* const* params,
                               const int64_t* sizes, const void* saved, const void* gy,
                               const void* gbound, void* gx, void* const* grads) {
  const OwnedProblem* owned = Problems::problems().find(problem);
  const LiftBackwardCall call{N,  x,      params, sizes, static_cast<const double*>(saved),
                              gy, gbound, gx,     grads};
  return owned->kernels->lift_backward(owned->problem, owned->box, call, runtime);
}

MK_EXPORT int mk_chain_slopes(int64_t layers, const mk_layer* chain, int64_t folded, int64_t boxes,
                              const double* c, const double* r, int64_t m, const int64_t* moving,
                              int64_t output, int64_t K, const int64_t* columns, const void* wanted,
                              double* const* found) {
  const std::vector<ChainLayer> each = chain_of(layers, chain);
  const SlopesCall call{
      boxes,
      m,
      output,
      K,
      c,
      r,
      moving,
      columns,
      static_cast<const bool*>(wanted),
      {found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]}};
  return chosen().chain_slopes({layers, folded, each.data()}, call, runtime);
}

MK_EXPORT void mk_activation(int64_t is_double, int64_t kind, const double* numbers, int64_t n,
                             const void* a, void* h, void* s, void* c) {
  const Kernels& kernels = is_double ? chosen().float64 : chosen().float32;
  kernels.activation(int(kind), numbers, n, a, h, s, c);
}
