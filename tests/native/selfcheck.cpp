// The kernel without Python or PyTorch: gradients against central differences, in float64, both modes,
// chains of every activation and a few programs. For machines where only a binary can be run, such as
// aarch64 under emulation (tests/native/aarch64.sh).
#include "../../csrc/c_api.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

typedef std::vector<double> Numbers;
typedef std::vector<int64_t> Places;

std::mt19937_64 engine(1);
constexpr int64_t N = 101;

Numbers randoms(int64_t n, double scale) {
  std::normal_distribution<double> normal(0, scale);
  Numbers v(static_cast<size_t>(n));
  for (double& each : v) each = normal(engine);
  return v;
}

std::vector<std::string> kinds() {
  std::istringstream names(mk_node_names());
  std::vector<std::string> all;
  for (std::string name; names >> name;) all.push_back(name);
  return all;
}
int64_t code(const std::string& kind) {
  const std::vector<std::string> all = kinds();
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i] == kind) return int64_t(i);
  }
  std::printf("no kind %s\n", kind.c_str());
  std::exit(2);
}

// A program as the library is told of it, its parameters by place and, before them, x.
struct Net {
  int64_t d, k, count = 0;
  bool adjoint;
  Places nodes, widths, columns;
  Numbers numbers, margin, direction;
  std::vector<Numbers> operands;
  std::vector<bool> trained;
  double step = 1e-6;  // of the differences: small where a kink must not be crossed

  Net(int64_t d, int64_t k, bool adjoint) : d(d), k(k), adjoint(adjoint), widths{d} {
    operands.push_back(randoms(N * d, 1));
    trained.push_back(true);
    for (int64_t c = 0; c < k; ++c) columns.push_back(d - k + c);
  }
  int64_t D() const { return widths.back(); }

  // Appends a node and returns the number of its value; `sizes` are those of its parameters.
  int64_t add(const std::string& kind, int64_t width, const Places& inputs,
              const Places& sizes = {}, const Numbers& own = {}) {
    for (int64_t n :
         {code(kind), width, int64_t(inputs.size()), int64_t(sizes.size()), int64_t(own.size())}) {
      nodes.push_back(n);
    }
    nodes.insert(nodes.end(), inputs.begin(), inputs.end());
    for (int64_t size : sizes) {
      nodes.push_back(int64_t(operands.size()) - 1);
      operands.push_back(randoms(size, 0.4));
      trained.push_back(kind != "dropout");
    }
    numbers.insert(numbers.end(), own.begin(), own.end());
    widths.push_back(width);
    return ++count;
  }
  int64_t linear(int64_t u, int64_t width) {
    return add("linear", width, {u}, {width * widths[size_t(u)], width});
  }
  int64_t same(const std::string& kind, int64_t u, const Numbers& own, bool parameter = false) {
    const int64_t width = widths[size_t(u)];
    return add(kind, width, {u}, parameter ? Places{kind == "dropout" ? 8 : width} : Places{}, own);
  }
};

// y·gy + penalty, and, where grads is given, its gradient.
double loss(const Net& net, const Numbers& gy, std::vector<Numbers>* grads) {
  const int64_t flags[] = {1, net.adjoint, 1, 1, 0};
  const int64_t problem =
      mk_problem_new(flags, net.d, net.k, net.columns.data(), net.count, net.nodes.data(),
                     net.numbers.data(), net.margin.data(), net.direction.data());
  mk_shape shape;
  mk_problem_shape(problem, &shape);
  std::vector<Numbers> buffers;
  void* saved[3];
  for (int64_t row : shape.saved) buffers.emplace_back(static_cast<size_t>(row * N + 1), NAN);
  for (size_t i = 0; i < 3; ++i) saved[i] = buffers[i].data();
  std::vector<const void*> params;
  Places sizes;
  for (size_t i = 1; i < net.operands.size(); ++i) {
    params.push_back(net.operands[i].data());
    sizes.push_back(int64_t(net.operands[i].size()));
  }
  Numbers y(gy.size(), NAN);
  double penalty = NAN;
  const double* x = net.operands[0].data();
  mk_forward(problem, N, 1, x, nullptr, 0, params.data(), sizes.data(), y.data(), &penalty, saved);
  if (grads) {
    const double one = 1;
    *grads = net.operands;
    std::vector<void*> places;
    for (size_t i = 1; i < grads->size(); ++i) {
      places.push_back(net.trained[i] ? (*grads)[i].data() : nullptr);
    }
    mk_backward(problem, N, 1, x, params.data(), sizes.data(), gy.data(), &one, saved,
                (*grads)[0].data(), places.data());
  }
  mk_problem_drop(problem);
  double total = penalty;
  for (size_t i = 0; i < y.size(); ++i) total += y[i] * gy[i];
  return total;
}

// The derivative in a random direction against a central difference; returns the relative error.
double error_of(Net net) {
  for (int64_t i = 0; i < net.D() * net.k; ++i) {
    net.direction.push_back(i % 4 == 3 ? -1 : 1);
    net.margin.push_back(i % 2 ? 0.3 : 0.4);
  }
  const Numbers gy = randoms(N * net.D(), 1);
  std::vector<Numbers> grads;
  loss(net, gy, &grads);
  double predicted = 0;
  Net up = net, down = net;
  for (size_t i = 0; i < net.operands.size(); ++i) {
    if (!net.trained[i]) continue;
    const Numbers step = randoms(int64_t(net.operands[i].size()), 1);
    for (size_t j = 0; j < step.size(); ++j) {
      predicted += grads[i][j] * step[j];
      up.operands[i][j] += net.step * step[j];
      down.operands[i][j] -= net.step * step[j];
    }
  }
  const double found = (loss(up, gy, nullptr) - loss(down, gy, nullptr)) / (2 * net.step);
  return std::fabs(found - predicted) / (std::fabs(found) + 1);
}

bool among(const std::string& kind, const char* names) {
  return std::strstr((std::string(" ") + names + " ").c_str(), (" " + kind + " ").c_str());
}

// σ, σ' or σ'' jumps.
bool kinked(const std::string& kind) {
  return among(kind,
               "relu leaky_relu hardtanh elu softsign hardsigmoid hardswish softshrink hardshrink "
               "threshold clamp abs prelu");
}

// p, q and r of an activation.
Numbers numbers_of(const std::string& kind) {
  if (kind == "leaky_relu") return {0.1, 0, 0};
  if (among(kind, "hardtanh clamp")) return {-0.5, 0.7, 0};
  if (kind == "elu") return {1.1, 1.3, 0.9};
  if (kind == "softplus") return {1.7, 50, 0};
  if (among(kind, "softshrink hardshrink threshold")) return {0.2, -0.3, 0};
  return {0, 0, 0};
}

Net chain(const std::string& kind, bool adjoint, int64_t D) {
  Net net(7, 3, adjoint);
  // Nested, these would soon be too large; a value between keeps the others at work thrice.
  const std::string outer = among(kind, "square exp reciprocal") ? "tanh" : kind;
  net.same(outer, net.linear(0, 19), numbers_of(outer));
  net.same(kind, net.linear(net.count, 33), numbers_of(kind));
  net.same(outer, net.linear(net.count, D), numbers_of(outer));
  if (kinked(kind)) net.step = 1e-9;
  return net;
}

// Those that are defined for positive numbers alone.
Net positive(const std::string& kind, bool adjoint, int64_t D) {
  Net net(5, 2, adjoint);
  const int64_t square = net.same("square", net.linear(0, 11), {0, 0, 0});
  net.linear(net.same(kind, net.same("line", square, {1.0, 0.3}), {0, 0, 0}), D);
  return net;
}

Net residual(bool adjoint, int64_t D) {
  Net net(7, 3, adjoint);
  const int64_t h = net.linear(0, 19);
  const int64_t scaled = net.same("scale", net.same("normalise", h, {1e-3}), {}, true);
  const int64_t inner = net.linear(net.same("shift", scaled, {}, true), 26);
  const int64_t branch = net.linear(net.same("silu", inner, {0, 0, 0}), 19);
  net.linear(net.add("sum", 19, {h, branch}, {}, {1, 0.5}), D);
  return net;
}

Net gates(bool adjoint, int64_t D) {
  Net net(6, 2, adjoint);
  const int64_t both = net.linear(0, 26);
  const int64_t left = net.add("columns", 13, {both}, {}, {0, 1});
  const int64_t right = net.add("columns", 13, {both}, {}, {1, 2});
  const int64_t gate = net.same("sigmoid", right, {0, 0, 0});
  const int64_t product = net.add("product", 13, {left, gate});
  net.linear(net.same("root_mean_square", product, {1e-3}), D);
  return net;
}

Net concatenated(bool adjoint, int64_t D) {
  Net net(6, 2, adjoint);
  net.step = 1e-9;
  const int64_t h = net.same("prelu", net.linear(0, 13), {}, true);
  const int64_t all = net.add("concat", 19, {h, 0});
  const int64_t p =
      net.same("softmax", net.linear(net.same("dropout", all, {0.3, 0}, true), 9), {});
  const int64_t l = net.same("log_softmax", net.linear(all, 9), {});
  const int64_t total = net.add("total", 1, {net.add("product", 9, {p, l})});
  net.linear(net.add("sum", 9, {net.add("expand", 9, {total}), l}, {}, {1, -0.5}), D);
  return net;
}

int failed = 0, passed = 0;

// With the last columns of x constrained, and with columns that lie apart.
void check(const std::string& name, Net net) {
  for (bool apart : {false, true}) {
    for (int64_t c = 0; apart && c < net.k; ++c) net.columns[size_t(c)] = 2 * c + (c > 1);
    const double error = error_of(net);
    const bool good = error < (net.step < 1e-6 ? 1e-4 : 1e-6);
    if (!good) {
      std::printf("%s, %s, D %d, columns %s: %g\n", name.c_str(),
                  net.adjoint ? "adjoint" : "tangent", int(net.D()), apart ? "apart" : "last",
                  error);
    }
    (good ? passed : failed) += 1;
  }
}

}  // namespace

int main() {
  for (bool adjoint : {false, true}) {
    for (int64_t D : {1, 3}) {
      for (const std::string& kind : kinds()) {
        if (kind == "linear") break;  // the activations come first
        check(kind, among(kind, "sqrt log reciprocal") ? positive(kind, adjoint, D)
                                                       : chain(kind, adjoint, D));
      }
      check("residual", residual(adjoint, D));
      check("gates", gates(adjoint, D));
      check("concatenated", concatenated(adjoint, D));
    }
  }
  std::printf("%s: %d passed, %d failed\n", mk_isa(), passed, failed);
  return failed != 0;
}
