// Rows of matrices: what is done to them a vector at a time, and sums along them and over them.
//
// Rows are readable and writable to whole vectors; what lies past the last column is anything and is
// never added up.
#pragma once

#include "simd.h"

namespace {

// A matrix by its first element and row stride; stride 0 is one row for all. With an index row i is
// row index[i] of the memory.
template <class T> struct Mat {
  T* at = nullptr;
  int64_t ld = 0;
  const int32_t* index = nullptr;

  MK_INLINE T* row(int64_t i) const { return at + (index ? index[i] : i) * ld; }
  explicit operator bool() const { return at != nullptr; }
  operator Mat<const T>() const { return {at, ld, index}; }
};

// to[i][j] = f(from[i][j] …), or += it, a vector at a time. Where each row begins is looked up once:
// a store may change whatever has an address, as far as the compiler knows.
template <class T, class F, class... Pointers>
MK_INLINE void put_row(int64_t columns, T* to, bool add, const F& f, Pointers... from) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if (add) {
    for (int64_t j = 0; j < columns; j += lanes) store(to + j, load(to + j) + f(load(from + j)...));
  } else {
    for (int64_t j = 0; j < columns; j += lanes) store(to + j, f(load(from + j)...));
  }
}
template <class T, class F, class... Mats>
MK_INLINE void put(int64_t rows, int64_t columns, Mat<T> to, bool add, const F& f,
                   const Mats&... from) {
  for (int64_t i = 0; i < rows; ++i) put_row<T>(columns, to.row(i), add, f, from.row(i)...);
}
// to[i][j] = f(i, j), or += it, where f needs more of a row than one vector.
template <class T, class F>
MK_INLINE void put_each(int64_t rows, int64_t columns, Mat<T> to, bool add, const F& f) {
  for (int64_t i = 0; i < rows; ++i) {
    T* at = to.row(i);
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
      store(at + j, add ? load(at + j) + f(i, j) : f(i, j));
    }
  }
}
struct Itself {
  template <class V> MK_INLINE V operator()(V x) const { return x; }
};
struct Times {
  template <class V> MK_INLINE V operator()(V x, V y) const { return x * y; }
};
struct TimesThree {
  template <class V> MK_INLINE V operator()(V x, V y, V z) const { return x * y * z; }
};

template <class T> MK_INLINE void copy_rows(int64_t rows, int64_t n, Mat<const T> from, Mat<T> to) {
  put(rows, n, to, false, Itself{}, from);
}

template <class T> MK_INLINE void clear_rows(int64_t rows, int64_t n, Mat<T> to) {
  put_each(rows, n, to, false, [](int64_t, int64_t) { return Vec<T>{}; });
}

// to[i][j] += from[i][j] where to's neighbours to the right are others': exactly n columns.
template <class T>
MK_INLINE void add_exactly(int64_t rows, int64_t n, Mat<const T> from, Mat<T> to) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < rows; ++i) {
    const T* a = from.row(i);
    T* b = to.row(i);
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) store(b + j, load(b + j) + load(a + j));
    for (; j < n; ++j) b[j] += a[j];
  }
}

// Σ_j f(j) over exactly n columns, f a vector.
template <class T, class F> MK_INLINE T total(int64_t n, const F& f) {
  constexpr int64_t lanes = Simd<T>::lanes;
  Vec<T> sums = Vec<T>{};
  for (int64_t j = 0; j < n; j += lanes) {  // f stands in one place, or it would be called
    const Vec<T> some = f(j);
    sums += j + lanes <= n ? some : first_lanes<T>(n - j) ? some : Vec<T>{};
  }
  return sum<T>(sums);
}

// to[j] += Σ_i f(i, j), or f alone if `to` is null: up to four vectors of columns at a time, so that
// the sums stay in registers, and even and odd rows apart, so that the chains of roundings are short.
template <class T, int Wide, class F>
MK_INLINE void add_some_columns(int64_t rows, int64_t j, T* to, const F& f) {
  constexpr int64_t lanes = Simd<T>::lanes;
  Vec<T> even[Wide] = {}, odd[Wide] = {};
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    MK_UNROLL
    for (int q = 0; q < Wide; ++q) even[q] += f(i, j + q * lanes);
    MK_UNROLL
    for (int q = 0; q < Wide; ++q) odd[q] += f(i + 1, j + q * lanes);
  }
  if (i < rows) {
    MK_UNROLL
    for (int q = 0; q < Wide; ++q) even[q] += f(i, j + q * lanes);
  }
  if (!to) return;
  for (int q = 0; q < Wide; ++q) {
    T* at = to + j + q * lanes;
    store(at, load(at) + (even[q] + odd[q]));
  }
}
template <class T, class F>
MK_INLINE void add_columns(int64_t rows, int64_t columns, T* to, const F& f) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t j = 0;
  for (; j + 4 * lanes <= columns; j += 4 * lanes) add_some_columns<T, 4>(rows, j, to, f);
  for (; j < columns; j += lanes) add_some_columns<T, 1>(rows, j, to, f);
}

}  // namespace
