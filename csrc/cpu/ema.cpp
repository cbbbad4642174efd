// SPDX-License-Identifier: Apache-2.0
// Exponential moving average over a whole parameter list in one call:
//
//   target = fma(decay, target, (1 - decay) * source)
//
// in float32, or in float64 if either side is float64, rounded once to the target's type.  Bound by
// memory (12 bytes an element in float32): plain loads and stores in order, which the hardware
// prefetches; non-temporal stores and software prefetch both measured slower.
//
// Threads get equal shares of the elements, not of the tensors.  Every element is computed by the same
// formula wherever a share begins, so the number of threads changes no bit; nor does the instruction
// set, since a set without FMA computes the same rounding in float64.
//
// Stochastic rounding of 16-bit targets: random bits from Philox4x32-10 (philox.h) with key = seed and counter
// = (element, step, tensor), so that they depend on nothing else.  backends/rounding.py is the plain twin.

#include <cstdint>

#include "narrow.h"
#include "philox.h"
#include "simd.h"
#include "sslkernels.h"

SSLK_BEGIN
namespace {

// A thread is worth starting for this many elements: 12 bytes each at some 30 GB/s take 13 us, a few
// times what it costs to start and join a team.
constexpr int64_t kGrain = 32768;

inline __attribute__((always_inline)) double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

#if defined(__FP_FAST_FMAF)
inline __attribute__((always_inline)) float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// The product of two floats is exact in double.  Its sum with c is rounded to odd (an inexact sum gets
// its last bit set), after which rounding to float is what rounding the exact sum would have been:
// Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
// to odd", IEEE Trans. Computers 57 (2008).
inline __attribute__((always_inline)) float fused(float a, float b, float c) {
  const double product = double(a) * double(b);
  const double sum = product + double(c);
  const double part = sum - product;
  const double error = (product - (sum - part)) + (double(c) - part);  // exact (Knuth's two-sum)
  int64_t bits = bit_cast<int64_t>(sum);
  const int64_t inexact = (error > 0.0) | (error < 0.0);  // false for NaN: inf and NaN stay
  const int64_t towards = (error > 0.0) == (sum > 0.0) ? 1 : -1;
  bits += (inexact & ~bits & 1) * towards;
  return float(bit_cast<double>(bits));
}
#endif

// ---- Stochastic rounding -----------------------------------------------------------------------

struct Random {
  uint32_t key0, key1;  // seed
  uint32_t step;
  uint32_t tensor;
};

// Counter (group low, group high, step, tensor): a word each for the four elements of a group.
inline __attribute__((always_inline)) void philox_group(const Random& random, uint64_t group, uint32_t out[4]) {
  uint32_t words[4] = {uint32_t(group), uint32_t(group >> 32), random.step, random.tensor};
  philox(random.key0, random.key1, words);
  for (int i = 0; i < 4; ++i) out[i] = words[i];
}

// To one of the two neighbours, the nearer the likelier: with n bits to drop from the significand m,
// (m + r) >> n where r holds the n highest bits of the random word.
inline __attribute__((always_inline)) void round_stochastic(float x, uint32_t word, bf16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + (word >> 16)) >> 16;  // an inf has no bits to carry
  out->bits = x != x ? uint16_t(0x7fc0u) : uint16_t(rounded);
}

// float16 drops 13 bits from 2^-14 on, and more below, where its spacing stays 2^-24.
inline __attribute__((always_inline)) void round_stochastic(float x, uint32_t word, f16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t exponent = magnitude >> 23;  // biased by 127
  uint32_t half;
  if (magnitude >= 0x7f800000u) {
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (exponent >= 113) {
    half = (magnitude + (word >> 19) - (112u << 23)) >> 13;
    half = half > 0x7c00u ? 0x7c00u : half;  // 65536 and above
  } else {
    const uint32_t drop = 126 - exponent;  // at least 14
    const uint64_t significand = (magnitude & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0u);
    if (drop <= 32) {
      half = uint32_t((significand + (word >> (32 - drop))) >> drop);
    } else if (drop < 56) {
      half = uint32_t((significand + (uint64_t(word) << (drop - 32))) >> drop);
    } else {
      half = 0;  // below the smallest probability that 32 random bits can express
    }
  }
  out->bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// ---- Kernels -----------------------------------------------------------------------------------

template <class T, class S>
struct AccOfPair {
  using type = float;
};
template <class S>
struct AccOfPair<double, S> {
  using type = double;
};
template <class T>
struct AccOfPair<T, double> {
  using type = double;
};
template <>
struct AccOfPair<double, double> {
  using type = double;
};

template <class A>
struct Decay {
  A keep;  // decay
  A take;  // 1 - decay, formed in double
};

// Both sides are of the accumulation type: straight through the registers.
template <class A>
void update_same(A* target, const A* source, int64_t n, Decay<A> decay) {
  // A tensor may be its own source: same address, same element, so iterations stay independent.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    target[i] = fused(decay.keep, target[i], decay.take * source[i]);
  }
}

// `first` is the place of target[0] in its tensor, for the random bits.
template <class T, class S>
void update_mixed(T* target, const S* source, int64_t n, Decay<typename AccOfPair<T, S>::type> decay, bool stochastic,
                  const Random& random, int64_t first) {
  using A = typename AccOfPair<T, S>::type;
  A wide[kBlock];
  A online[kBlock];
  for (int64_t b = 0; b < n; b += kBlock) {
    const int count = int(n - b < kBlock ? n - b : kBlock);
    widen_block(target + b, count, wide);
    widen_block(source + b, count, online);
#pragma omp simd
    for (int i = 0; i < count; ++i) wide[i] = fused(decay.keep, wide[i], decay.take * online[i]);
    if constexpr (sizeof(T) == 2) {
      if (stochastic) {
        // Element e has word e mod 4 of group e / 4; a part of a tensor may begin inside of a group.
        uint32_t words[kBlock + 8];
        const uint64_t element = uint64_t(first + b);
        const int skip = int(element % 4);
        for (int g = 0; 4 * g < skip + count; ++g) philox_group(random, element / 4 + uint64_t(g), words + 4 * g);
        for (int i = 0; i < count; ++i) round_stochastic(float(wide[i]), words[skip + i], &target[b + i]);
        continue;
      }
    }
    narrow_block(wide, count, target + b);
  }
}

template <class T, class S>
void update(const EmaEntry& entry, int64_t begin, int64_t end, const EmaArgs& args) {
  using A = typename AccOfPair<T, S>::type;
  T* target = static_cast<T*>(entry.target) + begin;
  const S* source = static_cast<const S*>(entry.source) + begin;
  const Decay<A> decay = {A(args.decay), A(1.0 - args.decay)};
  if constexpr (SameType<T, A>::value && SameType<S, A>::value) {
    update_same<A>(target, source, end - begin, decay);
  } else {
    const Random random = {uint32_t(args.seed), uint32_t(args.seed >> 32), args.step, entry.index};
    update_mixed<T, S>(target, source, end - begin, decay, args.stochastic_rounding, random, entry.first + begin);
  }
}

template <class T>
void update_target(const EmaEntry& entry, int64_t begin, int64_t end, const EmaArgs& args) {
  switch (entry.source_dtype) {
    case DType::f32: update<T, float>(entry, begin, end, args); break;
    case DType::f64: update<T, double>(entry, begin, end, args); break;
    case DType::bf16: update<T, bf16>(entry, begin, end, args); break;
    case DType::f16: update<T, f16>(entry, begin, end, args); break;
  }
}

void update_entry(const EmaEntry& entry, int64_t begin, int64_t end, const EmaArgs& args) {
  switch (entry.target_dtype) {
    case DType::f32: update_target<float>(entry, begin, end, args); break;
    case DType::f64: update_target<double>(entry, begin, end, args); break;
    case DType::bf16: update_target<bf16>(entry, begin, end, args); break;
    case DType::f16: update_target<f16>(entry, begin, end, args); break;
  }
}

// Elements [begin, end) of the concatenation of all entries.
void update_range(const EmaArgs& args, int64_t begin, int64_t end) {
  int64_t low = 0, high = args.n_entries;  // the last entry that begins at or before `begin`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (args.entries[middle].begin <= begin) {
      low = middle;
    } else {
      high = middle;
    }
  }
  for (int64_t e = low; e < args.n_entries && args.entries[e].begin < end; ++e) {
    const EmaEntry& entry = args.entries[e];
    const int64_t from = begin > entry.begin ? begin - entry.begin : 0;
    const int64_t to = end - entry.begin < entry.n ? end - entry.begin : entry.n;
    if (from < to) update_entry(entry, from, to, args);
  }
}

}  // namespace

int ema_update(const EmaArgs& args) {
  int64_t parts = args.n_elements / kGrain;
  if (parts > args.n_threads) parts = args.n_threads;
  if (parts <= 1) {
    update_range(args, 0, args.n_elements);
    return 0;
  }
  // Shares are multiples of 64 elements, so that inside a tensor two threads share no cache line.
  const int64_t share = (args.n_elements / parts + 63) / 64 * 64;
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * share;
    const int64_t end = part + 1 == parts ? args.n_elements : begin + share;
    if (begin < args.n_elements) {
      update_range(args, begin, end < args.n_elements ? end : args.n_elements);
    }
  }
  return 0;
}

SSLK_END
