// SPDX-License-Identifier: Apache-2.0
// z = mean + exp(log_variance / 2) eps with normal noise that is drawn again, not stored:
//
//   words 0..3 of Philox (philox.h) at counter (element / 4, kStream), key = seed
//   u = (word + 1/2) / 2^32
//   eps[4g], eps[4g+1] = sqrt(-2 log u0) (cos, sin)(2 pi u1), and the other two of u2, u3     (Box and Muller 1958)
//
// in the accumulation type.  The words of an element depend on nothing else, so the number of threads changes no bit.
//
// Plain-torch twin: sslkernels/backends/autoencoders_torch.py.

#include "../openmp.h"
#include "blocks.h"
#include "kernels.h"
#include "philox.h"
#include "rows.h"

SSLK_BEGIN
namespace {

// Fourth word of the counter: where the averages (ema.cpp) have the number of a tensor.
constexpr uint32_t kStream = 0x72657061u;

// log of x in [2^-33, 1]: x = 2^e m with m within a factor sqrt(2) of 1, log m = 2 atanh(y), y = (m - 1) / (m + 1)
// and |y| < 0.172: the next term is below half an ulp.
template <class T>
inline SSLK_INLINE Vec<T> log_v(Vec<T> x) {
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kTerms = kSingle ? 5 : 11;
  constexpr Int<T> kHalf = kSingle ? Int<T>(0x3f3504f3) : Int<T>(0x3fe6a09e667f3bcdLL);  // sqrt(1/2)
  constexpr int kShift = kSingle ? 23 : 52;
  const IVec<T> bits = bit_cast<IVec<T>>(x);
  const IVec<T> e = (bits - kHalf) >> kShift;
  const Vec<T> m = bit_cast<Vec<T>>(bits - (e << kShift));
  const Vec<T> y = (m - T(1)) / (m + T(1)), y2 = y * y;
  Vec<T> p = splat<T>(T(1) / T(2 * kTerms - 1));
  for (int n = kTerms - 2; n >= 0; --n) p = p * y2 + T(1) / T(2 * n + 1);
  return __builtin_convertvector(e, Vec<T>) * T(kLn2) + T(2) * (y * p);
}

// cos and sin of 2 pi u for u in [0, 1]: u = k / 4 + f with |2 pi f| <= pi / 4, and Taylor's series there.
template <class T>
inline SSLK_INLINE void cos_sin(Vec<T> u, Vec<T>* cosine, Vec<T>* sine) {
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 9;
  const Vec<T> t = u * T(4) + T(0.5);
  const IVec<T> k = __builtin_convertvector(t, IVec<T>);  // towards 0, and t > 0
  const Vec<T> a = (u * T(4) - __builtin_convertvector(k, Vec<T>)) * T(1.57079632679489661923), a2 = a * a;
  Vec<T> c = splat<T>(T(1)), s = splat<T>(T(1));
  for (int n = kTerms; n >= 1; --n) {
    c = T(1) - c * (a2 * (T(1) / T((2 * n - 1) * (2 * n))));
    s = T(1) - s * (a2 * (T(1) / T((2 * n) * (2 * n + 1))));
  }
  s *= a;
  const IVec<T> odd = (k & 1) != 0;
  const Vec<T> x = odd ? s : c, y = odd ? c : s;
  *cosine = ((k + 1) & 2) != 0 ? -x : x;
  *sine = (k & 2) != 0 ? -y : y;
}

template <class T>
inline SSLK_INLINE Vec<T> sqrt_v(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
  return bit_cast<Vec<T>>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
  return bit_cast<Vec<T>>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
  for (int l = 0; l < Simd<T>::kLanes; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

// The noise of elements [first, first + kBlock), first a multiple of 4.
template <class T>
void normal_block(uint64_t seed, int64_t first, T* out) {
  constexpr int L = Simd<T>::kLanes, kWords = Simd<uint32_t>::kLanes, kGroups = kBlock / 4;
  alignas(64) uint32_t words[4][kGroups];
  alignas(64) T normal[4][kGroups];
  for (int g = 0; g < kGroups; g += kWords) {
    uint32_t low[kWords], high[kWords];
    for (int l = 0; l < kWords; ++l) {
      const uint64_t group = uint64_t(first / 4 + g + l);
      low[l] = uint32_t(group);
      high[l] = uint32_t(group >> 32);
    }
    Vec<uint32_t> c[4] = {load<uint32_t>(low), load<uint32_t>(high), {}, splat<uint32_t>(kStream)};
    philox_lanes(uint32_t(seed), uint32_t(seed >> 32), c);
    for (int w = 0; w < 4; ++w) store<uint32_t>(&words[w][g], c[w]);
  }
  for (int w = 0; w < 4; ++w) {
    for (int g = 0; g < kGroups; ++g) normal[w][g] = T(words[w][g]) * T(0x1p-32) + T(0x1p-33);
  }
  for (int pair = 0; pair < 4; pair += 2) {
    for (int g = 0; g < kGroups; g += L) {
      const Vec<T> radius = sqrt_v<T>(T(-2) * log_v<T>(load<T>(&normal[pair][g])));
      Vec<T> cosine, sine;
      cos_sin<T>(load<T>(&normal[pair + 1][g]), &cosine, &sine);
      store<T>(&normal[pair][g], cosine * radius);
      store<T>(&normal[pair + 1][g], sine * radius);
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    for (int w = 0; w < 4; ++w) out[4 * g + w] = normal[w][g];
  }
}

template <class T>
void noise_range(const NoiseArgs& args, int64_t begin, int64_t end) {
  constexpr int L = Simd<T>::kLanes;
  const ReadBlock<T> read = reader_of<T>(args.dtype);
  const WriteBlock<T> write = writer_of<T>(args.dtype);
  alignas(64) T v[kBlock], other[kBlock], noise[kBlock];
  const bool forward = args.mean != nullptr;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int count = int(end - b < kBlock ? end - b : kBlock);
    read(args.log_variance, b, count, v);
    read(forward ? args.mean : args.dz, b, count, other);
    normal_block<T>(args.seed, b, noise);
    for (int k = 0; k < count; k += L) {
      const Vec<T> moved = exp_v<T>(T(0.5) * load<T>(v + k)) * load<T>(noise + k);
      const Vec<T> x = load<T>(other + k);
      store<T>(v + k, forward ? x + moved : T(0.5) * x * moved);
    }
    write(v, count, args.out, b);
  }
}

template <class T>
void noise_of(const NoiseArgs& args) {
  const int64_t blocks = (args.n + kBlock - 1) / kBlock;
  const int n_threads = args.n < kSerialElements ? 1 : args.n_threads;
#pragma omp parallel num_threads(n_threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = blocks * thread / team * kBlock, last = blocks * (thread + 1) / team * kBlock;
    noise_range<T>(args, begin, last < args.n ? last : args.n);
  }
}

}  // namespace

int reparameterize(const NoiseArgs& args) {
  if (args.dtype == DType::f64) {
    noise_of<double>(args);
  } else {
    noise_of<float>(args);
  }
  return 0;
}

SSLK_END
