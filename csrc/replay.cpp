// One operator for a whole step on a device, autograd included: `monokernel::device_step`.
//
// What a pass launches and allocates follows from the problem and from what its operands are, not from
// their values. So monokernel/backends/triton/replay.py writes it down, once for each kind of call, as a
// plan: plain data, which is run here without Python. Where there is none (a kind that is new, operands
// that are no plain memory) Python is asked, which also has the sentence for whatever is wrong.
//
// A plan's key says of each operand whether it is there, its dtype, sizes, device and whether its address is
// a multiple of 16: all that Triton's own launcher specialises a kernel by. Every operand is looked at
// again in each pass, since anybody may have changed it (monokernel/operands.py).
#include "autograd.h"

#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <variant>
#include <vector>

namespace {

using Key = std::vector<int64_t>;
using Parameters = c10::List<std::optional<Tensor>>;

// --- the driver -----------------------------------------------------------------------------------

// cuLaunchKernel and hipModuleLaunchKernel have the same arguments. The others are CUDA's, or null: a
// thread of autograd's may have no context yet.
struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra);
  int (*stream)(int device, void** found);  // PyTorch's current one
  int (*device)(int* found, int ordinal);
  int (*retain)(void** context, int device);
  int (*enter)(void* context);
};
Driver driver;
constexpr int no_context = 201;

// --- plans ----------------------------------------------------------------------------------------

// Operands, and what the steps make, are numbered in this order.
struct Empty {
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
};

struct Argument {
  enum From : int64_t { number = -1, margin = -2 };
  int64_t from;   // one of these, or the number of a tensor
  int64_t value;  // bits, or bytes behind the tensor's first element
};

struct Launch {
  void* function;
  unsigned programs[3], threads, shared;
  std::vector<Argument> arguments;
};

struct Operand {
  enum Kind : int64_t { none, boolean, integer, real, tensor, integers, tensors, device, scalar };
  Kind kind;
  c10::IValue value;
  std::vector<int64_t> numbers;  // of tensors
};

struct Operation {
  c10::OperatorHandle handle;
  std::vector<Operand> operands;
};

struct Step {
  std::variant<Empty, Launch, Operation> what;
  std::vector<int64_t> last;  // tensors that nothing after it reads
};

struct Plan {
  std::vector<Step> steps;
  std::vector<int64_t> outputs;
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t found = 14695981039346656037u;
    for (const int64_t number : key) found = (found ^ uint64_t(number)) * 1099511628211u;
    return size_t(found ^ found >> 32);
  }
};

// A kind that was met once has no plan yet: of what never comes again (a margin for each column that
// moves) none is made.
std::mutex lock;
std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans;
constexpr size_t most_plans = 4096;

struct Numbers {
  const int64_t* at;
  int64_t next() { return *at++; }
  std::vector<int64_t> list() {
    const int64_t size = next();
    const int64_t* from = at;
    at += size;
    return {from, at};
  }
};

Operand operand_of(Numbers& code) {
  Operand o{Operand::Kind(code.next()), {}, {}};
  switch (o.kind) {
    case Operand::none:
    case Operand::device: break;
    case Operand::boolean: o.value = code.next() != 0; break;
    case Operand::integer: o.value = code.next(); break;
    case Operand::real: {
      const int64_t bits = code.next();
      double value;
      std::memcpy(&value, &bits, sizeof value);
      o.value = value;
      break;
    }
    case Operand::tensor: o.numbers = {code.next()}; break;
    case Operand::integers: o.value = code.list(); break;
    case Operand::tensors: o.numbers = code.list(); break;
    case Operand::scalar: {  // in the place of a tensor, as in t + 1
      Tensor t = c10::scalar_to_tensor(operand_of(code).value.toScalar());
      t.unsafeGetTensorImpl()->set_wrapped_number(true);
      o.value = std::move(t);
    }
  }
  return o;
}

// In the order in which recording.py writes.
Plan plan_of(Numbers code, const char* const* names) {
  Plan plan;
  for (int64_t steps = code.next(); steps > 0; --steps) {
    Step step;
    switch (code.next()) {
      case 0: {
        const auto dtype = at::ScalarType(code.next());
        std::vector<int64_t> sizes = code.list();
        step.what = Empty{dtype, std::move(sizes), code.list()};
        break;
      }
      case 1: {
        Launch launch;
        launch.function = reinterpret_cast<void*>(code.next());
        for (unsigned& n : launch.programs) n = unsigned(code.next());
        launch.threads = unsigned(code.next());
        launch.shared = unsigned(code.next());
        for (int64_t n = code.next(); n > 0; --n) {
          const int64_t from = code.next();
          launch.arguments.push_back({from, code.next()});
        }
        step.what = std::move(launch);
        break;
      }
      default: {
        const char* const* name = names + 2 * code.next();
        Operation operation{c10::Dispatcher::singleton().findSchemaOrThrow(name[0], name[1]), {}};
        for (int64_t n = code.next(); n > 0; --n) operation.operands.push_back(operand_of(code));
        step.what = std::move(operation);
      }
    }
    step.last = code.list();
    plan.steps.push_back(std::move(step));
  }
  plan.outputs = code.list();
  return plan;
}

// --- a run ----------------------------------------------------------------------------------------

struct Run {
  variable_list tensors;
  at::Device device;
  void* stream;
  float margin;

  void operator()(const Empty& e) {
    tensors.push_back(
        at::empty_strided(e.sizes, e.strides, at::TensorOptions(e.dtype).device(device)));
  }

  void operator()(const Launch& l) {
    c10::SmallVector<int64_t, 64> values(l.arguments.size());
    c10::SmallVector<void*, 64> addresses(l.arguments.size());
    for (size_t i = 0; i < l.arguments.size(); ++i) {
      const auto [from, value] = l.arguments[i];
      if (from >= 0) {
        values[i] = reinterpret_cast<int64_t>(tensors[size_t(from)].data_ptr()) + value;
      } else if (from == Argument::margin) {
        std::memcpy(&values[i], &margin, sizeof margin);
      } else {
        values[i] = value;
      }
      addresses[i] = &values[i];
    }
    const auto [x, y, z] = l.programs;
    const auto launch = [&] {
      return driver.launch(l.function, x, y, z, l.threads, 1, 1, l.shared, stream, addresses.data(),
                           nullptr);
    };
    int status = launch();
    if (status == no_context && driver.retain) {
      int ordinal = 0;
      void* context = nullptr;
      status = driver.device(&ordinal, device.index());
      if (!status) status = driver.retain(&context, ordinal);
      if (!status) status = driver.enter(context);
      if (!status) status = launch();
    }
    TORCH_CHECK(status == 0, "monokernel: the driver refused to launch a kernel, with error ",
                status);
  }

  void operator()(const Operation& o) {
    torch::jit::Stack stack;
    for (const Operand& operand : o.operands) {
      switch (operand.kind) {
        case Operand::tensor: stack.emplace_back(tensors[size_t(operand.numbers[0])]); break;
        case Operand::tensors: {
          c10::List<Tensor> list;
          for (const int64_t n : operand.numbers) list.push_back(tensors[size_t(n)]);
          stack.emplace_back(std::move(list));
          break;
        }
        case Operand::device: stack.emplace_back(device); break;
        default: stack.push_back(operand.value);
      }
    }
    o.handle.callBoxed(stack);
    for (c10::IValue& value : stack) {
      if (value.isTensor())
        tensors.push_back(std::move(value).toTensor());
      else if (value.isTensorList()) {
        for (const Tensor& t : value.toTensorVector()) tensors.push_back(t);
      }
    }
  }
};

variable_list replay(const Plan& plan, variable_list operands, at::Device device, double margin) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::OptionalDeviceGuard current(device.is_cpu() ? std::nullopt : std::optional(device));
  void* stream = nullptr;
  if (!device.is_cpu()) {
    TORCH_CHECK(driver.stream && driver.stream(device.index(), &stream) == 0,
                "monokernel: PyTorch does not say on which stream of ", device, " it is");
  }
  Run run{std::move(operands), device, stream, float(margin)};
  for (const Step& step : plan.steps) {
    std::visit(run, step.what);
    for (const int64_t n : step.last) run.tensors[size_t(n)].reset();
  }
  variable_list outputs;
  outputs.reserve(plan.outputs.size());
  for (const int64_t n : plan.outputs) outputs.push_back(run.tensors[size_t(n)]);
  return outputs;
}

// --- kinds of calls -------------------------------------------------------------------------------

// Adds what a plan may depend on; false if an operand is none for a kernel. Of one that is not contiguous a
// copy takes the place. What is given twice (a layer that is used twice) is said to be.
bool describe(Key& key, variable_list& operands, at::Device device) {
  for (size_t i = 0; i < operands.size(); ++i) {
    Tensor& t = operands[i];
    if (!t.defined()) {
      key.push_back(-1);
      continue;
    }
    if (t.layout() != at::kStrided || t.device() != device || t.key_set().has_any(wrapped | lazy) ||
        !holds(t)) {
      return false;
    }
    if (!t.is_contiguous()) t = t.contiguous();
    const void* const at = t.data_ptr();
    const bool aligned = reinterpret_cast<uintptr_t>(at) % 16 == 0;
    size_t first = 0;
    while (first < i && (!operands[first].defined() || operands[first].data_ptr() != at)) ++first;
    key.push_back(int64_t(first) << 32 | int64_t(t.scalar_type()) << 8 | t.dim() << 1 |
                  int64_t(aligned));
    key.insert(key.end(), t.sizes().begin(), t.sizes().end());
  }
  return true;
}

// The plan of a kind of call, if there is one; and whether one is to be made.
struct Found {
  std::shared_ptr<const Plan> plan;
  bool wanted = false;
};

Found find(const Key& key) {
  const std::lock_guard<std::mutex> locked(lock);
  const auto found = plans.find(key);
  if (found == plans.end()) {
    if (plans.size() >= most_plans) plans.clear();
    plans.emplace(key, nullptr);
    return {};
  }
  if (!found->second) return {nullptr, true};
  return {found->second->outputs.empty() ? nullptr : found->second, false};
}

// --- a step ---------------------------------------------------------------------------------------

// The ones in Python, which get the key where they are to write a plan.
variable_list asked_forward(int64_t problem, at::ArrayRef<double> margin, const Tensor& x,
                            const std::optional<Tensor>& weight, const Parameters& params,
                            bool save, at::IntArrayRef key) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("monokernel::device_forward", "")
                             .typed<decltype(asked_forward)>();
  return op.call(problem, margin, x, weight, params, save, key);
}

variable_list asked_backward(int64_t problem, const std::optional<Tensor>& gy,
                             const std::optional<Tensor>& gout, const Tensor& x,
                             const Parameters& params, at::TensorList saved,
                             const c10::List<bool>& needs, at::IntArrayRef key) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("monokernel::device_backward", "")
                             .typed<decltype(asked_backward)>();
  return op.call(problem, gy, gout, x, params, saved, needs, key);
}

std::optional<Tensor> optional(const Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

Parameters list_of(const Tensor* from, size_t size) {
  Parameters list;
  for (size_t i = 0; i < size; ++i) list.push_back(optional(from[i]));
  return list;
}

// A problem as Python knows it, and what of it is a number at run time.
struct Asked {
  int64_t problem;
  bool replays;
  std::vector<double> margin;  // one, or one for each constraint
};

// y, the penalty or J, and what is saved; `operands` are x, the weight and the parameters.
variable_list run(const Asked& asked, variable_list operands, bool save) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Device device = operands[0].device();
  Key key{asked.problem, save, device.index()};
  if (asked.margin.size() > 1) {  // in a table that the plan has
    for (const double m : asked.margin) {
      int64_t bits;
      std::memcpy(&bits, &m, sizeof bits);
      key.push_back(bits);
    }
  }
  const bool plain = asked.replays && describe(key, operands, device);
  const Found kind = plain ? find(key) : Found();
  if (kind.plan) return replay(*kind.plan, std::move(operands), device, asked.margin[0]);
  return asked_forward(asked.problem, asked.margin, operands[0], optional(operands[1]),
                       list_of(&operands[2], operands.size() - 2), save,
                       kind.wanted ? at::IntArrayRef(key) : at::IntArrayRef());
}

struct DeviceStep : torch::autograd::Function<DeviceStep> {
  // `tensors` are x, the weight and the parameters, as far as they are there.
  static variable_list forward(AutogradContext* ctx, const Asked& asked,
                               const std::vector<bool>& present, const at::TensorList& tensors) {
    variable_list operands(present.size());
    size_t next = 0;
    for (size_t i = 0; i < present.size(); ++i) {
      if (present[i]) operands[i] = tensors[next++];
    }
    const variable_list found = run(asked, operands, true);
    const bool weighted = operands[1].defined();
    operands.erase(operands.begin() + 1);
    // Numbers, the only things that compiled autograd lifts out of here; few, since each has a name.
    ctx->saved_data["problem"] = asked.problem;
    ctx->saved_data["kind"] = int64_t(operands.size()) << 2 | weighted << 1 | asked.replays;
    operands.insert(operands.end(), found.begin() + 2, found.end());
    ctx->save_for_backward(std::move(operands));
    ctx->set_materialize_grads(false);
    return {found[0], found[1]};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t kind = ctx->saved_data["kind"].toInt();
    const auto count = size_t(kind >> 2);
    const bool weighted = kind & 2, replays = kind & 1;
    c10::List<bool> needs;
    size_t next = 0;  // among the inputs that are tensors
    for (size_t i = 0; i < count; ++i) {
      needs.push_back(saved[i].defined() && ctx->needs_input_grad(next));
      next += saved[i].defined() + (i == 0 && weighted);
    }
    variable_list grads = run_backward(ctx, outer, saved, count, needs, replays);
    if (at::GradMode::is_enabled()) guard(grads, {saved.begin(), saved.begin() + count}, outer);
    variable_list all(2);  // for what is asked, and what is present
    for (size_t i = 0; i < count; ++i) {
      if (saved[i].defined()) all.push_back(grads[i]);
      if (i == 0 && weighted) all.emplace_back();
    }
    return all;
  }

 private:
  static variable_list run_backward(AutogradContext* ctx, const variable_list& outer,
                                    const variable_list& saved, size_t count,
                                    const c10::List<bool>& needs, bool replays) {
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const int64_t problem = ctx->saved_data["problem"].toInt();
    variable_list operands{outer[0], outer[1]};
    operands.insert(operands.end(), saved.begin(), saved.end());
    const at::Device device = saved[0].device();
    Key key{problem, 2, device.index()};
    for (size_t i = 0; i < count; ++i) key.push_back(needs[i]);
    const bool plain = replays && describe(key, operands, device);
    const Found kind = plain ? find(key) : Found();
    const variable_list found =
        kind.plan ? replay(*kind.plan, std::move(operands), device, 0)
                  : asked_backward(problem, optional(operands[0]), optional(operands[1]),
                                   operands[2], list_of(&operands[3], count - 1),
                                   at::TensorList(operands).slice(2 + count), needs,
                                   kind.wanted ? at::IntArrayRef(key) : at::IntArrayRef());
    variable_list grads(count);
    size_t next = 0;
    for (size_t i = 0; i < count; ++i) {
      if (needs[i]) grads[i] = found.at(next++);
    }
    return grads;
  }
};

// y (N, D) and the penalty, or J where there is no hinge. `problem` is a number that replay.py gave;
// `replays` says whether plans may be used and made.
std::tuple<Tensor, Tensor> device_step(int64_t problem, bool replays, at::ArrayRef<double> margin,
                                       const Tensor& x, const std::optional<Tensor>& weight,
                                       const Parameters& params) {
  TORCH_CHECK_VALUE(!margin.empty(), "margin: expected one number at least, got none");
  const Asked asked{problem, replays, margin.vec()};
  variable_list operands{x, weight ? *weight : Tensor()};
  bool tracked = x.requires_grad();
  for (size_t i = 0; i < params.size(); ++i) {
    const std::optional<Tensor> p = params.get(i);
    operands.push_back(p ? *p : Tensor());
    tracked = tracked || (p && p->requires_grad());
  }
  if (!tracked || !at::GradMode::is_enabled()) {
    const variable_list found = run(asked, std::move(operands), false);
    return {found[0], found[1]};
  }
  std::vector<bool> present;
  variable_list given;
  for (const Tensor& t : operands) {
    present.push_back(t.defined());
    if (t.defined()) given.push_back(t);
  }
  const variable_list found = DeviceStep::apply(asked, present, at::TensorList(given));
  return {found[0], found[1]};
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void mk_device_connect(void* const* addresses) {
  static_assert(sizeof(Driver) == 5 * sizeof(void*), "one address for each function");
  std::memcpy(&driver, addresses, sizeof driver);
}

// The plan for a kind of call; one without outputs says that there can be none.
EXPORTED void mk_device_plan(const int64_t* key, int64_t size, const int64_t* code,
                             const char* const* names) {
  auto plan = std::make_shared<Plan>();
  try {
    *plan = plan_of({code}, names);
  } catch (const c10::Error&) {  // of an operation that this PyTorch does not have
  }
  const std::lock_guard<std::mutex> locked(lock);
  plans[Key(key, key + size)] = std::move(plan);
}

EXPORTED void mk_device_forget() {
  const std::lock_guard<std::mutex> locked(lock);
  plans.clear();
}

// PyTorch's number for a dtype, by its name; -1 for an unknown one.
EXPORTED int64_t mk_dtype_code(const char* name) {
  for (int64_t code = 0; code < int64_t(at::ScalarType::NumOptions); ++code) {
    if (c10::getDtypeNames(at::ScalarType(code)).first == name) return code;
  }
  return -1;
}

TORCH_LIBRARY_FRAGMENT(monokernel, library) {
  library.def(
      "device_step(int problem, bool replays, float[] margin, Tensor x, Tensor? weight, "
      "Tensor?[] params) -> (Tensor, Tensor)",
      &device_step);
}
