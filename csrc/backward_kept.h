// The backward of a block where P of every row is kept, one output in adjoint mode: gy∘P of a linear
// node is made in one pass with the elementwise node after it.
#pragma once

#include "backward_walk.h"

namespace {

// Whether the linear node before the elementwise one of v has a P that nobody reads but its own
// gradients: then gy∘P takes its place.
template <class T>
inline bool ProgramBackward<T>::scales(int64_t v) const {
  const int64_t b = v - 1;
  return flow(v).follows && passes(b) && flow(b).once && way(b).trained && call.gy &&
         !direct(net.below(b));
}

// And whether P of value v is known beforehand.
template <class T>
inline bool ProgramBackward<T>::scales_ahead(int64_t v) const {
  return scales(v) && way(v).value && (flow(v).pulled || below_top(v));
}

// Whether P of v is the one row of the last node, a linear one.
template <class T>
inline bool ProgramBackward<T>::below_top(int64_t v) const {
  return net.linear(net.y) && net.below(net.y) == v && flow(v).once && flow(net.y).kept;
}

// The value, σ' where pairs want it, and gy∘P of the linear node before, in one pass.
template <class T>
inline void ProgramBackward<T>::value_and_scale(const Scratch& scratch, int64_t rows, int64_t row0,
                                                int64_t v, bool active) const {
  const Node& node = net.node(v);
  const BlockValues<T>& at = scratch.rows;
  const Mat<const T> a = at.value[v - 1], P = below_top(v) ? Mat<const T>{net.at(net.y).rows, 0}
                                                           : Mat<const T>(scratch.cotangent[v]);
  const Mat<T> value = at.value[v];
  const T* gy = static_cast<const T*>(call.gy) + row0;
  singles_of<T>(int(node.kind))[active](
      {rows, net.whole(v), a.at, a.ld, P.at, P.ld, gy, value.at, at.first[v].at,
       scratch.cotangent[v - 1].at, value.ld, bias_of(scratch, v - 1)},
      {T(node.numbers[0]), T(node.numbers[1]), T(node.numbers[2])});
  scratch.begun[v - 1] = scratch.done[v - 1] = true;
}

// From the elementwise node of v to the linear one before it: gy∘P of the rows, if it is not there
// yet, and P of the pairs. Whether that is all there is to do.
template <class T>
inline bool ProgramBackward<T>::pull_and_scale(const Pass& pass, int64_t v) const {
  if (!scales(v)) return false;
  const Scratch& scratch = pass.scratch;
  const int64_t b = v - 1;
  const Mat<const T> P = scratch.cotangent[v], first = scratch.rows.first[v];
  const Mat<T> g = scratch.cotangent[b];
  const T* gy = static_cast<const T*>(call.gy) + pass.row0;
  if (!scratch.done[b]) {
    add_columns<T>(pass.rows, net.whole(b), bias_of(scratch, b), [&](int64_t i, int64_t j) {
      const Vec<T> x = gy[i] * (load(first.row(i) + j) * load(P.row(i) + j));
      store(g.row(i) + j, x);
      return x;
    });
  }
  const int32_t* row = scratch.pairs.row;
  put(flow(b).moving ? pass.m : 0, net.whole(b), scratch.seeds, false, Times{},
      Mat<const T>{first.at, first.ld, row}, Mat<const T>{P.at, P.ld, row});
  scratch.begun[b] = scratch.done[b] = true;
  return true;
}

}  // namespace
