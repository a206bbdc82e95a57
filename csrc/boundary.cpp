// One operator for a whole step on the CPU, autograd included: `monokernel::cpu_step`.
//
// One of the two files that see PyTorch's headers, so it is built for one version of PyTorch and is optional:
// without it the Function in monokernel/boundary.py does the same in Python, 30 µs slower, and
// intervals.py what a problem with a box is for. It links neither the kernels nor Python; `mk_connect`
// gives it the addresses of the C interface.
//
// Everything that a kernel will read or write at is looked at first, in forward and again in backward
// (see monokernel/operands.py for why): anybody may call the operator, with anything.
#include "autograd.h"
#include "c_api.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <optional>
#include <sstream>
#include <vector>

namespace {

// In the order of CALLS in backends/cpu.py.
struct Kernel {
  decltype(&mk_node_names) node_names;
  decltype(&mk_problem_shape) shape;
  decltype(&mk_problem_keep) keep;
  decltype(&mk_problem_drop) drop;
  decltype(&mk_take) take;
  decltype(&mk_give_back) give_back;
  decltype(&mk_forward) forward;
  decltype(&mk_backward) backward;
  decltype(&mk_lift) lift;
  decltype(&mk_lift_backward) lift_backward;
};
Kernel kernel;

// From so many bytes on, what forward saves comes from the library's pool; malloc keeps the rest.
constexpr int64_t pool_from = 1 << 18;

// Keeps a problem alive.
struct ProblemReference {
  explicit ProblemReference(int64_t handle) : handle(handle) {
    TORCH_CHECK_VALUE(kernel.keep(handle), "problem: expected the handle of a problem, got ",
                      handle);
    kernel.shape(handle, &shape);
  }
  ProblemReference(const ProblemReference&) = delete;
  ProblemReference& operator=(const ProblemReference&) = delete;
  ~ProblemReference() { kernel.drop(handle); }

  int64_t D() const { return shape.D; }
  int64_t row_size() const { return shape.saved[0] + shape.saved[1] + shape.saved[2]; }
  // What it computes in; a network in half precision is converted to it on entry.
  at::ScalarType dtype() const { return shape.is_double ? at::kDouble : at::kFloat; }
  bool serves(at::ScalarType network) const {
    if (network == at::kHalf || network == at::kBFloat16) return dtype() == at::kFloat;
    return network == dtype();
  }

  int64_t handle;
  mk_shape shape;
};

void check(int status) {
  TORCH_CHECK_WITH(OutOfMemoryError, status == 0,
                   "monokernel: no memory for the native kernel's scratch buffers");
}

// --- operands -------------------------------------------------------------------------------------

// As Python prints them.
std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}
std::string tuple(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << dtype_name(t.scalar_type()) << " of shape " << tuple(t.sizes()) << " on " << t.device();
  if (t.layout() != at::kStrided) {
    text << ", " << t.layout();
  } else if (t.key_set().has_any(wrapped)) {
    text << ", a subclass or wrapper of a tensor";
  } else {
    const int64_t bytes = extent(t) * int64_t(t.element_size());
    const int64_t held = t.storage().data() ? int64_t(t.storage().nbytes()) : 0;
    if (held < bytes) text << " with " << held << " of its " << bytes << " bytes";
  }
  return text.str();
}

bool readable(const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (!t.device().is_cpu() || t.layout() != at::kStrided || t.scalar_type() != dtype) return false;
  return !t.key_set().has_any(wrapped) && t.sizes() == sizes && holds(t);
}

// As PyTorch's own ``to``, which asks its dispatcher before it sees that there is nothing to do.
Tensor as_dtype(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// `given` in contiguous memory, once it is known to be readable.
template <class Name>
Tensor plain(const Tensor& given, at::IntArrayRef sizes, at::ScalarType dtype, const Name& name) {
  const bool copied = given.key_set().has_any(lazy) && !given.key_set().has_any(wrapped);
  const Tensor t = copied ? given.clone() : given;
  TORCH_CHECK(readable(t, sizes, dtype), name(), ": expected ", dtype_name(dtype), " of shape ",
              tuple(sizes), " on cpu in memory of its own, got ", describe(t));
  return t.contiguous();
}

// The same in the problem's dtype.
template <class Name>
Tensor operand(const ProblemReference& problem, const Tensor& given, at::IntArrayRef sizes,
               at::ScalarType dtype, const Name& name) {
  return as_dtype(plain(given, sizes, dtype, name), problem.dtype());
}

// The network's dtype is that of x.
Tensor inputs(const ProblemReference& problem, const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "x1, x2: expected two dimensions, got ", x.dim());
  const at::ScalarType network =
      problem.serves(x.scalar_type()) ? x.scalar_type() : problem.dtype();
  return operand(problem, x, {x.size(0), problem.shape.d}, network, [] { return "x1, x2"; });
}

// Which of the parameters are there.
using Present = std::vector<bool>;

// The elements of each, as the kernel is told.
std::vector<int64_t> sizes_of(const variable_list& params) {
  std::vector<int64_t> sizes;
  sizes.reserve(params.size());
  for (const Tensor& p : params) sizes.push_back(p.defined() ? p.numel() : 0);
  return sizes;
}

std::string name_of(const ProblemReference& problem, size_t place) {
  const mk_parameter& p = problem.shape.parameters[place];
  if (p.layer) {
    return c10::str("mlp: the ", p.dimensions == 2 ? "weight" : "bias", " of linear layer ",
                    p.layer);
  }
  std::istringstream names(kernel.node_names());
  std::string name;
  for (int64_t i = 0; i <= p.kind; ++i) names >> name;
  return c10::str("mlp: the parameter of its ", name);
}

// The parameters in their order, undefined where one is absent; `given` are those that are there.
variable_list parameters(const ProblemReference& problem, at::ScalarType network,
                         const Present& present, const variable_list& given) {
  TORCH_CHECK(int64_t(present.size()) == problem.shape.params, "params: expected ",
              problem.shape.params, ", got ", present.size());
  variable_list params(present.size());
  size_t next = 0;
  for (size_t i = 0; i < present.size(); ++i) {
    const mk_parameter& p = problem.shape.parameters[i];
    TORCH_CHECK(present[i] || p.optional, name_of(problem, i), ": expected a tensor, got None");
    if (!present[i]) continue;
    const Tensor& t = given[next++];
    const int64_t one[] = {1}, size[] = {p.rows, p.columns};
    const bool spread = p.one_for_all && t.sizes() == at::IntArrayRef(one);
    const at::IntArrayRef own(size + (2 - p.dimensions), size_t(p.dimensions));
    const at::IntArrayRef expected = spread ? at::IntArrayRef(one) : own;
    params[i] = operand(problem, t, expected, network, [&] { return name_of(problem, i); });
  }
  return params;
}

// A gradient from outside, which may be undefined.
Tensor cotangent(const ProblemReference& problem, const Tensor& g, at::IntArrayRef sizes,
                 at::ScalarType dtype, const char* name) {
  if (!g.defined()) return g;
  return operand(problem, g, sizes, dtype, [&] { return name; });
}

// --- memory ---------------------------------------------------------------------------------------

Tensor buffer(int64_t n, at::ScalarType dtype) {
  const int64_t bytes = n * int64_t(c10::elementSize(dtype));
  if (bytes < pool_from) return at::empty({n}, dtype);
  void* memory = kernel.take(bytes);
  check(memory ? 0 : 1);
  return at::from_blob(memory, {n}, [](void* given) { kernel.give_back(given); }, dtype);
}

// Where the values, the P and ∂penalty/∂J begin in the one buffer.
std::array<void*, 3> places(const mk_shape& shape, const Tensor& saved, int64_t N) {
  char* at = saved.defined() ? static_cast<char*>(saved.data_ptr()) : nullptr;
  const int64_t row = saved.defined() ? N * saved.element_size() : 0;
  return {at, at + row * shape.saved[0], at + row * (shape.saved[0] + shape.saved[1])};
}

void* address(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// The penalty, J or the bound: its shape.
std::vector<int64_t> second_output(const mk_shape& shape, int64_t N) {
  if (shape.bound) return {shape.D, shape.bounded};
  if (shape.summed) return {};
  return {N, shape.D, shape.k};
}

struct Outputs {
  Tensor y, out, saved, bounds;  // bounds: what the bound saved
};

Outputs run(const ProblemReference& problem, const Tensor& given,
            const std::optional<Tensor>& weight, const Present& present,
            const variable_list& given_params, bool save) {
  const mk_shape& shape = problem.shape;
  const Tensor x = inputs(problem, given);
  const at::ScalarType network = given.scalar_type();
  const int64_t N = x.size(0), D = problem.D();
  const variable_list params = parameters(problem, network, present, given_params);
  Tensor w;
  const bool per_row = weight && weight->dim() == 3;
  if (weight) {
    const int64_t size[] = {N, D, shape.k};
    w = operand(problem, *weight, {size + !per_row, 2u + per_row}, problem.dtype(),
                [] { return "weight"; });
  }
  Outputs o;
  o.y = at::empty({N, D}, x.options());
  o.out = at::empty(second_output(shape, N), x.options());
  if (save && problem.row_size()) o.saved = buffer(N * problem.row_size(), problem.dtype());
  std::vector<const void*> pointers;
  pointers.reserve(params.size());
  for (const Tensor& p : params) pointers.push_back(address(p));
  const std::array<void*, 3> at = places(shape, o.saved, N);
  const std::vector<int64_t> sizes = sizes_of(params);
  check(kernel.forward(problem.handle, N, at::get_num_threads(), x.data_ptr(), address(w), per_row,
                       pointers.data(), sizes.data(), o.y.data_ptr(), o.out.data_ptr(),
                       save ? at.data() : nullptr));
  if (shape.bound) {
    o.bounds = buffer(shape.bound, at::kDouble);
    check(kernel.lift(problem.handle, N, x.data_ptr(), pointers.data(), sizes.data(),
                      o.y.data_ptr(), o.out.data_ptr(), o.bounds.data_ptr()));
  }
  o.y = as_dtype(o.y, network);
  return o;
}

// What a problem with a box computes, by PyTorch's operations, with all derivatives: monokernel/monotone.py.
std::tuple<Tensor, Tensor> by_pytorch(int64_t problem, const Tensor& x,
                                      const c10::List<std::optional<Tensor>>& params) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("monokernel::lift_by_pytorch", "")
                             .typed<decltype(by_pytorch)>();
  return op.call(problem, x, params);
}

// What a backward has to know of its forward, and the problem for as long as one may come. As the memory of
// a tensor, since of all that autograd keeps compiled autograd takes nothing else that owns something.
struct Record {
  Record(int64_t handle, bool weighted, const Present& present)
      : problem(handle), numbers{handle, weighted} {
    numbers.insert(numbers.end(), present.begin(), present.end());
  }

  static Tensor tensor(std::unique_ptr<Record> record) {
    Record* owned = record.release();
    const int64_t size = int64_t(owned->numbers.size());
    return at::from_blob(
        owned->numbers.data(), {size}, [owned](void*) { delete owned; }, at::kLong);
  }

  ProblemReference problem;
  std::vector<int64_t> numbers;
};

struct Step : torch::autograd::Function<Step> {
  static variable_list forward(AutogradContext* ctx, int64_t problem, const Present& present,
                               const std::optional<Tensor>& weight, const Tensor& x,
                               const at::TensorList& given) {
    auto record = std::make_unique<Record>(problem, weight.has_value(), present);
    const Outputs o = run(record->problem, x, weight, present, {given.begin(), given.end()}, true);
    variable_list saved{x};
    saved.insert(saved.end(), given.begin(), given.end());
    saved.push_back(o.saved);
    saved.push_back(o.bounds);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["record"] = Record::tensor(std::move(record));
    return {o.y, o.out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const Tensor record = ctx->saved_data["record"].toTensor();
    const int64_t* numbers = record.const_data_ptr<int64_t>();
    const ProblemReference problem(numbers[0]);
    const bool weighted = numbers[1];
    const Present present(numbers + 2, numbers + record.numel());
    const variable_list saved = ctx->get_saved_variables();
    variable_list grads;
    if (problem.shape.bound && (at::GradMode::is_enabled() || many(outer))) {
      grads = differentiable(ctx, problem, present, saved, outer);
    } else {
      grads = run_backward(ctx, problem, present, weighted, saved, outer);
      if (at::GradMode::is_enabled()) guard(grads, saved, outer);
    }
    // For problem, present, weight, x and the parameters.
    variable_list all(2 + 1 + grads.size());
    std::move(grads.begin(), grads.end(), all.begin() + 3);
    return all;
  }

 private:
  // Of x and the parameters that are there.
  static variable_list run_backward(AutogradContext* ctx, const ProblemReference& problem,
                                    const Present& present, bool weighted,
                                    const variable_list& saved, const variable_list& outer) {
    const at::NoGradGuard no_grad;
    const mk_shape& shape = problem.shape;
    const Tensor x = inputs(problem, saved[0]);
    const at::ScalarType network = saved[0].scalar_type();
    const int64_t N = x.size(0), D = problem.D();
    const variable_list params =
        parameters(problem, network, present, {saved.begin() + 1, saved.end() - 2});
    Tensor buffers = saved.end()[-2], bounds = saved.back();
    if (buffers.defined()) {
      buffers = operand(problem, buffers, {N * problem.row_size()}, problem.dtype(),
                        [] { return "a tensor saved for the backward"; });
    }
    Tensor gy = cotangent(problem, outer[0], {N, D}, network, "gradient of y");
    const Tensor gout = cotangent(problem, outer[1], second_output(shape, N), problem.dtype(),
                                  "gradient of the penalty");
    if (shape.bound) {
      bounds = plain(bounds, {shape.bound}, at::kDouble,
                     [] { return "a tensor saved for the backward"; });
      if (!gy.defined()) gy = at::zeros({N, D}, x.options());
    }
    variable_list grads(saved.size() - 2);
    size_t next = weighted ? 1 : 0;  // among the inputs that are tensors
    if (ctx->needs_input_grad(next++)) grads[0] = at::empty_like(x);
    std::vector<const void*> pointers;
    std::vector<void*> to;
    size_t place = 1;
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& p = params[i];
      pointers.push_back(address(p));
      to.push_back(nullptr);
      if (!p.defined()) continue;
      if (ctx->needs_input_grad(next++)) {
        TORCH_CHECK(!shape.parameters[i].drawn,
                    "mlp: expected a dropout that is drawn, got one to be trained");
        to.back() = address(grads[place] = at::empty_like(p));
      }
      ++place;
    }
    const std::array<void*, 3> at = places(shape, buffers, N);
    const std::vector<int64_t> sizes = sizes_of(params);
    check(kernel.backward(problem.handle, N, at::get_num_threads(), x.data_ptr(), pointers.data(),
                          sizes.data(), address(gy), shape.bound ? nullptr : address(gout),
                          at.data(), address(grads[0]), to.data()));
    if (shape.bound) {
      check(kernel.lift_backward(problem.handle, N, x.data_ptr(), pointers.data(), sizes.data(),
                                 bounds.data_ptr(), gy.data_ptr(), address(gout), address(grads[0]),
                                 to.data()));
    }
    for (Tensor& g : grads) {
      if (g.defined()) g = as_dtype(g, network);
    }
    return grads;
  }

  // Whether they stand for many gradients at once, of which a kernel knows nothing.
  static bool many(const variable_list& outer) {
    for (const Tensor& g : outer) {
      if (g.defined() && g.key_set().has_any(wrapped)) return true;
    }
    return false;
  }

  // The gradients of a problem with a box, for whoever differentiates them or has many at once.
  static variable_list differentiable(AutogradContext* ctx, const ProblemReference& problem,
                                      const Present& present, const variable_list& saved,
                                      const variable_list& outer) {
    const bool second = at::GradMode::is_enabled();
    const at::AutoGradMode recording(true);
    variable_list given;  // views, for a tensor in two places has a gradient for each
    for (size_t i = 0; i + 2 < saved.size(); ++i) given.push_back(saved[i].view_as(saved[i]));
    c10::List<std::optional<Tensor>> params;
    size_t next = 1;
    for (const bool there : present) {
      params.push_back(there ? std::optional<Tensor>(given[next++]) : std::nullopt);
    }
    const auto [y, bound] = by_pytorch(problem.handle, given[0], params);
    variable_list results, cotangents, wanted;
    for (const auto& [result, g] : {std::pair(y, outer[0]), std::pair(bound, outer[1])}) {
      if (!g.defined() || !result.requires_grad()) continue;
      results.push_back(result);
      cotangents.push_back(g);
    }
    for (size_t i = 0; i < given.size(); ++i) {
      if (ctx->needs_input_grad(i)) wanted.push_back(given[i]);
    }
    variable_list grads(given.size());
    if (results.empty()) return grads;
    const variable_list found =
        torch::autograd::grad(results, wanted, cotangents, second, second, /*allow_unused=*/true);
    next = 0;
    for (size_t i = 0; i < given.size(); ++i) {
      if (ctx->needs_input_grad(i)) grads[i] = found[next++];
    }
    return grads;
  }
};

// y (N, D) and the penalty, or J where there is no hinge; `problem` is the handle of a problem. Of one with a
// box y with the linear term, and the bound.
std::tuple<Tensor, Tensor> cpu_step(int64_t problem, const Tensor& x,
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
    const variable_list o = Step::apply(problem, present, weight, x, at::TensorList(given));
    return {o[0], o[1]};
  }
  const ProblemReference reference(problem);
  const Outputs o = run(reference, x, weight, present, given, false);
  return {o.y, o.out};
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void mk_connect(void* const* addresses) {
  static_assert(sizeof(Kernel) == 10 * sizeof(void*), "one address for each function");
  std::copy_n(addresses, 10, reinterpret_cast<void**>(&kernel));
}

TORCH_LIBRARY_FRAGMENT(monokernel, library) {
  library.def(
      "cpu_step(int problem, Tensor x, Tensor? weight, Tensor?[] params) -> (Tensor, Tensor)",
      &cpu_step);
}
