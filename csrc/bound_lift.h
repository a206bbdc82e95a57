// The bound itself, and the lift that makes every slope the margin.
#pragma once

#include "bound_memory.h"

namespace {

// The least slope of all boxes, and in which of them it is. NaN where y is, by the rule for NaN.
template <class T>
inline double Bounded<T>::least(int64_t o, int64_t c, int64_t* box_of) const {
  const Pair e = ends(y);
  double found = infinity;
  *box_of = 0;
  for (int64_t b = 0; b < B; ++b) {
    const Interval value = e.at(b, o), slope = e.at((1 + c) * B + b, o);
    double low = sign(o, c) > 0 ? slope.low : -slope.high;
    if (is_nan(value.low) || is_nan(value.high)) low = not_a_number;
    if (low < found || is_nan(low)) found = low, *box_of = b;
    if (is_nan(low)) break;
  }
  return found;
}

template <class T> T rounded_down(double exact) {
  T near = T(exact);
  if (double(near) > exact) {
    near = sizeof(T) == 4 ? T(__builtin_nextafterf(float(near), -__builtin_inff()))
                          : T(__builtin_nextafter(double(near), -infinity));
  }
  return near;
}

template <class T>
inline void Bounded<T>::bound(T* to) const {
  for (int64_t o = 0; o < problem.D; ++o) {
    for (int64_t c = 0; c < box.k; ++c) {
      int64_t unused;
      const double exact = least(o, c, &unused);
      to[o * box.k + c] = rounded_down<T>(exact);
      saved[o * box.k + c] = double(to[o * box.k + c]);
    }
  }
}

// relu(margin - bound), rounded up as monotone.py does, and its rate by -bound.
template <class T>
inline T Bounded<T>::lift(int64_t o, int64_t c, T* rate) const {
  constexpr double four = 4 * (sizeof(T) == 4 ? 0x1p-23 : epsilon);
  const T more = T(box.margin + four * size_of(box.margin)), grown = T(1 + four);
  const T gap = more - T(saved[o * box.k + c]);
  const bool free = sign(o, c) == 0;
  *rate = !free && gap > T(0) ? grown : T(0);
  return free ? T(0) : gap > T(0) ? gap * grown : gap == gap ? T(0) : gap;
}

}  // namespace
