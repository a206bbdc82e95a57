// What forward leaves for backward.
#pragma once

#include "program.h"

namespace {

// What forward leaves, block after block: a block's values lie together, so that all of it takes N
// times the same number of elements. Rows are padded to whole vectors.
template <class T> struct SavedProgram {
  const Program<T>& program;
  const Blocks& blocks;

  Mat<T> value(void* buffer, int64_t block, int64_t v) const {
    return at(buffer, block, v, program.value_at[v], program.saved_values);
  }
  Mat<T> cotangent(void* buffer, int64_t block, int64_t v) const {
    return at(buffer, block, v, program.cotangent_at[v], program.saved_cotangents);
  }

 private:
  Mat<T> at(void* buffer, int64_t block, int64_t v, int64_t before, int64_t all) const {
    T* to = static_cast<T*>(buffer) + blocks.begin(block) * all + blocks.rows(block) * before;
    return {to, program.saved_ld(v)};
  }
};

}  // namespace
