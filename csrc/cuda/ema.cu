// SPDX-License-Identifier: Apache-2.0
// Exponential moving average over a whole parameter list in one launch.
//
//   target = fma(decay, target, (1 - decay) * source)
//
// in float32, or in float64 if either side is float64; 1 - decay is formed in float64 and then
// rounded. Bound by memory: the target is read and written once, the source read once (12 bytes an
// element in float32). A table made once (launchers.h) lists the pairs and cuts them into chunks of
// equal length, dealt out round-robin to a grid that fills the device; a chunk is worked on with
// 16-byte accesses from the first aligned element on, its edges one element at a time.
//
// Optional stochastic rounding of 16-bit targets: docs/cuda.md has the exact definition, bit for bit
// the one of the CPU kernel; without it a bfloat16 target at decay .999 does not move at all, since
// a step is smaller than half a unit in the last place.
//
// Deterministic: no element is touched by two threads, and random words depend on the position only.

#include <cstring>

#include "common.cuh"

namespace sslkernels::cuda {
namespace {

// ---- Device helpers ----------------------------------------------------------------------------

struct Decay {
  double keep;  // decay
  double take;  // 1 - decay
};

__device__ __forceinline__ Decay load_decay(const EmaArgs& args) {
  double decay = args.decay;
  if (args.decay_ptr != nullptr) {
    decay = args.decay_dtype == kFloat64 ? *static_cast<const double*>(args.decay_ptr)
                                         : *static_cast<const float*>(args.decay_ptr);
  }
  return {decay, 1.0 - decay};
}

struct Random {
  uint32_t key0, key1;  // seed
  uint32_t step;
  uint32_t tensor;
};

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") with
// counter = (group low, group high, step, tensor): a word each for the four elements of a group.
__device__ __forceinline__ Words philox(const Random& random, int64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group);
  uint32_t c1 = static_cast<uint32_t>(static_cast<uint64_t>(group) >> 32);
  uint32_t c2 = random.step, c3 = random.tensor;
  uint32_t k0 = random.key0, k1 = random.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The word of one element alone: number element mod 4 of its group. Selected, for an array that is indexed
// by a run-time value would leave the registers.
__device__ __forceinline__ uint32_t philox_word(const Random& random, int64_t element) {
  const Words words = philox(random, element >> 2);
  const uint32_t low = (element & 1) != 0 ? words.word[1] : words.word[0];
  const uint32_t high = (element & 1) != 0 ? words.word[3] : words.word[2];
  return (element & 2) != 0 ? high : low;
}

constexpr uint32_t kExponentMask = 0x7f800000u;

// To one of the two bfloat16 neighbours, the nearer the likelier, so that the mean is exact.
__device__ __forceinline__ __nv_bfloat16 round_stochastic(float x, uint32_t word, __nv_bfloat16) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & kExponentMask) == kExponentMask) return __float2bfloat16_rn(x);  // inf and NaN stay
  return __ushort_as_bfloat16(static_cast<unsigned short>((bits + (word >> 16)) >> 16));
}

// The same for float16, whose neighbours below 2^-14 are 2^-24 apart whatever the exponent.
__device__ __forceinline__ __half round_stochastic(float x, uint32_t word, __half) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t exponent = (bits & kExponentMask) >> 23;  // biased by 127
  if (exponent == 255) return __float2half_rn(x);          // inf and NaN stay
  if (exponent >= 113)  // 2^-14 and above: 13 bits are dropped; 65536 and above become inf
    return __float2half_rn(__uint_as_float((bits + (word >> 19)) & ~0x1fffu));
  // Below: x = mantissa * 2^(exponent - 150) in units of 2^-24, so 126 - exponent >= 14 bits go.
  const uint32_t mantissa = (bits & 0x007fffffu) | (exponent != 0 ? 0x00800000u : 0u);
  const uint32_t dropped = 126u - (exponent != 0 ? exponent : 1u);
  uint32_t units;
  if (dropped <= 32) {
    units = static_cast<uint32_t>((static_cast<uint64_t>(mantissa) + (word >> (32 - dropped))) >> dropped);
  } else {  // a 24-bit mantissa is gone after 24 more
    const uint32_t part = dropped - 32 < 24 ? mantissa >> (dropped - 32) : 0u;
    units = static_cast<uint32_t>((static_cast<uint64_t>(part) + word) >> 32);
  }
  return __ushort_as_half(static_cast<unsigned short>(((bits >> 16) & 0x8000u) | units));
}

// Whether elements of a type take random words.
template <typename Dst, bool kStochastic>
constexpr bool kTakesWords = kStochastic && sizeof(Dst) == 2;

template <typename Dst, typename Src, bool kStochastic>
__device__ __forceinline__ Dst update_with(Dst target, Src source, Decay decay, uint32_t word) {
  using Acc = typename Accumulator<Dst, Src>::type;
  const Acc mean = fused_multiply_add(static_cast<Acc>(decay.keep), widen<Acc>(target),
                                      static_cast<Acc>(decay.take) * widen<Acc>(source));
  if constexpr (kTakesWords<Dst, kStochastic>) {
    return round_stochastic(static_cast<float>(mean), word, Dst{});
  } else {
    return narrow<Dst>(mean);
  }
}

template <typename Dst, typename Src, bool kStochastic>
__device__ __forceinline__ Dst update(Dst target, Src source, Decay decay, const Random& random, int64_t element) {
  uint32_t word = 0;
  if constexpr (kTakesWords<Dst, kStochastic>) word = philox_word(random, element);
  return update_with<Dst, Src, kStochastic>(target, source, decay, word);
}

template <bool kStochastic, typename Dst, typename Src, int kWidth>
__device__ __forceinline__ Vector<Dst, kWidth> update_vector(const Vector<Dst, kWidth>& target,
                                                             const Vector<Src, kWidth>& source, Decay decay,
                                                             const Random& random, int64_t element) {
  Vector<Dst, kWidth> mean;
  if constexpr (kTakesWords<Dst, kStochastic>) {
    static_assert(kWidth % 4 == 0, "a vector is whole groups of random words");
    if ((element & 3) == 0) {  // but where the first aligned element is in the middle of a group
#pragma unroll
      for (int e = 0; e < kWidth; e += 4) {
        const Words words = philox(random, (element + e) >> 2);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mean.element[e + i] =
              update_with<Dst, Src, kStochastic>(target.element[e + i], source.element[e + i], decay, words.word[i]);
      }
      return mean;
    }
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    mean.element[e] = update<Dst, Src, kStochastic>(target.element[e], source.element[e], decay, random, element + e);
  return mean;
}

// One chunk by one block. `first` is the place of dst[0] in its tensor.
template <typename Dst, typename Src, bool kStochastic>
__device__ __forceinline__ void update_chunk(Dst* dst,        // [count]
                                             const Src* src,  // [count]
                                             int count, int64_t first, Decay decay, const Random& random) {
  SSLK_ASSUME_GLOBAL(dst);
  SSLK_ASSUME_GLOBAL(src);
  constexpr int kWidth = kVectorWidth<Dst, Src>;
  // `head` elements up to the first aligned target; no vectors if the source is not aligned there.
  const int to_boundary =
      static_cast<int>((kVectorBytes - reinterpret_cast<uintptr_t>(dst) % kVectorBytes) % kVectorBytes / sizeof(Dst));
  int head = min(to_boundary, count);
  if (!is_vector_aligned(src + head)) head = count;
  const int n_vectors = (count - head) / kWidth;

#pragma unroll 1
  for (int i = threadIdx.x; i < head; i += kEmaThreads) {
    dst[i] = update<Dst, Src, kStochastic>(dst[i], src[i], decay, random, first + i);
  }
  int v = threadIdx.x;
  if constexpr (!kStochastic) {  // random words keep the multipliers busy, not the memory
#pragma unroll 1
    for (; v + kEmaThreads < n_vectors; v += 2 * kEmaThreads) {  // two loads an array in flight
      const int a = head + v * kWidth, b = a + kEmaThreads * kWidth;
      const auto target_a = load_vector<Dst, kWidth>(dst + a);
      const auto target_b = load_vector<Dst, kWidth>(dst + b);
      const auto source_a = load_vector<Src, kWidth>(src + a);
      const auto source_b = load_vector<Src, kWidth>(src + b);
      store_vector<Dst, kWidth>(dst + a, update_vector<kStochastic>(target_a, source_a, decay, random, first + a));
      store_vector<Dst, kWidth>(dst + b, update_vector<kStochastic>(target_b, source_b, decay, random, first + b));
    }
  }
#pragma unroll 1
  for (; v < n_vectors; v += kEmaThreads) {
    const int a = head + v * kWidth;
    const auto target = load_vector<Dst, kWidth>(dst + a);
    const auto source = load_vector<Src, kWidth>(src + a);
    store_vector<Dst, kWidth>(dst + a, update_vector<kStochastic>(target, source, decay, random, first + a));
  }
#pragma unroll 1
  for (int i = head + n_vectors * kWidth + threadIdx.x; i < count; i += kEmaThreads) {
    dst[i] = update<Dst, Src, kStochastic>(dst[i], src[i], decay, random, first + i);
  }
}

template <typename Dst, bool kStochastic>
__device__ __forceinline__ void dispatch_source(const EmaTensor& tensor, const EmaChunk& chunk, Decay decay,
                                                const Random& random) {
  Dst* dst = reinterpret_cast<Dst*>(tensor.dst) + chunk.begin;
  switch (tensor.src_dtype) {
#define SSLK_SOURCE(dtype, Src)                                                                                   \
  case dtype:                                                                                                     \
    update_chunk<Dst, Src, kStochastic>(dst, reinterpret_cast<const Src*>(tensor.src) + chunk.begin, chunk.count, \
                                        chunk.begin, decay, random);                                              \
    break;
    SSLK_SOURCE(kFloat32, float)
    SSLK_SOURCE(kFloat64, double)
    SSLK_SOURCE(kBFloat16, __nv_bfloat16)
    SSLK_SOURCE(kFloat16, __half)
#undef SSLK_SOURCE
  }
}

// ---- Kernel ------------------------------------------------------------------------------------

template <bool kStochastic>
__global__ void __launch_bounds__(kEmaThreads, kEmaBlocksPerMultiprocessor) ema_kernel(EmaArgs args) {
  const Decay decay = load_decay(args);
  Random random = {};
  if constexpr (kStochastic) {
    uint64_t seed = args.seed;
    random.step = args.step;
    if (args.rng_state != nullptr) {
      seed = args.rng_state[0];
      random.step = static_cast<uint32_t>(read_counter(reinterpret_cast<unsigned long long*>(args.rng_state + 1)));
    }
    random.key0 = static_cast<uint32_t>(seed);
    random.key1 = static_cast<uint32_t>(seed >> 32);
  }

#pragma unroll 1
  for (int64_t c = blockIdx.x; c < args.n_chunks; c += gridDim.x) {
    const EmaChunk chunk = args.chunks[c];
    const EmaTensor tensor = args.tensors[chunk.tensor];
    random.tensor = tensor.index;
    switch (tensor.dst_dtype) {
      case kFloat32: dispatch_source<float, kStochastic>(tensor, chunk, decay, random); break;
      case kFloat64: dispatch_source<double, kStochastic>(tensor, chunk, decay, random); break;
      case kBFloat16: dispatch_source<__nv_bfloat16, kStochastic>(tensor, chunk, decay, random); break;
      case kFloat16: dispatch_source<__half, kStochastic>(tensor, chunk, decay, random); break;
    }
  }

  if constexpr (kStochastic) {
    if (args.rng_state != nullptr) {
      __syncthreads();  // no thread of this block has the step still to read
      unsigned long long* step = reinterpret_cast<unsigned long long*>(args.rng_state + 1);
      if (threadIdx.x == 0 && is_last_block(step)) *step = (random.step + 1ull) & 0xffffffffull;
    }
  }
}

}  // namespace

// ---- Launcher ----------------------------------------------------------------------------------

EmaTable build_ema_table(const std::vector<EmaTensor>& tensors) {
  EmaTable table;
  table.n_tensors = static_cast<int64_t>(tensors.size());
  for (const EmaTensor& tensor : tensors) table.n_chunks += (tensor.n + kEmaChunk - 1) / kEmaChunk;
  table.chunks_offset = (tensors.size() * sizeof(EmaTensor) + 15) / 16 * 16;
  table.bytes.resize(table.chunks_offset + static_cast<size_t>(table.n_chunks) * sizeof(EmaChunk));
  unsigned char* out = table.bytes.data();
  size_t chunk_at = table.chunks_offset;
  for (size_t t = 0; t < tensors.size(); ++t) {
    std::memcpy(out + t * sizeof(EmaTensor), &tensors[t], sizeof(EmaTensor));
    for (int64_t begin = 0; begin < tensors[t].n; begin += kEmaChunk) {
      const int64_t left = tensors[t].n - begin;
      const EmaChunk chunk = {static_cast<int32_t>(t), static_cast<int32_t>(left < kEmaChunk ? left : kEmaChunk),
                              begin};
      std::memcpy(out + chunk_at, &chunk, sizeof(EmaChunk));
      chunk_at += sizeof(EmaChunk);
    }
  }
  return table;
}

int ema_update(const EmaArgs& args, bool stochastic, int device, void* stream) {
  if (args.n_chunks == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t resident = kEmaBlocksPerMultiprocessor * static_cast<int64_t>(multiprocessors);
  const unsigned blocks = static_cast<unsigned>(args.n_chunks < resident ? args.n_chunks : resident);
  if (stochastic) {
    SSLK_LAUNCH(ema_kernel<true>, blocks, kEmaThreads, stream, args);
  } else {
    SSLK_LAUNCH(ema_kernel<false>, blocks, kEmaThreads, stream, args);
  }
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

std::vector<int> architectures() {
  std::vector<int> found;
  for (const int arch : {__CUDA_ARCH_LIST__}) found.push_back(arch / 10);  // nvcc's list: 800, 900
  return found;
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace sslkernels::cuda
