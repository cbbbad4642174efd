// SPDX-License-Identifier: Apache-2.0
// One vector type for every instruction set: GCC/Clang vector extensions, sized by the target flags.
//
// The compiler contracts a * b + c to FMA where the target has it (-ffp-contract=fast).  NaN handling
// matters in every helper: `cond ? a : b` with a comparison that is false for NaN is written so that
// the NaN survives.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"

SSLK_BEGIN

#define SSLK_INLINE __attribute__((always_inline))

// f(0), f(1), ... f(N - 1) with constants for arguments: arrays that they index stay in registers.
template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};
template <class F, int... I>
inline SSLK_INLINE void unroll_at(F& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int N, class F>
inline SSLK_INLINE void unroll(F&& f) {
  unroll_at(f, std::make_integer_sequence<int, N>{});
}

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVecBytes)));
  using int_t = int32_t;
  static constexpr int kLanes = kVecBytes / 4;
};

template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(kVecBytes)));
  typedef int64_t ivec __attribute__((vector_size(kVecBytes)));
  using int_t = int64_t;
  static constexpr int kLanes = kVecBytes / 8;
};

// Pairs of bfloat16, see MathBF16 in tile.h.
template <>
struct Simd<uint32_t> {
  typedef uint32_t vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVecBytes)));
  using int_t = int32_t;
  static constexpr int kLanes = kVecBytes / 4;
};

template <class T>
using Vec = typename Simd<T>::vec;
template <class T>
using IVec = typename Simd<T>::ivec;
template <class T>
using Int = typename Simd<T>::int_t;

template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline __attribute__((always_inline)) IVec<T> load_int(const Int<T>* p) {
  IVec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline __attribute__((always_inline)) void store_int(Int<T>* p, IVec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline __attribute__((always_inline)) Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, which 0 + x is not: the compiler then broadcasts from memory
}

template <class T>
inline __attribute__((always_inline)) IVec<T> splat_int(Int<T> x) {
  return x - IVec<T>{};
}

template <class V, class U>
inline __attribute__((always_inline)) V bit_cast(U u) {
  static_assert(sizeof(V) == sizeof(U), "bit_cast between different sizes");
  V v;
  __builtin_memcpy(&v, &u, sizeof v);
  return v;
}

// x where the mask is all ones, +0 where it is zero; unlike a multiplication it also stops inf and NaN.
template <class T>
inline __attribute__((always_inline)) Vec<T> keep(Vec<T> x, IVec<T> mask) {
  return bit_cast<Vec<T>>(bit_cast<IVec<T>>(x) & mask);
}

// a where it is larger (smaller) than b, else b; also where one is a NaN.
inline SSLK_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
inline SSLK_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}
inline SSLK_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
inline SSLK_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return a < b ? a : b; }

// All ones in the first `count` lanes (count may be negative or more than there are lanes).
template <class T>
inline __attribute__((always_inline)) IVec<T> lanes_below(int64_t count) {
  IVec<T> lane = {};
  for (int l = 0; l < Simd<T>::kLanes; ++l) lane[l] = l;
  const int64_t lanes = Simd<T>::kLanes;
  return lane < splat_int<T>(Int<T>(count < 0 ? 0 : (count > lanes ? lanes : count)));
}

// Bit l: whether lane l of a mask is all ones.
template <class T>
inline __attribute__((always_inline)) uint32_t lane_bits(IVec<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return uint32_t(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  if constexpr (sizeof(T) == 8) return uint32_t(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < Simd<T>::kLanes; ++l) bits |= uint32_t(mask[l] & 1) << l;
  return bits;
#endif
}

template <class T>
inline __attribute__((always_inline)) T sum_lanes(Vec<T> v) {
  T s = v[0];
  for (int l = 1; l < Simd<T>::kLanes; ++l) s += v[l];
  return s;
}

// Lane l of the result is lane lanes[l] of a and b, which follow each other.
template <class E>
inline SSLK_INLINE Vec<E> shuffle(Vec<E> a, Vec<E> b, IVec<E> lanes) {
#if defined(__clang__)
  constexpr int L = Simd<E>::kLanes;
  Vec<E> result = {};
  for (int l = 0; l < L; ++l) result[l] = lanes[l] < L ? a[lanes[l]] : b[lanes[l] - L];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Transposes L vectors of L lanes: lane c of v[r] becomes lane r of v[c].  Stage h swaps the h x h
// squares beside the diagonal of every 2h x 2h square.
template <class E>
inline SSLK_INLINE void transpose(Vec<E> (&v)[Simd<E>::kLanes]) {
  constexpr int L = Simd<E>::kLanes;
  unroll<5>([&](auto stage) SSLK_INLINE {
    constexpr int h = 1 << stage;
    if constexpr (h < L) {
      IVec<E> low = {}, high = {};
      for (int l = 0; l < L; ++l) {
        low[l] = l & h ? L + l - h : l;
        high[l] = l & h ? L + l : l + h;
      }
      unroll<L>([&](auto r) SSLK_INLINE {
        if constexpr ((r & h) == 0) {
          const Vec<E> a = v[r], b = v[r + h];
          v[r] = shuffle<E>(a, b, low);
          v[r + h] = shuffle<E>(a, b, high);
        }
      });
    }
  });
}

// ----------------------------------------------------------------------------- exp2, log2, softplus

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^t for t <= 127 (1023).  Arguments below the smallest normal exponent are clamped there, so that no
// denormal appears.  float: degree 5, relative error 7.5e-8 on [-1/2, 1/2] (minimax in relative error);
// double: degree 12, 6e-20 before rounding.
// kBounded: |t| <= 126 is known (or t is a NaN), and nothing is clamped.
// kCoarse: degree 4, 2.6e-6, for operands that were rounded to bfloat16 (2e-3).
template <bool kBounded, bool kCoarse>
inline SSLK_INLINE Vec<float> exp2_of(Vec<float> t) {
  if constexpr (!kBounded) t = larger(splat<float>(-126.0f), t);
  // 1.5 * 2^23 + 127: adding it leaves round(t) + 127, the exponent field of 2^round(t), in the low bits.
  const float magic = 12583039.0f;
  Vec<float> shifted = t + magic;
  Vec<float> f = t - (shifted - magic);
  Vec<float> p;
  if constexpr (kCoarse) {
    p = splat<float>(0.009570101967668544f);
    p = p * f + 0.055917860761546305f;
    p = p * f + 0.2402474483031089f;
    p = p * f + 0.6931218146828059f;
    p = p * f + 0.9999992614437773f;
  } else {
    p = splat<float>(0.0013276472167819943f);
    p = p * f + 0.0096755413310213911f;
    p = p * f + 0.055507132728753912f;
    p = p * f + 0.24022119723969178f;
    p = p * f + 0.69314696706526493f;
    p = p * f + 1.0000000716546416f;
  }
  return p * bit_cast<Vec<float>>(bit_cast<IVec<float>>(shifted) << 23);
}
inline SSLK_INLINE Vec<float> exp2_v(Vec<float> t) { return exp2_of<false, false>(t); }

inline __attribute__((always_inline)) Vec<double> exp2_v(Vec<double> t) {
  t = t < -1022.0 ? splat<double>(-1022.0) : t;
  const double magic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  Vec<double> shifted = t + magic;
  Vec<double> f = t - (shifted - magic);
  Vec<double> p = splat<double>(2.5733568308756891235e-11);
  p = p * f + 4.4566753410482058782e-10;
  p = p * f + 7.0548943863483480445e-9;
  p = p * f + 1.017805119296064896e-7;
  p = p * f + 1.3215486815999976975e-6;
  p = p * f + 0.000015252733856293466416;
  p = p * f + 0.00015403530393362755291;
  p = p * f + 0.0013333558146390352775;
  p = p * f + 0.0096181291076284830543;
  p = p * f + 0.055504108664821698992;
  p = p * f + 0.24022650695910071228;
  p = p * f + 0.69314718055994530835;
  p = p * f + 1.0;
  return p * bit_cast<Vec<double>>(bit_cast<IVec<double>>(shifted) << 52);
}

// log2 of 0 (-inf), normal positive numbers and inf; a NaN stays.  x = 2^e m with m within a factor sqrt(2)
// of 1, log(m) = 2 atanh(y), y = (m - 1) / (m + 1), |y| < 0.172: 11 terms leave 1e-18.
inline SSLK_INLINE Vec<double> log2_v(Vec<double> x) {
  const IVec<double> bits = bit_cast<IVec<double>>(x);
  const IVec<double> e = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
  const Vec<double> m = bit_cast<Vec<double>>(bits - (e << 52));
  const Vec<double> y = (m - 1.0) / (m + 1.0), y2 = y * y;
  Vec<double> p = splat<double>(1.0 / 21);
  for (int n = 9; n >= 0; --n) p = p * y2 + 1.0 / (2 * n + 1);
  const Vec<double> result = __builtin_convertvector(e, Vec<double>) + (2.0 * kLog2E) * (y * p);
  const Vec<double> infinity = splat<double>(__builtin_inf());
  return x == 0.0 ? -infinity : (x < infinity ? result : x);
}

// log2(1 + x) for x >= 0, to the digits of x: the second term is what rounding 1 + x lost.
inline SSLK_INLINE Vec<double> log2_1p_v(Vec<double> x) {
  const Vec<double> sum = 1.0 + x;
  return log2_v(sum) + (x - (sum - 1.0)) / sum * kLog2E;
}

// -|x|, for which the exponential can't overflow.
inline SSLK_INLINE Vec<float> minus_abs(Vec<float> x) {
  return bit_cast<Vec<float>>(bit_cast<IVec<float>>(x) | splat_int<float>(INT32_MIN));
}
inline SSLK_INLINE Vec<double> minus_abs(Vec<double> x) {
  return bit_cast<Vec<double>>(bit_cast<IVec<double>>(x) | splat_int<double>(INT64_MIN));
}

// 1 / x for normal x: an estimate of 12 (14 with AVX-512) bits and one step of Newton, which takes a
// quarter of the time of a division.  Relative error below 2e-7.
inline SSLK_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = bit_cast<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
  return y + y * (1.0f - x * y);
#elif defined(__AVX2__)
  const Vec<float> y = bit_cast<Vec<float>>(_mm256_rcp_ps(bit_cast<__m256>(x)));
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}
inline SSLK_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// log(1 + exp(x)) = max(x, 0) + log1p(e), e = exp(-|x|) <= 1.  float: log1p(e) = e p(e), p of degree 8 (minimax in
// relative error, 3e-8); double: log1p(e) = 2 atanh(y), y = e / (2 + e) <= 1/3, the next term below half an ulp.
inline SSLK_INLINE Vec<float> softplus_v(Vec<float> x) {
  const Vec<float> e = exp2_v(minus_abs(x) * float(kLog2E));
  Vec<float> p = splat<float>(0.005232694261758521f);
  p = p * e - 0.02950523876707348f;
  p = p * e + 0.07822595186123846f;
  p = p * e - 0.13663245793390952f;
  p = p * e + 0.19106006760116692f;
  p = p * e - 0.24842982213554102f;
  p = p * e + 0.333190968075461f;
  p = p * e - 0.4999949314048224f;
  p = p * e + 0.9999999698795629f;
  return larger(Vec<float>{}, x) + e * p;
}
inline SSLK_INLINE Vec<double> softplus_v(Vec<double> x) {
  constexpr int kTerms = 17;
  Vec<double> e = exp2_v(minus_abs(x) * kLog2E);
  Vec<double> y = e * reciprocal(2.0 + e);
  Vec<double> y2 = y * y;
  Vec<double> p = splat<double>(1.0 / (2 * kTerms - 1));
  for (int n = kTerms - 2; n >= 0; --n) p = p * y2 + 1.0 / (2 * n + 1);
  return (x > 0.0 ? x : (x == x ? Vec<double>{} : x)) + 2.0 * y * p;
}

// 1 / (1 + 2^-t).  float: the exponential is kept where its reciprocal is a normal number.
inline SSLK_INLINE Vec<float> logistic2_v(Vec<float> t) {
  return reciprocal(1.0f + exp2_of<true, false>(smaller(splat<float>(125.0f), larger(splat<float>(-126.0f), -t))));
}
inline SSLK_INLINE Vec<double> logistic2_v(Vec<double> t) {
  const Vec<double> e = exp2_v(minus_abs(t));
  return (t < 0.0 ? e : splat<double>(1.0)) * reciprocal(1.0 + e);
}
// 1 / (1 + exp(-x)).
inline SSLK_INLINE Vec<float> logistic_v(Vec<float> x) { return logistic2_v(x * float(kLog2E)); }
inline SSLK_INLINE Vec<double> logistic_v(Vec<double> x) { return logistic2_v(x * kLog2E); }

// -------------------------------------------------------------------------------- 16-bit conversions

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  return bit_cast<float>(u);
}

// Branch-free half to float: the exponent is rebased by a multiplication with 2^112, which also
// normalises denormals; inf and NaN get their exponent bits put back.
inline __attribute__((always_inline)) float to_float(f16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  float f = bit_cast<float>(magnitude) * 5192296858534827628530496329220096.0f;  // 2^112
  uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(f) | special | sign);
}

inline __attribute__((always_inline)) float to_float(float x) { return x; }
inline __attribute__((always_inline)) double to_float(double x) { return x; }

// Round to nearest even, as torch does.
inline __attribute__((always_inline)) void from_float(float x, bf16* out) {
  uint32_t u = bit_cast<uint32_t>(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = x != x ? uint16_t(0x7fc0u) : uint16_t(rounded);
}

inline __attribute__((always_inline)) void from_float(float x, f16* out) {
  uint32_t u = bit_cast<uint32_t>(x);
  uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  uint32_t half;
  if (u >= 0x7f800000u) {
    half = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (u >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (u < 0x38800000u) {  // denormal half: let the float adder round at 2^-24
    float f = bit_cast<float>(u) + 0.5f;
    half = bit_cast<uint32_t>(f) - 0x3f000000u;
  } else {
    half = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(half | sign);
}

inline __attribute__((always_inline)) void from_float(float x, float* out) { *out = x; }
inline __attribute__((always_inline)) void from_float(double x, double* out) { *out = x; }

#if defined(__AVX512BF16__)
// 32 floats, rounded to bfloat16, in order.
inline SSLK_INLINE Vec<uint32_t> pair_along(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<uint32_t>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
}

// Lane l: low[l] and high[l], rounded to bfloat16.
inline SSLK_INLINE Vec<uint32_t> pair_across(Vec<float> low, Vec<float> high) {
  Vec<uint32_t> order = {};
  for (uint32_t l = 0; l < 16; ++l) order[l] = l | (l + 16) << 16;
  return bit_cast<Vec<uint32_t>>(
      _mm512_permutexvar_epi16(bit_cast<__m512i>(order), bit_cast<__m512i>(pair_along(low, high))));
}
#endif

template <class In>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// Accumulation type: float64 for float64, float32 for everything else.
template <class In>
using Acc = typename AccOf<In>::type;

SSLK_END
