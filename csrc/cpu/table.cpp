// SPDX-License-Identifier: Apache-2.0
// The table of kernels of this instruction set; csrc/dispatch.cpp chooses between the tables.

#include "../sslkernels.h"
#include "kernels.h"

SSLK_BEGIN

#define SSLK_STRING_(x) #x
#define SSLK_STRING(x) SSLK_STRING_(x)

#if defined(__AVX512BF16__)
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

const Kernels& table() {
  static const Kernels kernels = {
      SSLK_STRING(SSLK_ISA_NS),
      kBf16,
      pairwise_forward,
      pairwise_backward,
      attend,
      extremes,
      peak_flops,
      contrastive_forward,
      contrastive_backward,
      regression_forward,
      regression_backward,
      paired_forward,
      paired_backward,
      ema_update,
      enqueue,
  };
  return kernels;
}

SSLK_END
