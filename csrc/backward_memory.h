// What a backward packs and works in.
#pragma once

#include "hinge.h"
#include "saved.h"
#include "values.h"

namespace {

// What a backward needs of its way beyond the flags by value.
struct Errand {
  bool pairs;   // some slope takes part in the loss
  bool curved;  // and some node on the way bends
};

template <class T> struct ProgramBackwardWeights {
  Program<T> net;

  ProgramBackwardWeights(const Problem& problem, const BackwardCall& call, const Errand& errand,
                         Bump& memory)
      : net(problem, call.params, call.sizes, memory) {
    for (int64_t v = 1; v <= net.y; ++v) {
      const Way& way = call.way[v];
      if (!net.flow(v).used || !(way.wanted || way.dot || way.value)) continue;
      net.pack_parameter(memory, v);
      if (!net.linear(v)) continue;
      const bool again = way.value && !net.flow(v).saved;
      const bool pushed = errand.pairs && way.dot;
      if (again) net.pack_bias(memory, v);
      const bool top = v == net.y && net.flow(v).kept;
      if (top || ((again || pushed) && net.by_dots(v))) net.pack_rows(memory, v);
      if ((again || pushed) && !net.by_dots(v)) net.pack_forward(memory, v);
      if (way.wanted && pulls(call, errand, v)) net.pack_back(memory, v);
    }
  }

 private:
  // Whether something is multiplied by W on the way down from v.
  bool pulls(const BackwardCall& call, const Errand& errand, int64_t v) const {
    const int64_t u = net.below(v);
    if (!call.way[u].wanted) return false;
    if (!net.flow(u).kept) return true;
    return (errand.pairs && errand.curved) || (!net.flow(u).pulled && v != net.y);
  }
};

template <class T> struct ProgramBackwardScratch {
  BlockValues<T> rows;
  // By value.
  Mat<T>* cotangent;  // of the rows: P where it is kept, else g
  Mat<T>* second;     // σ'' of the rows or of the pairs
  Mat<T>* dot;        // of the pairs: the tangent
  Mat<T>* chain;      // of the pairs: what comes down for them, q where P is kept, else P
  bool* begun;        // there is something in `cotangent`
  bool* done;      // of an elementwise node, the rows' cotangent has gone on to its input already;
                   // of a linear one, it is gy∘P, and P of the pairs in `seeds`
  bool* chained;   // there is something in `chain`
  bool* prepared;  // and in `second`
  bool* through;   // what came down for the pairs has gone on
  Mat<const T>* dots;     // of the inputs of the node at hand
  Mat<T> g, seeds, bend;  // a block of the widest value each
  T* slopes;              // gJ (rows, D, k)
  Pairs<T> pairs;
  T* sums = nullptr;

  ProgramBackwardScratch(Bump& memory, const Program<T>& net, const BackwardCall& call,
                         const Errand& errand, int64_t capacity)
      : rows(memory, net, capacity,
             [&](int64_t v, ValuePart part) {
               const Way& way = call.way[v];
               if (v == 0) return part == the_value && !net.x_as_it_is();
               if (!net.flow(v).used) return false;
               if (part == the_mask) return is_mask(net, call, v);
               if (part == the_first) return way.first && needs_first(net.node(v));
               return way.value && !net.flow(v).saved && !net.is_view(v);
             }),
        pairs(memory, *net.problem, errand.pairs ? capacity : 0) {
    const int64_t count = net.y + 1;
    Mat<T>** const lists[] = {&cotangent, &second, &dot, &chain};
    for (Mat<T>** list : lists) *list = memory.take<Mat<T>>(count);
    bool** const flags[] = {&begun, &done, &chained, &prepared, &through};
    for (bool** list : flags) *list = memory.take<bool>(count);
    int64_t most = 1, widest = 1;
    for (int64_t v = 0; v < count; ++v) {
      if (v) most = max_of(most, net.node(v).inputs);
      widest = max_of(widest, net.width(v));
      const Way& way = call.way[v];
      const Flow& flow = net.flow(v);
      const int64_t ld = scratch_ld<T>(net.width(v)), size = capacity * ld;
      const bool one_row = flow.kept && flow.uniform;
      const auto take = [&](bool wanted, int64_t n) {
        return Mat<T>{wanted ? memory.take<T>(n) : nullptr, ld};
      };
      Mat<T> own = take(flow.used && way.wanted && !flow.pulled && !flow.part, one_row ? ld : size);
      if (one_row) own.ld = 0;
      const bool bends =
          v && flow.used && way.first && is_elementwise(net.node(v).kind) && net.node(v).curved;
      const Mat<T> bent = take(errand.pairs && bends, size);
      const Mat<T> tangent = take(errand.pairs && flow.used && way.dot && !net.is_view(v), size);
      const Mat<T> down = take(errand.pairs && flow.used && way.wanted && !flow.part &&
                                   (flow.kept ? errand.curved : flow.moving),
                               size);
      if (!cotangent) continue;
      cotangent[v] = flow.part ? net.view_of(cotangent, v) : own;
      chain[v] = flow.part ? net.view_of(chain, v) : down;
      dot[v] = net.is_view(v) ? net.view_of(dot, v) : tangent;
      second[v] = bent;
    }
    dots = memory.take<Mat<const T>>(most);
    Mat<T>* const blocks[] = {&g, &seeds, &bend};
    for (Mat<T>* block : blocks) {
      block->ld = scratch_ld<T>(widest);
      block->at = memory.take<T>(capacity * block->ld);
    }
    slopes = memory.take<T>(capacity * net.D * net.k);
  }
  static bool is_mask(const Program<T>& net, const BackwardCall& call, int64_t v) {
    const Way& way = call.way[v];
    return net.node(v).kind == node_dropout && (way.wanted || way.dot || way.value);
  }
};

}  // namespace
