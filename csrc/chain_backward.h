// The backward pass: gradients of (y, J or its penalty) with respect to parameters and x.
//
// The part of a slope in the loss is uᵀ·J·e for a pair of seeds: in tangent mode e is a unit vector
// (one monotone column) and u = gJ[n, :, c], in adjoint mode u is a unit vector (one output) and
// e = gJ[n, d, :]. Both are one tangent chain up from e and one cotangent chain down from u, and
// only pairs that are not zero are there at all: `Pairs`. They add to the weight gradients and leave,
// for each row, σ''∘ȧ∘ū in the cotangent of the pre-activations, which the task's own chain carries
// down. Both chains meet the same weights, so pairs are stacked upon the block's rows into one
// product.
#pragma once

#include "chain_forward.h"

namespace {

// One thread's sums of the weight gradients. W_1 is kept transposed, (d, H_1): x is narrow.
template <class T> struct Gradients {
  T* base;

  static int64_t weight_size(const Plan& plan, int64_t l) {
    const int64_t in = plan.widths[l - 1], out = plan.widths[l];
    return l == 1 ? in * whole_vectors<T>(out) : out * whole_vectors<T>(in);
  }
  static int64_t offset(const Plan& plan, int64_t end) {
    int64_t n = 0;
    for (int64_t l = 1; l < end; ++l) {
      n += weight_size(plan, l) + whole_vectors<T>(plan.widths[l]);
    }
    return n;
  }
  T* weight(const Plan& plan, int64_t l) const { return base + offset(plan, l); }
  T* bias(const Plan& plan, int64_t l) const { return weight(plan, l) + weight_size(plan, l); }
};

// Scratch of one thread, by layer where it says so. What rows and pairs have in common is stacked:
// the block's rows have a fixed place, `m` pairs lie just before them, and one product takes both.
template <class T> struct BackwardScratch {
  T *s, *c, *at;       // by layer: σ', σ'' (σ''∘P with one output in adjoint mode), ȧ of the pairs
  T *stacked_h;        // by layer, stacked: ḣ of the pairs and h
  T *stacked_g;        // by layer, stacked: the pairs' ū (or p) and the rows' cotangent of a
  T* r;                // by layer and row: Σ over pairs of σ''∘ȧ∘ū; with one output the pairs' q
  T* t;                // one layer, all rows
  T* slopes;           // gJ (rows, D, k)
  T *task, *task_top;  // with one output, by row: gy, and gy·σ_L'
  T *one, *one_top;    // 1, and σ_L'
  Pairs<T> pairs;
  Gradients<T> sums;
  int64_t ld, stride;

  BackwardScratch(Bump& memory, const Net<T>& net, int64_t capacity)
      : pairs(memory, *net.plan, capacity) {
    ld = scratch_ld<T>(max_of(net.widest, net.d));
    stride = capacity * ld;
    const int64_t L = net.L;
    T** const by_layer[] = {&s, &c, &at, &r};
    for (T** buffer : by_layer) *buffer = memory.take<T>(stride * L);
    T** const stacked[] = {&stacked_h, &stacked_g};
    for (T** buffer : stacked) *buffer = memory.take<T>(2 * stride * L);
    t = memory.take<T>(stride);
    slopes = memory.take<T>(capacity * net.D * net.k);
    T** const by_row[] = {&task, &task_top, &one, &one_top};
    for (T** buffer : by_row) *buffer = memory.take<T>(capacity);
  }
  T* of(T* array, int64_t l) const { return array + (l - 1) * stride; }
  T* h(int64_t l) const { return stacked_h + (2 * l - 1) * stride; }
  T* g(int64_t l) const { return stacked_g + (2 * l - 1) * stride; }
  T* ht(int64_t l, int64_t m) const { return h(l) - m * ld; }
  T* u(int64_t l, int64_t m) const { return g(l) - m * ld; }
};

// What a call needs beyond its pointers.
struct Wants {
  bool weights[max_layers], biases[max_layers], input, pairs;
};

template <class T> struct BackwardPass {
  const Net<T>& net;
  const BackwardCall& call;
  SavedLayout<T> layout;
  Wants wants;

  // --- weight gradients -------------------------------------------------------------------------

  // dW_l += gᵀ·h (h (rows, in) is h_{l-1}, or x for the first layer).
  void add_weight(const BackwardScratch<T>& scratch, int64_t l, int64_t rows, const T* g,
                  int64_t ldg, const T* h, int64_t ldh) const {
    if (!wants.weights[l - 1] || rows == 0) return;
    const Layer<T>& layer = net.at(l);
    T* to = scratch.sums.weight(*net.plan, l);
    if (l == 1) return add_first(to, 0, layer.in, rows, g, ldg, h, ldh);
    const Matrix<T> b{h, rows, layer.in, ldh};
    gemm<true>(layer.out, rows, g, ldg, b, 0, from_zero<T>(), to, whole_vectors<T>(layer.in),
               Nothing{});
  }
  // Rows [from, from + count) of dW_1ᵀ += xᵀ·g.
  void add_first(T* to, int64_t from, int64_t count, int64_t rows, const T* g, int64_t ldg,
                 const T* x, int64_t ldx) const {
    const int64_t H = net.at(1).out, ld = whole_vectors<T>(H);
    const Matrix<T> b{g, rows, H, ldg};
    gemm<true>(count, rows, x, ldx, b, 0, from_zero<T>(), to + from * ld, ld, Nothing{});
  }
  // The tangent of x is e in its last k columns and nothing elsewhere.
  void add_first_columns(const BackwardScratch<T>& scratch, int64_t pairs, const T* g) const {
    if (!wants.weights[0]) return;
    add_first(scratch.sums.weight(*net.plan, 1), net.d - net.k, net.k, pairs, g, scratch.ld,
              scratch.pairs.e, scratch.pairs.lde);
  }
  void add_bias(const BackwardScratch<T>& scratch, int64_t l, int64_t rows, const T* g,
                int64_t ldg) const {
    if (!wants.biases[l - 1]) return;
    T* to = scratch.sums.bias(*net.plan, l);
    const int64_t columns = whole_vectors<T>(net.at(l).out);
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      Vec<T> even = Vec<T>{}, odd = Vec<T>{};
      int64_t i = 0;
      for (; i + 2 <= rows; i += 2) {
        even += load(g + i * ldg + j);
        odd += load(g + (i + 1) * ldg + j);
      }
      if (i < rows) even += load(g + i * ldg + j);
      store(to + j, load(to + j) + (even + odd));  // block by block: fewer roundings in a chain
    }
  }

  // --- the block's rows -------------------------------------------------------------------------

  const T* x(int64_t row0) const { return static_cast<const T*>(call.x) + row0 * net.d; }
  const T* gy(int64_t row0) const {
    return call.gy ? static_cast<const T*>(call.gy) + row0 * net.D : nullptr;
  }

  // a_l as forward saved it; a_1 is computed again where it was not.
  const T* pre_activation(const BackwardScratch<T>& scratch, int64_t block, int64_t rows,
                          int64_t row0, int64_t l, int64_t* ld) const {
    if (layout.has_a(l)) {
      *ld = layout.ld(l);
      return layout.a(call.saved[0], block, l);
    }
    const Layer<T>& layer = net.at(1);
    *ld = scratch.ld;
    gemm<false>(rows, layer.in, x(row0), net.d, layer.forward, 0, from_bias(layer.bias), scratch.t,
                *ld, Nothing{});
    return scratch.t;
  }

  void activate(const BackwardScratch<T>& scratch, int64_t block, int64_t rows, int64_t row0,
                int64_t l, int order) const {
    int64_t lda;
    const T* a = pre_activation(scratch, block, rows, row0, l, &lda);
    net.at(l).apply(order, {rows, whole_vectors<T>(net.at(l).out), a, lda, scratch.h(l),
                            scratch.of(scratch.s, l), scratch.of(scratch.c, l), scratch.ld});
  }

  // --- pairs ------------------------------------------------------------------------------------

  int64_t gather_pairs(const BackwardScratch<T>& scratch, int64_t rows, int64_t* next) const {
    return scratch.pairs.gather(*net.plan, scratch.slopes, rows, layout.blocks.capacity, next);
  }

  // to[i] = s[row[i]]∘x[i], one tile of pairs after a product.
  struct ScaleRows {
    const int32_t* row;
    const T* s;
    const T* x;
    T* to;
    int64_t ld;

    void operator()(int64_t i0, int64_t rows, int64_t j0, int64_t columns) const {
      for (int64_t i = i0; i < i0 + rows; ++i) {
        multiply<T>(1, columns, s + row[i] * ld + j0, 0, x + i * ld + j0, 0, to + i * ld + j0, 0);
      }
    }
  };

  // ȧ_l and ḣ_l of m pairs, as far up as they are needed.
  void tangent_chain(const BackwardScratch<T>& scratch, int64_t m) const {
    const int64_t ld = scratch.ld, end = net.last().curved ? net.L : net.L - 1;
    for (int64_t l = 1; l <= end; ++l) {
      const Layer<T>& layer = net.at(l);
      T *at = scratch.of(scratch.at, l), *ht = scratch.ht(l, m);
      const ScaleRows after{scratch.pairs.row, scratch.of(scratch.s, l), at, ht, ld};
      if (l == 1) {
        gemm<false>(m, net.k, scratch.pairs.e, scratch.pairs.lde, layer.forward, net.d - net.k,
                    from_zero<T>(), at, ld, after);
      } else {
        gemm<false>(m, layer.in, scratch.ht(l - 1, m), ld, layer.forward, 0, from_zero<T>(), at, ld,
                    after);
      }
    }
  }

  // x of stacked rows, one tile after a product with W_{l+1}: pairs leave σ''∘ȧ∘x in r and become
  // ū = σ'∘x; rows become ḡ = σ'∘x + r. Pairs come first, so r is complete when rows read it.
  struct Pull {
    int64_t m;
    const int32_t* row;
    const T *s, *c, *at;
    T *r, *x;  // r is null where nothing is curved
    int64_t ld;

    void operator()(int64_t i0, int64_t rows, int64_t j0, int64_t columns) const {
      const int64_t end = i0 + rows;
      int64_t i = i0;
      for (; i < min_of(end, m); ++i) pair(i * ld + j0, row[i] * ld + j0, columns);
      for (; i < end; ++i) own(i * ld + j0, (i - m) * ld + j0, columns);
    }
    MK_INLINE void pair(int64_t here, int64_t there, int64_t columns) const {
      for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
        const Vec<T> pulled = load(x + here + j);
        store(x + here + j, load(s + there + j) * pulled);
        if (!r) continue;
        const Vec<T> bent = load(c + there + j) * load(at + here + j);
        store(r + there + j, load(r + there + j) + bent * pulled);
      }
    }
    MK_INLINE void own(int64_t here, int64_t there, int64_t columns) const {
      for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
        const Vec<T> g = load(s + there + j) * load(x + here + j);
        store(x + here + j, r ? g + load(r + there + j) : g);
      }
    }
  };

  // The cotangent chain of m pairs stacked upon `rows` rows (either may be none).
  void chain(const BackwardScratch<T>& scratch, int64_t m, int64_t rows, int64_t row0,
             bool active) const {
    const int64_t ld = scratch.ld;
    pairs_top(scratch, m);
    rows_top(scratch, rows, row0, active);
    for (int64_t l = net.L; l > 1; --l) {
      add_weight(scratch, l, m + rows, scratch.u(l, m), ld, scratch.ht(l - 1, m), ld);
      add_bias(scratch, l, rows, scratch.g(l), ld);
      T* next = scratch.u(l - 1, m);
      const bool curved = active && net.at(l - 1).curved;
      const Pull after{m,
                       scratch.pairs.row,
                       scratch.of(scratch.s, l - 1),
                       scratch.of(scratch.c, l - 1),
                       scratch.of(scratch.at, l - 1),
                       curved ? scratch.of(scratch.r, l - 1) : nullptr,
                       next,
                       ld};
      gemm<false>(m + rows, net.at(l).out, scratch.u(l, m), ld, net.at(l).back, 0, from_zero<T>(),
                  next, ld, after);
    }
    add_first_columns(scratch, m, scratch.u(1, m));
    add_bias(scratch, 1, rows, scratch.g(1), ld);
    if (rows) first_layer(scratch, rows, row0, scratch.g(1));
  }

  // ū_L = σ_L'∘u, and what a curved last activation leaves in r.
  void pairs_top(const BackwardScratch<T>& scratch, int64_t m) const {
    const int64_t L = net.L, ld = scratch.ld, ldu = scratch.pairs.ldu;
    const T *s = scratch.of(scratch.s, L), *c = scratch.of(scratch.c, L);
    const T* at = scratch.of(scratch.at, L);
    T *to = scratch.u(L, m), *r = scratch.of(scratch.r, L);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = scratch.pairs.row[i] * ld;
      for (int64_t j = 0; j < whole_vectors<T>(net.D); j += Simd<T>::lanes) {
        const Vec<T> u = load(scratch.pairs.u + i * ldu + j);
        store(to + i * ld + j, load(s + row + j) * u);
        if (!net.last().curved) continue;
        store(r + row + j, load(r + row + j) + load(c + row + j) * load(at + i * ld + j) * u);
      }
    }
  }

  // ḡ_L: the task loss's, and what the pairs left in r.
  void rows_top(const BackwardScratch<T>& scratch, int64_t rows, int64_t row0, bool active) const {
    const int64_t L = net.L, D = net.D, ld = scratch.ld;
    const bool curved = active && net.last().curved;
    const T* given = gy(row0);
    T* g = scratch.g(L);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < D; ++j) {
        const T from_task = given ? given[i * D + j] * scratch.of(scratch.s, L)[i * ld + j] : T(0);
        g[i * ld + j] = from_task + (curved ? scratch.of(scratch.r, L)[i * ld + j] : T(0));
      }
      for (int64_t j = D; j < whole_vectors<T>(D); ++j) g[i * ld + j] = 0;
    }
  }

  // --- one block, any mode ----------------------------------------------------------------------

  void run(const BackwardScratch<T>& scratch, int64_t block) const {
    const int64_t rows = layout.blocks.rows(block), row0 = layout.blocks.begin(block);
    const bool active =
        wants.pairs && slope_gradients(*net.plan, call, scratch.slopes, rows, row0);
    if (!active && !call.gy) return no_input_gradient(rows, row0);
    if (layout.keeps_adjoint()) return run_single(scratch, block, rows, row0, active);
    const int64_t L = net.L, ld = scratch.ld;
    for (int64_t l = 1; l <= L; ++l) {
      const bool curved = active && net.at(l).curved;
      if (curved) clear(scratch.of(scratch.r, l), rows * ld);
      if (l < L || !net.last().identity) {
        activate(scratch, block, rows, row0, l, curved ? 2 : 1);
      } else {
        ones(scratch, rows);
      }
    }
    const bool task = call.gy || (active && net.curved);
    int64_t m = 0, next = 0;
    if (active) {
      while ((m = gather_pairs(scratch, rows, &next))) {
        tangent_chain(scratch, m);
        if (task && stacks(rows, next)) break;
        chain(scratch, m, 0, row0, true);
      }
    }
    if (task) {
      chain(scratch, m, rows, row0, active);
    } else {
      no_input_gradient(rows, row0);
    }
  }

  // Whether pairs just gathered are the block's last, which are stacked upon its rows.
  bool stacks(int64_t rows, int64_t next) const {
    return switches.stacks && next == rows * (net.plan->adjoint ? net.D : net.k);
  }

  // σ_L' where no activation follows the last layer.
  void ones(const BackwardScratch<T>& scratch, int64_t rows) const {
    T* s = scratch.of(scratch.s, net.L);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < whole_vectors<T>(net.D); ++j) s[i * scratch.ld + j] = T(1);
    }
  }

  void no_input_gradient(int64_t rows, int64_t row0) const {
    if (call.gx) clear(static_cast<T*>(call.gx) + row0 * net.d, rows * net.d);
  }

  // dW_1 and dx of the finished g_1.
  void first_layer(const BackwardScratch<T>& scratch, int64_t rows, int64_t row0, const T* g) const {
    const int64_t ld = scratch.ld, d = net.d;
    add_weight(scratch, 1, rows, g, ld, x(row0), d);
    if (call.gx) input_gradient(scratch, rows, row0, g, nullptr);
  }

  // dx = scale·g_1·W_1, scale one number a row where it is given.
  void input_gradient(const BackwardScratch<T>& scratch, int64_t rows, int64_t row0, const T* g,
                      const T* scale) const {
    const int64_t ld = scratch.ld, d = net.d;
    T* dx = scratch.t;
    gemm<false>(rows, net.at(1).out, g, ld, net.at(1).back, 0, from_zero<T>(), dx, ld, Nothing{});
    for (int64_t i = 0; i < rows; ++i) {
      T* to = static_cast<T*>(call.gx) + (row0 + i) * d;
      for (int64_t j = 0; j < d; ++j) to[j] = scale ? scale[i] * dx[i * ld + j] : dx[i * ld + j];
    }
  }

  // --- one block, one output in adjoint mode -------------------------------------------------------

  // The task's cotangent of a_l is gy·p_l, and p_l is known: without pairs no chain is left, only
  // the weight gradients' own products.
  void run_single(const BackwardScratch<T>& scratch, int64_t block, int64_t rows, int64_t row0,
                  bool active) const {
    const int64_t L = net.L, ld = scratch.ld;
    int64_t next = 0;
    const int64_t m = active ? gather_pairs(scratch, rows, &next) : 0;
    single_top(scratch, block, rows, row0);
    if (m && !net.curved) return run_single_linear(scratch, block, rows, row0, m);
    // Every row with a pair: then pairs are rows, and nothing is gathered nor put back.
    const bool all = m == rows;
    for (int64_t l = 1; l < L; ++l) {
      const int more = m == 0 ? 0 : net.at(l).curved ? 2 : 1;
      single_layer(scratch, block, rows, row0, l, more, all, all ? scratch.u(l, m) : scratch.g(l));
    }
    if (m) {
      tangent_chain(scratch, m);
      single_pairs_top(scratch, m, all);
    }
    for (int64_t l = L; l > 1; --l) {
      if (switches.stacks) {
        add_weight(scratch, l, m + rows, scratch.u(l, m), ld, scratch.ht(l - 1, m), ld);
      } else {
        add_weight(scratch, l, m, scratch.u(l, m), ld, scratch.ht(l - 1, m), ld);
        add_weight(scratch, l, rows, scratch.g(l), ld, scratch.h(l - 1), ld);
      }
      if (m || l == L) add_bias(scratch, l, rows, scratch.g(l), ld);
      if (m) single_pairs_below(scratch, block, l, m, all);
    }
    if (m) add_first_columns(scratch, m, scratch.u(1, m));
    if (m || L == 1) add_bias(scratch, 1, rows, scratch.g(1), ld);
    first_layer(scratch, rows, row0, scratch.g(1));
  }

  // σ_L', σ_L'' and g_L = gy·σ_L', each in column 0 of its layer.
  void single_top(const BackwardScratch<T>& scratch, int64_t block, int64_t rows,
                  int64_t row0) const {
    const int64_t L = net.L, ld = scratch.ld;
    const T* given = gy(row0);
    T *s = scratch.of(scratch.s, L), *g = scratch.g(L);
    if (net.last().identity) {
      for (int64_t i = 0; i < rows; ++i) s[i * ld] = T(1);
    } else {
      int64_t lda;
      const T* a = pre_activation(scratch, block, rows, row0, L, &lda);
      net.last().apply(4, {rows, Simd<T>::lanes, a, lda, nullptr, s, scratch.of(scratch.c, L), ld});
    }
    for (int64_t i = 0; i < rows; ++i) {
      clear(g + i * ld, Simd<T>::lanes);
      scratch.task[i] = given ? given[i] : T(0);
      scratch.one[i] = T(1);
      scratch.one_top[i] = s[i * ld];
      scratch.task_top[i] = g[i * ld] = scratch.task[i] * s[i * ld];
    }
  }

  // Under piecewise-linear σ the pairs leave the cotangents alone, so task and pairs share the left
  // factor p_l of every weight gradient and add up in the right one: dW_l += p_lᵀ(gy·h + ḣ).
  void run_single_linear(const BackwardScratch<T>& scratch, int64_t block, int64_t rows,
                         int64_t row0, int64_t m) const {
    const int64_t L = net.L, ld = scratch.ld, d = net.d, k = net.k;
    const int32_t* row = scratch.pairs.row;
    for (int64_t l = 1; l < L; ++l) {
      single_layer(scratch, block, rows, row0, l, 3, true, scratch.g(l));
    }
    tangent_chain(scratch, m);
    T* top = scratch.g(L);
    T bias = 0;
    for (int64_t i = 0; i < rows; ++i) {
      bias += scratch.task_top[i];
      top[i * ld] = scratch.one_top[i];
    }
    if (wants.biases[L - 1]) scratch.sums.bias(*net.plan, L)[0] += bias;
    for (int64_t l = L; l > 1; --l) {
      T* h = scratch.h(l - 1);
      add_pairs(m, row, whole_vectors<T>(net.at(l - 1).out), scratch.ht(l - 1, m), h, ld);
      add_weight(scratch, l, rows, scratch.g(l), ld, h, ld);
    }
    const T *p = scratch.g(1), *from = x(row0);
    T* seeds = scratch.t;  // gy·x, and the pairs' e in its last columns
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < d; ++j) seeds[i * ld + j] = scratch.task[i] * from[i * d + j];
    }
    for (int64_t i = 0; i < m; ++i) {
      T* to = seeds + row[i] * ld + (d - k);
      for (int64_t c = 0; c < k; ++c) to[c] += scratch.pairs.e[i * scratch.pairs.lde + c];
    }
    add_weight(scratch, 1, rows, p, ld, seeds, ld);
    if (call.gx) input_gradient(scratch, rows, row0, p, scratch.task);
  }

  void add_pairs(int64_t m, const int32_t* row, int64_t columns, const T* x, T* to,
                 int64_t ld) const {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
        store(to + row[i] * ld + j, load(to + row[i] * ld + j) + load(x + i * ld + j));
      }
    }
  }

  // h_l and gy·p_l (or p_l itself) of all rows, and what the pairs need of σ', σ'' (`more`: see
  // Single).
  void single_layer(const BackwardScratch<T>& scratch, int64_t block, int64_t rows, int64_t row0,
                    int64_t l, int more, bool p_itself, T* g) const {
    const Layer<T>& layer = net.at(l);
    const bool below_top = l == net.L - 1;  // where P is a row of W_L times σ_L'
    const T* p_scale = below_top ? scratch.one_top : scratch.one;
    const T* g_scale = below_top ? scratch.task_top : scratch.task;
    const bool sums_bias = wants.biases[l - 1] && (more == 0 || more == 3);
    int64_t lda;
    const T* a = pre_activation(scratch, block, rows, row0, l, &lda);
    const Single<T> work{rows,
                         whole_vectors<T>(layer.out),
                         a,
                         lda,
                         below_top ? net.last().rows : layout.p(call.saved[1], block, l),
                         below_top ? 0 : layout.ld(l),
                         p_itself ? p_scale : g_scale,
                         more == 3 ? scratch.task : p_scale,
                         scratch.h(l),
                         scratch.of(scratch.s, l),
                         scratch.of(scratch.c, l),
                         g,
                         scratch.ld,
                         sums_bias ? scratch.sums.bias(*net.plan, l) : nullptr};
    layer.single[more](work, layer.numbers);
  }

  // P_l of one row: saved, or the last layer's weights times σ_L'.
  const T* pulled(const BackwardScratch<T>& scratch, int64_t block, int64_t l, int64_t row,
                  T* scale) const {
    if (l == net.L - 1) {
      *scale = scratch.of(scratch.s, net.L)[row * scratch.ld];
      return net.last().rows;
    }
    *scale = T(1);
    return layout.p(call.saved[1], block, l) + row * layout.ld(l);
  }

  // p_L and the total adjoint q_L = gy·p_L + σ_L''∘ȧ_L of m pairs, one for each active row.
  void single_pairs_top(const BackwardScratch<T>& scratch, int64_t m, bool all) const {
    const int64_t L = net.L, ld = scratch.ld;
    T *p = scratch.u(L, m), *g = scratch.g(L), *q = adjoint(scratch, L, all);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = scratch.pairs.row[i], from = row * ld;
      clear(q + i * ld, Simd<T>::lanes);
      p[i * ld] = scratch.one_top[row];
      q[i * ld] = scratch.task_top[row];
      if (net.last().curved) {
        q[i * ld] += scratch.of(scratch.c, L)[from] * scratch.of(scratch.at, L)[i * ld];
      }
      g[from] = q[i * ld];
    }
  }
  // Where the pairs' q_l goes: with all rows active it is the rows' cotangent itself.
  T* adjoint(const BackwardScratch<T>& scratch, int64_t l, bool all) const {
    return all ? scratch.g(l) : scratch.of(scratch.r, l);
  }

  // From layer l to the one below: q (then also the cotangent of the pairs' rows) and p.
  void single_pairs_below(const BackwardScratch<T>& scratch, int64_t block, int64_t l, int64_t m,
                          bool all) const {
    const int64_t ld = scratch.ld, columns = whole_vectors<T>(net.at(l - 1).out);
    const int32_t* row = scratch.pairs.row;
    const bool curved = net.at(l - 1).curved;
    T *q = adjoint(scratch, l - 1, all), *g = scratch.g(l - 1);
    const PullRows after{row,
                         scratch.of(scratch.s, l - 1),
                         curved ? scratch.of(scratch.c, l - 1) : nullptr,
                         scratch.of(scratch.at, l - 1),
                         q,
                         ld};
    gemm<false>(m, net.at(l).out, adjoint(scratch, l, all), ld, net.at(l).back, 0, from_zero<T>(),
                q, ld, after);
    if (all) return;
    gather_p(scratch, block, l - 1, m);
    for (int64_t i = 0; i < m; ++i) copy(g + row[i] * ld, q + i * ld, columns);
  }

  // q = σ'∘q + (σ''∘P)∘ȧ, one tile of pairs after a product.
  struct PullRows {
    const int32_t* row;
    const T *s, *c;  // c = σ''∘P, null where σ'' is zero
    const T* at;
    T* q;
    int64_t ld;

    void operator()(int64_t i0, int64_t rows, int64_t j0, int64_t columns) const {
      for (int64_t i = i0; i < i0 + rows; ++i) {
        const int64_t from = row[i] * ld;
        for (int64_t j = j0; j < j0 + columns; j += Simd<T>::lanes) {
          Vec<T> pulled = load(s + from + j) * load(q + i * ld + j);
          if (c) pulled += load(c + from + j) * load(at + i * ld + j);
          store(q + i * ld + j, pulled);
        }
      }
    }
  };

  // p_l = σ'∘P of the pairs' rows, one after another.
  void gather_p(const BackwardScratch<T>& scratch, int64_t block, int64_t l, int64_t m) const {
    const int64_t ld = scratch.ld, columns = whole_vectors<T>(net.at(l).out);
    const T* s = scratch.of(scratch.s, l);
    T* p = scratch.u(l, m);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = scratch.pairs.row[i];
      T scale;
      const T* P = pulled(scratch, block, l, row, &scale);
      for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
        store(p + i * ld + j, load(s + row * ld + j) * (scale * load(P + j)));
      }
    }
  }
};

template <class T> struct BackwardWeights {
  Net<T> net;

  BackwardWeights(const Plan& plan, const BackwardCall& call, const Wants& wants, Bump& memory)
      : net(plan, call.params, memory) {
    const SavedLayout<T> layout(plan, call.N);
    const int64_t L = net.L;
    if (!layout.has_a(1)) net.pack_bias(memory, 1);
    if (!layout.has_a(1) || wants.pairs) net.pack_forward(memory, 1);
    if (wants.pairs) {
      for (int64_t l = 2; l < L + (net.bends(L) ? 1 : 0); ++l) net.pack_forward(memory, l);
    }
    const bool single = layout.keeps_adjoint();
    if (single && L > 1) net.pack_rows(memory, L);
    if (!single || (wants.pairs && net.curved)) {
      for (int64_t l = 2; l <= L; ++l) net.pack_back(memory, l);
    }
    if (call.gx) net.pack_back(memory, 1);
  }
};

// Adds up the threads' sums in their order and lays them out as the parameters are.
template <class T> struct Reduction {
  const Plan& plan;
  const BackwardCall& call;
  const T* sums;  // thread after thread
  int64_t size, threads;

  void run(const Runtime& runtime) const {
    const int64_t helpers = size < shared_from ? 1 : threads;
    auto work = [&](int64_t t) {
      for (int64_t l = 1; l <= plan.L; ++l) layer(l, helpers, t);
    };
    on_threads(runtime, helpers, work);
  }

  // One helper's share of a layer.
  void layer(int64_t l, int64_t helpers, int64_t helper) const {
    const int64_t in = plan.widths[l - 1], out = plan.widths[l];
    T *dw = static_cast<T*>(call.grads[2 * l - 2]), *db = static_cast<T*>(call.grads[2 * l - 1]);
    const int64_t at = Gradients<T>::offset(plan, l), ld = whole_vectors<T>(l == 1 ? out : in);
    if (db && helper == 0) row(db, at + Gradients<T>::weight_size(plan, l), out);
    if (!dw) return;
    if (l > 1) {
      const int64_t end = out * (helper + 1) / helpers;
      for (int64_t i = out * helper / helpers; i < end; ++i) row(dw + i * in, at + i * ld, in);
      return;
    }
    const int64_t end = out * (helper + 1) / helpers;  // W_1's sums are transposed
    for (int64_t j = out * helper / helpers; j < end; ++j) {
      for (int64_t i = 0; i < in; ++i) {
        const T* from = sums + at + i * ld + j;
        T total = *from;
        for (int64_t t = 1; t < threads; ++t) total += from[t * size];
        dw[j * in + i] = total;
      }
    }
  }

  void row(T* to, int64_t at, int64_t n) const {
    copy(to, sums + at, n);
    for (int64_t t = 1; t < threads; ++t) {
      const T* more = sums + t * size + at;
      for (int64_t j = 0; j < n; ++j) to[j] += more[j];
    }
  }
};

template <class T>
Status backward_chain(const Plan& plan, const BackwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  Wants wants{};
  for (int64_t l = 0; l < plan.L; ++l) {
    wants.weights[l] = call.grads[2 * l] != nullptr;
    wants.biases[l] = call.grads[2 * l + 1] != nullptr;
  }
  wants.input = call.gx != nullptr;
  wants.pairs = any_slope_gradient<T>(plan, call);
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  const int64_t size = round_up(Gradients<T>::offset(plan, plan.L + 1) + int64_t(gap / sizeof(T)), 64);
  Bump front;
  front.take<T>(size * threads);
  const auto weights_in = [&](Bump& memory) {
    return BackwardWeights<T>(plan, call, wants, memory);
  };
  const auto scratch_in = [&](Bump& memory, const Net<T>& packed) {
    return BackwardScratch<T>(memory, packed, blocks.capacity);
  };
  const Crew<T, decltype(weights_in), decltype(scratch_in)> crew(threads, front.lines(), weights_in,
                                                                 scratch_in);
  char* memory = static_cast<char*>(runtime.acquire(crew.bytes()));
  if (!memory) return out_of_memory;
  T* sums = reinterpret_cast<T*>(memory);

  crew.run(runtime, memory,
           [&](int64_t t, const BackwardWeights<T>& weights, BackwardScratch<T> scratch) {
             scratch.sums.base = sums + t * size;
             clear(scratch.sums.base, size);
             const SavedLayout<T> layout(plan, call.N);
             const BackwardPass<T> pass{weights.net, call, layout, wants};
             const int64_t end = first_block(blocks, threads, t + 1);
             for (int64_t b = first_block(blocks, threads, t); b < end; ++b) pass.run(scratch, b);
           });
  Reduction<T>{plan, call, sums, size, threads}.run(runtime);
  runtime.release(memory, crew.bytes());
  return ok;
}

}  // namespace
