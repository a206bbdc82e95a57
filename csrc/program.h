// One call's view of a program: its weights packed, and products with them.
#pragma once

#include <vector>

#include "crew.h"
#include "nodes.h"

namespace {

// What is packed of one node: of a linear one W (out, in) and b, of others a row of parameters.
template <class T> struct Weights {
  const T* b;          // the user's tensor
  Matrix<T> forward;   // Wᵀ (in, out), for h·Wᵀ
  Matrix<T> back;      // W (out, in), for g·W
  Matrix<T> slopes;    // the columns of W that meet x2, (out, k), as `back`
  const T* bias;       // b padded to whole vectors; null without bias
  const T* rows;       // W with padded rows (stride whole_vectors(in)), for dot products
  const T* columns;    // (k, whole_vectors(out)): the columns of W that meet x2
  const T* parameter;  // padded to whole vectors, one number spread over them
};

template <class T> struct Program {
  const Problem* problem;
  const void* const* params;
  const int64_t* sizes;
  int64_t d, D, k, y;                // y: the number of the last value
  Weights<T>* weights;               // by node; null while memory is counted
  std::vector<Packing<T>> packings;  // each once, however many nodes read it
  // Where a value and its P begin in what is saved of one row, and how much that is in all.
  int64_t *value_at, *cotangent_at, saved_values = 0, saved_cotangents = 0;

  Program(const Problem& p, const void* const* given, const int64_t* elements, Bump& memory)
      : problem(&p), params(given), sizes(elements), d(p.d), D(p.D), k(p.k), y(p.count) {
    weights = memory.take<Weights<T>>(p.count);
    value_at = memory.take<int64_t>(p.count + 1);
    cotangent_at = memory.take<int64_t>(p.count + 1);
    for (int64_t v = 0; v <= y; ++v) {
      if (value_at) value_at[v] = saved_values, cotangent_at[v] = saved_cotangents;
      if (flow(v).saved) saved_values += saved_ld(v);
      if (flow(v).pulled) saved_cotangents += saved_ld(v);
    }
    if (!weights) return;
    for (int64_t i = 0; i < p.count; ++i) {
      weights[i] = Weights<T>{};
      const Node& node = p.nodes[i];
      if (node.kind != node_linear) continue;
      weights[i].b = static_cast<const T*>(given[node.place[1]]);
    }
  }

  const Node& node(int64_t v) const { return problem->nodes[v - 1]; }  // that makes value v
  const Flow& flow(int64_t v) const { return problem->flow[v]; }
  int64_t width(int64_t v) const { return problem->width(v); }
  int64_t whole(int64_t v) const { return whole_vectors<T>(width(v)); }
  int64_t saved_ld(int64_t v) const { return flow(v).viewed ? scratch_ld<T>(width(v)) : whole(v); }
  bool linear(int64_t v) const { return node(v).kind == node_linear; }
  // The input of a linear node.
  int64_t below(int64_t v) const { return node(v).input[0]; }
  const Weights<T>& at(int64_t v) const { return weights[v - 1]; }

  // Whether value v + 1 is the elementwise node's that follows the linear one of v.
  bool followed(int64_t v) const { return v < y && flow(v + 1).follows && flow(v + 1).used; }
  // Whether what linear node v pulls to value u is all that u gets, and u is elementwise: then it
  // goes on to u's input at once.
  bool pulls_through(int64_t u) const {
    return u > 0 && is_elementwise(node(u).kind) && node(u).varies && flow(u).once;
  }

  // Whether value v + 1 is a shift of the scale of v, which nothing else reads: then they are one pass,
  // and value v is not there.
  bool scale_and_shift(int64_t v) const {
    return v < y && node(v).kind == node_scale && node(v + 1).kind == node_shift &&
           node(v + 1).input[0] == v && flow(v).once && flow(v + 1).used;
  }
  // A view of columns side by side needs no memory.
  bool is_view(int64_t v) const {
    return v > 0 && node(v).kind == node_columns && node(v).numbers[1] == 1;
  }
  Mat<T> view_of(const Mat<T>* of_values, int64_t v) const {
    const Mat<T> from = of_values[node(v).input[0]];
    return {from.at ? from.at + int64_t(node(v).numbers[0]) : nullptr, from.ld};
  }
  // Whether only products read x, element by element; others want its rows in whole vectors.
  bool x_as_it_is() const {
    for (int64_t v = 1; v <= y; ++v) {
      if (!flow(v).used || linear(v)) continue;
      for (int64_t nth = 0; nth < node(v).inputs; ++nth) {
        if (node(v).input[nth] == 0) return false;
      }
    }
    return true;
  }

  // Few outputs go by dot products; they read h in whole vectors, which x is not laid out for.
  bool by_dots(int64_t v) const {
    return below(v) > 0 && prefers_dots<T>(width(below(v)), width(v));
  }
  bool slopes_by_dots(int64_t v) const { return prefers_dots<T>(width(v), k); }

  // The weights to be packed are first noted, then packed by so many threads.
  Matrix<T> note(Bump& memory, const T* w, int64_t row, int64_t column, int64_t K, int64_t N,
                 const int64_t* chosen = nullptr) {
    for (const Packing<T>& p : packings) {
      const bool same = p.w == w && p.row == row && p.column == column && p.chosen == chosen;
      if (same && p.K == K && p.N == N) return p.matrix();
    }
    packings.push_back({memory.take<T>(packed_size<T>(K, N)), w, row, column, K, N, chosen});
    return packings.back().matrix();
  }
  void pack(int64_t threads, int64_t thread) const {
    int64_t panel = 0;
    for (const Packing<T>& packing : packings) {
      for (int64_t p = 0; p < packing.panels(); ++p, ++panel) {
        if (panel % threads == thread) packing.panel(p);
      }
    }
  }

  const T* w_of(int64_t v) const { return static_cast<const T*>(params[node(v).place[0]]); }

  void pack_forward(Bump& memory, int64_t v) {
    const int64_t in = width(below(v)), out = width(v);
    const Matrix<T> packed = note(memory, w_of(v), 1, in, in, out);
    if (weights) weights[v - 1].forward = packed;
  }
  void pack_back(Bump& memory, int64_t v) {
    const int64_t in = width(below(v)), out = width(v);
    const Matrix<T> packed = note(memory, w_of(v), in, 1, out, in);
    if (weights) weights[v - 1].back = packed;
  }
  void pack_slopes(Bump& memory, int64_t v) {
    const T* w = w_of(v);
    const bool beside = problem->side_by_side();
    const int64_t first = beside ? problem->columns[0] : 0;
    const Matrix<T> packed =
        note(memory, w ? w + first : w, d, 1, width(v), k, beside ? nullptr : problem->columns);
    if (weights) weights[v - 1].slopes = packed;
  }
  void pack_rows(Bump& memory, int64_t v) {
    const int64_t in = width(below(v)), out = width(v), ld = whole_vectors<T>(in);
    T* to = memory.take<T>(out * ld);
    if (!to) return;
    for (int64_t i = 0; i < out; ++i) pad(to + i * ld, w_of(v) + i * in, in);
    weights[v - 1].rows = to;
  }
  void pack_columns(Bump& memory, int64_t v) {
    const int64_t out = width(v), ld = whole_vectors<T>(out);
    T* to = memory.take<T>(k * ld);
    if (!to) return;
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t j = 0; j < ld; ++j) {
        to[c * ld + j] = j < out ? w_of(v)[j * d + problem->columns[c]] : T(0);
      }
    }
    weights[v - 1].columns = to;
  }
  void pack_bias(Bump& memory, int64_t v) {
    T* to = memory.take<T>(whole(v));
    if (!to || !weights[v - 1].b) return;
    pad(to, weights[v - 1].b, width(v));
    weights[v - 1].bias = to;
  }
  // A row of parameters of a node that is not linear.
  void pack_parameter(Bump& memory, int64_t v) {
    if (linear(v) || !node(v).params || node(v).kind == node_dropout) return;
    T* to = memory.take<T>(whole(v));
    if (!to) return;
    const int64_t place = node(v).place[0];
    const T* from = static_cast<const T*>(params[place]);
    if (sizes[place] == 1) {
      for (int64_t j = 0; j < whole(v); ++j) to[j] = from[0];
    } else {
      pad(to, from, width(v));
    }
    weights[v - 1].parameter = to;
  }

 private:
  static void pad(T* to, const T* from, int64_t n) {
    if (n) copy(to, from, n);  // a tensor without elements has no address
    for (int64_t j = n; j < whole_vectors<T>(n); ++j) to[j] = T(0);
  }
};

// h·Wᵀ of a linear node, with b for its value and without for its tangent. `after` sees each tile of
// the result while it is in the first-level cache: the place of the elementwise node that follows.
template <class T, class After>
void linear_push(const Program<T>& program, int64_t v, int64_t rows, Mat<const T> h, const T* bias,
                 Mat<T> to, const After& after) {
  const Weights<T>& w = program.at(v);
  const int64_t in = program.width(program.below(v)), out = program.width(v);
  if (program.by_dots(v)) {
    dot_rows<T>(rows, in, h.at, h.ld, out, w.rows, whole_vectors<T>(in), bias, to.at, to.ld, 1);
    after(0, rows, 0, program.whole(v));
  } else {
    gemm<false>(rows, in, h.at, h.ld, w.forward, 0, from_bias(bias), to.at, to.ld, after);
  }
}
template <class T, class After>
void linear_value(const Program<T>& program, int64_t v, int64_t rows, Mat<const T> h, Mat<T> to,
                  const After& after) {
  linear_push<T>(program, v, rows, h, program.at(v).bias, to, after);
}
// to (+)= P·W.
template <class T, class After>
void linear_pull(const Program<T>& program, int64_t v, int64_t rows, Mat<const T> P, Mat<T> to,
                 bool add, const After& after) {
  const Init<T> init = add ? Init<T>{to.at, to.ld} : from_zero<T>();
  gemm<false>(rows, program.width(v), P.at, P.ld, program.at(v).back, 0, init, to.at, to.ld, after);
}

}  // namespace
