// The backward pass of a program: gradients of (y, J or its penalty) by parameters and x.
//
// The part of a slope in the loss is sᵀ·J·ẋ for a pair (row, tangent ẋ, seed s); only pairs that are
// not zero are there at all. Their tangents are pushed up the program and their seeds pulled down it;
// each node adds what its parameters do to a slope, and its curvature joins the cotangent g of the
// row. With one output in adjoint mode the seed's chain P of every row is known from the forward and
// g = gy∘P + q, q the chain of the curvature alone: rows without a violation cost no product with W.
#pragma once

#include "backward_memory.h"
#include "gradients.h"

namespace {

template <class T> struct ProgramBackward {
  typedef ProgramBackwardScratch<T> Scratch;

  const Program<T>& net;
  const BackwardCall& call;
  const Blocks& blocks;
  const Errand& errand;
  const GradientLayout<T>& layout;

  void run(const Scratch& scratch, int64_t block) const {
    const int64_t rows = blocks.rows(block), row0 = blocks.begin(block);
    const bool active =
        errand.pairs && slope_gradients(*net.problem, call, scratch.slopes, rows, row0);
    if (!active && !call.gy) return give_input(scratch, rows, row0, false);
    const int64_t candidates = rows * (net.problem->adjoint ? net.D : net.k);
    // σ'' is computed with σ' for every row where many are wanted, else for each pair by itself.
    const bool bends = active && 4 * count(scratch.slopes, candidates) > rows;
    begin(scratch, block, rows, row0);
    values(scratch, block, rows, row0, active, bends);
    int64_t next = active ? 0 : candidates;
    for (;;) {  // the last pairs go together with the rows
      const int64_t m = next < candidates ? scratch.pairs.gather(*net.problem, scratch.slopes, rows,
                                                                 blocks.capacity, &next)
                                          : 0;
      const bool all = m == rows && net.problem->keeps_adjoint();
      const Pass pass{scratch, rows, row0, m, all ? nullptr : scratch.pairs.row, bends};
      if (m) tangents(pass);
      walk(pass, next == candidates);
      if (next == candidates) break;
    }
    give_input(scratch, rows, row0, true);
  }

 private:
  // One walk: `m` pairs of a block.
  struct Pass {
    const Scratch& scratch;
    int64_t rows, row0, m;
    const int32_t* index;  // the pairs' rows; null where every row is a pair, in its place
    bool bends;            // σ'' of every row is there

    // The pairs' rows of what all rows have.
    Mat<const T> of_pairs(Mat<const T> x) const { return {x.at, x.ld, index}; }
  };
  struct Runs {
    const Run *first, *last;
    const Run* begin() const { return first; }
    const Run* end() const { return last; }
  };
  Runs runs() const { return {net.problem->runs, net.problem->runs + net.problem->run_count}; }
  const Way& way(int64_t v) const { return call.way[v]; }
  const Flow& flow(int64_t v) const { return net.flow(v); }
  bool wants(int64_t place) const { return call.grads[place] != nullptr; }
  int64_t rows_of(const Pass& pass, int64_t v) const {
    return pass.scratch.cotangent[v].ld ? pass.rows : 1;
  }

  // Whether what comes down for the pairs goes on to value u.
  bool by_pairs(int64_t u) const {
    return way(u).wanted && (flow(u).kept || (u > 0 && flow(u).moving));
  }
  // Whether the rows' gradient goes to u by itself, not as gy∘P + q.
  bool direct(int64_t u) const { return way(u).wanted && !flow(u).kept; }
  // Whether what the rows pull to u is all that it gets, and goes on to the input of its elementwise
  // node at once.
  bool goes_through(const Scratch& scratch, int64_t u) const {
    return !scratch.begun[u] && net.pulls_through(u) && direct(net.node(u).input[0]);
  }
  // Whether P goes on to u: not where forward left it.
  bool passes(int64_t u) const { return way(u).wanted && flow(u).kept && !flow(u).pulled; }

  void walk(const Pass& pass, bool with_rows) const {
    const Scratch& scratch = pass.scratch;
    for (int64_t v = net.y; v > 0; --v) {
      if (!flow(v).used || !way(v).wanted) continue;
      if (flow(v).parted) {
        if (pass.m) join(v, pass.m, scratch.chain, scratch.chained);
        if (with_rows) join(v, rows_of(pass, v), scratch.cotangent, scratch.begun);
      }
      if (flow(v).part) continue;
      const bool slopes = way(v).trained || net.node(v).curved;
      const Mat<const T> P = slopes ? seeds(pass, v) : Mat<const T>{};
      const Mat<const T> down =
          pass.m && scratch.chained[v] ? Mat<const T>(scratch.chain[v]) : Mat<const T>{};
      if (!net.linear(v) && pass.m && !scratch.through[v]) pairs_light(pass, v, P, down);
      const Mat<const T> G = with_rows ? row_gradient(pass, v, down) : Mat<const T>{};
      if (net.linear(v)) {
        if (way(v).trained) linear_gradients(pass, v, P, G);
        if (with_rows) rows_linear(pass, v, G);
        if (down && by_pairs(net.below(v))) pull_pairs(pass, v, down);
      } else if (with_rows && !scratch.done[v]) {
        rows_light(pass, v, G);
      }
    }
  }
  // What has come down to the parts of value u is what came down to u; to some perhaps nothing did.
  void join(int64_t u, int64_t rows, Mat<T>* at, bool* begun) const {
    const auto is_part = [&](int64_t v) { return flow(v).part && net.node(v).input[0] == u; };
    for (int64_t v = u + 1; v <= net.y; ++v) begun[u] |= is_part(v) && begun[v];
    for (int64_t v = u + 1; begun[u] && v <= net.y; ++v) {
      if (is_part(v) && !begun[v]) clear_rows(rows, net.whole(v), at[v]);
    }
  }
  // Zeros for what is added to piece by piece.
  void start(Mat<T>* at, bool* begun, int64_t u, int64_t rows) const {
    if (!begun[u]) clear_rows(rows, net.whole(u), at[u]);
    begun[u] = true;
  }

  // The rest is in the files that are named.

  // backward_rows.h
  void values(const Scratch& scratch, int64_t block, int64_t rows, int64_t row0, bool active,
              bool bends) const;
  void begin(const Scratch& scratch, int64_t block, int64_t rows, int64_t row0) const;
  Mat<const T> row_gradient(const Pass& pass, int64_t v, Mat<const T> down) const;
  void rows_linear(const Pass& pass, int64_t v, Mat<const T> G) const;
  void rows_light(const Pass& pass, int64_t v, Mat<const T> G) const;
  void give_input(const Scratch& scratch, int64_t rows, int64_t row0, bool walked) const;

  // backward_kept.h
  bool scales(int64_t v) const;
  bool scales_ahead(int64_t v) const;
  bool below_top(int64_t v) const;
  void value_and_scale(const Scratch& scratch, int64_t rows, int64_t row0, int64_t v,
                       bool active) const;
  bool pull_and_scale(const Pass& pass, int64_t v) const;

  // backward_pairs.h
  int64_t count(const T* gJ, int64_t candidates) const;
  Mat<const T> gather(const Pass& pass, Mat<const T> from, int64_t columns, Mat<T> to) const;
  void scatter_add(const Pass& pass, Mat<const T> from, int64_t columns, Mat<T> to) const;
  Operands<T> operands(const Pass& pass, int64_t v) const;
  bool dots_of(const Pass& pass, int64_t v) const;
  void tangents(const Pass& pass) const;
  Mat<const T> seeds(const Pass& pass, int64_t v) const;
  void pull_pairs(const Pass& pass, int64_t v, Mat<const T> down) const;
  bool pull_through(const Pass& pass, int64_t v, Mat<const T> down) const;
  void pairs_light(const Pass& pass, int64_t v, Mat<const T> P, Mat<const T> down) const;
  void pairs_curved(const Pass& pass, const Operands<T>& o, Mat<const T> P, Mat<const T> down,
                    bool moves) const;

  // backward_parameters.h
  template <class Add> void add_parameter(int64_t v, const Add& add, const Scratch& scratch) const;
  T* bias_of(const Scratch& scratch, int64_t v) const;
  void linear_gradients(const Pass& pass, int64_t v, Mat<const T> P, Mat<const T> G) const;
  void product(int64_t M, int64_t K, Mat<const T> left, Mat<const T> right, int64_t N, T* to,
               int64_t ld, const More<T>& more) const;
};

}  // namespace
