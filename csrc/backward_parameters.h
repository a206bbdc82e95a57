// The backward of a block: what parameters get of its rows and pairs.
#pragma once

#include "backward_walk.h"

namespace {

// `add(row)` adds the gradient of v's parameter to a row of as many columns. One number for all
// columns may be that of nodes of several widths, and gets their sum.
template <class T>
template <class Add>
inline void ProgramBackward<T>::add_parameter(int64_t v, const Add& add,
                                              const Scratch& scratch) const {
  const int64_t place = net.node(v).place[0], n = net.width(v);
  T* to = scratch.sums + layout.place[place].at;
  if (call.sizes[place] != 1 || n == 1) return add(to);
  clear(scratch.bend.at, net.whole(v));
  add(scratch.bend.at);
  *to += total<T>(n, [&](int64_t j) { return load(scratch.bend.at + j); });
}

// Where the gradient of a linear node's bias is added up; null if nobody wants it.
template <class T>
inline T* ProgramBackward<T>::bias_of(const Scratch& scratch, int64_t v) const {
  if (!net.linear(v) || !wants(net.node(v).place[1])) return nullptr;
  return scratch.sums + layout.place[net.node(v).place[1]].at;
}

// dW += Pᵀ·u̇ of the pairs and gᵀ·u of the rows. Either may be missing.
template <class T>
inline void ProgramBackward<T>::linear_gradients(const Pass& pass, int64_t v, Mat<const T> P,
                                                 Mat<const T> G) const {
  const Scratch& scratch = pass.scratch;
  const Node& node = net.node(v);
  const int64_t u = net.below(v);
  if (!wants(node.place[0])) return;
  const typename GradientLayout<T>::Place& place = layout.place[node.place[0]];
  T* to = scratch.sums + place.at;
  const Mat<const T> rows = scratch.rows.value[u];
  if (P && u == 0) {  // the tangent of x is ẋ in the columns of x2 and nothing elsewhere
    for (const Run& run : runs()) {
      product(run.count, pass.m, {scratch.pairs.dot + run.at, scratch.pairs.ld_dot}, P,
              net.width(v), to + run.first * place.ld(), place.ld(), {});
    }
  }
  const bool slopes = P && u > 0 && flow(u).moving;
  if (!G && !slopes) return;
  const Mat<const T> dots = slopes ? Mat<const T>(scratch.dot[u]) : Mat<const T>{};
  const Mat<const T> left = place.transposed ? rows : G, right = place.transposed ? G : rows;
  const Mat<const T> left2 = place.transposed ? dots : P, right2 = place.transposed ? P : dots;
  const int64_t M = place.rows(), N = place.columns();
  if (!G || (slopes && !switches.stacks)) {
    product(M, pass.m, left2, right2, N, to, place.ld(), {});
  }
  if (!G) return;
  More<T> more{};
  if (slopes && switches.stacks) more = {pass.m, left2.at, left2.ld, right2.at, right2.ld};
  product(M, pass.rows, left, right, N, to, place.ld(), more);
}

// to (M, N) += leftᵀ·right over K rows.
template <class T>
inline void ProgramBackward<T>::product(int64_t M, int64_t K, Mat<const T> left, Mat<const T> right,
                                        int64_t N, T* to, int64_t ld, const More<T>& more) const {
  if (M == 1) {  // a tile of one row would be one long chain of sums
    const auto row = [](Mat<const T> a, Mat<const T> x) {
      return [=](int64_t i, int64_t j) { return a.row(i)[0] * load(x.row(i) + j); };
    };
    add_columns<T>(K, whole_vectors<T>(N), to, row(left, right));
    add_columns<T>(more.K, whole_vectors<T>(N), to, row({more.a, more.lda}, {more.b, more.ldb}));
    return;
  }
  const Matrix<T> b{right.at, K, N, right.ld};
  gemm<true>(M, K, left.at, left.ld, b, 0, from_zero<T>(), to, ld, Nothing{}, more);
}

}  // namespace
