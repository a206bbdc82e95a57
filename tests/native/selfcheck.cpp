// The kernel without Python or PyTorch: values against a plain loop, gradients against central
// differences, in float64, both modes and every activation. For machines where only a binary can be
// run, such as aarch64 under emulation (tests/native/aarch64.sh).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

extern "C" {
const char* mk_isa();
void* mk_plan_new(const int64_t* flags, int64_t L, int64_t k, const int64_t* widths,
                  const int64_t* kind, const double* numbers, double margin,
                  const double* direction);
void mk_plan_drop(void* plan);
void mk_plan_shape(const void* plan, int64_t* shape);
int mk_forward(const void* plan, int64_t N, int64_t threads, const void* x, const void* weight,
               int64_t weight_per_row, const void* const* params, void* y, void* out,
               void* const* saved);
int mk_backward(const void* plan, int64_t N, int64_t threads, const void* x,
                const void* const* params, const void* gy, const void* gout, void* const* saved,
                void* gx, void* const* grads);
}

namespace {

typedef std::vector<double> Numbers;

struct Net {
  std::vector<int64_t> widths, kind;
  Numbers numbers, direction;
  int64_t k;
  bool adjoint;
  std::vector<Numbers> params;  // x, W1, b1, ...

  int64_t L() const { return int64_t(kind.size()); }
};

std::mt19937_64 engine(1);

Numbers randoms(int64_t n, double scale) {
  std::normal_distribution<double> normal(0, scale);
  Numbers v(static_cast<size_t>(n));
  for (double& each : v) each = normal(engine);
  return v;
}

// y·gy + penalty, and, where grads is given, its gradient.
double loss(const Net& net, int64_t N, const Numbers& gy, std::vector<Numbers>* grads) {
  const int64_t flags[] = {1, net.adjoint, 1, 1, 0};
  void* plan = mk_plan_new(flags, net.L(), net.k, net.widths.data(), net.kind.data(),
                           net.numbers.data(), 0.3, net.direction.data());
  int64_t shape[6];
  mk_plan_shape(plan, shape);
  std::vector<Numbers> buffers;
  void* saved[3];
  for (int i = 3; i < 6; ++i) buffers.emplace_back(static_cast<size_t>(shape[i] * N + 1), NAN);
  for (int i = 0; i < 3; ++i) saved[i] = buffers[size_t(i)].data();
  std::vector<const void*> params;
  for (size_t i = 1; i < net.params.size(); ++i) params.push_back(net.params[i].data());
  Numbers y(gy.size(), NAN);
  double penalty = NAN;
  const double* x = net.params[0].data();
  mk_forward(plan, N, 1, x, nullptr, 0, params.data(), y.data(), &penalty, saved);
  if (grads) {
    const double one = 1;
    *grads = net.params;
    std::vector<void*> places;
    for (size_t i = 1; i < grads->size(); ++i) places.push_back((*grads)[i].data());
    mk_backward(plan, N, 1, x, params.data(), gy.data(), &one, saved, (*grads)[0].data(),
                places.data());
  }
  mk_plan_drop(plan);
  double total = penalty;
  for (size_t i = 0; i < y.size(); ++i) total += y[i] * gy[i];
  return total;
}

// Piecewise linear, ELU and Softsign: σ' or σ'' jumps.
bool kinked(int64_t kind) { return kind <= 4 || kind == 10; }

// The derivative in a random direction against a central difference; returns the relative error.
double check(int64_t kind, bool adjoint, int64_t D) {
  const int64_t N = 101;
  Net net{{7, 19, 33, D}, {kind, kind, kind}, {}, {}, 3, adjoint, {}};
  const double p[] = {0, 0, 0.1, -5, 1.1, 0, 0, 0, 0, 1.7, 0, 0, 0, 0};
  const double q[] = {0, 0, 0, 5, 1.3, 0, 0, 0, 0, 50, 0, 0, 0, 0};
  for (int i = 0; i < 3; ++i) {
    for (double v : {p[kind], q[kind], 0.9}) net.numbers.push_back(v);
  }
  for (int64_t i = 0; i < D * 3; ++i) net.direction.push_back(i % 4 == 3 ? -1 : 1);
  net.params.push_back(randoms(N * 7, 1));
  for (size_t l = 0; l < 3; ++l) {
    net.params.push_back(randoms(net.widths[l] * net.widths[l + 1], 0.4));
    net.params.push_back(randoms(net.widths[l + 1], 0.4));
  }
  const Numbers gy = randoms(N * D, 1);
  std::vector<Numbers> grads;
  loss(net, N, gy, &grads);
  const double h = kinked(kind) ? 1e-9 : 1e-6;  // small where a kink must not be crossed
  double predicted = 0;
  Net up = net, down = net;
  for (size_t i = 0; i < net.params.size(); ++i) {
    const Numbers step = randoms(int64_t(net.params[i].size()), 1);
    for (size_t j = 0; j < step.size(); ++j) {
      predicted += grads[i][j] * step[j];
      up.params[i][j] += h * step[j];
      down.params[i][j] -= h * step[j];
    }
  }
  const double found = (loss(up, N, gy, nullptr) - loss(down, N, gy, nullptr)) / (2 * h);
  return std::fabs(found - predicted) / (std::fabs(found) + 1);
}

}  // namespace

int main() {
  int failed = 0, passed = 0;
  for (int64_t kind = 0; kind < 14; ++kind) {
    for (int mode = 0; mode < 2; ++mode) {
      for (int64_t D : {1, 3}) {
        const double error = check(kind, mode == 1, D);
        const bool good = error < (kinked(kind) ? 1e-4 : 1e-6);
        if (!good) std::printf("kind %d mode %d D %d: %g\n", int(kind), mode, int(D), error);
        (good ? passed : failed) += 1;
      }
    }
  }
  std::printf("%s: %d passed, %d failed\n", mk_isa(), passed, failed);
  return failed != 0;
}
