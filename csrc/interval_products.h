// Products of few rows of intervals with a matrix, by centre and radius: W c ± |W| r, and their adjoints.
// All in double, whatever the dtype of W: it is converted where it is read.
#pragma once

#include "intervals.h"
#include "vmath.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// As many elements of T as a vector has doubles.
template <class T> struct Narrowed {
  typedef T V __attribute__((vector_size(Simd<double>::lanes * sizeof(T))));
};
template <class T> MK_INLINE Vec<double> converted(typename Narrowed<T>::V v) {
#if defined(__x86_64__) && MK_VECTOR_BYTES == 64  // which GCC does in two halves
  if constexpr (sizeof(T) == 4) return Vec<double>(_mm512_cvtps_pd(__m256(v)));
#endif
  return __builtin_convertvector(v, Vec<double>);
}

// Some elements of T as doubles, zeros past the last, and back.
template <class T> MK_INLINE Vec<double> widened(const T* from, int64_t left) {
  typename Narrowed<T>::V narrow{};
  if (left >= Simd<double>::lanes) {
    __builtin_memcpy(&narrow, from, sizeof(narrow));
  } else {
    for (int64_t j = 0; j < left; ++j) narrow[j] = from[j];
  }
  return converted<T>(narrow);
}
template <class T> MK_INLINE void narrowed(Vec<double> v, T* to, int64_t left) {
  const auto narrow = __builtin_convertvector(v, typename Narrowed<T>::V);
  if (left >= Simd<double>::lanes) {
    __builtin_memcpy(to, &narrow, sizeof(narrow));
  } else {
    for (int64_t j = 0; j < left; ++j) to[j] = narrow[j];
  }
}

template <int n> struct Few {
  static constexpr int count = n;
};
// f(first row, how many) over all rows, so many at a time that their sums stay in registers.
template <class F> MK_INLINE void by_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 5 <= rows; r += 5) f(r, Few<5>{});
  switch (rows - r) {
    case 4: return f(r, Few<4>{});
    case 3: return f(r, Few<3>{});
    case 2: return f(r, Few<2>{});
    case 1: return f(r, Few<1>{});
  }
}

// to.a = from.a Wᵀ and to.b = from.b |W|ᵀ, W (m, n); past the last column `from` is 0, and `to` is
// written in whole vectors. W is turned square by square, which costs less than sums over lanes.
template <class T>
void push_product(int64_t rows, int64_t n, int64_t m, const T* W, Pair from, Pair to) {
  constexpr int lanes = Simd<double>::lanes;
  by_rows(rows, [&](int64_t r, auto few) {
    constexpr int count = decltype(few)::count;
    for (int64_t i = 0; i < m; i += lanes) {
      Vec<double> a[count] = {}, b[count] = {};
      for (int64_t j = 0; j < n; j += lanes) {
        Vec<double> w[lanes];
        MK_UNROLL
        for (int l = 0; l < lanes; ++l) {
          w[l] = i + l < m ? widened(W + (i + l) * n + j, n - j) : Vec<double>{};
        }
        transpose<double>(w);
        MK_UNROLL
        for (int l = 0; l < lanes; ++l) {
          const Vec<double> size = abs_of<double>(w[l]);
          MK_UNROLL
          for (int q = 0; q < count; ++q) {
            a[q] += from.a[(r + q) * from.ld + j + l] * w[l];
            b[q] += from.b[(r + q) * from.ld + j + l] * size;
          }
        }
      }
      MK_UNROLL
      for (int q = 0; q < count; ++q) {
        store(to.a + (r + q) * to.ld + i, a[q]);
        store(to.b + (r + q) * to.ld + i, b[q]);
      }
    }
  });
}

// to.a = from.a W and to.b = from.b |W|; `to` is written in whole vectors.
template <class T>
void pull_product(int64_t rows, int64_t n, int64_t m, const T* W, Pair from, Pair to) {
  constexpr int64_t lanes = Simd<double>::lanes;
  by_rows(rows, [&](int64_t r, auto few) {
    constexpr int count = decltype(few)::count;
    for (int64_t j = 0; j < n; j += lanes) {
      Vec<double> a[count] = {}, b[count] = {};
      for (int64_t i = 0; i < m; ++i) {
        const Vec<double> w = widened(W + i * n + j, n - j), size = abs_of<double>(w);
        MK_UNROLL
        for (int q = 0; q < count; ++q) {
          a[q] += from.a[(r + q) * from.ld + i] * w;
          b[q] += from.b[(r + q) * from.ld + i] * size;
        }
      }
      MK_UNROLL
      for (int q = 0; q < count; ++q) {
        store(to.a + (r + q) * to.ld + j, a[q]);
        store(to.b + (r + q) * to.ld + j, b[q]);
      }
    }
  });
}

// to (m, n) += g.aᵀ u.a + sign(W)∘(g.bᵀ u.b).
template <class T>
void weight_gradient(int64_t rows, int64_t n, int64_t m, const T* W, Pair g, Pair u, T* to) {
  constexpr int64_t lanes = Simd<double>::lanes;
  by_rows(rows, [&](int64_t r, auto few) {
    constexpr int count = decltype(few)::count;
    for (int64_t i = 0; i < m; ++i) {
      Vec<double> of_a[count], of_b[count];
      MK_UNROLL
      for (int q = 0; q < count; ++q) {
        of_a[q] = splat(g.a[(r + q) * g.ld + i]), of_b[q] = splat(g.b[(r + q) * g.ld + i]);
      }
      for (int64_t j = 0; j < n; j += lanes) {
        Vec<double> a = {}, b = {};
        MK_UNROLL
        for (int q = 0; q < count; ++q) {
          a += of_a[q] * load(u.a + (r + q) * u.ld + j);
          b += of_b[q] * load(u.b + (r + q) * u.ld + j);
        }
        const Vec<double> w = widened(W + i * n + j, n - j);
        a += w > 0.0 ? b : (w < 0.0 ? -b : b * 0.0);
        narrowed(widened(to + i * n + j, n - j) + a, to + i * n + j, n - j);
      }
    }
  });
}

}  // namespace
