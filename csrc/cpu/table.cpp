// SPDX-License-Identifier: Apache-2.0
// The table of kernels of this instruction set; csrc/dispatch.cpp chooses between the tables.

#include "../sslkernels.h"
#include "kernels.h"

SSLK_BEGIN

#define SSLK_STRING_(x) #x
#define SSLK_STRING(x) SSLK_STRING_(x)

const Kernels& table() {
  static const Kernels kernels = {
      SSLK_STRING(SSLK_ISA_NS), pairwise_forward,   pairwise_backward,   attend,     extremes, contrastive_forward,
      contrastive_backward,     regression_forward, regression_backward, ema_update, enqueue,
  };
  return kernels;
}

SSLK_END
