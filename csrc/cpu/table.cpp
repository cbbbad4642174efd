// SPDX-License-Identifier: Apache-2.0
// The table of kernels of this instruction set; csrc/dispatch.cpp chooses between the tables.

#include "../sslkernels.h"
#include "kernels.h"

SSLK_BEGIN

#define SSLK_STRING_(x) #x
#define SSLK_STRING(x) SSLK_STRING_(x)

#if defined(__AVX512BF16__)

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels all = avx512::table();
    all.isa = SSLK_STRING(SSLK_ISA_NS);
    all.bf16 = true;
    all.pairwise_forward = pairwise_forward;
    all.pairwise_backward = pairwise_backward;
    all.attend = attend;
    all.peak_flops = peak_flops;
    return all;
  }();
  return kernels;
}

#else

const Kernels& table() {
  static const Kernels kernels = {
      SSLK_STRING(SSLK_ISA_NS),
      false,
      pairwise_forward,
      pairwise_backward,
      attend,
      extremes,
      peak_flops,
      contrastive_forward,
      contrastive_backward,
      contrastive_at_once,
      kept_tiles,
      unit_forward,
      unit_backward,
      regression_forward,
      regression_backward,
      paired_forward,
      paired_backward,
      triplet_forward,
      triplet_backward,
      vae_forward,
      vae_backward,
      reparameterize,
      features_forward,
      features_backward,
      ema_update,
      enqueue,
  };
  return kernels;
}

#endif

SSLK_END
