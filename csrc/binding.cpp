// The C interface of the shared library: plans, the choice of instruction set, PyTorch's thread pool.
//
// The library links neither PyTorch nor Python. It is opened with ctypes, which releases the GIL, and
// is given the address of `torch_parallel_for` (LibTorch's stable C interface, torch 2.10 and later),
// so that one binary serves every PyTorch and every Python, and no second thread pool appears.
#include "plan.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace {

// --- memory ---------------------------------------------------------------------------------------

// One block of scratch memory is kept from call to call, since a fresh one costs a page fault for
// each 4 KiB. A call takes it for itself; a second thread meanwhile finds none and allocates.
struct Cached {
  void* memory;
  size_t bytes;
};
constexpr size_t keep_at_most = size_t(256) << 20;
std::atomic<Cached*> cached{nullptr};

void free_cached(Cached* block) {
  if (!block) return;
  std::free(block->memory);
  delete block;
}

// The header in front of what `acquire` hands out.
constexpr size_t header = 64;

void* acquire(size_t bytes) {
  bytes += header;
  Cached* block = cached.exchange(nullptr);
  if (!block || block->bytes < bytes) {
    free_cached(block);
    block = new (std::nothrow) Cached{nullptr, (bytes + 4095) / 4096 * 4096};
    if (!block) return nullptr;
    block->memory = std::aligned_alloc(64, block->bytes);
    if (!block->memory) {
      delete block;
      return nullptr;
    }
  }
#ifdef MK_POISON
  std::memset(block->memory, 0xff, block->bytes);  // NaN: whatever is read must have been written
#endif
  std::memcpy(block->memory, &block, sizeof(block));
  return static_cast<char*>(block->memory) + header;
}

void release(void* memory, size_t) {
  Cached* block;
  std::memcpy(&block, static_cast<char*>(memory) - header, sizeof(block));
  if (block->bytes > keep_at_most) return free_cached(block);
  free_cached(cached.exchange(block));
}

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

// --- plans ------------------------------------------------------------------------------------------

struct OwnedPlan {
  Plan plan;
  const Kernels* kernels;
  std::vector<int64_t> widths, kind;
  std::vector<double> numbers, direction;
};

}  // namespace

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

MK_EXPORT const char* mk_isa() { return chosen().name; }

MK_EXPORT void mk_use_parallel_for(void* address) {
  parallel_for = reinterpret_cast<ParallelFor>(address);
}

// flags: is_double, adjoint, hinge, squared, elementwise. Arrays as in Plan; copied.
MK_EXPORT void* mk_plan_new(const int64_t* flags, int64_t L, int64_t k, const int64_t* widths,
                            const int64_t* kind, const double* numbers, double margin,
                            const double* direction) {
  OwnedPlan* owned = new (std::nothrow) OwnedPlan{};
  if (!owned) return nullptr;
  owned->kernels = flags[0] ? &chosen().float64 : &chosen().float32;
  owned->widths.assign(widths, widths + L + 1);
  owned->kind.assign(kind, kind + L);
  owned->numbers.assign(numbers, numbers + 3 * L);
  if (direction) owned->direction.assign(direction, direction + widths[L] * k);
  owned->plan = Plan{L,
                     k,
                     owned->widths.data(),
                     owned->kind.data(),
                     owned->numbers.data(),
                     flags[1] != 0,
                     flags[2] != 0,
                     flags[3] != 0,
                     flags[4] != 0,
                     margin,
                     owned->direction.data()};
  return owned;
}

MK_EXPORT void mk_plan_delete(void* plan) { delete static_cast<OwnedPlan*>(plan); }

// Elements for each row of x of the buffers that forward fills: a_l, P_l, ∂penalty/∂J.
MK_EXPORT void mk_saved_sizes(const void* plan, int64_t* sizes) {
  const OwnedPlan* owned = static_cast<const OwnedPlan*>(plan);
  Saved saved;
  owned->kernels->saved(owned->plan, &saved);
  std::memcpy(sizes, saved.size, sizeof(saved.size));
}

MK_EXPORT int mk_forward(const void* plan, int64_t N, int64_t threads, const void* x,
                         const void* weight, int64_t weight_per_row, const void* const* params,
                         void* y, void* out, void* const* saved) {
  const OwnedPlan* owned = static_cast<const OwnedPlan*>(plan);
  const ForwardCall call{N, int(threads), x, weight, weight_per_row != 0, params, y, out, saved};
  return owned->kernels->forward(owned->plan, call, runtime);
}

MK_EXPORT int mk_backward(const void* plan, int64_t N, int64_t threads, const void* x,
                          const void* const* params, const void* gy, const void* gout,
                          void* const* saved, void* gx, void* const* grads) {
  const OwnedPlan* owned = static_cast<const OwnedPlan*>(plan);
  const BackwardCall call{N, int(threads), x, params, gy, gout, saved, gx, grads};
  return owned->kernels->backward(owned->plan, call, runtime);
}

MK_EXPORT void mk_activation(int64_t is_double, int64_t kind, const double* numbers, int64_t n,
                             const void* a, void* h, void* s, void* c) {
  const Kernels& kernels = is_double ? chosen().float64 : chosen().float32;
  kernels.activation(int(kind), numbers, n, a, h, s, c);
}
