// SPDX-License-Identifier: Apache-2.0
// The table of kernels of this instruction set; csrc/dispatch.cpp chooses between the tables.

#include "../sslkernels.h"
#include "isa.h"

SSLK_BEGIN

int pairwise_forward(const PairwiseArgs&, const PairwiseForwardOut&);
int pairwise_backward(const PairwiseArgs&, const PairwiseBackwardArgs&);
int attend(const PairwiseArgs&, const AttendOut&);
int extremes(const PairwiseArgs&, const ExtremesOut&);
int ema_update(const EmaArgs&);
int enqueue(const EnqueueArgs&);

#define SSLK_STRING_(x) #x
#define SSLK_STRING(x) SSLK_STRING_(x)

const Kernels& table() {
  static const Kernels kernels = {
      SSLK_STRING(SSLK_ISA_NS), pairwise_forward, pairwise_backward, attend, extremes,
      ema_update, enqueue,
  };
  return kernels;
}

SSLK_END
