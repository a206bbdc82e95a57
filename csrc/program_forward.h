// The forward pass of a program: y, and J or its penalty, of one block of rows after another.
//
// All values of a block are computed while it stays in cache; the tangents of x2's columns or the
// cotangents of y's follow at once. Letters are those of docs/mathematics.md.
#pragma once

#include "hinge.h"
#include "program.h"

namespace {

// Tangents that go up the program together: each panel of a weight meets all of them while it is in
// the first-level cache.
constexpr int64_t most_together = 4;

// Memory of the chain of slopes, by value: the cotangents of one output, or the tangents of a few
// columns. One more stands for x2: what products pull to its columns of x alone.
template <class T> struct SlopeChain {
  int64_t x2;          // its number
  Mat<T>* at;          // the first tangent
  int64_t* apart;      // elements from one tangent to the next
  int64_t together;
  bool *begun, *done;  // done: it has gone on to its node's input already
  Mat<const T>* dots;  // of the inputs of the node at hand
  T* product;          // one block of the widest value, for a product that is added to others
  int64_t ld;

  SlopeChain(Bump& memory, const Program<T>& program, int64_t capacity) {
    const int64_t count = program.y + 1;
    x2 = count;
    together = program.plan->adjoint ? 1 : min_of(program.k, most_together);
    at = memory.take<Mat<T>>(count + 1);
    apart = memory.take<int64_t>(count);
    begun = memory.take<bool>(count + 1);
    done = memory.take<bool>(count);
    int64_t most = 1, widest = 1;
    for (int64_t v = 0; v < count; ++v) {
      if (v) most = max_of(most, program.node(v).inputs);
      widest = max_of(widest, program.width(v));
      const Flow& flow = program.flow(v);
      if (program.plan->adjoint ? flow.part : program.is_view(v)) {
        if (at) at[v] = program.view_of(at, v), apart[v] = apart[program.node(v).input[0]];
        continue;
      }
      if (scaled_in_place(program, v)) continue;
      const bool one_row = program.plan->adjoint ? flow.uniform : flow.constant;
      const int64_t stride = scratch_ld<T>(program.width(v));
      const int64_t size = (one_row ? 1 : capacity) * stride;
      T* own = memory.take<T>(together * size);
      if (!at) continue;
      at[v] = {own, one_row ? 0 : stride}, apart[v] = size;
      if (v && scaled_in_place(program, v - 1)) at[v - 1] = at[v], apart[v - 1] = size;
    }
    if (program.plan->adjoint) {
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
    return !program.plan->adjoint && v > 0 && program.linear(v) && program.followed(v) &&
           program.flow(v).once && !program.flow(v).constant;
  }
  Mat<T> tangent(int64_t v, int64_t c) const { return {at[v].at + c * apart[v], at[v].ld}; }
  // Rows of value v's own: one that stands for all, or each.
  int64_t rows_of(int64_t v, int64_t rows) const { return at[v].ld ? rows : 1; }
};

template <class T> struct ProgramForwardWeights {
  Program<T> net;
  Hinge<T> hinge;

  ProgramForwardWeights(const Plan& plan, const ForwardCall& call, Bump& memory)
      : net(plan, call.params, call.sizes, memory), hinge(plan, call, memory) {
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!net.flow(v).used) continue;
      net.pack_parameter(memory, v);
      if (!net.linear(v)) continue;
      net.pack_bias(memory, v);
      if (net.by_dots(v) || (plan.adjoint && v == net.y)) net.pack_rows(memory, v);
      if (!net.by_dots(v)) net.pack_forward(memory, v);
      pack_for_slopes(memory, v, walked(net, call, v));
    }
  }

  // Whether the chain of slopes goes through value v.
  static bool walked(const Program<T>& net, const ForwardCall& call, int64_t v) {
    const Flow& flow = net.flow(v);
    const bool keeps = call.saved && net.plan->keeps_adjoint();
    return flow.used && (flow.moving || (keeps && flow.kept));
  }

 private:
  void pack_for_slopes(Bump& memory, int64_t v, bool walked) {
    if (!walked) return;
    const bool of_x = net.below(v) == 0;
    if (!net.plan->adjoint) {
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

template <class T> struct ProgramForward {
  const Program<T>& net;
  const Hinge<T>& hinge;
  const ForwardCall& call;
  const Blocks& blocks;
  double* partial;

  void run(const ProgramForwardScratch<T>& scratch, int64_t block) const {
    const int64_t rows = blocks.rows(block), row0 = blocks.begin(block);
    values(scratch, block, rows, row0);
    T* y = static_cast<T*>(call.y) + row0 * net.D;
    const Mat<T> last = scratch.values.value[net.y];
    for (int64_t i = 0; i < rows; ++i) copy_few(y + i * net.D, last.row(i), net.D);
    T* J = hinge.slopes(row0, scratch.slopes);
    if (net.plan->adjoint) {
      for (int64_t d = 0; d < net.D; ++d) adjoint_slopes(scratch, block, rows, d, J + d * net.k);
    } else {
      const int64_t most = scratch.chain.together;
      for (int64_t c = 0; c < net.k; c += most) {
        tangent_slopes(scratch, rows, c, min_of(most, net.k - c), J + c);
      }
    }
    hinge.run(block, rows, row0, y, J, partial);
  }

  bool walked(int64_t v) const { return ProgramForwardWeights<T>::walked(net, call, v); }

  void values(const ProgramForwardScratch<T>& scratch, int64_t block, int64_t rows,
              int64_t row0) const {
    const BlockValues<T>& at = scratch.values;
    const SavedProgram<T> saved{net, blocks};
    at.read_x(net, call.x, rows, row0, net.x_as_it_is());
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!net.flow(v).used) continue;
      if (call.saved && net.flow(v).saved) at.value[v] = saved.value(call.saved[0], block, v);
      if (net.linear(v) && net.followed(v)) {
        const ApplySigma<T> after(net.node(v + 1), at.value[v], at.value[v + 1], at.first[v + 1]);
        linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], after);
        ++v;
      } else if (net.linear(v)) {
        linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], Nothing{});
      } else if (net.is_view(v)) {
        at.value[v] = net.view_of(at.value, v);
      } else {
        if (net.node(v).kind == node_dropout) at.draw_mask(net, v, rows, row0);
        node_value<T>(at.operands(net, v, rows), at.value[v], at.first[v]);
      }
    }
  }

  // J[:, d, :]: e_d pulled down the program.
  void adjoint_slopes(const ProgramForwardScratch<T>& scratch, int64_t block, int64_t rows,
                      int64_t d, T* to) const {
    const SlopeChain<T>& P = scratch.chain;
    const SavedProgram<T> saved{net, blocks};
    P.begun[P.x2] = false;
    for (int64_t v = 0; v <= net.y; ++v) {
      P.begun[v] = P.done[v] = false;
      if (call.saved && net.flow(v).pulled) P.at[v] = saved.cotangent(call.saved[1], block, v);
    }
    if (walked(net.y) && !net.linear(net.y)) {
      clear(P.at[net.y].at, net.whole(net.y));
      P.at[net.y].at[d] = T(1);
    }
    for (int64_t v = net.y; v > 0; --v) {
      if (!walked(v)) continue;
      if (net.linear(v)) {
        pull_linear(scratch, rows, v, d);
      } else if (net.flow(v).part) {
        P.begun[net.node(v).input[0]] = true;  // what reads a part pulls to it, so none is left out
      } else if (!P.done[v]) {
        pull_light(scratch, rows, v);
      }
    }
    const int64_t Dk = net.D * net.k;
    const Mat<T> x = P.at[0], x2 = P.at[P.x2];
    for (int64_t i = 0; i < rows; ++i) {
      T* J = to + i * Dk;
      if (P.begun[P.x2]) {
        copy_few(J, x2.row(i), net.k);
      } else {
        clear(J, net.k);
      }
      if (!P.begun[0]) continue;
      for (int64_t c = 0; c < net.k; ++c) J[c] += x.row(i)[net.plan->columns[c]];
    }
  }

  void pull_linear(const ProgramForwardScratch<T>& scratch, int64_t rows, int64_t v,
                   int64_t d) const {
    const SlopeChain<T>& P = scratch.chain;
    const int64_t u = net.below(v);
    if (u == 0 ? !net.flow(v).moving : !walked(u)) return;
    const Weights<T>& w = net.at(v);
    Mat<const T> from = P.at[v];
    const int64_t goal = u ? u : P.x2;
    const int64_t given = P.rows_of(v, rows), taken = P.rows_of(goal, rows);
    const int64_t columns = u ? net.width(u) : net.k;
    const Mat<T> to = P.at[goal];
    const bool add = P.begun[goal];
    P.begun[goal] = true;
    // What is added to, or spread over all rows, is computed on the side, but for plain products.
    const bool plain = u > 0 && v != net.y && given == taken;
    if (plain && !add && taken == rows && net.pulls_through(u) && continues(u)) {
      const int64_t b = net.node(u).input[0];
      const ApplySlope<T> after{scratch.values.first[u], to, P.at[b], P.begun[b]};
      linear_pull<T>(net, v, given, from, to, false, after);
      P.begun[b] = P.done[u] = true;
      return;
    }
    if (plain) return linear_pull<T>(net, v, given, from, to, add, Nothing{});
    Mat<T> side = given == taken && !add ? to : Mat<T>{P.product, given == 1 ? 0 : P.ld};
    if (v == net.y) {  // the identity: a row of W
      const T* row = w.rows + d * whole_vectors<T>(net.width(u));
      if (u) {
        copy(side.at, row, columns);
      } else {
        for (int64_t c = 0; c < columns; ++c) side.at[c] = row[net.plan->columns[c]];
      }
    } else if (u > 0) {
      linear_pull<T>(net, v, given, from, side, false, Nothing{});
    } else if (net.slopes_by_dots(v)) {
      dot_rows<T>(given, net.width(v), from.at, from.ld, net.k, w.columns,
                  whole_vectors<T>(net.width(v)), nullptr, side.at, side.ld, 1);
    } else {
      gemm<false>(given, net.width(v), from.at, from.ld, w.slopes, 0, from_zero<T>(), side.at, side.ld,
                  Nothing{});
    }
    if (side.at == to.at) return;
    put(taken, whole_vectors<T>(columns), to, add, Itself{}, side);
  }

  // Whether P goes on from value u to the input of its elementwise node.
  bool continues(int64_t u) const {
    const int64_t b = net.node(u).input[0];
    return b == 0 ? net.flow(u).moving : walked(b);
  }

  void pull_light(const ProgramForwardScratch<T>& scratch, int64_t rows, int64_t v) const {
    const SlopeChain<T>& P = scratch.chain;
    const Node& node = net.node(v);
    Operands<T> o = scratch.values.operands(net, v, rows);
    for (int64_t nth = 0; nth < node.inputs; ++nth) {
      const int64_t u = node.input[nth];
      if (u == 0 ? !net.flow(v).moving : !walked(u)) continue;
      o.rows = P.rows_of(u, rows);
      if (node.kind == node_columns && !P.begun[u]) {
        clear_rows(o.rows, net.whole(u), P.at[u]);
        P.begun[u] = true;
      }
      node_pull<T>(o, P.at[v], nth, P.at[u], P.begun[u]);
      P.begun[u] = true;
    }
  }

  // J[:, :, c0 : c0 + some]: the tangents of those columns of x2 pushed up the program.
  void tangent_slopes(const ProgramForwardScratch<T>& scratch, int64_t rows, int64_t c0,
                      int64_t some, T* to) const {
    const SlopeChain<T>& chain = scratch.chain;
    for (int64_t c = 0; c < some; ++c) {
      T* x = chain.tangent(0, c).at;
      clear(x, net.whole(0));
      x[net.plan->columns[c0 + c]] = T(1);
    }
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!net.flow(v).used || !net.flow(v).moving || net.is_view(v)) continue;
      const int64_t n = chain.rows_of(v, rows);
      if (!net.linear(v)) {
        push_light(scratch, n, v, some);
      } else if (net.below(v) == 0) {
        for (int64_t c = 0; c < some; ++c) {
          copy(chain.tangent(v, c).at, net.at(v).columns + (c0 + c) * net.whole(v), net.whole(v));
        }
      } else if (net.followed(v) && n == rows) {
        const Mat<const T> first = scratch.values.first[v + 1];
        push_linear(chain, n, v, some, [&](int64_t c) {
          return ApplySlope<T>{first, chain.tangent(v, c), chain.tangent(v + 1, c), false};
        });
        ++v;
      } else {
        push_linear(chain, n, v, some, [](int64_t) { return Nothing{}; });
      }
    }
    const bool moving = net.flow(net.y).moving;
    const int64_t Dk = net.D * net.k;
    if (!moving) {
      for (int64_t i = 0; i < rows * net.D; ++i) clear(to + i * net.k, some);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {  // row by row: each line of J is in the cache once
      for (int64_t c = 0; c < some; ++c) {
        const T* y = chain.tangent(net.y, c).row(i);
        T* J = to + i * Dk + c;
        for (int64_t d = 0; d < net.D; ++d) J[d * net.k] = y[d];
      }
    }
  }

  template <class AfterOf>
  void push_linear(const SlopeChain<T>& chain, int64_t n, int64_t v, int64_t some,
                   const AfterOf& after_of) const {
    const int64_t u = net.below(v);
    if (net.by_dots(v)) {
      for (int64_t c = 0; c < some; ++c) {
        linear_push<T>(net, v, n, chain.tangent(u, c), nullptr, chain.tangent(v, c), after_of(c));
      }
      return;
    }
    const Matrix<T>& w = net.at(v).forward;
    for (int64_t j = 0; j < w.N; j += panel_width<T>) {
      for (int64_t c = 0; c < some; ++c) {
        const Mat<T> from = chain.tangent(u, c), to = chain.tangent(v, c);
        gemm_panel<false>(j, n, w.K, from.at, from.ld, w, 0, from_zero<T>(), to.at, to.ld,
                          after_of(c));
      }
    }
  }

  void push_light(const ProgramForwardScratch<T>& scratch, int64_t n, int64_t v,
                  int64_t some) const {
    const SlopeChain<T>& chain = scratch.chain;
    const Node& node = net.node(v);
    const Operands<T> o = scratch.values.operands(net, v, n);
    for (int64_t c = 0; c < some; ++c) {
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const int64_t u = node.input[nth];
        const bool moves = net.flow(u).moving;
        chain.dots[nth] = moves ? Mat<const T>(chain.tangent(u, c)) : Mat<const T>{};
      }
      node_push<T>(o, chain.dots, chain.tangent(v, c));
    }
  }
};

template <class T>
Status forward(const Plan& plan, const ForwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  const bool summed = plan.hinge && !plan.elementwise;
  if (call.N == 0) {
    if (summed) *static_cast<T*>(call.out) = 0;
    return ok;
  }
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  Bump front;
  front.take<double>(summed ? blocks.count : 0);
  const auto weights_in = [&](Bump& memory) {
    return ProgramForwardWeights<T>(plan, call, memory);
  };
  const auto scratch_in = [&](Bump& memory, const Program<T>& net) {
    return ProgramForwardScratch<T>(memory, net, call, blocks.capacity, summed);
  };
  const Crew<T, decltype(weights_in), decltype(scratch_in)> crew(threads, front.lines(), weights_in,
                                                                 scratch_in);
  char* memory = static_cast<char*>(runtime.acquire(crew.bytes()));
  if (!memory) return out_of_memory;
  double* partial = summed ? reinterpret_cast<double*>(memory) : nullptr;
  crew.run(runtime, memory,
           [&](int64_t t, const auto& weights, const ProgramForwardScratch<T>& scratch) {
             const ProgramForward<T> pass{weights.net, weights.hinge, call, blocks, partial};
             const int64_t end = first_block(blocks, threads, t + 1);
             for (int64_t b = first_block(blocks, threads, t); b < end; ++b) pass.run(scratch, b);
           });
  if (summed) {
    double total = 0;
    for (int64_t b = 0; b < blocks.count; ++b) total += partial[b];
    *static_cast<T*>(call.out) = T(total);
  }
  runtime.release(memory, crew.bytes());
  return ok;
}

}  // namespace
