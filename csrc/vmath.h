// Vectorised exp, expm1, log1p, erf and the normal tail, on whole vectors of float or double.
//
// Each is a polynomial of polynomials.h with a reduction of the argument; errors stay within a few
// units in the last place (tests/test_cpu.py fixes them against float64 and longer). NaN propagates;
// results that would be denormal flush to zero.
#pragma once

#include "polynomials.h"
#include "simd.h"

namespace {

template <class T> struct FloatFormat;
template <> struct FloatFormat<float> {
  static constexpr int mantissa = 23;
  static constexpr int32_t bias = 127;
  static constexpr float shifter = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.33654f, highest = 88.72283f;
  static constexpr float normal_center = 3.0f;
};
template <> struct FloatFormat<double> {
  static constexpr int mantissa = 52;
  static constexpr int64_t bias = 1023;
  static constexpr double shifter = 6755399441055744.0;
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -708.396418532264, highest = 709.782712893384;
  static constexpr double normal_center = 4.0;
};

template <class T, int n> MK_INLINE Vec<T> horner(const T (&c)[n], Vec<T> x) {
  Vec<T> p = splat(c[0]);
  MK_UNROLL
  for (int i = 1; i < n; ++i) p = p * x + c[i];
  return p;
}

template <class T> MK_INLINE Vec<T> bits_to_value(IVec<T> i) {
  Vec<T> v;
  __builtin_memcpy(&v, &i, sizeof(v));
  return v;
}
template <class T> MK_INLINE IVec<T> value_to_bits(Vec<T> v) {
  IVec<T> i;
  __builtin_memcpy(&i, &v, sizeof(i));
  return i;
}

template <class T> MK_INLINE Vec<T> abs_of(Vec<T> v) {
  typedef typename Simd<T>::Int Int;
  constexpr Int sign = Int(uint64_t(1) << (sizeof(T) * 8 - 1));
  return bits_to_value<T>(value_to_bits<T>(v) & ~sign);
}
template <class T> MK_INLINE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> v) {
  typedef typename Simd<T>::Int Int;
  constexpr Int sign = Int(uint64_t(1) << (sizeof(T) * 8 - 1));
  return bits_to_value<T>(value_to_bits<T>(magnitude) | (value_to_bits<T>(v) & sign));
}
template <class T> MK_INLINE Vec<T> max_zero(Vec<T> v) { return v < T(0) ? Vec<T>{} : v; }
template <class T> MK_INLINE Vec<T> min_zero(Vec<T> v) { return v > T(0) ? Vec<T>{} : v; }

template <class T> struct Exp {
  Vec<T> exp, expm1;
};

// exp(x) and exp(x) - 1 of one reduction: x = n·log 2 + r, exp(x) = 2^n + 2^n·(exp(r) - 1).
// `Nonpositive`: x ≤ 0 is known, and the care for overflow is left out.
template <class T, bool Nonpositive> MK_INLINE Exp<T> exp_both(Vec<T> x) {
  typedef FloatFormat<T> F;
  const Vec<T> shifted = x * T(1.44269504088896340736) + F::shifter;
  const Vec<T> n = shifted - F::shifter;
  const Vec<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
  const Vec<T> q = r + r * r * horner(ExpTail<T>::c, r);
  // Half the power of two where 2^n itself may overflow: n can be one past the largest exponent.
  // Without sign: past the last column x may be any NaN, whose bits overflow.
  const UVec<T> bits = (UVec<T>)value_to_bits<T>(shifted);
  const UVec<T> exponent = bits + typename IntOf<T>::bits(Nonpositive ? F::bias : F::bias - 1);
  const Vec<T> power = bits_to_value<T>((IVec<T>)(exponent << F::mantissa));
  Exp<T> out;
  if (Nonpositive) {
    out.exp = x < F::lowest ? Vec<T>{} : power * q + power;
    out.expm1 = x < F::lowest ? splat(T(-1)) : power * q + (power - T(1));
  } else {
    const Vec<T> infinite = splat(T(__builtin_inf()));
    const Vec<T> e = T(2) * (power * q + power);
    const Vec<T> m = T(2) * (power * q + (power - T(0.5)));
    out.exp = x < F::lowest ? Vec<T>{} : (x > F::highest ? infinite : e);
    out.expm1 = x < F::lowest ? splat(T(-1)) : (x > F::highest ? infinite : m);
  }
  return out;
}

template <class T> MK_INLINE Vec<T> exp_nonpositive(Vec<T> x) { return exp_both<T, true>(x).exp; }

// log(1 + e) for 0 ≤ e ≤ 1, as 2·atanh(e / (2 + e)).
template <class T> MK_INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2));
  const Vec<T> w = s * s;
  return T(2) * (s + s * (w * horner(AtanhTail<T>::c, w)));
}

template <class T> struct Normal {
  Vec<T> cdf, pdf;
};

// Φ(a) and φ(a) of one exponential: Φ(-|a|) = exp(-a²/2)·R(|a|), accurate in both tails.
template <class T> MK_INLINE Normal<T> normal(Vec<T> a) {
  typedef FloatFormat<T> F;
  const Vec<T> x = abs_of<T>(a);
  const Vec<T> e = exp_nonpositive<T>(a * a * T(-0.5));
  const Vec<T> far = splat(T(sizeof(T) == 4 ? 13.3 : 39));
  const Vec<T> near = x > far ? far : x;  // past it e is zero, and the fit would be left
  const Vec<T> t = (near - F::normal_center) / (near + F::normal_center);
  const Vec<T> tail = e * horner(NormalTail<T>::c, t);
  return {a > T(0) ? T(1) - tail : tail, e * T(0.39894228040143267794)};
}

template <class T> struct ErrorFunction {
  Vec<T> value, first;  // erf(a), 2/√π·exp(-a²)
};

// Where erf(a) is less than 0.85 as a polynomial, from there on as 1 - 2·Φ(-√2·|a|).
template <class T> MK_INLINE ErrorFunction<T> erf_both(Vec<T> a) {
  const Normal<T> n = normal<T>(abs_of<T>(a) * T(-1.41421356237309504880));
  const Vec<T> square = a * a;
  const Vec<T> near = a * horner(ErfNear<T>::c, square > T(1) ? splat(T(1)) : square);
  const auto small = abs_of<T>(a) < T(1);
  return {small ? near : with_sign_of<T>(T(1) - T(2) * n.cdf, a),
          n.pdf * T(2.82842712474619009760)};
}

template <class T> struct Logistic {
  Vec<T> value, complement, small;  // sigmoid(a), sigmoid(-a), exp(-|a|)
};

template <class T> MK_INLINE Logistic<T> logistic(Vec<T> a) {
  const Vec<T> e = exp_nonpositive<T>(-abs_of<T>(a));
  const Vec<T> large = T(1) / (T(1) + e);
  const Vec<T> small = e * large;
  const auto negative = a < T(0);
  return {negative ? small : large, negative ? large : small, e};
}

template <class T> struct Tanh {
  Vec<T> value, first;  // tanh(a), 1 - tanh(a)² without cancellation
};

template <class T> MK_INLINE Tanh<T> tanh_both(Vec<T> a) {
  const Exp<T> e = exp_both<T, true>(abs_of<T>(a) * T(-2));
  const Vec<T> q = T(1) / (e.expm1 + T(2));
  return {with_sign_of<T>(-e.expm1 * q, a), T(4) * e.exp * q * q};
}

}  // namespace
