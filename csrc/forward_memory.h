// What a forward packs and works in.
#pragma once

#include "hinge.h"
#include "saved.h"
#include "values.h"

namespace {

// Tangents that go up the program together: each panel of a weight meets all of them while it is in
// the first-level cache.
constexpr int64_t most_together = 4;

// Memory of the chain of slopes, by value: the cotangents of one output, or the tangents of a few
// columns. One more stands for x2: what products pull to its columns of x alone.
template <class T> struct SlopeChain {
  int64_t x2;      // its number
  Mat<T>* at;      // the first tangent
  int64_t* apart;  // elements from one tangent to the next
  int64_t together;
  bool *begun, *done;  // done: it has gone on to its node's input already
  Mat<const T>* dots;  // of the inputs of the node at hand
  T* product;          // one block of the widest value, for a product that is added to others
  int64_t ld;

  SlopeChain(Bump& memory, const Program<T>& program, int64_t capacity) {
    const int64_t count = program.y + 1;
    x2 = count;
    together = program.problem->adjoint ? 1 : min_of(program.k, most_together);
    at = memory.take<Mat<T>>(count + 1);
    apart = memory.take<int64_t>(count);
    begun = memory.take<bool>(count + 1);
    done = memory.take<bool>(count);
    int64_t most = 1, widest = 1;
    for (int64_t v = 0; v < count; ++v) {
      if (v) most = max_of(most, program.node(v).inputs);
      widest = max_of(widest, program.width(v));
      const Flow& flow = program.flow(v);
      if (program.problem->adjoint ? flow.part : program.is_view(v)) {
        if (at) at[v] = program.view_of(at, v), apart[v] = apart[program.node(v).input[0]];
        continue;
      }
      if (scaled_in_place(program, v)) continue;
      const bool one_row = program.problem->adjoint ? flow.uniform : flow.constant;
      const int64_t stride = scratch_ld<T>(program.width(v));
      const int64_t size = (one_row ? 1 : capacity) * stride;
      T* own = memory.take<T>(together * size);
      if (!at) continue;
      at[v] = {own, one_row ? 0 : stride}, apart[v] = size;
      if (v && scaled_in_place(program, v - 1)) at[v - 1] = at[v], apart[v - 1] = size;
    }
    if (program.problem->adjoint) {
      const bool one_row = program.flow(0).uniform;
      const int64_t stride = scratch_ld<T>(program.k);
      T* own = memory.take<T>((one_row ? 1 : capacity) * stride);
      if (at) at[x2] = {own, one_row ? 0 : stride};
    }
    dots = memory.take<Mat<const T>>(most);
    ld = scratch_ld<T>(widest);
    product = memory.take<T>(capacity * ld);
  }
  // Whether the tangents of linear node v become those of the elementwise one after it where they lie.
  static bool scaled_in_place(const Program<T>& program, int64_t v) {
    return !program.problem->adjoint && v > 0 && program.linear(v) && program.followed(v) &&
           program.flow(v).once && !program.flow(v).constant;
  }
  Mat<T> tangent(int64_t v, int64_t c) const { return {at[v].at + c * apart[v], at[v].ld}; }
  // Rows of value v's own: one that stands for all, or each.
  int64_t rows_of(int64_t v, int64_t rows) const { return at[v].ld ? rows : 1; }
};

template <class T> struct ProgramForwardWeights {
  Program<T> net;
  Hinge<T> hinge;

  ProgramForwardWeights(const Problem& problem, const ForwardCall& call, Bump& memory)
      : net(problem, call.params, call.sizes, memory), hinge(problem, call, memory) {
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!net.flow(v).used) continue;
      net.pack_parameter(memory, v);
      if (!net.linear(v)) continue;
      net.pack_bias(memory, v);
      if (net.by_dots(v) || (problem.adjoint && v == net.y)) net.pack_rows(memory, v);
      if (!net.by_dots(v)) net.pack_forward(memory, v);
      pack_for_slopes(memory, v, walked(net, call, v));
    }
  }

  // Whether the chain of slopes goes through value v.
  static bool walked(const Program<T>& net, const ForwardCall& call, int64_t v) {
    const Flow& flow = net.flow(v);
    const bool keeps = call.saved && net.problem->keeps_adjoint();
    return flow.used && (flow.moving || (keeps && flow.kept));
  }

 private:
  void pack_for_slopes(Bump& memory, int64_t v, bool walked) {
    if (!walked) return;
    const bool of_x = net.below(v) == 0;
    if (!net.problem->adjoint) {
      if (of_x) net.pack_columns(memory, v);
    } else if (!of_x) {
      net.pack_back(memory, v);
    } else if (net.slopes_by_dots(v)) {
      net.pack_columns(memory, v);
    } else {
      net.pack_slopes(memory, v);
    }
  }
};

template <class T> struct ProgramForwardScratch {
  BlockValues<T> values;
  SlopeChain<T> chain;
  T* slopes;

  ProgramForwardScratch(Bump& memory, const Program<T>& net, const ForwardCall& call,
                        int64_t capacity, bool own_slopes)
      : values(memory, net, capacity,
               [&](int64_t v, ValuePart part) {
                 if (v == 0) return part == the_value && !net.x_as_it_is();
                 if (!net.flow(v).used) return false;
                 if (part == the_mask) return net.node(v).kind == node_dropout;
                 if (part == the_first) {
                   return needs_first(net.node(v)) &&
                          ProgramForwardWeights<T>::walked(net, call, v);
                 }
                 return !net.is_view(v) && !(call.saved && net.flow(v).saved);
               }),
        chain(memory, net, capacity) {
    slopes = memory.take<T>(own_slopes ? capacity * net.D * net.k : 0);
  }
};

}  // namespace
