// The rows of a block as the nodes see them, on the way up and on the way back.
#pragma once

#include "dropout.h"
#include "program.h"

namespace {

// What there is of a value: itself, what its node's Jacobian is computed from, a dropout's mask.
enum ValuePart { the_value, the_first, the_mask };

// The rows of one block as the nodes see them, by value.
template <class T> struct BlockValues {
  Mat<T>* value;         // null where it is not at hand
  Mat<T>* first;         // what a node's Jacobian is computed from: σ', or the r of a normalisation
  Mat<T>* mask;          // of a dropout
  Mat<const T>* inputs;  // of the node at hand, as many as the longest has
  int64_t* widths;

  // `want(v, part)`: whether it needs memory of its own for that part of what belongs to value v.
  template <class Want>
  BlockValues(Bump& memory, const Program<T>& program, int64_t capacity, const Want& want) {
    const int64_t count = program.y + 1;
    Mat<T>** const lists[] = {&value, &first, &mask};
    for (Mat<T>** list : lists) *list = memory.take<Mat<T>>(count);
    int64_t most = 1;
    for (int64_t v = 1; v < count; ++v) most = max_of(most, program.node(v).inputs);
    inputs = memory.take<Mat<const T>>(most);
    widths = memory.take<int64_t>(most);
    for (int64_t v = 0; v < count; ++v) {
      const int64_t ld = scratch_ld<T>(program.width(v));
      Mat<T> own{nullptr, ld}, slope{nullptr, ld}, drawn{nullptr, ld};
      if (want(v, the_value)) own.at = memory.take<T>(capacity * ld);
      if (v && want(v, the_first)) {
        const bool norm = normalises(program.node(v).kind);
        if (norm) slope.ld = 1;
        slope.at = memory.take<T>(norm ? round_up(capacity, Simd<T>::lanes) : capacity * ld);
      }
      if (v && want(v, the_mask)) drawn.at = memory.take<T>(capacity * ld);
      if (!value) continue;
      value[v] = own, first[v] = slope, mask[v] = drawn;
    }
  }

  // What the node of value v is computed from.
  Operands<T> operands(const Program<T>& program, int64_t v, int64_t rows) const {
    const Node& node = program.node(v);
    for (int64_t nth = 0; nth < node.inputs; ++nth) {
      inputs[nth] = value[node.input[nth]];
      widths[nth] = program.width(node.input[nth]);
    }
    Operands<T> o{&node, rows, program.whole(v), inputs, widths, value[v], first[v], {}, {}};
    o.parameter = node.kind == node_dropout ? Mat<const T>(mask[v])
                                            : Mat<const T>{program.at(v).parameter, 0};
    return o;
  }

  void scale_and_shift(const Program<T>& program, int64_t v, int64_t rows) const {
    const Mat<const T> scale{program.at(v).parameter, 0}, shift{program.at(v + 1).parameter, 0};
    put(
        rows, program.whole(v), value[v + 1], false,
        [](Vec<T> x, Vec<T> s, Vec<T> t) { return x * s + t; },
        Mat<const T>(value[program.node(v).input[0]]), scale, shift);
  }

  void read_x(const Program<T>& program, const void* x, int64_t rows, int64_t row0,
              bool as_it_is) const {
    const int64_t d = program.d;
    T* from = const_cast<T*>(static_cast<const T*>(x)) + row0 * d;
    if (as_it_is) {
      value[0] = {from, d};
      return;
    }
    for (int64_t i = 0; i < rows; ++i) copy(value[0].row(i), from + i * d, d);
  }
  void draw_mask(const Program<T>& program, int64_t v, int64_t rows, int64_t row0) const {
    const Node& node = program.node(v);
    const T* key = static_cast<const T*>(program.params[node.place[0]]);
    dropout_mask<T>(key, node.numbers[0], uint32_t(node.numbers[1]), row0, rows, node.width,
                    mask[v].at, mask[v].ld);
  }
};

}  // namespace
