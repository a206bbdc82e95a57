// The mask of an active dropout, as monokernel/dropout.py has it: Philox4x32 with 7 rounds (Salmon et
// al. 2011) of the row, the column and the dropout's number. Never stored: it is computed again
// wherever it is needed.
#pragma once

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Words of 32 bits in lanes of 64. The upper halves are anything.
typedef uint64_t Words __attribute__((vector_size(MK_VECTOR_BYTES)));
constexpr int64_t words = MK_VECTOR_BYTES / 8;

typedef int64_t Flags __attribute__((vector_size(MK_VECTOR_BYTES)));
// As many elements: half a vector of float, or a vector of double.
template <class T> struct PartOf {
  typedef T type __attribute__((vector_size(MK_VECTOR_BYTES / 8 * sizeof(T))));
};
template <class T> using Part = typename PartOf<T>::type;

// The whole products of the lower halves: one instruction on x86, which compilers do not find.
MK_INLINE Words wide_product(Words a, uint64_t b) {
#if defined(__x86_64__) && MK_VECTOR_BYTES == 64
  return Words(_mm512_mul_epu32(__m512i(a), __m512i(Words{} + b)));
#elif defined(__x86_64__) && MK_VECTOR_BYTES == 32
  return Words(_mm256_mul_epu32(__m256i(a), __m256i(Words{} + b)));
#elif defined(__x86_64__)
  return Words(_mm_mul_epu32(__m128i(a), __m128i(Words{} + b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// to (rows, width), rows of x from row0 on: 0 by probability p, else 1/(1 - p).
template <class T>
void dropout_mask(const T* key, double p, uint32_t number, int64_t row0, int64_t rows,
                  int64_t width, T* to, int64_t ld) {
  constexpr int rounds = 7;
  uint32_t k[2] = {0, 0};
  for (int i = 0; i < 8; ++i) k[i / 4] |= uint32_t(key[i]) << (8 * (i % 4));
  uint64_t keys[rounds][2];
  for (int r = 0; r < rounds; ++r) {
    keys[r][0] = uint32_t(k[0] + uint32_t(r) * 0x9E3779B9u);
    keys[r][1] = uint32_t(k[1] + uint32_t(r) * 0xBB67AE85u);
  }
  const uint64_t threshold = uint64_t(p * 4294967296.0);
  const T scale = p < 1 ? T(1 / (1 - p)) : T(0);
  const int64_t groups = (width + 3) / 4;
  Words lane;
  for (int64_t j = 0; j < words; ++j) lane[j] = uint64_t(j);
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t row = uint64_t(row0 + i);
    T* out = to + i * ld;
    for (int64_t g = 0; g < groups; g += words) {
      Words c0 = Words{} + row, c1 = Words{} + (row >> 32);
      Words c2 = lane + uint64_t(g), c3 = Words{} + uint64_t(number);
      MK_UNROLL
      for (int r = 0; r < rounds; ++r) {
        const Words p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ keys[r][0];
        c2 = (p0 >> 32) ^ c3 ^ keys[r][1];
        c1 = p1, c3 = p0;
      }
      const Words all[] = {c0, c1, c2, c3};
      MK_UNROLL
      for (int w = 0; w < 4; ++w) {
        const Flags kept = (all[w] & 0xffffffffu) >= threshold;  // 0 or -1
        const int64_t at = w * groups + g, some = min_of(words, min_of(groups - g, width - at));
        const Part<T> m = __builtin_convertvector(-kept, Part<T>) * scale;
        if (some == words) {
          __builtin_memcpy(out + at, &m, sizeof(m));
        } else {
          for (int64_t j = 0; j < some; ++j) out[at + j] = m[j];
        }
      }
    }
  }
}

}  // namespace
