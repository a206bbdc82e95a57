// Matrix products of one block of rows, N along the vector: C (M, N) = init + A (M, K) · B (K, N), or
// C += Aᵀ·B (weight gradients), where the block is summed by itself first: a chain of roundings as
// long as a block and as the number of blocks, not as the number of rows.
//
// A tile of MR rows by two vectors stays in registers over the whole of K; A is broadcast element by
// element, B comes as panels two vectors wide. B is either packed (weights, once per call) or a
// strided matrix (activations, in weight gradients), A plain or transposed. M may be any number.
// Measured on Zen 5 (AVX-512, one core): 277 of 285 GFLOP/s at every width from 32 to 512.
#pragma once

#include "simd.h"

namespace {

// Rows of a register tile. Accumulators must outnumber latency x units of the FMA (8 on x86) and
// fit the register file with B and the broadcast: 32 registers take 8x2, 16 take 6x2 (4x2 for SSE2,
// whose product needs a temporary).
#if MK_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int MR = 8;
#elif MK_VECTOR_BYTES == 32
constexpr int MR = 6;
#else
constexpr int MR = 4;
#endif
constexpr int NV = 2;
template <class T> constexpr int panel_width = NV * Simd<T>::lanes;

// A row of zeros, the `init` of a product that starts from nothing.
template <class T> struct Zeros {
  alignas(64) static const T row[panel_width<T>];
};
template <class T> const T Zeros<T>::row[panel_width<T>] = {};

template <class T> struct Tile {
  int64_t K;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  const T* init;  // a row: a bias or zeros; or a matrix, of stride ldi. Aᵀ·B starts from zero
  int64_t ldi;
  T* c;
  int64_t ldc;
  // Of Aᵀ·B more rows of both, to be summed with the others.
  int64_t K2;
  const T *a2, *b2;
  int64_t lda2, ldb2;
};

template <class T, int M, int N, bool ATransposed>
__attribute__((noinline)) void tile(const Tile<T>& t) {
  constexpr int lanes = Simd<T>::lanes;
  const T *a = t.a, *b = t.b;
  const int64_t lda = t.lda, ldb = t.ldb;
  Vec<T> acc[M][N];
  if (ATransposed || t.ldi == 0) {  // loads for every row would cost short products 3 %
    MK_UNROLL
    for (int j = 0; j < N; ++j) {
      const Vec<T> first = ATransposed ? Vec<T>{} : load(t.init + j * lanes);
      MK_UNROLL
      for (int i = 0; i < M; ++i) acc[i][j] = first;
    }
  } else {
    MK_UNROLL
    for (int i = 0; i < M; ++i) {
      MK_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] = load(t.init + i * t.ldi + j * lanes);
    }
  }
  for (int64_t k = 0; k < t.K; ++k) {
    Vec<T> row[N];
    MK_UNROLL
    for (int j = 0; j < N; ++j) row[j] = load(b + j * lanes);
    MK_UNROLL
    for (int i = 0; i < M; ++i) {
      const T s = ATransposed ? a[i] : a[i * lda];
      MK_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] += s * row[j];
    }
    a += ATransposed ? lda : 1;
    b += ldb;
  }
  if constexpr (ATransposed) {
    const T *more_a = t.a2, *more_b = t.b2;
    for (int64_t k = 0; k < t.K2; ++k, more_a += t.lda2, more_b += t.ldb2) {
      Vec<T> row[N];
      MK_UNROLL
      for (int j = 0; j < N; ++j) row[j] = load(more_b + j * lanes);
      MK_UNROLL
      for (int i = 0; i < M; ++i) {
        MK_UNROLL
        for (int j = 0; j < N; ++j) acc[i][j] += more_a[i] * row[j];
      }
    }
  }
  MK_UNROLL
  for (int i = 0; i < M; ++i) {
    MK_UNROLL
    for (int j = 0; j < N; ++j) {
      T* to = t.c + i * t.ldc + j * lanes;
      store(to, ATransposed ? load(to) + acc[i][j] : acc[i][j]);
    }
  }
}

template <class T, int N, bool AT> void tile_rows(int64_t rows, const Tile<T>& t) {
  switch (rows) {
    case 1: return tile<T, 1, N, AT>(t);
    case 2: return tile<T, 2, N, AT>(t);
    case 3: return tile<T, 3, N, AT>(t);
#if MK_VECTOR_BYTES == 64 || MK_VECTOR_BYTES == 32 || defined(__aarch64__)
    case 4: return tile<T, 4, N, AT>(t);
    case 5: return tile<T, 5, N, AT>(t);
#endif
#if MK_VECTOR_BYTES == 64 || defined(__aarch64__)
    case 6: return tile<T, 6, N, AT>(t);
    case 7: return tile<T, 7, N, AT>(t);
#endif
    default: return tile<T, MR, N, AT>(t);
  }
}

// A matrix B (K, N) as the product reads it: vector panels of `panel_width` columns.
// Packed: panels lie one after another, the last as narrow as whole vectors allow.
// Strided: ld > 0 is the row stride of the matrix itself, whose rows are readable to whole vectors.
template <class T> struct Matrix {
  const T* data;
  int64_t K, N, ld;

  MK_INLINE int64_t width(int64_t column) const {
    return min_of<int64_t>(panel_width<T>, round_up(N - column, Simd<T>::lanes));
  }
  MK_INLINE const T* panel(int64_t column) const { return ld ? data + column : data + column * K; }
  MK_INLINE int64_t stride(int64_t column) const { return ld ? ld : width(column); }
};

template <class T> MK_INLINE int64_t packed_size(int64_t K, int64_t N) {
  return K * round_up(N, Simd<T>::lanes);
}

// A weight to be packed: B (K, N), B[k][n] = w[k·row + n·column], of column chosen[n] if they are
// chosen; columns are padded with zeros to whole vectors.
template <class T> struct Packing {
  T* to;
  const T* w;
  int64_t row, column, K, N;
  const int64_t* chosen;

  Matrix<T> matrix() const { return {to, K, N, 0}; }
  int64_t panels() const { return (N + panel_width<T> - 1) / panel_width<T>; }

  void panel(int64_t p) const {
    const int64_t j0 = p * panel_width<T>, width = matrix().width(j0), real = min_of(width, N - j0);
    T* panel = to + j0 * K;
    for (int64_t j = 0; j < width; j += lanes) strip(panel + j, width, j0 + j, real - j);
  }

 private:
  static constexpr int lanes = Simd<T>::lanes;

  // One vector of columns from j on, of which `real` are there.
  void strip(T* panel, int64_t width, int64_t j, int64_t real) const {
    const T* from = w + (chosen ? 0 : j * column);
    const auto at = [&](int64_t i) { return column * (chosen ? chosen[j + i] : i); };
    int64_t k = 0;
    if (!chosen && column == 1 && real >= lanes) {
      for (; k < K; ++k) store(panel + k * width, load(from + k * row));
    } else if (!chosen && row == 1 && real >= lanes) {
      for (; k + lanes <= K; k += lanes) {
        Vec<T> square[lanes];
        MK_UNROLL
        for (int i = 0; i < lanes; ++i) square[i] = load(from + k + i * column);
        transpose<T>(square);
        MK_UNROLL
        for (int i = 0; i < lanes; ++i) store(panel + (k + i) * width, square[i]);
      }
    }
    for (; k < K; ++k) {
      for (int64_t i = 0; i < lanes; ++i) {
        panel[k * width + i] = i < real ? from[k * row + at(i)] : T(0);
      }
    }
  }
};

// What a product starts from: nothing, a bias row (padded to whole vectors; null for none), or a
// matrix, C itself say.
template <class T> struct Init {
  const T* row;
  int64_t ld;
};
template <class T> MK_INLINE Init<T> from_zero() { return {nullptr, 0}; }
template <class T> MK_INLINE Init<T> from_bias(const T* bias) { return {bias, 0}; }

// More rows of A and B for the sum Aᵀ·B.
template <class T> struct More {
  int64_t K;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
};

struct Nothing {
  MK_INLINE void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// The panel at column j of C = init + A·B[k0 : k0 + K], or of C += Aᵀ·B. `after(i, rows, j, columns)`
// sees each tile just stored, while it is in the first-level cache: the place of activations and
// element-wise products.
template <bool ATransposed, class T, class After>
void gemm_panel(int64_t j, int64_t M, int64_t K, const T* a, int64_t lda, const Matrix<T>& b,
                int64_t k0, Init<T> init, T* c, int64_t ldc, const After& after,
                const More<T>& more = {}) {
  const int64_t width = b.width(j), ldb = b.stride(j);
  const T* panel = b.panel(j) + k0 * ldb;
  for (int64_t i = 0; i < M; i += MR) {
    const int64_t rows = min_of<int64_t>(MR, M - i);
    T* to = c + i * ldc + j;
    const T* from = init.row ? init.row + i * init.ld + j : Zeros<T>::row;
    const Tile<T> t{K,
                    ATransposed ? a + i : a + i * lda,
                    lda,
                    panel,
                    ldb,
                    from,
                    init.ld,
                    to,
                    ldc,
                    more.K,
                    more.K ? more.a + i : nullptr,
                    more.K ? more.b + j : nullptr,
                    more.lda,
                    more.ldb};
    if (width == panel_width<T>) {
      tile_rows<T, NV, ATransposed>(rows, t);
    } else {
      tile_rows<T, 1, ATransposed>(rows, t);
    }
    after(i, rows, j, width);
  }
}

template <bool ATransposed, class T, class After>
void gemm(int64_t M, int64_t K, const T* a, int64_t lda, const Matrix<T>& b, int64_t k0,
          Init<T> init, T* c, int64_t ldc, const After& after, const More<T>& more = {}) {
  for (int64_t j = 0; j < b.N; j += panel_width<T>) {
    gemm_panel<ATransposed>(j, M, K, a, lda, b, k0, init, c, ldc, after, more);
  }
}

// out[r·ldo + q·step] = bias[q] + Σ_j a[r][j]·b[q][j]: a product with few columns as dot products
// along the vector. The ragged end goes element by element: padding may hold NaN (0·inf).
template <class T>
__attribute__((noinline))  // inlined, it lacks registers
void dot_rows(int64_t rows, int64_t H, const T* a, int64_t lda, int64_t Q, const T* b, int64_t ldb,
              const T* bias, T* out, int64_t ldo, int64_t step) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t q = 0; q < Q; ++q) {
      const T *x = a + r * lda, *w = b + q * ldb;
      Vec<T> even = Vec<T>{}, odd = Vec<T>{};
      int64_t j = 0;
      for (; j + 2 * lanes <= H; j += 2 * lanes) {
        even += load(x + j) * load(w + j);
        odd += load(x + j + lanes) * load(w + j + lanes);
      }
      for (; j + lanes <= H; j += lanes) even += load(x + j) * load(w + j);
      T rest = bias ? bias[q] : T(0);
      for (; j < H; ++j) rest += x[j] * w[j];
      out[r * ldo + q * step] = sum<T>(even + odd) + rest;
    }
  }
}

// Few columns (the last layer, the slopes) go by dot products where those cost fewer instructions.
template <class T> MK_INLINE bool prefers_dots(int64_t H, int64_t Q) {
  constexpr int64_t lanes = Simd<T>::lanes;
  return Q * (round_up(H, lanes) / lanes + 8) < H * (round_up(Q, lanes) / lanes);
}

}  // namespace
