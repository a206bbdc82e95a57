// The vector of the machine at hand, as GCC's and Clang's vector extensions spell it: one source
// serves AVX-512, AVX2, NEON and SSE2, chosen by MK_VECTOR_BYTES in isa_*.cpp.
//
// Everything of a kernel lives in an unnamed namespace and uses no standard C++ header, so that no
// inline function compiled for one instruction set can be picked by the linker for another.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef MK_VECTOR_BYTES
#error "define MK_VECTOR_BYTES before including the kernels"
#endif

#define MK_UNROLL _Pragma("GCC unroll 32")
#define MK_INLINE inline __attribute__((always_inline))

namespace {

template <class T> struct IntOf;
template <> struct IntOf<float> {
  typedef int32_t type;
  typedef uint32_t bits;
};
template <> struct IntOf<double> {
  typedef int64_t type;
  typedef uint64_t bits;
};

template <class T> struct Simd {
  typedef typename IntOf<T>::type Int;
  typedef T V __attribute__((vector_size(MK_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(MK_VECTOR_BYTES)));
  typedef typename IntOf<T>::bits U __attribute__((vector_size(MK_VECTOR_BYTES)));
  // As V, but with the alignment of one element: what unaligned loads and stores go through.
  typedef T Any __attribute__((vector_size(MK_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = MK_VECTOR_BYTES / sizeof(T);
};

template <class T> using Vec = typename Simd<T>::V;
template <class T> using IVec = typename Simd<T>::I;
template <class T> using UVec = typename Simd<T>::U;

template <class T> MK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Any*>(p);
}
template <class T> MK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Any*>(p) = v;
}
template <class T> MK_INLINE Vec<T> splat(T s) { return Vec<T>{} + s; }

// Sum over the lanes, always in the same order: halves folded onto each other.
template <class T, int bytes> struct Fold {
  typedef T V __attribute__((vector_size(bytes)));
  typedef T Half __attribute__((vector_size(bytes / 2)));
  static MK_INLINE T sum(V v) {
    Half half[2];
    __builtin_memcpy(half, &v, bytes);  // all of it, or v would stay in memory where it is summed
    return Fold<T, bytes / 2>::sum(half[0] + half[1]);
  }
};
template <> struct Fold<float, 16> {
  typedef float V __attribute__((vector_size(16)));
  static MK_INLINE float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
};
template <> struct Fold<double, 16> {
  typedef double V __attribute__((vector_size(16)));
  static MK_INLINE double sum(V v) { return v[0] + v[1]; }
};
template <class T> MK_INLINE T sum(Vec<T> v) { return Fold<T, MK_VECTOR_BYTES>::sum(v); }

// All ones in the first n lanes.
template <class T> MK_INLINE IVec<T> first_lanes(int64_t n) {
  IVec<T> lane;
  MK_UNROLL
  for (int i = 0; i < Simd<T>::lanes; ++i) lane[i] = i;
  return lane < typename Simd<T>::Int(n);
}

template <int... Lane> struct Lanes {};
template <int n, int... Lane> struct FirstLanes : FirstLanes<n - 1, n - 1, Lane...> {};
template <int... Lane> struct FirstLanes<0, Lane...> {
  typedef Lanes<Lane...> type;
};

// Lane i of the result is lane `from` i of a and b side by side.
template <class T, int... From> MK_INLINE Vec<T> pick(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From...);
#else
  return __builtin_shuffle(a, b, IVec<T>{From...});  // GCC has the other from version 12 on
#endif
}

// Swaps the odd groups of d lanes of one row with the even ones of another.
template <class T, int d, int... Lane>
MK_INLINE void swap_lanes(Vec<T>& low, Vec<T>& high, Lanes<Lane...>) {
  constexpr int n = sizeof...(Lane);
  const Vec<T> a = low, b = high;
  low = pick<T, (Lane & d ? n + Lane - d : Lane)...>(a, b);
  high = pick<T, (Lane & d ? n + Lane : Lane + d)...>(a, b);
}

// Transposes lanes x lanes elements held in registers.
template <class T, int d = Simd<T>::lanes / 2>
MK_INLINE void transpose(Vec<T> (&rows)[Simd<T>::lanes]) {
  constexpr int n = Simd<T>::lanes;
  MK_UNROLL
  for (int i = 0; i < n; ++i) {
    if (!(i & d)) swap_lanes<T, d>(rows[i], rows[i + d], typename FirstLanes<n>::type{});
  }
  if constexpr (d > 1) transpose<T, d / 2>(rows);
}

MK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class A> MK_INLINE A min_of(A a, A b) { return a < b ? a : b; }
template <class A> MK_INLINE A max_of(A a, A b) { return a < b ? b : a; }

}  // namespace
