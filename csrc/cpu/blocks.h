// SPDX-License-Identifier: Apache-2.0
// Blocks of kBlock elements of any dtype in the accumulation type, for passes over every element.
#pragma once

#include "../sslkernels.h"
#include "narrow.h"

SSLK_BEGIN

// Widens elements [offset, offset + count) of `data`; what is left of the block's last vector becomes 0.
template <class T>
using ReadBlock = void (*)(const void* data, int64_t offset, int count, T* out);
template <class T>
using WriteBlock = void (*)(const T* in, int count, void* data, int64_t offset);

template <class In, class T>
void read_block(const void* data, int64_t offset, int count, T* out) {
  widen_block(static_cast<const In*>(data) + offset, count, out);
  for (int i = count; i % Simd<T>::kLanes != 0; ++i) out[i] = T(0);
}

template <class Out, class T>
void write_block(const T* in, int count, void* data, int64_t offset) {
  if constexpr (SameType<Out, T>::value) {
    std::memcpy(static_cast<T*>(data) + offset, in, size_t(count) * sizeof(T));
  } else {
    narrow_block(in, count, static_cast<Out*>(data) + offset);
  }
}

template <class T>
ReadBlock<T> reader_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return read_block<double, T>;
    case DType::bf16: return read_block<bf16, T>;
    case DType::f16: return read_block<f16, T>;
    default: return read_block<float, T>;
  }
}

template <class T>
WriteBlock<T> writer_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return write_block<double, T>;
    case DType::bf16: return write_block<bf16, T>;
    case DType::f16: return write_block<f16, T>;
    default: return write_block<float, T>;
  }
}

// e^x = scale (1 + part), scale a power of 2 and part = e^a - 1 with |a| <= ln(2) / 2, by Taylor's series.  Unlike
// exp2_v this is exact at 0, and part keeps its digits near 0.  Needs x <= 127 ln(2) (1023 ln(2)); below the
// smallest normal exponent x is clamped there, and a NaN stays.
template <class T>
inline SSLK_INLINE Vec<T> exp_part(Vec<T> x, Vec<T>* scale) {
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kTerms = kSingle ? 7 : 13;  // the next one is below 1e-8 and 1e-17
  constexpr T kLeast = kSingle ? T(-126) : T(-1022);
  constexpr T kMagic = kSingle ? T(12583039.0) : T(6755399441056767.0);  // as in exp2_v
  Vec<T> t = x * T(kLog2E);
  t = t < kLeast ? splat<T>(kLeast) : t;
  const Vec<T> shifted = t + kMagic;
  const Vec<T> a = (t - (shifted - kMagic)) * T(kLn2);
  Vec<T> h = splat<T>(T(1));
  for (int n = kTerms; n >= 2; --n) h = T(1) + h * (a * T(1.0 / n));
  *scale = bit_cast<Vec<T>>(bit_cast<IVec<T>>(shifted) << (kSingle ? 23 : 52));
  return a * h;
}

template <class T>
inline SSLK_INLINE Vec<T> or_infinity(Vec<T> x, Vec<T> result) {
  return x > T((sizeof(T) == 4 ? 127 : 1023) * kLn2) ? splat<T>(T(__builtin_inf())) : result;
}

// e^x; 0 is replaced by the smallest normal number.
template <class T>
inline SSLK_INLINE Vec<T> exp_v(Vec<T> x) {
  Vec<T> scale;
  const Vec<T> part = exp_part<T>(x, &scale);
  return or_infinity<T>(x, scale + scale * part);
}

// e^x - 1, with the digits of x near 0.
template <class T>
inline SSLK_INLINE Vec<T> expm1_v(Vec<T> x) {
  Vec<T> scale;
  const Vec<T> part = exp_part<T>(x, &scale);
  return or_infinity<T>(x, scale * part + (scale - T(1)));
}

SSLK_END
