// The kernel's own product against its peak: one thread, blocks of 96 rows as the kernel cuts them.
//   g++ -O3 -std=c++17 -ffp-contract=fast -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma
//       -DMK_VECTOR_BYTES=64 -I../../csrc products.cpp -o products     (32 with -mavx2 -mfma; 16)
#include "gemm.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

template <class T> T* buffer(int64_t n) {
  T* p = static_cast<T*>(std::aligned_alloc(64, (size_t(n) * sizeof(T) + 63) / 64 * 64));
  for (int64_t i = 0; i < n; ++i) p[i] = T(0.01) * T(i % 7);
  return p;
}

template <class Run> double gflops(double flop, Run run) {
  double best = 1e30;
  const int repeats = std::max(1, int(5e8 / flop));
  for (int t = 0; t < 7; ++t) {
    const auto start = std::chrono::steady_clock::now();
    for (int r = 0; r < repeats; ++r) run();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / repeats);
  }
  return flop / best / 1e9;
}

template <class T> void widths(const char* name) {
  for (int64_t H : {32, 64, 100, 128, 256, 512}) {
    const int64_t rows = 96, ld = round_up(H, Simd<T>::lanes) + Simd<T>::lanes;
    T *h = buffer<T>(rows * ld), *g = buffer<T>(rows * ld), *w = buffer<T>(H * H);
    T *packed = buffer<T>(packed_size<T>(H, H)), *dw = buffer<T>(H * ld);
    const Packing<T> packing{packed, w, 1, H, H, H};
    for (int64_t p = 0; p < packing.panels(); ++p) packing.panel(p);
    const double flop = 2.0 * double(rows * H * H);
    const double forward = gflops(flop, [&] {
      gemm<false>(rows, H, h, ld, packing.matrix(), 0, from_zero<T>(), g, ld, Nothing{});
    });
    const Matrix<T> strided{h, rows, H, ld};
    const double weight = gflops(flop, [&] {
      gemm<true>(H, rows, g, ld, strided, 0, from_zero<T>(), dw, ld, Nothing{});
      if (dw[0] > T(1e6)) std::fill(dw, dw + H * ld, T(0));
    });
    std::printf("%s,%d,%.0f,%.0f\n", name, int(H), forward, weight);
    for (T* p : {h, g, w, packed, dw}) std::free(p);
  }
}

}  // namespace

int main() {
  std::printf("dtype,width,forward_gflops,weight_gradient_gflops\n");
  widths<float>("float32");
  widths<double>("float64");
}
