// The backward of a block: the pairs that take part in the loss by their slopes. Tangents up, seeds
// down, and the curvature of each node to the cotangent of its input.
#pragma once

#include "backward_walk.h"

namespace {

// How many pairs of gJ there are.
template <class T>
inline int64_t ProgramBackward<T>::count(const T* gJ, int64_t candidates) const {
  if (net.problem->adjoint && net.D == 1) {
    int64_t n = 0;
    for (int64_t i = 0; i < candidates; ++i) {
      bool any = false;
      for (int64_t c = 0; c < net.k; ++c) any |= gJ[i * net.k + c] != T(0);
      n += any;
    }
    return n;
  }
  int64_t n = 0;  // of several outputs the entries, which are as many or more
  for (int64_t i = 0; i < candidates * (net.problem->adjoint ? net.k : net.D); ++i)
    n += gJ[i] != T(0);
  return n;
}

template <class T>
inline Mat<const T> ProgramBackward<T>::gather(const Pass& pass, Mat<const T> from, int64_t columns,
                                               Mat<T> to) const {
  put(pass.m, columns, to, false, Itself{}, Mat<const T>{from.at, from.ld, pass.scratch.pairs.row});
  return to;
}

template <class T>
inline void ProgramBackward<T>::scatter_add(const Pass& pass, Mat<const T> from, int64_t columns,
                                            Mat<T> to) const {
  const int32_t* row = pass.scratch.pairs.row;
  for (int64_t i = 0; i < pass.m; ++i) {
    const T* x = from.row(i);
    T* at = to.row(row[i]);
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      store(at + j, load(at + j) + load(x + j));
    }
  }
}

// What a node that is not linear is computed from, for the pairs.
template <class T>
inline Operands<T> ProgramBackward<T>::operands(const Pass& pass, int64_t v) const {
  const Scratch& scratch = pass.scratch;
  const Node& node = net.node(v);
  Operands<T> o = scratch.rows.operands(net, v, pass.m);
  for (int64_t nth = 0; nth < node.inputs; ++nth) scratch.rows.inputs[nth].index = pass.index;
  o.v.index = o.first.index = pass.index;
  if (node.kind == node_dropout) o.parameter.index = pass.index;
  o.second = scratch.second[v];
  if (!o.second) return o;
  if (pass.bends) {
    o.second.index = pass.index;
  } else if (!scratch.prepared[v]) {
    const Numbers<T> numbers{o.number(0), o.number(1), o.number(2)};
    for (int64_t i = 0; i < pass.m; ++i) {  // σ' goes to the side
      orders_of<T>(int(node.kind))[derivatives](
          {1, o.columns, o.u[0].row(i), 0, nullptr, scratch.bend.at, scratch.second[v].row(i), 0},
          numbers);
    }
    scratch.prepared[v] = true;
  }
  return o;
}

// The tangents of the inputs of v's node; false if there is none.
template <class T>
inline bool ProgramBackward<T>::dots_of(const Pass& pass, int64_t v) const {
  const Node& node = net.node(v);
  bool any = false;
  for (int64_t nth = 0; nth < node.inputs; ++nth) {
    const int64_t u = node.input[nth];
    const bool moves = flow(u).moving && way(u).dot;
    pass.scratch.dots[nth] = moves ? Mat<const T>(pass.scratch.dot[u]) : Mat<const T>{};
    any |= moves;
  }
  return any;
}

template <class T>
inline void ProgramBackward<T>::tangents(const Pass& pass) const {
  const Scratch& scratch = pass.scratch;
  for (int64_t v = 0; v <= net.y; ++v) {
    scratch.prepared[v] = scratch.chained[v] = scratch.through[v] = false;
  }
  if (way(0).dot) {
    for (int64_t i = 0; i < pass.m; ++i) {
      T* x = scratch.dot[0].row(i);
      clear(x, net.whole(0));
      for (int64_t c = 0; c < net.k; ++c) {
        x[net.problem->columns[c]] = scratch.pairs.dot[i * scratch.pairs.ld_dot + c];
      }
    }
  }
  for (int64_t v = 1; v <= net.y; ++v) {
    if (!flow(v).used || !way(v).dot || net.is_view(v)) continue;
    if (!net.linear(v)) {
      const Operands<T> o = operands(pass, v);
      dots_of(pass, v);
      node_push<T>(o, scratch.dots, scratch.dot[v]);
    } else if (net.below(v) && net.followed(v) && way(v + 1).dot) {
      const ApplySlope<T> after{operands(pass, v + 1).first, scratch.dot[v], scratch.dot[v + 1],
                                false};
      linear_push<T>(net, v, pass.m, scratch.dot[net.below(v)], nullptr, scratch.dot[v], after);
      ++v;
    } else if (net.below(v)) {
      linear_push<T>(net, v, pass.m, scratch.dot[net.below(v)], nullptr, scratch.dot[v], Nothing{});
    } else {
      const Mat<T> to = scratch.dot[v];
      for (const Run& run : runs()) {
        const Init<T> init = run.at ? Init<T>{to.at, to.ld} : from_zero<T>();
        gemm<false>(pass.m, run.count, scratch.pairs.dot + run.at, scratch.pairs.ld_dot,
                    net.at(v).forward, run.first, init, to.at, to.ld, Nothing{});
      }
    }
  }
  if (!flow(net.y).kept && flow(net.y).moving && way(net.y).wanted) {
    for (int64_t i = 0; i < pass.m; ++i) {
      copy_few(scratch.chain[net.y].row(i), scratch.pairs.seed + i * scratch.pairs.ld_seed, net.D);
    }
    scratch.chained[net.y] = true;
  }
}

// The pairs' own P of value v, if x2 reaches it.
template <class T>
inline Mat<const T> ProgramBackward<T>::seeds(const Pass& pass, int64_t v) const {
  const Scratch& scratch = pass.scratch;
  if (!pass.m || !flow(v).moving) return {};
  if (!flow(v).kept) return scratch.chained[v] ? Mat<const T>(scratch.chain[v]) : Mat<const T>{};
  if (!net.linear(v)) return pass.of_pairs(scratch.cotangent[v]);
  if (scratch.done[v]) return scratch.seeds;  // by pull_and_scale
  if (!pass.index && scratch.cotangent[v].ld) return scratch.cotangent[v];
  return gather(pass, scratch.cotangent[v], net.whole(v), scratch.seeds);
}

template <class T>
inline void ProgramBackward<T>::pull_pairs(const Pass& pass, int64_t v, Mat<const T> down) const {
  const Scratch& scratch = pass.scratch;
  const int64_t u = net.below(v);
  if (net.pulls_through(u) && pull_through(pass, v, down)) return;
  linear_pull<T>(net, v, pass.m, down, scratch.chain[u], scratch.chained[u], Nothing{});
  scratch.chained[u] = true;
}

// σ'∘down + σ''∘u̇∘P.
struct PullAndBend {
  template <class V> MK_INLINE V operator()(V first, V down, V second, V dot, V P) const {
    return first * down + second * dot * P;
  }
};

// After a product gave a tile of what comes down for the pairs to an elementwise node: its pull and
// its curvature, while the tile is in the first-level cache.
template <class T> struct PullPairs {
  Mat<const T> first, second, dot, P;  // second null: no curvature; P null: the product itself
  Mat<const T> x;                      // the product
  Mat<T> to;                           // null: nothing goes on; else perhaps x itself
  bool add;
  Mat<T> rows;  // whose cotangent gets the curvature; null: it goes on with the pull
  const int32_t* row;

  void operator()(int64_t i0, int64_t count, int64_t j0, int64_t columns) const {
    for (int64_t i = i0; i < i0 + count; ++i) {
      const auto of = [&](const Mat<const T>& a) { return a.row(i) + j0; };
      T* on = to ? to.row(i) + j0 : nullptr;
      if (second && !rows) {
        put_row<T>(columns, on, add, PullAndBend{}, of(first), of(x), of(second), of(dot), of(P));
        continue;
      }
      if (second) {
        put_row<T>(columns, rows.row(row[i]) + j0, true, TimesThree{}, of(second), of(dot), of(x));
      }
      if (on) put_row<T>(columns, on, add, Times{}, of(first), of(x));
    }
  }
};

// The pairs' pull of linear node v and of the elementwise node of its input, in one pass.
template <class T>
inline bool ProgramBackward<T>::pull_through(const Pass& pass, int64_t v, Mat<const T> down) const {
  const Scratch& scratch = pass.scratch;
  const int64_t u = net.below(v), b = net.node(u).input[0];
  const bool kept = flow(u).kept;
  if (kept != flow(b).kept) return false;
  const Operands<T> o = operands(pass, u);
  const bool bends = net.node(u).curved && dots_of(pass, u) && way(b).wanted;
  PullPairs<T> after{};
  after.first = o.first;
  if (by_pairs(b)) after.to = scratch.chain[b], after.add = scratch.chained[b];
  if (bends) {
    after.second = o.second, after.dot = scratch.dots[0];
    if (kept) after.P = pass.of_pairs(scratch.cotangent[u]);
    if (!kept) {
      start(scratch.cotangent, scratch.begun, b, pass.rows);
      after.rows = scratch.cotangent[b], after.row = scratch.pairs.row;
    }
  }
  const Mat<T> product = after.to && !after.add ? after.to : scratch.chain[u];
  after.x = product;
  linear_pull<T>(net, v, pass.m, down, product, false, after);
  scratch.through[u] = true;
  scratch.chained[b] |= bool(after.to);
  return true;
}

template <class T>
inline void ProgramBackward<T>::pairs_light(const Pass& pass, int64_t v, Mat<const T> P,
                                            Mat<const T> down) const {
  const Scratch& scratch = pass.scratch;
  const Node& node = net.node(v);
  if (!P && !down) return;
  const Operands<T> o = operands(pass, v);
  const bool moves = dots_of(pass, v) && P;
  if (moves && way(v).trained && wants(node.place[0])) {
    add_parameter(
        v, [&](T* sums) { node_slope_parameters<T>(o, scratch.dots[0], P, sums); }, scratch);
  }
  if (is_elementwise(node.kind) && node.curved) return pairs_curved(pass, o, P, down, moves);
  for (int64_t nth = 0; nth < node.inputs; ++nth) {
    const int64_t u = node.input[nth];
    if (down && by_pairs(u)) {
      if (node.kind == node_columns) start(scratch.chain, scratch.chained, u, pass.m);
      node_pull<T>(o, down, nth, scratch.chain[u], scratch.chained[u]);
      scratch.chained[u] = true;
    }
    if (!moves || !way(u).wanted || !node_bends(node, scratch.dots, nth)) continue;
    if (flow(u).kept) {
      node_curvature<T>(o, scratch.dots, P, nth, scratch.chain[u], scratch.chained[u]);
      scratch.chained[u] = true;
    } else {
      const Mat<T> bend{scratch.bend.at, scratch_ld<T>(net.width(u))};
      node_curvature<T>(o, scratch.dots, P, nth, bend, false);
      start(scratch.cotangent, scratch.begun, u, pass.rows);
      scatter_add(pass, bend, net.whole(u), scratch.cotangent[u]);
    }
  }
}

// An elementwise node that bends: its pull and its curvature in one pass.
template <class T>
inline void ProgramBackward<T>::pairs_curved(const Pass& pass, const Operands<T>& o, Mat<const T> P,
                                             Mat<const T> down, bool moves) const {
  const Scratch& scratch = pass.scratch;
  const int64_t u = o.node->input[0], m = pass.m, columns = o.columns;
  const bool pulls = down && by_pairs(u), bends = moves && way(u).wanted;
  const Mat<const T> dot = scratch.dots[0];
  if (pulls && bends && flow(u).kept) {
    put(m, columns, scratch.chain[u], scratch.chained[u], PullAndBend{}, o.first, down, o.second,
        dot, P);
  } else if (bends && flow(u).kept) {
    put(m, columns, scratch.chain[u], scratch.chained[u], TimesThree{}, o.second, dot, P);
  } else if (pulls) {
    put(m, columns, scratch.chain[u], scratch.chained[u], Times{}, o.first, down);
  }
  if (pulls || (bends && flow(u).kept)) scratch.chained[u] = true;
  if (!bends || flow(u).kept) return;
  start(scratch.cotangent, scratch.begun, u, pass.rows);
  for (int64_t i = 0; i < m; ++i) {
    put_row<T>(columns, scratch.cotangent[u].row(scratch.pairs.row[i]), true, TimesThree{},
               o.second.row(i), dot.row(i), P.row(i));
  }
}

}  // namespace
