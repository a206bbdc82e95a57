// How a call is cut and what it works in: blocks of rows, threads, and one allocation for the packed
// weights and the scratch memory of all of them.
#pragma once

#include "gemm.h"
#include "plan.h"

// Rows of a block, about. docs/native.md has what other sizes cost.
#ifndef MK_BLOCK_ROWS
#define MK_BLOCK_ROWS 96
#endif

namespace {

// Hands out pieces of one allocation. Run once with no base to count, once to hand out.
struct Bump {
  char* base = nullptr;
  size_t used = 0;

  size_t lines() const { return (used + 63) / 64 * 64; }  // whole cache lines
  template <class U> U* take(int64_t n) {
    const size_t at = lines();
    used = at + size_t(n) * sizeof(U);
    return base ? reinterpret_cast<U*>(base + at) : nullptr;
  }
};

// The row stride of scratch matrices: whole vectors, and one more so that the rows of a matrix of
// 2^n columns do not all fall into the same few sets of the first-level cache.
template <class T> MK_INLINE int64_t scratch_ld(int64_t columns) {
  return round_up(columns, Simd<T>::lanes) + Simd<T>::lanes;
}
template <class T> MK_INLINE int64_t whole_vectors(int64_t columns) {
  return round_up(columns, Simd<T>::lanes);
}

// Rows are cut into `count` blocks of at most `capacity` rows that go through all layers while they
// stay in the second-level cache. The cut depends on nothing but N, so that what forward saves can
// be read whatever the number of threads is by then.
struct Blocks {
  int64_t N, tiles, count, capacity;

  explicit Blocks(int64_t n) : N(n), tiles((n + MR - 1) / MR) {
    constexpr int64_t target = MK_BLOCK_ROWS / MR;  // tiles in a block of many rows
    count = (tiles + target - 1) / target;
    if (count > 1) count = round_up(count, 2);  // two, four, ... threads get equal shares
    count = max_of<int64_t>(count, 1);
    capacity = max_of<int64_t>((tiles + count - 1) / count, 1) * MR;
  }
  int64_t begin(int64_t b) const { return min_of(N, b * tiles / count * MR); }
  int64_t rows(int64_t b) const { return begin(b + 1) - begin(b); }
};

// Runs work(thread) for every thread of the call, on PyTorch's pool.
template <class Work> void on_threads(const Runtime& runtime, int64_t threads, Work& work) {
  if (threads == 1) return work(0);
  runtime.parallel(
      threads,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t t = begin; t < end; ++t) (*static_cast<Work*>(context))(t);
      },
      &work);
}

// Below so many elements, work that is only moving them is quicker done than shared out.
constexpr int64_t shared_from = 1 << 16;

// Bytes between what one thread works in and what another does: prefetchers run past the end of what
// a core reads, and would take lines from the core that writes them.
constexpr size_t gap = 8192;

// The threads of a pass and the memory they work in: something of the caller's in front, packed
// weights, scratch for each thread. Small weights every thread packs for itself: to fetch what
// another core has just written takes longer, above all where the two share no cache. Large weights
// are packed once, by all threads together. `weights_in(memory)` and `scratch_in(memory, net)` lay
// them out.
template <class T, class WeightsIn, class ScratchIn> class Crew {
 public:
  Crew(int64_t threads, size_t front, const WeightsIn& weights_in, const ScratchIn& scratch_in)
      : threads_(threads), front_(front + gap), weights_in_(weights_in), scratch_in_(scratch_in) {
    Bump packed, scratch;
    const auto weights = weights_in(packed);
    scratch_in(scratch, weights.net);
    packed_ = packed.lines() + gap, scratch_ = scratch.lines() + gap;
    together_ = packed_ >= size_t(shared_from) * sizeof(T);
  }
  size_t bytes() const { return scratch_at(threads_); }

  // body(t, weights, scratch) for every thread t.
  template <class Body> void run(const Runtime& runtime, char* memory, const Body& body) const {
    const auto with = [&](int64_t t, const auto& weights) {
      Bump at{memory + scratch_at(t), 0};
      body(t, weights, scratch_in_(at, weights.net));
    };
    if (!together_) {
      auto alone = [&](int64_t t) {
        Bump at{memory + front_ + packed_ * size_t(t), 0};
        const auto weights = weights_in_(at);
        weights.net.pack(1, 0);
        with(t, weights);
      };
      return on_threads(runtime, threads_, alone);
    }
    Bump at{memory + front_, 0};
    const auto weights = weights_in_(at);
    auto packing = [&](int64_t t) { weights.net.pack(threads_, t); };
    on_threads(runtime, threads_, packing);
    auto work = [&](int64_t t) { with(t, weights); };
    on_threads(runtime, threads_, work);
  }

 private:
  size_t scratch_at(int64_t t) const {
    return front_ + packed_ * (together_ ? 1 : size_t(threads_)) + scratch_ * size_t(t);
  }

  int64_t threads_;
  size_t front_, packed_, scratch_;
  bool together_;
  const WeightsIn& weights_in_;
  const ScratchIn& scratch_in_;
};

// The blocks of one thread: a fixed share, so that the same thread count gives the same bits.
MK_INLINE int64_t first_block(const Blocks& blocks, int64_t threads, int64_t t) {
  return blocks.count * t / threads;
}

template <class T> MK_INLINE void clear(T* to, int64_t n) {
  __builtin_memset(to, 0, size_t(n) * sizeof(T));
}
template <class T> MK_INLINE void copy(T* to, const T* from, int64_t n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(T));
}
// The same for a handful of elements, where a call of memcpy would cost more than the copy.
template <class T> MK_INLINE void copy_few(T* to, const T* from, int64_t n) {
  for (; n >= 4; n -= 4, to += 4, from += 4) copy(to, from, 4);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace
