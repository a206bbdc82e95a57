// The forward pass of a program: y, and J or its penalty, of one block of rows after another.
//
// All values of a block are computed while it stays in cache; the tangents of x2's columns or the
// cotangents of y's follow at once. Letters are those of docs/mathematics.md.
#pragma once

#include "forward_memory.h"

namespace {

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
    if (net.problem->adjoint) {
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
      } else if (net.scale_and_shift(v)) {
        at.scale_and_shift(net, v++, rows);
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
      for (int64_t c = 0; c < net.k; ++c) J[c] += x.row(i)[net.problem->columns[c]];
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
        for (int64_t c = 0; c < columns; ++c) side.at[c] = row[net.problem->columns[c]];
      }
    } else if (u > 0) {
      linear_pull<T>(net, v, given, from, side, false, Nothing{});
    } else if (net.slopes_by_dots(v)) {
      dot_rows<T>(given, net.width(v), from.at, from.ld, net.k, w.columns,
                  whole_vectors<T>(net.width(v)), nullptr, side.at, side.ld, 1);
    } else {
      gemm<false>(given, net.width(v), from.at, from.ld, w.slopes, 0, from_zero<T>(), side.at,
                  side.ld, Nothing{});
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
      x[net.problem->columns[c0 + c]] = T(1);
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
Status forward(const Problem& problem, const ForwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  const bool summed = problem.hinge && !problem.elementwise;
  if (call.N == 0) {
    if (summed) *static_cast<T*>(call.out) = 0;
    return ok;
  }
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  Bump front;
  front.take<double>(summed ? blocks.count : 0);
  const auto weights_in = [&](Bump& memory) {
    return ProgramForwardWeights<T>(problem, call, memory);
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
