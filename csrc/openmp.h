// SPDX-License-Identifier: Apache-2.0
// OpenMP's functions, also for a compiler without OpenMP: there every team is one thread.
//
// Kernels ask how many threads a team has got, which may be fewer than were asked for, so nothing else changes.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
#include <time.h>

static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
static inline double omp_get_wtime() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}
#endif
