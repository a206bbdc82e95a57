// The threads of a call, and one allocation for the packed weights and the scratch memory of all.
#pragma once

#include "blocks.h"

namespace {

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

}  // namespace
