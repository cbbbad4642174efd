// SPDX-License-Identifier: Apache-2.0
// What the multiply-add units of this instruction set can do at most: the ceiling that benchmarks
// compare with.  Independent chains hide the latency, and nothing but registers is touched.

#include "../openmp.h"
#include "kernels.h"
#include "tile.h"

SSLK_BEGIN
namespace {

// 12 chains: latency 4 on two ports needs 8, AVX2 has 16 registers.
constexpr int kChains = 12;
constexpr int64_t kSteps = 200000;
constexpr int kRuns = 60;

template <class M>
float chains(float seed) {
  Vec<float> acc[kChains];
  unroll<kChains>([&](auto c) SSLK_INLINE { acc[c] = splat<float>(seed + float(int(c))); });
  const Vec<ElemOf<M>> a = splat<ElemOf<M>>(ElemOf<M>(seed)), b = splat<ElemOf<M>>(ElemOf<M>(2 * seed));
  for (int64_t step = 0; step < kSteps; ++step) {
    unroll<kChains>([&](auto c) SSLK_INLINE { multiply_add<M>(acc[c], a, b); });
  }
  float sum = 0;
  unroll<kChains>([&](auto c) SSLK_INLINE { sum += sum_lanes<float>(acc[c]); });
  return sum;
}

template <class M>
double best_of_runs(int n_threads) {
  double best = 0;
  volatile float seed = 0.0f, sink = 0.0f;  // unknown to the compiler; zeros stay finite
  for (int run = 0; run < kRuns; ++run) {
    const double start = omp_get_wtime();
    int team = 0;  // there may be fewer than were asked for
#pragma omp parallel num_threads(n_threads)
    {
      const float sum = chains<M>(seed);
#pragma omp critical
      {
        sink = sink + sum;
        ++team;
      }
    }
    const double flops = 2.0 * M::kPack * Simd<float>::kLanes * kChains * double(kSteps) * team;
    const double rate = flops / (omp_get_wtime() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

// FLOP/s of n_threads threads together: float32, or bfloat16 products added in float32.
double peak_flops([[maybe_unused]] bool bf16, int n_threads) {
#if defined(__AVX512BF16__)
  return bf16 ? best_of_runs<MathBF16>(n_threads) : avx512::peak_flops(false, n_threads);
#else
  return best_of_runs<MathF32>(n_threads);
#endif
}

SSLK_END
