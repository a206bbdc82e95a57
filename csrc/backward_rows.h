// The backward of a block: its rows. Their values once more, and the cotangent g of each value.
#pragma once

#include "backward_walk.h"

namespace {

template <class T>
inline void ProgramBackward<T>::values(const Scratch& scratch, int64_t block, int64_t rows,
                                       int64_t row0, bool active, bool bends) const {
  const BlockValues<T>& at = scratch.rows;
  const SavedProgram<T> saved{net, blocks};
  at.read_x(net, call.x, rows, row0, net.x_as_it_is());
  for (int64_t v = 1; v <= net.y; ++v) {
    if (!flow(v).used) continue;
    const Node& node = net.node(v);
    if (Scratch::is_mask(net, call, v)) at.draw_mask(net, v, rows, row0);
    if (flow(v).saved) {
      at.value[v] = saved.value(call.saved[0], block, v);
    } else if (net.is_view(v)) {
      if (way(v).value) at.value[v] = net.view_of(at.value, v);
    } else if (net.linear(v)) {
      if (!way(v).value) continue;
      const bool next = net.followed(v) && (way(v + 1).value || at.first[v + 1]);
      if (next && !(bends && scratch.second[v + 1]) && !scales_ahead(v + 1)) {
        const ApplySigma<T> after(net.node(v + 1), at.value[v], at.value[v + 1], at.first[v + 1]);
        linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], after);
        ++v;
      } else {
        linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], Nothing{});
      }
    } else if (scales_ahead(v) && !(bends && scratch.second[v])) {
      value_and_scale(scratch, rows, row0, v, active);
    } else if (bends && scratch.second[v]) {
      const Operands<T> o = at.operands(net, v, rows);
      const Mat<T> second = scratch.second[v];
      const Numbers<T> numbers{o.number(0), o.number(1), o.number(2)};
      orders_of<T>(int(node.kind))[at.value[v] ? all_orders : derivatives](
          {rows, o.columns, o.u[0].at, o.u[0].ld, at.value[v].at, at.first[v].at, second.at,
           second.ld},
          numbers);
    } else if (net.scale_and_shift(v)) {
      if (way(v + 1).value) at.scale_and_shift(net, v, rows);
      ++v;
    } else if (way(v).value || at.first[v]) {
      node_value<T>(at.operands(net, v, rows), at.value[v], at.first[v]);
    }
  }
}

// The cotangent of y, and those that forward left.
template <class T>
inline void ProgramBackward<T>::begin(const Scratch& scratch, int64_t block, int64_t rows,
                                      int64_t row0) const {
  const SavedProgram<T> saved{net, blocks};
  for (int64_t v = 0; v <= net.y; ++v) {
    scratch.begun[v] = scratch.done[v] = false;
    if (!flow(v).pulled) continue;
    scratch.cotangent[v] = saved.cotangent(call.saved[1], block, v);
    scratch.begun[v] = true;
  }
  if (!way(net.y).wanted) return;
  const Mat<T> top = scratch.cotangent[net.y];
  if (flow(net.y).kept) {
    for (int64_t j = 0; j < net.whole(net.y); ++j) top.at[j] = T(1);
  } else if (call.gy) {
    const T* gy = static_cast<const T*>(call.gy) + row0 * net.D;
    for (int64_t i = 0; i < rows; ++i) copy_few(top.row(i), gy + i * net.D, net.D);
  } else {
    return;
  }
  scratch.begun[net.y] = true;
}

// g of the rows at value v, where somebody wants it, and what a bias gets of it.
template <class T>
inline Mat<const T> ProgramBackward<T>::row_gradient(const Pass& pass, int64_t v,
                                                     Mat<const T> down) const {
  const Scratch& scratch = pass.scratch;
  T* bias = bias_of(scratch, v);
  if (!flow(v).kept) {
    if (!scratch.begun[v]) return {};
    const Mat<const T> g = scratch.cotangent[v];
    if (bias) {
      add_columns<T>(pass.rows, net.whole(v), bias,
                     [&](int64_t i, int64_t j) { return load(g.row(i) + j); });
    }
    return g;
  }
  bool wanted = way(v).trained;
  for (int64_t i = 0; i < net.node(v).inputs; ++i) wanted |= direct(net.node(v).input[i]);
  if (!wanted || (!call.gy && !down)) return {};
  const Mat<const T> P = scratch.cotangent[v];
  const bool scaled = net.linear(v) && scratch.done[v];
  const Mat<T> g =
      scaled ? scratch.cotangent[v] : Mat<T>{scratch.g.at, scratch_ld<T>(net.width(v))};
  if (call.gy && !scaled) {
    const T* gy = static_cast<const T*>(call.gy) + pass.row0;
    add_columns<T>(pass.rows, net.whole(v), bias, [&](int64_t i, int64_t j) {
      const Vec<T> x = gy[i] * load(P.row(i) + j);
      store(g.row(i) + j, x);
      return x;
    });
  } else if (!call.gy) {
    clear(g.at, pass.rows * g.ld);
  }
  if (down) {
    scatter_add(pass, down, net.whole(v), g);
    if (bias) {
      add_columns<T>(pass.m, net.whole(v), bias,
                     [&](int64_t i, int64_t j) { return load(down.row(i) + j); });
    }
  }
  return g;
}

template <class T>
inline void ProgramBackward<T>::rows_linear(const Pass& pass, int64_t v, Mat<const T> G) const {
  const Scratch& scratch = pass.scratch;
  const int64_t u = net.below(v);
  const Mat<T> to = scratch.cotangent[u];
  if (G && direct(u)) {
    if (goes_through(scratch, u)) {
      const int64_t b = net.node(u).input[0];
      const Mat<T> product = scratch.begun[b] ? to : scratch.cotangent[b];
      const ApplySlope<T> after{scratch.rows.first[u], product, scratch.cotangent[b],
                                scratch.begun[b]};
      linear_pull<T>(net, v, pass.rows, G, product, false, after);
      scratch.begun[b] = scratch.done[u] = true;
    } else {
      linear_pull<T>(net, v, pass.rows, G, to, scratch.begun[u], Nothing{});
    }
    scratch.begun[u] = true;
  }
  if (!passes(u)) return;
  // Here P is one row for all, or forward would have left what it pulls.
  const int64_t n = rows_of(pass, u);
  Mat<T> side = n == 1 && !scratch.begun[u] ? to : Mat<T>{scratch.bend.at, 0};
  if (v == net.y) {
    copy(side.at, net.at(v).rows, net.width(u));
  } else {
    linear_pull<T>(net, v, 1, scratch.cotangent[v], side, false, Nothing{});
  }
  if (side.at != to.at) {
    put(n, net.whole(u), to, scratch.begun[u], Itself{}, Mat<const T>{side.at, 0});
  }
  scratch.begun[u] = true;
}

template <class T>
inline void ProgramBackward<T>::rows_light(const Pass& pass, int64_t v, Mat<const T> G) const {
  const Scratch& scratch = pass.scratch;
  const Node& node = net.node(v);
  if (pull_and_scale(pass, v)) return;
  Operands<T> o = scratch.rows.operands(net, v, pass.rows);
  if (G && way(v).trained && wants(node.place[0])) {
    add_parameter(v, [&](T* sums) { node_parameters<T>(o, G, sums); }, scratch);
  }
  for (int64_t nth = 0; nth < node.inputs; ++nth) {
    const int64_t u = node.input[nth];
    const bool by_itself = G && direct(u);
    if (!by_itself && !passes(u)) continue;
    o.rows = rows_of(pass, u);
    if (node.kind == node_columns) start(scratch.cotangent, scratch.begun, u, o.rows);
    if (node.kind == node_sum && by_itself && goes_through(scratch, u)) {
      const int64_t b = net.node(u).input[0];
      const T factor = o.number(nth);
      put(
          o.rows, net.whole(u), scratch.cotangent[b], scratch.begun[b],
          [&](Vec<T> x, Vec<T> y) { return factor * (x * y); }, Mat<const T>(scratch.rows.first[u]),
          G);
      scratch.begun[u] = scratch.begun[b] = scratch.done[u] = true;
      continue;
    }
    node_pull<T>(o, by_itself ? G : Mat<const T>(scratch.cotangent[v]), nth, scratch.cotangent[u],
                 scratch.begun[u]);
    scratch.begun[u] = true;
  }
}

template <class T>
inline void ProgramBackward<T>::give_input(const Scratch& scratch, int64_t rows, int64_t row0,
                                           bool walked) const {
  if (!call.gx) return;
  T* to = static_cast<T*>(call.gx) + row0 * net.d;
  if (!walked || !scratch.begun[0]) return clear(to, rows * net.d);
  for (int64_t i = 0; i < rows; ++i) copy(to + i * net.d, scratch.cotangent[0].row(i), net.d);
}

}  // namespace
