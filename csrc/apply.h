// An activation over a rectangle of pre-activations.
#pragma once

#include "activations.h"

namespace {

// Which of σ, σ' and σ'' are stored.
enum Orders { value_alone, value_and_first, all_orders, first_alone, derivatives, order_sets };

// What to do over a rectangle of pre-activations a: store σ, σ', σ'' in the places of the orders.
template <class T> struct Apply {
  int64_t rows, columns;  // columns: whole vectors
  const T* a;
  int64_t lda;
  T *value, *first, *second;
  int64_t ld;  // of all three
};

template <class T, template <class> class Kind, Orders orders>
void apply_kind(const Apply<T>& w, Numbers<T> numbers) {
  constexpr bool values = orders != first_alone && orders != derivatives;
  constexpr bool seconds = orders == all_orders || orders == derivatives;
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t j = 0; j < w.columns; j += Simd<T>::lanes) {
      const Sigma<T> v = Kind<T>::at(load(w.a + i * w.lda + j), numbers);
      const int64_t at = i * w.ld + j;
      if (values) store(w.value + at, v.value);
      if (orders != value_alone) store(w.first + at, v.first);
      if (seconds) store(w.second + at, v.second);
    }
  }
}

template <class T> using ApplyFn = void (*)(const Apply<T>&, Numbers<T>);

// Nobody asks for the derivatives alone where σ'' is zero everywhere.
constexpr Orders derivatives_of(bool flat) { return flat ? first_alone : derivatives; }

#define MK_ORDERS(name, Kind, flat)                                        \
  {apply_kind<T, Kind, value_alone>, apply_kind<T, Kind, value_and_first>, \
   apply_kind<T, Kind, all_orders>, apply_kind<T, Kind, first_alone>,      \
   apply_kind<T, Kind, derivatives_of(flat)>},

// The functions of one activation by orders.
template <class T> const ApplyFn<T>* orders_of(int kind) {
  static const ApplyFn<T> table[kinds][order_sets] = {MK_KINDS(MK_ORDERS)};
  return table[kind];
}
#undef MK_ORDERS

// One output in adjoint mode, on the way back: from a and P, σ(a) and g = scale·σ'(a)∘P, scale
// one number a row; the column sums of g go to the bias gradient. `More`: stores σ' too.
template <class T> struct Single {
  int64_t rows, columns;  // columns: whole vectors
  const T* a;
  int64_t lda;
  const T* P;
  int64_t ldp;
  const T* scale;
  T *value, *first, *g;
  int64_t ld;
  T* bias;  // may be null
};

template <class T, template <class> class Kind, bool More, int Wide>
MK_INLINE void single_columns(const Single<T>& w, Numbers<T> numbers, int64_t j0) {
  constexpr int64_t lanes = Simd<T>::lanes;
  Vec<T> total[Wide] = {};
  for (int64_t i = 0; i < w.rows; ++i) {
    MK_UNROLL
    for (int j = 0; j < Wide; ++j) {
      const int64_t at = i * w.ld + j0 + j * lanes;
      const Sigma<T> v = Kind<T>::at(load(w.a + i * w.lda + j0 + j * lanes), numbers);
      const Vec<T> P = load(w.P + i * w.ldp + j0 + j * lanes);
      const Vec<T> g = w.scale[i] * P * v.first;
      store(w.value + at, v.value);
      store(w.g + at, g);
      if (More) store(w.first + at, v.first);
      total[j] += g;
    }
  }
  if (!w.bias) return;
  for (int j = 0; j < Wide; ++j) {
    T* to = w.bias + j0 + j * lanes;
    store(to, load(to) + total[j]);
  }
}

template <class T, template <class> class Kind, bool More>
void single_kind(const Single<T>& w, Numbers<T> numbers) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t j = 0;
  for (; j + 4 * lanes <= w.columns; j += 4 * lanes) {
    single_columns<T, Kind, More, 4>(w, numbers, j);
  }
  for (; j < w.columns; j += lanes) single_columns<T, Kind, More, 1>(w, numbers, j);
}

template <class T> using SingleFn = void (*)(const Single<T>&, Numbers<T>);

#define MK_MORE(name, Kind, flat) {single_kind<T, Kind, false>, single_kind<T, Kind, true>},

template <class T> const SingleFn<T>* singles_of(int kind) {
  static const SingleFn<T> table[kinds][2] = {MK_KINDS(MK_MORE)};
  return table[kind];
}
#undef MK_MORE

}  // namespace
