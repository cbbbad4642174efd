// SPDX-License-Identifier: Apache-2.0
// Normalise, cast, wrap and write a batch of keys into a ring of K rows, in one launch.
//
//   row (queue_ptr + i) mod K  =  key_i / max(||key_i||_2, eps),   i = max(0, N - K) .. N - 1
//   queue_ptr = (queue_ptr + N) mod K,  fill = min(fill + N, K)
//
// A warp takes a row: D is 128 or 256 in practice, that is one or two 16-byte accesses a lane, and a
// batch is a few hundred rows, so the launch itself is most of the time. The row is read twice, the
// second time from the cache. The pointer stays on the device: no host synchronisation. Every block
// reads it, and the block that finishes last moves it on (is_last_block in common.cuh).
//
// Sums are float32, or float64 if either side is float64, in a fixed order: deterministic. A NaN in
// a key makes its row NaN. Requires 0 <= queue_ptr < K. A larger pointer counts modulo K up to 2^44; one
// beyond, or a negative one, still writes inside the ring, but does not move (its upper bits count blocks).

#include "common.cuh"

namespace sslkernels::cuda {
namespace {

// ---- Device helpers ----------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr int kWarps = kEnqueueThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// x mod K for 0 <= x < 2 K.
__device__ __forceinline__ int64_t wrap(int64_t x, int64_t K) { return x >= K ? x - K : x; }

// The sum over the 32 lanes, in every lane.
template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// ||key||_2, at least eps, in every lane. A comparison and not fmax, which would drop a NaN.
template <typename Key, typename Acc, int kWidth>
__device__ __forceinline__ Acc row_norm(const Key* key,  // [D]
                                        int64_t D, int64_t n_vectors, int lane, double eps) {
  Acc sum = 0;
#pragma unroll 1
  for (int64_t v = lane; v < n_vectors; v += kWarp) {
    const Vector<Key, kWidth> x = load_vector<Key, kWidth>(key + v * kWidth);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const Acc value = widen<Acc>(x.element[e]);
      sum = fused_multiply_add(value, value, sum);
    }
  }
#pragma unroll 1
  for (int64_t d = n_vectors * kWidth + lane; d < D; d += kWarp) {
    const Acc value = widen<Acc>(key[d]);
    sum = fused_multiply_add(value, value, sum);
  }
  const Acc norm = sqrt(warp_sum(sum));
  const Acc least = static_cast<Acc>(eps);
  return norm < least ? least : norm;
}

// ---- Kernel ------------------------------------------------------------------------------------

template <typename Key, typename Slot>
__global__ void __launch_bounds__(kEnqueueThreads) enqueue_kernel(EnqueueArgs args) {
  using Acc = typename Accumulator<Key, Slot>::type;
  constexpr int kWidth = kVectorWidth<Key, Slot>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = args.N > args.K ? args.N - args.K : 0;  // older rows would be overwritten
  // Where row `first` goes; the one 64-bit division, so that the rows below need a subtraction only.
  const int64_t ptr = static_cast<int64_t>(read_counter(args.queue_ptr));
  const int64_t begin = (ptr + first) % args.K;

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t row = first + static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  for (; row < args.N; row += stride) {
    const int64_t place = wrap(begin + (row - first), args.K);
    const Key* key = static_cast<const Key*>(args.keys) + row * args.key_stride;
    Slot* slot = static_cast<Slot*>(args.queue) + place * args.D;
    const bool vectors = is_vector_aligned(key) && is_vector_aligned(slot);
    const int64_t n_vectors = vectors ? args.D / kWidth : 0;
    Acc norm = 1;
    if (args.normalize != 0) norm = row_norm<Key, Acc, kWidth>(key, args.D, n_vectors, lane, args.eps);

#pragma unroll 1
    for (int64_t v = lane; v < n_vectors; v += kWarp) {
      const Vector<Key, kWidth> x = load_vector<Key, kWidth>(key + v * kWidth);
      Vector<Slot, kWidth> y;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) y.element[e] = narrow<Slot>(widen<Acc>(x.element[e]) / norm);
      store_vector<Slot, kWidth>(slot + v * kWidth, y);
    }
#pragma unroll 1
    for (int64_t d = n_vectors * kWidth + lane; d < args.D; d += kWarp)
      slot[d] = narrow<Slot>(widen<Acc>(key[d]) / norm);
    if (lane == 0 && args.labels != nullptr) args.queue_labels[place] = args.labels[row];
  }

  __syncthreads();  // no thread of this block has the pointer still to read
  if (threadIdx.x == 0 && is_last_block(args.queue_ptr)) {
    *args.queue_ptr = static_cast<unsigned long long>(wrap(begin + (args.N - first), args.K));
    const int64_t held = *args.fill < 0 ? 0 : *args.fill < args.K ? *args.fill : args.K;
    const int64_t fill = held + args.N;
    *args.fill = fill < args.K ? fill : args.K;
  }
}

template <typename Key>
int launch(const EnqueueArgs& args, int32_t queue_dtype, unsigned blocks, void* stream) {
  switch (queue_dtype) {
    case kFloat32: SSLK_LAUNCH((enqueue_kernel<Key, float>), blocks, kEnqueueThreads, stream, args); break;
    case kFloat64: SSLK_LAUNCH((enqueue_kernel<Key, double>), blocks, kEnqueueThreads, stream, args); break;
    case kBFloat16: SSLK_LAUNCH((enqueue_kernel<Key, __nv_bfloat16>), blocks, kEnqueueThreads, stream, args); break;
    case kFloat16: SSLK_LAUNCH((enqueue_kernel<Key, __half>), blocks, kEnqueueThreads, stream, args); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

// ---- Launcher ----------------------------------------------------------------------------------

int enqueue(const EnqueueArgs& args, int32_t key_dtype, int32_t queue_dtype, int device, void* stream) {
  if (args.N == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const int64_t rows = args.N < args.K ? args.N : args.K;
  const int64_t wanted = (rows + kWarps - 1) / kWarps;
  const unsigned blocks = static_cast<unsigned>(wanted < kMaxTickets ? wanted : kMaxTickets);
  switch (key_dtype) {
    case kFloat32: return launch<float>(args, queue_dtype, blocks, stream);
    case kFloat64: return launch<double>(args, queue_dtype, blocks, stream);
    case kBFloat16: return launch<__nv_bfloat16>(args, queue_dtype, blocks, stream);
    case kFloat16: return launch<__half>(args, queue_dtype, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sslkernels::cuda
