// What the operators of boundary.cpp and replay.cpp share: which tensors are plain memory, and gradients
// that may not be differentiated again.
#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Tensors that are no plain memory: subclasses that decide themselves what an operation does,
// functorch's and functionalization's wrappers. And those whose memory is not their value: views to
// be negated when they are read, zeros without any.
constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                       c10::DispatchKey::FuncTorchBatched,
                                       c10::DispatchKey::FuncTorchGradWrapper,
                                       c10::DispatchKey::Batched});
constexpr c10::DispatchKeySet lazy({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                    c10::DispatchKey::ZeroTensor});

// One past its last element, in its storage.
inline int64_t extent(const Tensor& t) {
  int64_t last = t.storage_offset() + t.numel();
  if (!t.is_contiguous() && t.numel()) {
    last = t.storage_offset() + 1;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  }
  return last;
}

// Whether its storage reaches to its last element.
inline bool holds(const Tensor& t) {
  if (t.numel() == 0) return true;
  return t.storage().data() &&
         extent(t) * int64_t(t.element_size()) <= int64_t(t.storage().nbytes());
}

constexpr const char* second_derivative =
    "fused_mono_penalty: its backward is written by hand and first-order; a second derivative was "
    "asked for, which backend='reference' supports";
// Identity on the first `count` tensors; its backward raises.
struct NoSecond : torch::autograd::Function<NoSecond> {
  static variable_list forward(AutogradContext*, int64_t count, const at::TensorList& tensors) {
    variable_list same;
    for (int64_t i = 0; i < count; ++i) same.push_back(tensors[i].view_as(tensors[i]));
    return same;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, second_derivative);
  }
};

// The same gradients, so tied to what they depend on that differentiating them raises.
inline void guard(variable_list& grads, const variable_list& saved, const variable_list& outer) {
  variable_list tied;
  for (const Tensor& g : grads) {
    if (g.defined()) tied.push_back(g);
  }
  const int64_t count = int64_t(tied.size());
  for (const variable_list* causes : {&outer, &saved}) {
    for (const Tensor& t : *causes) {
      if (t.defined()) tied.push_back(t);
    }
  }
  const variable_list found = NoSecond::apply(count, at::TensorList(tied));
  size_t next = 0;
  for (Tensor& g : grads) {
    if (g.defined()) g = found[next++];
  }
}

}  // namespace
