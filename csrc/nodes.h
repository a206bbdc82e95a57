// The table of nodes over rows of one block: what each kind says of its value, push, pull, curvature
// and parameters. monokernel/nodes.py is its readable twin; docs/mathematics.md has the formulas.
#pragma once

#include "apply.h"
#include "rows.h"

namespace {

// What a node other than a linear one is computed from, over some rows.
template <class T> struct Operands {
  const Node* node;
  int64_t rows, columns;  // columns of v, whole vectors
  const Mat<const T>* u;
  const int64_t* widths;       // of the inputs
  Mat<const T> v;              // for the kinds that read it
  Mat<const T> first, second;  // σ' and σ'' of an elementwise node; first: the r of a normalisation
  Mat<const T> parameter;      // one row, or one for each row of x

  MK_INLINE int64_t width(int64_t i = 0) const { return widths[i]; }
  MK_INLINE int64_t whole(int64_t i = 0) const { return round_up(widths[i], Simd<T>::lanes); }
  MK_INLINE T number(int64_t i) const { return T(node->numbers[i]); }
};

MK_INLINE bool normalises(int64_t kind) {
  return kind == node_normalise || kind == node_root_mean_square;
}
MK_INLINE bool is_elementwise(int64_t kind) { return kind < kinds; }
// Kinds whose Jacobian is computed from more than u and v: from `first`.
MK_INLINE bool needs_first(const Node& node) {
  return (is_elementwise(node.kind) && node.varies) || normalises(node.kind);
}

// --- value ----------------------------------------------------------------------------------------

template <class T> struct Softmax {
  // exp(u - max u) into v; their sum.
  static T exponentials(int64_t n, const T* u, T* v, T* most) {
    constexpr int64_t lanes = Simd<T>::lanes;
    T top = u[0];
    for (int64_t j = 1; j < n; ++j) top = u[j] > top || u[j] != u[j] ? u[j] : top;
    *most = top;
    for (int64_t j = 0; j < n; j += lanes) {
      store(v + j, exp_nonpositive<T>(load(u + j) - top));
    }
    return total<T>(n, [&](int64_t j) { return load(v + j); });
  }
};

// σ and σ' of some of an elementwise node's rows and columns; either may be null.
template <class T> struct ApplySigma {
  const ApplyFn<T>* orders;
  Numbers<T> numbers;
  Mat<const T> u;
  Mat<T> value, first;

  ApplySigma(const Node& node, Mat<const T> from, Mat<T> v, Mat<T> slope)
      : orders(orders_of<T>(int(node.kind))),
        numbers{T(node.numbers[0]), T(node.numbers[1]), T(node.numbers[2])}, u(from), value(v),
        first(slope) {}

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t columns) const {
    const Orders wanted = !value ? first_alone : first ? value_and_first : value_alone;
    orders[wanted]({rows, columns, u.row(i) + j, u.ld, value ? value.row(i) + j : nullptr,
                    first ? first.row(i) + j : nullptr, nullptr, value ? value.ld : first.ld},
                   numbers);
  }
};

// to (+)= σ'∘x over some rows and columns.
template <class T> struct ApplySlope {
  Mat<const T> first, x;
  Mat<T> to;
  bool add;

  void operator()(int64_t i0, int64_t rows, int64_t j0, int64_t columns) const {
    for (int64_t i = i0; i < i0 + rows; ++i) {
      put_row<T>(columns, to.row(i) + j0, add, Times{}, first.row(i) + j0, x.row(i) + j0);
    }
  }
};

// x̂ and r, either where it is wanted. Some rows at a time: the divisions and the root of one would wait
// for each other.
template <class T> void normalised(const Operands<T>& o, Mat<T> v, Mat<T> first) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t n = o.node->width;
  const bool centres = o.node->kind == node_normalise;
  const T more = o.number(0);
  for (int64_t i = 0; i < o.rows; i += lanes) {
    const int64_t some = min_of(o.rows - i, lanes);
    T mean[lanes] = {}, r[lanes] = {};
    for (int64_t q = 0; centres && q < some; ++q) {
      const T* x = o.u[0].row(i + q);
      mean[q] = total<T>(n, [&](int64_t j) { return load(x + j); });
    }
    for (int64_t q = 0; q < lanes; ++q) mean[q] /= T(n);
    for (int64_t q = 0; q < some; ++q) {
      const T *x = o.u[0].row(i + q), middle = mean[q];
      r[q] = total<T>(n, [&](int64_t j) {
        const Vec<T> c = load(x + j) - middle;
        return c * c;
      });
    }
    for (int64_t q = 0; q < lanes; ++q) {
      r[q] = T(1) / T(__builtin_sqrt(double(r[q] / T(n) + more)));
    }
    for (int64_t q = 0; first && q < some; ++q) first.at[i + q] = r[q];
    for (int64_t q = 0; v && q < some; ++q) {
      const Vec<T> middle = splat(mean[q]), factor = splat(r[q]);
      put_row<T>(
          o.columns, v.row(i + q), false, [&](Vec<T> x) { return (x - middle) * factor; },
          o.u[0].row(i + q));
    }
  }
}

// v, and what `first` is for the kind. Either may be null where it is not wanted.
template <class T> void node_value(const Operands<T>& o, Mat<T> v, Mat<T> first) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const Node& node = *o.node;
  const int64_t rows = o.rows, columns = o.columns, n = node.width;
  const Mat<const T> u = o.u[0];
  if (is_elementwise(node.kind)) {
    return ApplySigma<T>(node, u, v, first)(0, rows, 0, columns);
  }
  switch (node.kind) {
    case node_prelu: {
      const Mat<const T> a{o.parameter.at, 0};
      return put(
          rows, columns, v, false, [](Vec<T> x, Vec<T> slope) { return x > T(0) ? x : x * slope; },
          u, a);
    }
    case node_scale:
    case node_dropout: return put(rows, columns, v, false, Times{}, u, o.parameter);
    case node_shift:
      return put(
          rows, columns, v, false, [&](Vec<T> x, Vec<T> y) { return x + y; }, u,
          Mat<const T>{o.parameter.at, 0});
    case node_line: {
      const T factor = o.number(0), offset = o.number(1);
      return put(rows, columns, v, false, [&](Vec<T> x) { return factor * x + offset; }, u);
    }
    case node_sum: {
      const T factor = o.number(0);
      if (node.inputs == 1) {
        return put(rows, columns, v, false, [&](Vec<T> x) { return factor * x; }, u);
      }
      const Mat<const T> w = o.u[1];
      const T other = o.number(1);
      put(
          rows, columns, v, false, [&](Vec<T> x, Vec<T> y) { return factor * x + other * y; }, u,
          w);
      for (int64_t nth = 2; nth < node.inputs; ++nth) {
        const Mat<const T> more = o.u[nth];
        const T next = o.number(nth);
        put(rows, columns, v, true, [&](Vec<T> x) { return next * x; }, more);
      }
      return;
    }
    case node_product: {
      const Mat<const T> w = o.u[1];
      return put(rows, columns, v, false, Times{}, u, w);
    }
    case node_expand:
      return put_each(rows, columns, v, false,
                      [&](int64_t i, int64_t) { return splat(u.row(i)[0]); });
    case node_total:
      for (int64_t i = 0; i < rows; ++i) {
        v.row(i)[0] = total<T>(o.width(), [&](int64_t j) { return load(u.row(i) + j); });
      }
      return;
    case node_concat: {
      int64_t at = 0;
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        copy_rows<T>(rows, o.whole(nth), o.u[nth], {v.at + at, v.ld});
        at += o.width(nth);
      }
      return;
    }
    case node_columns: {  // of a stride; others are views
      const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) v.row(i)[j] = u.row(i)[start + j * step];
      }
      return;
    }
    case node_normalise:
    case node_root_mean_square: return normalised<T>(o, v, first);
    case node_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        T most, *to = v.row(i);
        const T scale = T(1) / Softmax<T>::exponentials(n, u.row(i), to, &most);
        for (int64_t j = 0; j < columns; j += lanes) store(to + j, load(to + j) * scale);
      }
      return;
    case node_log_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        T most, *to = v.row(i);
        const T all = Softmax<T>::exponentials(n, u.row(i), to, &most);
        const T log = T(__builtin_log(double(all)));
        for (int64_t j = 0; j < columns; j += lanes) {
          store(to + j, (load(u.row(i) + j) - most) - log);
        }
      }
      return;
  }
}

// --- the Jacobian ---------------------------------------------------------------------------------

// to (+)= f'(u) x of the kinds whose Jacobian is symmetric: push and pull are the same.
template <class T>
void symmetric_jacobian(const Operands<T>& o, Mat<const T> x, Mat<T> to, bool add) {
  const int64_t n = o.node->width;
  const T each = T(1) / T(n);
  for (int64_t i = 0; i < o.rows; ++i) {
    const T *xi = x.row(i), *v = o.v.row(i);
    const T along = total<T>(n, [&](int64_t j) { return load(v + j) * load(xi + j); });
    const Mat<T> here{to.row(i), 0};
    if (o.node->kind == node_softmax) {
      put_each(1, o.columns, here, add,
               [&](int64_t, int64_t j) { return load(v + j) * (load(xi + j) - along); });
      continue;
    }
    T mean = 0;
    if (o.node->kind == node_normalise) {
      mean = each * total<T>(n, [&](int64_t j) { return load(xi + j); });
    }
    const T r = o.first.row(i)[0], factor = along * each;
    put_each(1, o.columns, here, add, [&](int64_t, int64_t j) {
      return r * ((load(xi + j) - mean) - load(v + j) * factor);
    });
  }
}

template <class T>
void node_pull(const Operands<T>& o, Mat<const T> P, int64_t nth, Mat<T> to, bool add);

// to = f'(u) u̇; the tangent of an input is null where it is zero, but not of all.
template <class T> void node_push(const Operands<T>& o, const Mat<const T>* dots, Mat<T> to) {
  const Node& node = *o.node;
  const int64_t rows = o.rows, columns = o.columns;
  const Mat<const T> dot = dots[0];
  if (is_elementwise(node.kind)) return node_pull<T>(o, dot, 0, to, false);
  switch (node.kind) {
    case node_sum: {
      bool add = false;
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const Mat<const T> x = dots[nth];
        if (!x) continue;
        const T factor = o.number(nth);
        put(rows, columns, to, add, [&](Vec<T> x) { return factor * x; }, x);
        add = true;
      }
      return;
    }
    case node_product: {
      const Mat<const T> u = o.u[0], w = o.u[1], r = dots[1];
      if (dot && r) {
        return put(
            rows, columns, to, false,
            [&](Vec<T> x, Vec<T> y, Vec<T> z, Vec<T> w) { return x * y + z * w; }, dot, w, u, r);
      }
      const Mat<const T> x = dot ? dot : r, other = dot ? w : u;
      return put(rows, columns, to, false, Times{}, x, other);
    }
    case node_expand:
      return put_each(rows, columns, to, false,
                      [&](int64_t i, int64_t) { return splat(dot.row(i)[0]); });
    case node_total:
      for (int64_t i = 0; i < rows; ++i) {
        to.row(i)[0] = total<T>(o.width(), [&](int64_t j) { return load(dot.row(i) + j); });
      }
      return;
    case node_concat: {
      int64_t at = 0;
      for (int64_t nth = 0; nth < node.inputs; ++nth) {
        const Mat<T> part{to.at + at, to.ld};
        if (dots[nth]) {
          copy_rows<T>(rows, o.whole(nth), dots[nth], part);
        } else {
          clear_rows(rows, o.whole(nth), part);
        }
        at += o.width(nth);
      }
      return;
    }
    case node_columns: {
      const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < node.width; ++j) to.row(i)[j] = dot.row(i)[start + j * step];
      }
      return;
    }
    case node_log_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        const T *x = dot.row(i), *v = o.v.row(i);
        const T along = total<T>(
            node.width, [&](int64_t j) { return exp_nonpositive<T>(load(v + j)) * load(x + j); });
        put_each(1, columns, Mat<T>{to.row(i), 0}, false,
                 [&](int64_t, int64_t j) { return load(x + j) - along; });
      }
      return;
    case node_normalise:
    case node_root_mean_square:
    case node_softmax: return symmetric_jacobian<T>(o, dot, to, false);
    default:
      return node_pull<T>(o, dot, 0, to, false);  // diagonal: prelu, scale, mask, shift, line
  }
}

// to (+)= f'(u)ᵀ P for the nth input. Of a strided or shifted view `to` must have been begun.
template <class T>
void node_pull(const Operands<T>& o, Mat<const T> P, int64_t nth, Mat<T> to, bool add) {
  const Node& node = *o.node;
  const int64_t rows = o.rows, columns = o.columns;
  if (is_elementwise(node.kind) && node.varies) {
    return put(rows, columns, to, add, Times{}, o.first, P);
  }
  if (is_elementwise(node.kind)) {  // the identity
    return put(rows, columns, to, add, Itself{}, P);
  }
  switch (node.kind) {
    case node_prelu: {
      const Mat<const T> u = o.u[0];
      const Mat<const T> a{o.parameter.at, 0};
      return put(
          rows, columns, to, add,
          [](Vec<T> x, Vec<T> p, Vec<T> slope) { return x > T(0) ? p : p * slope; }, u, P, a);
    }
    case node_scale:
    case node_dropout: return put(rows, columns, to, add, Times{}, P, o.parameter);
    case node_shift: return put(rows, columns, to, add, Itself{}, P);
    case node_line:
    case node_sum: {
      const T factor = o.number(nth);
      return put(rows, columns, to, add, [&](Vec<T> x) { return factor * x; }, P);
    }
    case node_product: {
      const Mat<const T> other = o.u[1 - nth];
      return put(rows, columns, to, add, Times{}, P, other);
    }
    case node_expand:
      for (int64_t i = 0; i < rows; ++i) {
        const T* p = P.row(i);
        const T all = total<T>(node.width, [&](int64_t j) { return load(p + j); });
        to.row(i)[0] = add ? to.row(i)[0] + all : all;
      }
      return;
    case node_total:
      return put_each(rows, o.whole(), to, add,
                      [&](int64_t i, int64_t) { return splat(P.row(i)[0]); });
    case node_concat: {
      int64_t at = 0;
      for (int64_t i = 0; i < nth; ++i) at += o.width(i);
      return put(rows, o.whole(nth), to, add, Itself{}, Mat<const T>{P.at + at, P.ld, P.index});
    }
    case node_columns: {
      const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
      if (step == 1) return add_exactly<T>(rows, node.width, P, {to.at + start, to.ld});
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < node.width; ++j) to.row(i)[start + j * step] += P.row(i)[j];
      }
      return;
    }
    case node_log_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        const T *p = P.row(i), *v = o.v.row(i);
        const T all = total<T>(node.width, [&](int64_t j) { return load(p + j); });
        put_each(1, columns, Mat<T>{to.row(i), 0}, add, [&](int64_t, int64_t j) {
          return load(p + j) - exp_nonpositive<T>(load(v + j)) * all;
        });
      }
      return;
    case node_normalise:
    case node_root_mean_square:
    case node_softmax: return symmetric_jacobian<T>(o, P, to, add);
  }
}

// --- curvature ------------------------------------------------------------------------------------

// Whether the nth input of the node has a curvature under such tangents.
template <class T> MK_INLINE bool node_bends(const Node& node, const Mat<const T>* dots,
                                             int64_t nth) {
  if (node.kind == node_product) return bool(dots[1 - nth]);
  return node.curved && bool(dots[0]);
}

// to (+)= ∇_u ⟨P, f'(u) u̇⟩ for the nth input, which `node_bends` says is not zero. Elementwise nodes are
// done together with their pull.
template <class T>
void node_curvature(const Operands<T>& o, const Mat<const T>* dots, Mat<const T> P, int64_t nth,
                    Mat<T> to, bool add) {
  const Node& node = *o.node;
  const int64_t rows = o.rows, columns = o.columns, n = node.width;
  const Mat<const T> dot = dots[0];
  switch (node.kind) {
    case node_product: {
      const Mat<const T> x = dots[1 - nth];
      return put(rows, columns, to, add, Times{}, P, x);
    }
    case node_normalise:
    case node_root_mean_square: {
      const T each = T(1) / T(n);
      for (int64_t i = 0; i < rows; ++i) {
        const T *a = P.row(i), *b = dot.row(i), *v = o.v.row(i), r = o.first.row(i)[0];
        const auto mean = [&](const auto& f) { return each * total<T>(n, f); };
        const T alpha = mean([&](int64_t j) { return load(v + j) * load(a + j); });
        const T beta = mean([&](int64_t j) { return load(v + j) * load(b + j); });
        T gamma = mean([&](int64_t j) { return load(a + j) * load(b + j); });
        T of_a = 0, of_b = 0;
        if (node.kind == node_normalise) {
          of_a = mean([&](int64_t j) { return load(a + j); });
          of_b = mean([&](int64_t j) { return load(b + j); });
          gamma = mean([&](int64_t j) { return (load(a + j) - of_a) * (load(b + j) - of_b); });
        }
        const T own = gamma - 3 * alpha * beta, scale = -r * r;
        put_each(1, columns, Mat<T>{to.row(i), 0}, add, [&](int64_t, int64_t j) {
          return scale *
                 (alpha * (load(b + j) - of_b) + beta * (load(a + j) - of_a) + load(v + j) * own);
        });
      }
      return;
    }
    case node_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        const T *a = P.row(i), *b = dot.row(i), *v = o.v.row(i);
        const T alpha = total<T>(n, [&](int64_t j) { return load(v + j) * load(a + j); });
        const T beta = total<T>(n, [&](int64_t j) { return load(v + j) * load(b + j); });
        const auto w = [&](int64_t j) {
          const Vec<T> p = load(a + j), x = load(b + j);
          return p * x - beta * p - alpha * x;
        };
        const T along = total<T>(n, [&](int64_t j) { return load(v + j) * w(j); });
        put_each(1, columns, Mat<T>{to.row(i), 0}, add,
                 [&](int64_t, int64_t j) { return load(v + j) * (w(j) - along); });
      }
      return;
    case node_log_softmax:
      for (int64_t i = 0; i < rows; ++i) {
        const T *a = P.row(i), *b = dot.row(i), *v = o.v.row(i);
        const auto p = [&](int64_t j) { return exp_nonpositive<T>(load(v + j)); };
        const T all = total<T>(n, [&](int64_t j) { return load(a + j); });
        const T along = total<T>(n, [&](int64_t j) { return p(j) * load(b + j); });
        put_each(1, columns, Mat<T>{to.row(i), 0}, add,
                 [&](int64_t, int64_t j) { return -all * p(j) * (load(b + j) - along); });
      }
      return;
  }
}

// --- parameters -----------------------------------------------------------------------------------

// sums += ∂/∂θ of ⟨g, f(u; θ)⟩, a row of H columns.
template <class T> void node_parameters(const Operands<T>& o, Mat<const T> g, T* sums) {
  const Mat<const T> u = o.u[0];
  switch (o.node->kind) {
    case node_prelu:
      return add_columns<T>(o.rows, o.columns, sums, [&](int64_t i, int64_t j) {
        return min_zero<T>(load(u.row(i) + j)) * load(g.row(i) + j);
      });
    case node_scale:
      return add_columns<T>(o.rows, o.columns, sums, [&](int64_t i, int64_t j) {
        return load(u.row(i) + j) * load(g.row(i) + j);
      });
    case node_shift:
      return add_columns<T>(o.rows, o.columns, sums,
                            [&](int64_t i, int64_t j) { return load(g.row(i) + j); });
  }
}

// sums += ∂/∂θ of ⟨P, f'(u; θ) u̇⟩.
template <class T>
void node_slope_parameters(const Operands<T>& o, Mat<const T> dot, Mat<const T> P, T* sums) {
  const Mat<const T> u = o.u[0];
  switch (o.node->kind) {
    case node_prelu:
      return add_columns<T>(o.rows, o.columns, sums, [&](int64_t i, int64_t j) {
        const Vec<T> x = load(dot.row(i) + j) * load(P.row(i) + j);
        return load(u.row(i) + j) > T(0) ? Vec<T>{} : x;
      });
    case node_scale:
      return add_columns<T>(o.rows, o.columns, sums, [&](int64_t i, int64_t j) {
        return load(dot.row(i) + j) * load(P.row(i) + j);
      });
  }
}

}  // namespace
