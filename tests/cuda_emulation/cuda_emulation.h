// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA C++ to compile csrc/cuda/*.cu, unchanged, with the host compiler and run it on the
// CPU. Test only.
//
// Blocks and threads are real: every CUDA thread is a fiber with a stack of its own, blocks are
// started in shuffled order with several resident at a time, and at each barrier, shuffle, fence and
// atomic the scheduler picks the next thread. A thread that passes where a barrier is missing
// therefore meets data that is not there yet, or takes it away from others. Three policies, by seed:
// the first thread that can run, as far as it can, so that a warp runs ahead of the next; the last
// thread that can run, with a switch at every fence and atomic; at random.
// Checked, each with an abort that names block and thread: barriers that not every thread of the
// block reaches, or reaches at different lines; shuffles whose mask leaves out the caller or names a
// lane that has returned; deadlock. Shared memory is allocated afresh for each block, filled with
// 0xff (NaN), and its ends are seen by the address sanitizer.
//
// Not emulated: weak memory order (a missing fence is not found), caches, timing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- Language ----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace sslk_emulation {

struct Thread {  // what a kernel can ask of the thread that runs it
  dim3 thread_index, block_index, block_dim, grid_dim;
};
const Thread& current();

struct Config {
  uint64_t seed = 1;        // of the schedule; seed % 3 is the policy, as listed above
  int multiprocessors = 1;  // what cudaDeviceGetAttribute answers
  int resident_blocks = 3;  // blocks that run interleaved
};
void configure(const Config& config);

void launch(dim3 grid, dim3 block, void* stream, const std::function<void()>& body);
void barrier(int line);
// Publishes `value` (at most 8 bytes) and returns what `source_lane` published.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, int line);
void maybe_switch();  // a point where another thread may run
void* shared_memory(size_t bytes, int line);
int lane();

}  // namespace sslk_emulation

#define threadIdx (sslk_emulation::current().thread_index)
#define blockIdx (sslk_emulation::current().block_index)
#define blockDim (sslk_emulation::current().block_dim)
#define gridDim (sslk_emulation::current().grid_dim)

#define SSLK_LAUNCH(kernel, grid, block, stream, args) \
  sslk_emulation::launch((grid), (block), (stream), [launch_args = (args)] { kernel(launch_args); })
#define SSLK_ASSUME_GLOBAL(pointer) ((void)(pointer))
// `__shared__ type name[count]` in a form that gives each resident block its own array.
#define SSLK_SHARED(type, name, count) \
  type* name = static_cast<type*>(sslk_emulation::shared_memory((count) * sizeof(type), __LINE__))

// ---- Synchronisation ---------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { sslk_emulation::barrier(line); }
inline void __threadfence() { sslk_emulation::maybe_switch(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sslk_emulation::exchange(mask, bits, sslk_emulation::lane() ^ lane_mask, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T atomicAdd(T* address, T value) {
  sslk_emulation::maybe_switch();
  const T before = *address;
  *address = before + value;
  sslk_emulation::maybe_switch();
  return before;
}

// ---- Arithmetic --------------------------------------------------------------------------------

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::sqrt;
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

// ---- 16-bit types: storage and the conversions, as the PTX instructions round ---------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the NaN of cvt.rn.bf16.f32
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u;
  const unsigned mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return __uint_as_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign != 0 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};                                  // the NaN of cvt.rn.f16.f32
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24, rounded by the host's nearbyint
    const float units = std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24));
    return {static_cast<uint16_t>(sign | static_cast<unsigned>(units))};
  }
  const unsigned rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);  // may carry into infinity
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

// ---- Runtime -----------------------------------------------------------------------------------

// What nvcc and its headers would define: one architecture, and a runtime of the age of the driver.
#define __CUDA_ARCH_LIST__ 800
#define CUDART_VERSION 12040
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorSymbolNotFound = 500
};
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
// The functions of the driver that deal with contexts. There is no cudaGetDevice and no cudaSetDevice: what this
// runtime takes for the current device and what torch's does need not agree.
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
const char* cudaGetErrorString(cudaError_t error);
