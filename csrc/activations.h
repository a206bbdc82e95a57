// σ, σ' and σ'' of each kind of the activation table (kinds.h).
//
// Each kind is one function of one vector that gives all three; what a caller does not store, the
// compiler drops. The transcendental part is shared. Kinks and NaN are treated as PyTorch does.
#pragma once

#include "problem.h"
#include "vmath.h"

namespace {

template <class T> struct Sigma {
  Vec<T> value, first, second;
};

// The numbers of one activation, in the working precision.
template <class T> struct Numbers {
  T p, q, r;
};

template <class T> MK_INLINE Vec<T> none() { return Vec<T>{}; }

template <class T> struct Identity {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) { return {a, splat(T(1)), none<T>()}; }
};

template <class T> struct Relu {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    return {max_zero<T>(a), a > T(0) ? splat(T(1)) : none<T>(), none<T>()};
  }
};

template <class T> struct LeakyRelu {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> slope = a > T(0) ? splat(T(1)) : splat(s.p);
    return {a * slope, slope, none<T>()};
  }
};

template <class T> struct Hardtanh {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> low = splat(s.p), high = splat(s.q), one = splat(T(1));
    const Vec<T> first = a > low ? (a < high ? one : none<T>()) : none<T>();
    const Vec<T> raised = a < low ? low : a;
    return {raised > high ? high : raised, first, none<T>()};
  }
};

template <class T> struct Elu {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Exp<T> e = exp_both<T, false>(min_zero<T>(a) * s.r);
    const T scale = s.p * s.q;
    const auto positive = a > T(0);
    const Vec<T> first = e.exp * (scale * s.r);
    return {positive ? a * s.p : e.expm1 * scale, positive ? splat(s.p) : first,
            positive ? none<T>() : first * s.r};
  }
};

template <class T> struct Gelu {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Normal<T> n = normal<T>(a);
    return {a * n.cdf, n.cdf + a * n.pdf, n.pdf * (T(2) - a * a)};
  }
};

template <class T> struct GeluTanh {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    constexpr T c = T(0.79788456080286535588), cubic = T(0.044715);
    const Vec<T> square = a * a;
    // (1 + tanh(u)) / 2 is sigmoid(2u), which keeps its digits where tanh(u) is close to -1.
    const Logistic<T> m = logistic<T>((2 * c) * (a + cubic * a * square));
    const Vec<T> u1 = c * (T(1) + (3 * cubic) * square), u2 = (c * 6 * cubic) * a;
    const Vec<T> slope = T(4) * m.value * m.complement, t = m.value - m.complement;
    return {a * m.value, m.value + T(0.5) * a * slope * u1,
            slope * (u1 + T(0.5) * a * (u2 - T(2) * t * u1 * u1))};
  }
};

template <class T> struct Silu {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Logistic<T> s = logistic<T>(a);
    return {a * s.value, s.value * (T(1) + a * s.complement),
            s.value * s.complement * (T(2) + a * (s.complement - s.value))};
  }
};

template <class T> struct Mish {
  // tanh(softplus(a)) is ((1 + u)² - 1) / ((1 + u)² + 1) with u = exp(a), written in exp(-|a|).
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Logistic<T> s = logistic<T>(a);
    const Vec<T> e = s.small, one = splat(T(1));
    const auto negative = a < T(0);
    const Vec<T> top = negative ? e * (e + T(2)) : T(2) * e + one;
    const Vec<T> rest = T(2) * (negative ? one : e * e);
    const Vec<T> q = one / (top + rest);
    const Vec<T> t = top * q;
    const Vec<T> slope = rest * q * (one + t);  // 1 - t², as (1 - t)(1 + t)
    return {a * t, t + a * s.value * slope,
            slope * s.value * (T(2) + a * (s.complement - T(2) * t * s.value))};
  }
};

template <class T> struct Softplus {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> u = a * s.p;
    const Logistic<T> m = logistic<T>(u);
    const auto linear = u > s.q;
    const Vec<T> value = (max_zero<T>(u) + log1p_unit<T>(m.small)) / s.p;
    return {linear ? a : value, linear ? splat(T(1)) : m.value,
            linear ? none<T>() : m.value * m.complement * s.p};
  }
};

template <class T> struct Softsign {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> q = T(1) / (T(1) + abs_of<T>(a));
    const Vec<T> square = q * q;
    const Vec<T> bent = T(-2) * square * q;
    return {a * q, square, a > T(0) ? bent : (a < T(0) ? -bent : a)};
  }
};

template <class T> struct TanhKind {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Tanh<T> t = tanh_both<T>(a);
    return {t.value, t.first, T(-2) * t.value * t.first};
  }
};

template <class T> struct Sigmoid {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Logistic<T> s = logistic<T>(a);
    const Vec<T> first = s.value * s.complement;
    return {s.value, first, first * (s.complement - s.value)};
  }
};

template <class T> struct LogSigmoid {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Logistic<T> s = logistic<T>(a);
    return {min_zero<T>(a) - log1p_unit<T>(s.small), s.complement, -s.value * s.complement};
  }
};

template <class T> struct Hardsigmoid {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> low = splat(T(-3)), high = splat(T(3));
    const Vec<T> raised = a < low ? low : a;
    return {(raised > high ? high : raised) / T(6) + T(0.5),
            a > low ? (a < high ? splat(T(1) / T(6)) : none<T>()) : none<T>(), none<T>()};
  }
};

template <class T> struct Hardswish {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> low = splat(T(-3)), high = splat(T(3)), shifted = a + T(3);
    const Vec<T> raised = max_zero<T>(shifted);
    const Vec<T> gate = (raised > T(6) ? splat(T(6)) : raised) / T(6);
    const Vec<T> inside = a / T(3) + T(0.5);
    return {a * gate, a <= low ? none<T>() : (a < high ? inside : splat(T(1))),
            a > low ? (a < high ? splat(T(1) / T(3)) : none<T>()) : none<T>()};
  }
};

// 1 where a is not in [-p, p], a NaN included.
template <class T> MK_INLINE Vec<T> outside(Vec<T> a, T p) {
  return a >= -p ? (a <= p ? none<T>() : splat(T(1))) : splat(T(1));
}

template <class T> struct Softshrink {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> value = a > s.p ? a - s.p : (a < -s.p ? a + s.p : a * T(0));
    return {value, outside<T>(a, s.p), none<T>()};
  }
};

template <class T> struct Hardshrink {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> first = outside<T>(a, s.p);
    return {first != T(0) ? a : none<T>(), first, none<T>()};
  }
};

template <class T> struct Threshold {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    return {a <= s.p ? splat(s.q) : a, a <= s.p ? none<T>() : splat(T(1)), none<T>()};
  }
};

template <class T> struct Clamp {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T> s) {
    const Vec<T> low = splat(s.p), high = splat(s.q);
    const Vec<T> raised = a < low ? low : a;
    return {raised > high ? high : raised,
            a >= low ? (a <= high ? splat(T(1)) : none<T>()) : none<T>(), none<T>()};
  }
};

template <class T> struct Tanhshrink {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Tanh<T> t = tanh_both<T>(a);
    return {a - t.value, t.value * t.value, T(2) * t.value * t.first};
  }
};

template <class T> struct Abs {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    return {abs_of<T>(a), a > T(0) ? splat(T(1)) : (a < T(0) ? splat(T(-1)) : a * T(0)), none<T>()};
  }
};

template <class T> struct Square {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) { return {a * a, T(2) * a, splat(T(2))}; }
};

// f of each lane, for functions that have no spelling in vectors here.
template <class T, class F> MK_INLINE Vec<T> each_lane(Vec<T> a, const F& f) {
  Vec<T> out = Vec<T>{};
  for (int i = 0; i < Simd<T>::lanes; ++i) out[i] = T(f(double(a[i])));
  return out;
}

template <class T> struct Sqrt {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> value = each_lane<T>(a, [](double x) { return __builtin_sqrt(x); });
    const Vec<T> inverse = T(1) / value;
    return {value, T(0.5) * inverse, T(-0.25) * inverse / a};
  }
};

template <class T> struct Exponential {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> e = exp_both<T, false>(a).exp;
    return {e, e, e};
  }
};

template <class T> struct Log {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> inverse = T(1) / a;
    return {each_lane<T>(a, [](double x) { return __builtin_log(x); }), inverse,
            -inverse * inverse};
  }
};

template <class T> struct Reciprocal {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> inverse = T(1) / a, square = inverse * inverse;
    return {inverse, -square, T(2) * square * inverse};
  }
};

template <class T> struct Sine {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> sine = each_lane<T>(a, [](double x) { return __builtin_sin(x); });
    return {sine, each_lane<T>(a, [](double x) { return __builtin_cos(x); }), -sine};
  }
};

template <class T> struct Cosine {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const Vec<T> cosine = each_lane<T>(a, [](double x) { return __builtin_cos(x); });
    return {cosine, -each_lane<T>(a, [](double x) { return __builtin_sin(x); }), -cosine};
  }
};

template <class T> struct Erf {
  static MK_INLINE Sigma<T> at(Vec<T> a, Numbers<T>) {
    const ErrorFunction<T> e = erf_both<T>(a);
    return {e.value, e.first, T(-2) * a * e.first};
  }
};

}  // namespace
