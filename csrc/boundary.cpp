// One operator for a whole step on the CPU, autograd included: `monokernel::cpu_step`.
//
// The only file that sees PyTorch's headers, so it is built for one version of PyTorch and is optional:
// without it the Function in function.py does the same in Python, 30 µs slower. It links neither the
// kernels nor Python; `mk_connect` gives it the addresses of the C interface in binding.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Shape {
  int64_t D, k, summed;
  int64_t saved[3];  // elements for each row of x
  int64_t row_size() const { return saved[0] + saved[1] + saved[2]; }
};

struct Kernel {
  void (*shape)(const void* plan, Shape*);
  void (*keep)(void* plan);
  void (*drop)(void* plan);
  void* (*take)(int64_t bytes);
  void (*give_back)(void* memory);
  int (*forward)(const void* plan, int64_t N, int64_t threads, const void* x, const void* weight,
                 int64_t weight_per_row, const void* const* params, void* y, void* out,
                 void* const* saved);
  int (*backward)(const void* plan, int64_t N, int64_t threads, const void* x,
                  const void* const* params, const void* gy, const void* gout, void* const* saved,
                  void* gx, void* const* grads);
};
Kernel kernel;

// From so many bytes on, what forward saves comes from the library's pool; malloc keeps the rest.
constexpr int64_t pool_from = 1 << 18;

// Keeps a plan alive as long as a backward may come.
struct PlanReference : torch::CustomClassHolder {
  explicit PlanReference(void* given) : plan(given) { kernel.keep(plan); }
  ~PlanReference() override { kernel.drop(plan); }
  void* plan;
};

void check(int status) {
  TORCH_CHECK_WITH(OutOfMemoryError, status == 0,
                   "monokernel: no memory for the native kernel's scratch buffers");
}

Tensor buffer(const Shape& shape, const Tensor& x) {
  const int64_t n = x.size(0) * shape.row_size(), bytes = n * x.element_size();
  if (bytes < pool_from) return at::empty({n}, x.options());
  void* memory = kernel.take(bytes);
  check(memory ? 0 : 1);
  return at::from_blob(memory, {n}, [](void* given) { kernel.give_back(given); }, x.options());
}

// Where the a_l, the P_l and ∂penalty/∂J begin in the one buffer.
std::array<void*, 3> places(const Shape& shape, const Tensor& saved, int64_t N) {
  char* at = saved.defined() ? static_cast<char*>(saved.data_ptr()) : nullptr;
  const int64_t row = saved.defined() ? N * saved.element_size() : 0;
  return {at, at + row * shape.saved[0], at + row * (shape.saved[0] + shape.saved[1])};
}

void* address(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

struct Outputs {
  Tensor y, out, saved;
};

// params: W1, b1, ..., undefined where a layer has no bias; all operands contiguous.
Outputs run(void* plan, const Tensor& x, const std::optional<Tensor>& weight,
            const variable_list& params, bool save) {
  Shape shape;
  kernel.shape(plan, &shape);
  const int64_t N = x.size(0);
  Outputs o;
  o.y = at::empty({N, shape.D}, x.options());
  o.out = shape.summed ? at::empty({}, x.options()) : at::empty({N, shape.D, shape.k}, x.options());
  if (save && shape.row_size()) o.saved = buffer(shape, x);
  std::vector<const void*> pointers;
  pointers.reserve(params.size());
  for (const Tensor& p : params) pointers.push_back(address(p));
  const std::array<void*, 3> at = places(shape, o.saved, N);
  check(kernel.forward(plan, N, at::get_num_threads(), x.data_ptr(),
                       weight ? weight->data_ptr() : nullptr, weight && weight->dim() == 3,
                       pointers.data(), o.y.data_ptr(), o.out.data_ptr(),
                       save ? at.data() : nullptr));
  return o;
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

// Where the parameters that are there lie among W1, b1, ...
using Present = std::vector<bool>;

variable_list spread(const Present& present, const variable_list& given) {
  variable_list params(present.size());
  size_t next = 0;
  for (size_t i = 0; i < present.size(); ++i) {
    if (present[i]) params[i] = given[next++];
  }
  return params;
}

struct Step : torch::autograd::Function<Step> {
  static variable_list forward(AutogradContext* ctx, int64_t plan, const Present& present,
                               const std::optional<Tensor>& weight, const Tensor& x,
                               const at::TensorList& given) {
    auto reference = c10::make_intrusive<PlanReference>(reinterpret_cast<void*>(plan));
    const Tensor dense = x.contiguous();
    variable_list params(given.begin(), given.end());
    for (Tensor& p : params) p = p.contiguous();
    const Outputs o = run(reference->plan, dense, weight, spread(present, params), true);
    variable_list saved{x};
    saved.insert(saved.end(), given.begin(), given.end());
    saved.push_back(o.saved);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["plan"] = c10::IValue::make_capsule(std::move(reference));
    ctx->saved_data["present"] = present;
    ctx->saved_data["weight"] = weight.has_value();
    return {o.y, o.out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const auto held = ctx->saved_data["plan"].toCapsule();
    void* plan = static_cast<const PlanReference*>(held.get())->plan;
    const Present present = bools(ctx->saved_data["present"]);
    const bool weighted = ctx->saved_data["weight"].toBool();
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads = run_backward(ctx, plan, present, weighted, saved, outer);
    if (at::GradMode::is_enabled()) guard(grads, saved, outer);
    // For plan, present, weight, x and the parameters.
    variable_list all(2 + 1 + grads.size());
    std::move(grads.begin(), grads.end(), all.begin() + 3);
    return all;
  }

 private:
  static Present bools(const c10::IValue& value) {
    const auto list = value.toBoolList();
    return Present(list.begin(), list.end());
  }

  // Of x and the parameters that are there.
  static variable_list run_backward(AutogradContext* ctx, void* plan, const Present& present,
                                    bool weighted, const variable_list& saved,
                                    const variable_list& outer) {
    const at::NoGradGuard no_grad;
    const size_t count = saved.size() - 2;
    const Tensor x = saved[0].contiguous();
    variable_list params, grads(1 + count);
    for (size_t i = 0; i <= count; ++i) {
      const Tensor dense = i ? saved[i].contiguous() : x;
      if (i) params.push_back(dense);
      if (ctx->needs_input_grad(i + (weighted ? 1 : 0))) grads[i] = at::empty_like(dense);
    }
    params = spread(present, params);
    const variable_list wanted = spread(present, {grads.begin() + 1, grads.end()});
    std::vector<void*> pointers, to;
    for (size_t i = 0; i < params.size(); ++i) {
      pointers.push_back(address(params[i]));
      to.push_back(address(wanted[i]));
    }
    const Tensor gy = outer[0].defined() ? outer[0].contiguous() : outer[0];
    const Tensor gout = outer[1].defined() ? outer[1].contiguous() : outer[1];
    Shape shape;
    kernel.shape(plan, &shape);
    const std::array<void*, 3> at = places(shape, saved.back(), x.size(0));
    check(kernel.backward(plan, x.size(0), at::get_num_threads(), x.data_ptr(), pointers.data(),
                          address(gy), address(gout), at.data(), address(grads[0]), to.data()));
    return grads;
  }

  // The same gradients, so tied to what they depend on that differentiating them raises.
  static void guard(variable_list& grads, const variable_list& saved, const variable_list& outer) {
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
};

// y (N, D) and the penalty, or J where there is no hinge; `plan` is the address of a plan.
std::tuple<Tensor, Tensor> cpu_step(int64_t plan, const Tensor& x,
                                    const std::optional<Tensor>& weight,
                                    const c10::List<std::optional<Tensor>>& params) {
  Present present;
  variable_list given;
  bool tracked = x.requires_grad();
  for (size_t i = 0; i < params.size(); ++i) {
    const std::optional<Tensor> p = params.get(i);
    present.push_back(p.has_value());
    if (!p) continue;
    tracked = tracked || p->requires_grad();
    given.push_back(*p);
  }
  if (tracked && at::GradMode::is_enabled()) {
    const variable_list o = Step::apply(plan, present, weight, x, at::TensorList(given));
    return {o[0], o[1]};
  }
  for (Tensor& p : given) p = p.contiguous();
  const Outputs o = run(reinterpret_cast<void*>(plan), x.contiguous(), weight,
                        spread(present, given), false);
  return {o.y, o.out};
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void mk_connect(void* const* addresses) {
  static_assert(sizeof(Kernel) == 7 * sizeof(void*), "one address for each function");
  std::copy_n(addresses, 7, reinterpret_cast<void**>(&kernel));
}

TORCH_LIBRARY_FRAGMENT(monokernel, library) {
  library.def("cpu_step(int plan, Tensor x, Tensor? weight, Tensor?[] params) -> (Tensor, Tensor)",
              &cpu_step);
}
