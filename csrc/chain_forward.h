// The forward pass: y, and J or its penalty, of one block of rows after another.
//
// A block goes through all layers while it stays in cache; tangents or the adjoint chain follow at
// once, from the σ' still there. Letters are those of docs/mathematics.md.
#pragma once

#include "chain.h"
#include "hinge.h"

namespace {

// After a product gave a tile of a: h = σ(a), s = σ'(a).
template <class T> struct Activate {
  const Layer<T>& layer;
  int order;
  const T* a;
  int64_t lda;
  T *h, *s;
  int64_t ld;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
    const int64_t at = i * ld + j;
    layer.apply(order, {rows, columns, a + i * lda + j, lda, h + at, s + at, nullptr, ld});
  }
};

// After a product gave a tile of x: to = s∘x (to may be x itself).
template <class T> struct Scale {
  const T* s;
  int64_t lds;
  const T* x;
  int64_t ldx;
  T* to;
  int64_t ldto;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
    multiply(rows, columns, x + i * ldx + j, ldx, s + i * lds + j, lds, to + i * ldto + j, ldto);
  }
};

// The columns of x2 whose tangents go through the layers together with h, each panel of a weight
// serving all of them. More would only push one another out of the cache.
constexpr int64_t most_riders = 4;

template <class T> struct ForwardScratch {
  T *a, *h[2];    // one block of the widest layer each
  T* p[2];        // the same for the chain of slopes, or for each rider's
  T* s;           // σ'(a_l), l = 1 .. L; only the layer at hand where every tangent rides
  T *y, *slopes;  // (rows, D) padded; (rows, D, k)
  int64_t ld, stride, riders, stride_s;

  ForwardScratch(Bump& memory, const Net<T>& net, int64_t capacity, bool own_slopes) {
    ld = scratch_ld<T>(net.widest);
    stride = capacity * ld;
    a = memory.take<T>(stride);
    for (T*& buffer : h) buffer = memory.take<T>(stride);
    riders = net.plan->adjoint || !switches.stacks ? 0 : min_of(net.k, most_riders);
    for (T*& buffer : p) buffer = memory.take<T>(stride * max_of<int64_t>(riders, 1));
    stride_s = riders == net.k ? 0 : stride;
    s = memory.take<T>(stride + stride_s * (net.L - 1));
    y = memory.take<T>(stride);
    slopes = memory.take<T>(own_slopes ? capacity * net.D * net.k : 0);
  }
  T* first(int64_t l) const { return s + (l - 1) * stride_s; }
  T* tangent(int64_t l, int64_t c) const { return p[(l + 1) % 2] + c * stride; }
};

template <class T> struct ForwardPass {
  const Net<T>& net;
  const ForwardCall& call;
  SavedLayout<T> layout;
  double* partial;  // one sum of the penalty for each block
  const Hinge<T>& hinge;

  // a_l of a block: its place among the saved, or scratch.
  T* pre_activation(const ForwardScratch<T>& scratch, int64_t block, int64_t l, int64_t* ld) const {
    if (call.saved && layout.has_a(l)) {
      *ld = layout.ld(l);
      return layout.a(call.saved[0], block, l);
    }
    *ld = scratch.ld;
    return l == net.L ? scratch.y : scratch.a;
  }

  void run(const ForwardScratch<T>& scratch, int64_t block) const {
    const int64_t rows = layout.blocks.rows(block), row0 = layout.blocks.begin(block);
    const T* top = hidden_layers(scratch, block, rows, row0);
    T* y = static_cast<T*>(call.y) + row0 * net.D;
    output_layer(scratch, block, rows, row0, top, y);
    T* slopes = hinge.slopes(row0, scratch.slopes);
    if (net.L == 1) {
      only_layer_slopes(scratch, rows, slopes);
    } else if (net.plan->adjoint) {
      for (int64_t d = 0; d < net.D; ++d) adjoint_slopes(scratch, block, rows, d, slopes + d * net.k);
    } else {
      for (int64_t c = 0; c < net.k; ++c) {
        const T* t = c < scratch.riders ? scratch.tangent(net.L - 1, c)
                                        : tangent_chain(scratch, rows, c);
        tangent_slopes(scratch, rows, t, slopes + c);
      }
    }
    hinge.run(block, rows, row0, y, slopes, partial);
  }

  // h_l, σ'(a_l) for l < L, and the riders' ḣ_l; returns h_{L-1}.
  const T* hidden_layers(const ForwardScratch<T>& scratch, int64_t block, int64_t rows,
                         int64_t row0) const {
    const T* h = static_cast<const T*>(call.x) + row0 * net.d;
    int64_t ldh = net.d;
    for (int64_t l = 1; l < net.L; ++l) {
      const Layer<T>& layer = net.at(l);
      int64_t lda;
      T *a = pre_activation(scratch, block, l, &lda), *next = scratch.h[l % 2];
      const Activate<T> after{layer, 1, a, lda, next, scratch.first(l), scratch.ld};
      for (int64_t j = 0; j < layer.out; j += panel_width<T>) {
        gemm_panel<false>(j, rows, layer.in, h, ldh, layer.forward, 0, from_bias(layer.bias), a,
                          lda, after);
        for (int64_t c = 0; c < scratch.riders; ++c) tangent_panel(scratch, rows, l, c, c, j);
      }
      h = next;
      ldh = scratch.ld;
    }
    return h;
  }

  void output_layer(const ForwardScratch<T>& scratch, int64_t block, int64_t rows, int64_t row0,
                    const T* h, T* y) const {
    const Layer<T>& layer = net.last();
    const int64_t D = net.D, ldh = net.L == 1 ? net.d : scratch.ld;
    int64_t lda;
    T* a = pre_activation(scratch, block, net.L, &lda);
    if (net.L == 1) h = static_cast<const T*>(call.x) + row0 * net.d;
    if (net.last_by_dots()) {
      dot_rows(rows, layer.in, h, ldh, D, layer.rows, whole_vectors<T>(layer.in), layer.bias, a,
               lda, 1);
    } else {
      gemm<false>(rows, layer.in, h, ldh, layer.forward, 0, from_bias(layer.bias), a, lda,
                  Nothing{});
    }
    T* value = a;
    int64_t ld = lda;
    if (!layer.identity) {
      value = scratch.a, ld = scratch.ld;
      layer.apply(1, {rows, whole_vectors<T>(D), a, lda, value, scratch.first(net.L), nullptr, ld});
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < D; ++j) y[i * D + j] = value[i * ld + j];
    }
  }

  // σ_L'(a_L)[i, d], one where no activation follows the last layer.
  T last_first(const ForwardScratch<T>& scratch, int64_t i, int64_t d) const {
    return net.last().identity ? T(1) : scratch.first(net.L)[i * scratch.ld + d];
  }

  void only_layer_slopes(const ForwardScratch<T>& scratch, int64_t rows, T* slopes) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < net.D; ++d) {
        const T* w = net.last().w + d * net.d + (net.d - net.k);
        const T s = last_first(scratch, i, d);
        for (int64_t c = 0; c < net.k; ++c) slopes[(i * net.D + d) * net.k + c] = s * w[c];
      }
    }
  }

  // J[:, d, :] = p_1·W_1[:, x2]; P_{l-1} = p_l·W_l, p = σ'∘P.
  void adjoint_slopes(const ForwardScratch<T>& scratch, int64_t block, int64_t rows, int64_t d,
                      T* to) const {
    const int64_t L = net.L, ld = scratch.ld, Dk = net.D * net.k;
    const int64_t top = whole_vectors<T>(net.last().in);
    const T* w = net.last().rows + d * top;
    T* p = scratch.p[(L - 1) % 2];
    for (int64_t i = 0; i < rows; ++i) {
      const T s = last_first(scratch, i, d);
      for (int64_t j = 0; j < top; j += Simd<T>::lanes) {
        store(p + i * ld + j, load(scratch.first(L - 1) + i * ld + j) * (s * load(w + j)));
      }
    }
    for (int64_t l = L - 1; l > 1; --l) {
      const Layer<T>& layer = net.at(l);
      T *next = scratch.p[(l - 1) % 2], *pulled = next;
      int64_t ldp = ld;
      if (call.saved && layout.has_p(l - 1)) {
        pulled = layout.p(call.saved[1], block, l - 1);
        ldp = layout.ld(l - 1);
      }
      gemm<false>(rows, layer.out, p, ld, layer.back, 0, from_zero<T>(), pulled, ldp,
                  Scale<T>{scratch.first(l - 1), ld, pulled, ldp, next, ld});
      p = next;
    }
    if (net.slopes_by_dots()) {
      const int64_t H = net.at(1).out;
      dot_rows<T>(rows, H, p, ld, net.k, net.columns, whole_vectors<T>(H), nullptr, to, Dk, 1);
    } else {
      T* J = scratch.a;
      gemm<false>(rows, net.at(1).out, p, ld, net.slopes, 0, from_zero<T>(), J, ld, Nothing{});
      for (int64_t i = 0; i < rows; ++i) copy_few(to + i * Dk, J + i * ld, net.k);
    }
  }

  // Columns j of ḣ_l = σ'∘ȧ_l, ȧ_l = W_l·ḣ_{l-1}, in place `at`; ȧ_1 = W_1[:, c].
  void tangent_panel(const ForwardScratch<T>& scratch, int64_t rows, int64_t l, int64_t c,
                     int64_t at, int64_t j) const {
    const Layer<T>& layer = net.at(l);
    const int64_t ld = scratch.ld, H = whole_vectors<T>(layer.out);
    T* t = scratch.tangent(l, at);
    const T* s = scratch.first(l);
    if (l == 1) {
      multiply(rows, min_of<int64_t>(panel_width<T>, H - j), s + j, ld, net.columns + c * H + j, 0,
               t + j, ld);
    } else {
      gemm_panel<false>(j, rows, layer.in, scratch.tangent(l - 1, at), ld, layer.forward, 0,
                        from_zero<T>(), t, ld, Scale<T>{s, ld, t, ld, t, ld});
    }
  }

  // ḣ_{L-1} of a column that does not ride.
  const T* tangent_chain(const ForwardScratch<T>& scratch, int64_t rows, int64_t c) const {
    for (int64_t l = 1; l < net.L; ++l) {
      for (int64_t j = 0; j < net.at(l).out; j += panel_width<T>) {
        tangent_panel(scratch, rows, l, c, 0, j);
      }
    }
    return scratch.tangent(net.L - 1, 0);
  }

  // J[:, :, c] = ȧ_L of ḣ_{L-1}.
  void tangent_slopes(const ForwardScratch<T>& scratch, int64_t rows, const T* t, T* to) const {
    const int64_t ld = scratch.ld, k = net.k, Dk = net.D * k;
    const Layer<T>& layer = net.last();
    if (net.last_by_dots()) {
      dot_rows<T>(rows, layer.in, t, ld, net.D, layer.rows, whole_vectors<T>(layer.in), nullptr, to,
                  Dk, k);
    } else {
      T* J = scratch.a;
      gemm<false>(rows, layer.in, t, ld, layer.forward, 0, from_zero<T>(), J, ld, Nothing{});
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < net.D; ++d) to[i * Dk + d * k] = J[i * ld + d];
      }
    }
    if (layer.identity) return;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < net.D; ++d) to[i * Dk + d * k] *= last_first(scratch, i, d);
    }
  }
};

// What a thread reads besides the rows: the network, packed, and what the hinge needs.
template <class T> struct ForwardWeights {
  Net<T> net;
  Hinge<T> hinge;

  ForwardWeights(const Plan& plan, const ForwardCall& call, Bump& memory)
      : net(plan, call.params, memory), hinge(plan, call, memory) {
    for (int64_t l = 1; l < net.L; ++l) net.pack_forward(memory, l);
    for (int64_t l = 1; l <= net.L; ++l) net.pack_bias(memory, l);
    if (!net.last_by_dots()) net.pack_forward(memory, net.L);
    if (net.L > 1) pack_slopes(memory);
  }

 private:
  void pack_slopes(Bump& memory) {
    if (net.last_by_dots() || net.plan->adjoint) net.pack_rows(memory, net.L);
    if (!net.plan->adjoint) return net.pack_columns(memory);
    for (int64_t l = 2; l < net.L; ++l) net.pack_back(memory, l);
    if (net.slopes_by_dots()) {
      net.pack_columns(memory);
    } else {
      net.pack_slopes(memory);
    }
  }
};

template <class T>
Status forward_chain(const Plan& plan, const ForwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  const bool summed = plan.hinge && !plan.elementwise;
  if (call.N == 0) {
    if (summed) *static_cast<T*>(call.out) = 0;
    return ok;
  }
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  Bump front;
  front.take<double>(summed ? blocks.count : 0);
  const auto weights_in = [&](Bump& memory) { return ForwardWeights<T>(plan, call, memory); };
  const auto scratch_in = [&](Bump& memory, const Net<T>& net) {
    return ForwardScratch<T>(memory, net, blocks.capacity, summed);
  };
  const Crew<T, decltype(weights_in), decltype(scratch_in)> crew(threads, front.lines(), weights_in,
                                                                 scratch_in);
  char* memory = static_cast<char*>(runtime.acquire(crew.bytes()));
  if (!memory) return out_of_memory;
  double* partial = summed ? reinterpret_cast<double*>(memory) : nullptr;

  crew.run(runtime, memory,
           [&](int64_t t, const ForwardWeights<T>& weights, const ForwardScratch<T>& scratch) {
             const SavedLayout<T> layout(plan, call.N);
             const ForwardPass<T> pass{weights.net, call, layout, partial, weights.hinge};
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
