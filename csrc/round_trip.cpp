// SPDX-License-Identifier: Apache-2.0
// How long a cache line takes from one core to another and back, which on virtual machines changes under a running
// program and decides how fast threads work together (docs/cpu.md).

#include <atomic>
#include <cmath>
#include <thread>

#include "openmp.h"
#include "sslkernels.h"

namespace sslk {

// Seconds, the mean of `exchanges` between two threads of the OpenMP pool; NaN when there is only one.
double round_trip(int exchanges) {
  constexpr int kSpins = 10000;  // then the other thread may be waiting for this core
  alignas(128) std::atomic<int> turn{0};
  double seconds = NAN;
#pragma omp parallel num_threads(2)
  if (omp_get_num_threads() == 2) {
    const int thread = omp_get_thread_num();
    const double start = omp_get_wtime();
    for (int i = thread; i < 2 * exchanges; i += 2) {
      for (int spin = 0; turn.load(std::memory_order_acquire) != i; ++spin) {
        if (spin > kSpins) std::this_thread::yield();
      }
      turn.store(i + 1, std::memory_order_release);
    }
    if (thread == 1) seconds = (omp_get_wtime() - start) / exchanges;
  }
  return seconds;
}

}  // namespace sslk
