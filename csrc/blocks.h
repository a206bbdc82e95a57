// How a call is cut into blocks of rows, and pieces of one allocation.
#pragma once

#include "gemm.h"
#include "problem.h"

// Rows of a block, about. docs/native.md has what other sizes cost.
#ifndef MK_BLOCK_ROWS
#define MK_BLOCK_ROWS 96
#endif

namespace {

// Hands out pieces of one allocation. Run once with no base to count, once to hand out.
struct Bump {
  char* base = nullptr;
  size_t used = 0;

  size_t lines() const { return (used + 63) / 64 * 64; }  // whole cache lines
  template <class U> U* take(int64_t n) {
    const size_t at = lines();
    used = at + size_t(n) * sizeof(U);
    return base ? reinterpret_cast<U*>(base + at) : nullptr;
  }
};

// The row stride of scratch matrices: whole vectors, and one more so that the rows of a matrix of
// 2^n columns do not all fall into the same few sets of the first-level cache.
template <class T> MK_INLINE int64_t scratch_ld(int64_t columns) {
  return round_up(columns, Simd<T>::lanes) + Simd<T>::lanes;
}
template <class T> MK_INLINE int64_t whole_vectors(int64_t columns) {
  return round_up(columns, Simd<T>::lanes);
}

// Rows are cut into `count` blocks of at most `capacity` rows that go through all layers while they
// stay in the second-level cache. The cut depends on nothing but N, so that what forward saves can
// be read whatever the number of threads is by then.
struct Blocks {
  int64_t N, tiles, count, capacity;

  explicit Blocks(int64_t n) : N(n), tiles((n + MR - 1) / MR) {
    constexpr int64_t target = MK_BLOCK_ROWS / MR;  // tiles in a block of many rows
    count = (tiles + target - 1) / target;
    if (count > 1) count = round_up(count, 2);  // two, four, ... threads get equal shares
    count = max_of<int64_t>(count, 1);
    capacity = max_of<int64_t>((tiles + count - 1) / count, 1) * MR;
  }
  int64_t begin(int64_t b) const { return min_of(N, b * tiles / count * MR); }
  int64_t rows(int64_t b) const { return begin(b + 1) - begin(b); }
};

template <class T> MK_INLINE void clear(T* to, int64_t n) {
  __builtin_memset(to, 0, size_t(n) * sizeof(T));
}
template <class T> MK_INLINE void copy(T* to, const T* from, int64_t n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(T));
}
// The same for a handful of elements, where a call of memcpy would cost more than the copy.
template <class T> MK_INLINE void copy_few(T* to, const T* from, int64_t n) {
  for (; n >= 4; n -= 4, to += 4, from += 4) copy(to, from, 4);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace
