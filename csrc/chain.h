// One call's view of a chain: layers with their weights packed, and where forward leaves what backward
// reads.
#pragma once

#include "activations.h"
#include "blocks.h"

namespace {

// One linear layer a = W·h + b (W (out, in)) and the activation that follows it.
template <class T> struct Layer {
  int64_t in, out;
  const ApplyFn<T>* sigma;
  const SingleFn<T>* single;
  Numbers<T> numbers;
  bool identity, curved;  // curved: σ'' is not zero everywhere
  const T *w, *b;         // the user's tensors

  Matrix<T> forward;      // Wᵀ (in, out), for h·Wᵀ
  Matrix<T> back;         // W (out, in), for g·W
  const T* bias;          // b padded to whole vectors; null without bias
  const T* rows;          // W itself with padded rows (stride whole_vectors(in)), for dot products

  void apply(int order, Apply<T> what) const { sigma[order](what, numbers); }
};

template <class T> struct Net {
  const Plan* plan;
  int64_t L, d, D, k, widest;  // widest: of the hidden layers, x2 and the output
  bool curved;
  Layer<T>* layer;             // layer[l - 1] is layer l of the formulas; null while memory is counted
  const T* columns;            // (k, whole_vectors(H_1)): the columns of W_1 that meet x2
  Matrix<T> slopes;            // the same as B (H_1, k) of a product

  const Layer<T>& at(int64_t l) const { return layer[l - 1]; }
  const Layer<T>& last() const { return layer[L - 1]; }

  Net(const Plan& p, const void* const* given, Bump& memory) : plan(&p), params(given) {
    L = p.L, d = p.widths[0], D = p.widths[p.L], k = p.k;
    widest = max_of(D, k);
    curved = false;
    // Not on the stack: that of a thread may be as small as all layers of a deep network.
    layer = memory.take<Layer<T>>(L);
    packings = memory.take<Packing<T>>(2 * L + 1);
    for (int64_t l = 1; l <= L; ++l) {
      widest = max_of(widest, out(l));
      curved = curved || bends(l);
      if (layer) layer[l - 1] = described(l);
    }
    columns = nullptr;
    slopes = Matrix<T>{};
  }

  // What the plan says of a layer.
  int64_t in(int64_t l) const { return plan->widths[l - 1]; }
  int64_t out(int64_t l) const { return plan->widths[l]; }
  bool bends(int64_t l) const { return !piecewise_linear[plan->kind[l - 1]]; }

  // The last layer goes by dot products when its outputs are few; they read h in whole vectors,
  // which x itself is not laid out for.
  bool last_by_dots() const { return L > 1 && prefers_dots<T>(in(L), D); }
  bool slopes_by_dots() const { return prefers_dots<T>(out(1), k); }

  // The weights to be packed are first noted, then packed (`pack`).
  const void* const* params;
  Packing<T>* packings;
  int64_t noted = 0;

  Matrix<T> note(Bump& memory, const T* w, int64_t row, int64_t column, int64_t K, int64_t N) {
    T* to = memory.take<T>(packed_size<T>(K, N));
    if (!to) return {};
    packings[noted] = {to, w, row, column, K, N};
    return packings[noted++].matrix();
  }
  void pack_forward(Bump& memory, int64_t l) {
    const Matrix<T> packed = note(memory, w_of(l), 1, in(l), in(l), out(l));
    if (layer) layer[l - 1].forward = packed;
  }
  void pack_back(Bump& memory, int64_t l) {
    const Matrix<T> packed = note(memory, w_of(l), in(l), 1, out(l), in(l));
    if (layer) layer[l - 1].back = packed;
  }
  // One thread's share: every so-many-th panel.
  void pack(int64_t threads, int64_t thread) const {
    int64_t panel = 0;
    for (int64_t i = 0; i < noted; ++i) {
      for (int64_t p = 0; p < packings[i].panels(); ++p, ++panel) {
        if (panel % threads == thread) packings[i].panel(p);
      }
    }
  }

  void pack_bias(Bump& memory, int64_t l) {
    if (!params[2 * l - 1]) return;
    T* to = memory.take<T>(whole_vectors<T>(out(l)));
    if (!to) return;
    Layer<T>& f = layer[l - 1];
    for (int64_t j = 0; j < whole_vectors<T>(f.out); ++j) to[j] = j < f.out ? f.b[j] : T(0);
    f.bias = to;
  }
  void pack_rows(Bump& memory, int64_t l) {
    const int64_t ld = whole_vectors<T>(in(l));
    T* to = memory.take<T>(out(l) * ld);
    if (!to) return;
    Layer<T>& f = layer[l - 1];
    for (int64_t i = 0; i < f.out; ++i) {
      for (int64_t j = 0; j < ld; ++j) to[i * ld + j] = j < f.in ? f.w[i * f.in + j] : T(0);
    }
    f.rows = to;
  }
  void pack_columns(Bump& memory) {
    const int64_t ld = whole_vectors<T>(out(1));
    T* to = memory.take<T>(k * ld);
    if (!to) return;
    const Layer<T>& f = layer[0];
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t j = 0; j < ld; ++j) {
        to[c * ld + j] = j < f.out ? f.w[j * d + (d - k) + c] : T(0);
      }
    }
    columns = to;
  }
  void pack_slopes(Bump& memory) {
    const T* w = w_of(1);  // null where the layer has no outputs
    slopes = note(memory, w ? w + (d - k) : w, d, 1, out(1), k);
  }

 private:
  const T* w_of(int64_t l) const { return static_cast<const T*>(params[2 * l - 2]); }

  Layer<T> described(int64_t l) const {
    const double* numbers = plan->numbers + 3 * (l - 1);
    const int code = int(plan->kind[l - 1]);
    Layer<T> f{};
    f.in = in(l), f.out = out(l);
    f.sigma = orders_of<T>(code);
    f.single = singles_of<T>(code);
    f.numbers = {T(numbers[0]), T(numbers[1]), T(numbers[2])};
    f.identity = code == 0;
    f.curved = bends(l);
    f.w = w_of(l);
    f.b = static_cast<const T*>(params[2 * l - 1]);
    return f;
  }
};

// Where forward leaves what backward reads, block after block: the pre-activations a_l of the hidden
// layers (a_1 only where it is dear to recompute; a_L only where an activation follows), and for one
// output in adjoint mode the pulled-back P_l of layers 1 .. L-2. Both hold everything: σ, σ', σ'' and
// p are one cheap pass away, and P_{L-1} is a row of W_L. Rows are padded to whole vectors; a block's
// layers lie together, so that all of it takes N times the same number of elements.
template <class T> struct SavedLayout {
  const Plan& plan;
  Blocks blocks;

  SavedLayout(const Plan& p, int64_t N) : plan(p), blocks(N) {}

  int64_t ld(int64_t l) const { return whole_vectors<T>(plan.widths[l]); }
  bool has_a(int64_t l) const {
    if (l == plan.L) return plan.kind[l - 1] != 0;
    return l > 1 || plan.d > 48;  // to compute a_1 again costs a product of depth d
  }
  bool keeps_adjoint() const { return plan.keeps_adjoint(); }
  bool has_p(int64_t l) const { return keeps_adjoint() && l <= plan.L - 2; }

  int64_t row_of_a(int64_t end) const {  // elements of one row before layer `end`
    int64_t n = 0;
    for (int64_t l = 1; l < end; ++l) n += has_a(l) ? ld(l) : 0;
    return n;
  }
  int64_t row_of_p(int64_t end) const {
    int64_t n = 0;
    for (int64_t l = 1; l < end; ++l) n += has_p(l) ? ld(l) : 0;
    return n;
  }
  T* a(void* buffer, int64_t block, int64_t l) const {
    return static_cast<T*>(buffer) + place(block, row_of_a(l), row_of_a(plan.L + 1));
  }
  T* p(void* buffer, int64_t block, int64_t l) const {
    return static_cast<T*>(buffer) + place(block, row_of_p(l), row_of_p(plan.L + 1));
  }
  int64_t place(int64_t block, int64_t before, int64_t all) const {
    return blocks.begin(block) * all + blocks.rows(block) * before;
  }
  Saved elements_of_a_row() const {
    return {{row_of_a(plan.L + 1), row_of_p(plan.L + 1), plan.hinge ? plan.D * plan.k : 0}};
  }
};

}  // namespace
