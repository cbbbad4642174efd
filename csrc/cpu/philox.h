// SPDX-License-Identifier: Apache-2.0
// Random words that depend on nothing but a key and a counter: Philox4x32-10 of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011.  sslkernels/backends/rounding.py is the plain twin.
#pragma once

#include <cstdint>

#include "simd.h"

SSLK_BEGIN

// c becomes the four words of this counter.
inline __attribute__((always_inline)) void philox(uint32_t k0, uint32_t k1, uint32_t (&c)[4]) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u;
    const uint64_t product1 = uint64_t(c[2]) * 0xCD9E8D57u;
    c[0] = uint32_t(product1 >> 32) ^ c[1] ^ k0;
    c[1] = uint32_t(product1);
    c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
    c[3] = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Upper and lower half of a[l] * factor.
inline SSLK_INLINE void multiply_wide(Vec<uint32_t> a, uint32_t factor, Vec<uint32_t>* high, Vec<uint32_t>* low) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), m = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_maskz_mul_epu32(0xff, x, m),
                odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, x, 32), m);
  *high = bit_cast<Vec<uint32_t>>(_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd));
  *low = bit_cast<Vec<uint32_t>>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = bit_cast<__m256i>(a), m = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  *high = bit_cast<Vec<uint32_t>>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *low = bit_cast<Vec<uint32_t>>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int l = 0; l < Simd<uint32_t>::kLanes; ++l) {
    const uint64_t product = uint64_t(a[l]) * factor;
    (*high)[l] = uint32_t(product >> 32);
    (*low)[l] = uint32_t(product);
  }
#endif
}

// The same for a counter in each lane.
inline SSLK_INLINE void philox_lanes(uint32_t k0, uint32_t k1, Vec<uint32_t> (&c)[4]) {
#pragma GCC unroll 10
  for (int r = 0; r < 10; ++r) {
    Vec<uint32_t> high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

SSLK_END
