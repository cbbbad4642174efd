// SPDX-License-Identifier: Apache-2.0
// Blocks of elements between their stored type and the accumulation type.
//
// The updates read and write each element once, so conversions must keep up with memory.  The bit
// formulas of simd.h vectorise for bfloat16; float16 uses the conversion instructions (F16C) where the
// instruction set has them, with the same results for everything but the payload of a NaN.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "simd.h"

SSLK_BEGIN

constexpr int kBlock = 512;  // elements converted at a time: 2 KB of float32, well inside L1

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

template <class T, class A>
inline __attribute__((always_inline)) void widen_block(const T* in, int n, A* out) {
  for (int i = 0; i < n; ++i) out[i] = A(to_float(in[i]));
}

template <class T, class A>
inline __attribute__((always_inline)) void narrow_block(const A* in, int n, T* out) {
  for (int i = 0; i < n; ++i) from_float(in[i], &out[i]);
}
// float64 sums go to 16 bits through float32, as in torch.
inline __attribute__((always_inline)) void narrow_block(const double* in, int n, bf16* out) {
  for (int i = 0; i < n; ++i) from_float(float(in[i]), &out[i]);
}
inline __attribute__((always_inline)) void narrow_block(const double* in, int n, f16* out) {
  for (int i = 0; i < n; ++i) from_float(float(in[i]), &out[i]);
}
inline __attribute__((always_inline)) void narrow_block(const double* in, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = float(in[i]);
}
inline __attribute__((always_inline)) void narrow_block(const float* in, int n, double* out) {
  for (int i = 0; i < n; ++i) out[i] = double(in[i]);
}

#if defined(__F16C__)
inline __attribute__((always_inline)) void widen_block(const f16* in, int n, float* out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i half_f16x8;
    __builtin_memcpy(&half_f16x8, in + i, sizeof half_f16x8);
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half_f16x8));
  }
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
inline __attribute__((always_inline)) void narrow_block(const float* in, int n, f16* out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i half_f16x8 = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(out + i, &half_f16x8, sizeof half_f16x8);
  }
  for (; i < n; ++i) from_float(in[i], &out[i]);
}
#endif

SSLK_END
