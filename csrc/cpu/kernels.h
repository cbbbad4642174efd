// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, each defined in the file named beside it.
#pragma once

#include "../sslkernels.h"
#include "isa.h"

// AVX512-BF16 adds arithmetic to AVX-512: of avx512_bf16 only the files with tiles are compiled
// (setup.py), in bfloat16, and all else is avx512.
#if defined(__AVX512BF16__)
namespace sslk {
namespace avx512 {
int pairwise_forward(const PairwiseArgs&, const PairwiseForwardOut&);
int pairwise_backward(const PairwiseArgs&, const PairwiseBackwardArgs&);
int attend(const PairwiseArgs&, const AttendOut&);
double peak_flops(bool bf16, int n_threads);
const Kernels& table();
}  // namespace avx512
}  // namespace sslk
#endif

SSLK_BEGIN

int pairwise_forward(const PairwiseArgs&, const PairwiseForwardOut&);     // pairwise_forward.cpp
int pairwise_backward(const PairwiseArgs&, const PairwiseBackwardArgs&);  // pairwise_backward.cpp
int64_t padded_rows(int64_t n);                                           // pairwise_backward.cpp
int attend(const PairwiseArgs&, const AttendOut&);                        // attend.cpp
int extremes(const PairwiseArgs&, const ExtremesOut&);                    // extremes.cpp
double peak_flops(bool bf16, int n_threads);                              // peak.cpp
int contrastive_forward(const ContrastiveArgs&, const ContrastiveState&, void* loss,
                        int64_t* rank);  // contrastive.cpp
int contrastive_backward(const ContrastiveArgs&, const ContrastiveState&,
                         const ContrastiveBackwardArgs&);  // contrastive.cpp
int contrastive_at_once(const ContrastiveArgs&, const ContrastiveState&, void* loss,
                        const ContrastiveBackwardArgs&);                       // contrastive.cpp
int64_t kept_tiles(Layout layout, DType dtype, int64_t n, int64_t d);          // contrastive.cpp
int unit_forward(const UnitArgs&, DType unit_dtype, void* unit, float* norm);  // unit.cpp
int unit_backward(const UnitArgs&, DType dunit_dtype, const Rows& dunit, const float* norm, void* dx);  // unit.cpp
int regression_forward(const RegressionArgs&, void* state, void* loss);  // regression.cpp
int regression_backward(const RegressionArgs&, const void* state, const void* dloss, int64_t dloss_stride,
                        void* dprediction);                                                 // regression.cpp
int paired_forward(const PairedArgs&, const PairedState&, const PairedForwardOut&);         // paired.cpp
int paired_backward(const PairedArgs&, const PairedState&, const PairedBackwardArgs&);      // paired.cpp
int triplet_forward(const TripletArgs&, const TripletState&, void* loss);                   // triplet.cpp
int triplet_backward(const TripletArgs&, const TripletState&, const TripletBackwardArgs&);  // triplet.cpp
int vae_forward(const VaeArgs&, const VaeLatent&, void* reconstruction, void* kl);          // vae.cpp
int vae_backward(const VaeArgs&, const VaeLatent&, const VaeBackwardArgs&);                 // vae.cpp
int reparameterize(const NoiseArgs&);                                                       // noise.cpp
int features_forward(const FeatureArgs&, void* out);                                        // features.cpp
int features_backward(const FeatureArgs&, const void* dout);                                // features.cpp
int ema_update(const EmaArgs&);                                                             // ema.cpp
int enqueue(const EnqueueArgs&);                                                            // queue.cpp

SSLK_END
