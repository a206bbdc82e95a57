// The backward pass of a program: gradients of (y, J or its penalty) by parameters and x.
#pragma once

#include "backward_kept.h"
#include "backward_pairs.h"
#include "backward_parameters.h"
#include "backward_rows.h"

namespace {

template <class T>
Status backward(const Problem& problem, const BackwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  Errand errand{any_slope_gradient<T>(problem, call), false};
  for (int64_t v = 1; v <= problem.count; ++v) {
    errand.curved |= call.way[v].wanted && problem.flow[v].used && problem.nodes[v - 1].curved;
  }
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  // The layout itself is in front of the sums that it lays out.
  Bump places;
  GradientLayout<T>(places, problem, call.sizes);
  char* first = static_cast<char*>(runtime.acquire(places.lines() + 64));
  if (!first) return out_of_memory;
  Bump at{first, 0};
  const GradientLayout<T> layout(at, problem, call.sizes);
  const size_t sums_bytes = size_t(layout.size) * size_t(threads) * sizeof(T);
  const auto weights_in = [&](Bump& memory) {
    return ProgramBackwardWeights<T>(problem, call, errand, memory);
  };
  const auto scratch_in = [&](Bump& memory, const Program<T>& net) {
    return ProgramBackwardScratch<T>(memory, net, call, errand, blocks.capacity);
  };
  const Crew<T, decltype(weights_in), decltype(scratch_in)> crew(threads, sums_bytes, weights_in,
                                                                 scratch_in);
  char* memory = static_cast<char*>(runtime.acquire(crew.bytes()));
  if (!memory) {
    runtime.release(first, places.lines() + 64);
    return out_of_memory;
  }
  T* sums = reinterpret_cast<T*>(memory);
  crew.run(runtime, memory, [&](int64_t t, const auto& weights, ProgramBackwardScratch<T> scratch) {
    scratch.sums = sums + t * layout.size;
    clear(scratch.sums, layout.size);
    const ProgramBackward<T> pass{weights.net, call, blocks, errand, layout};
    const int64_t end = first_block(blocks, threads, t + 1);
    for (int64_t b = first_block(blocks, threads, t); b < end; ++b) pass.run(scratch, b);
  });
  ProgramReduction<T>{call, layout, sums, problem.params, threads}.run(runtime);
  runtime.release(memory, crew.bytes());
  runtime.release(first, places.lines() + 64);
  return ok;
}

}  // namespace
