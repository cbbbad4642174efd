// SPDX-License-Identifier: Apache-2.0
// What both kernels share: element types, 16-byte accesses, rounding, the device guard.
//
// The same sources compile in two ways: with nvcc, and, for the tests, with the host compiler and
// tests/cuda_emulation/cuda_emulation.h in place of the CUDA headers. The macros below are all the
// difference there is: how to launch, and how to say that an address is in global memory.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#ifdef SSLKERNELS_CUDA_EMULATION
#include "cuda_emulation.h"  // defines SSLK_LAUNCH and SSLK_ASSUME_GLOBAL too
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SSLK_LAUNCH(kernel, grid, block, stream, args) \
  kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(args)
// Addresses that come out of a table are generic to the compiler; this makes it emit ld.global.
#define SSLK_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#endif

#include "launchers.h"

namespace sslkernels::cuda {

// ---- Element types -----------------------------------------------------------------------------

constexpr int kVectorBytes = 16;  // the widest access of sm_80 and sm_90

// Arithmetic is float32, or float64 as soon as one side is float64.
template <typename A, typename B>
struct Accumulator {
  using type = float;
};
template <typename B>
struct Accumulator<double, B> {
  using type = double;
};
template <typename A>
struct Accumulator<A, double> {
  using type = double;
};
template <>
struct Accumulator<double, double> {
  using type = double;
};

template <typename Acc>
__device__ __forceinline__ Acc widen(float x) {
  return x;
}
template <typename Acc>
__device__ __forceinline__ Acc widen(double x) {
  return static_cast<Acc>(x);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__half x) {
  return __half2float(x);
}

// Round to nearest, ties to even. float64 goes to 16 bits through float32.
template <typename T>
__device__ __forceinline__ T narrow(double x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}
template <>
__device__ __forceinline__ __half narrow<__half>(double x) {
  return __float2half_rn(static_cast<float>(x));
}
template <typename T>
__device__ __forceinline__ T narrow(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// ---- 16-byte accesses --------------------------------------------------------------------------

// Elements a thread handles at a time: the narrower of the two types fills one 16-byte access; 4 where
// float64 meets 16 bits, which would otherwise need more registers than there are.
template <typename A, typename B>
constexpr int kVectorWidth = sizeof(A) + sizeof(B) == 10 ? 4
                             : sizeof(A) < sizeof(B)     ? kVectorBytes / sizeof(A)
                                                         : kVectorBytes / sizeof(B);

template <int kBytes>
struct AccessWord {  // what one access moves
  using type = uint4;
};
template <>
struct AccessWord<8> {
  using type = uint2;
};

template <typename T, int kWidth>
struct alignas(kVectorBytes) Vector {
  static constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
  using Word = typename AccessWord<kBytes>::type;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  T element[kWidth];
};

// Requires: `from` aligned to the access, 16 bytes or, for half a vector, 8.
template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load_vector(const T* from) {
  using Word = typename Vector<T, kWidth>::Word;
  Vector<T, kWidth> v;
#pragma unroll
  for (int i = 0; i < Vector<T, kWidth>::kWords; ++i)
    reinterpret_cast<Word*>(&v)[i] = reinterpret_cast<const Word*>(from)[i];
  return v;
}

// Requires: `to` aligned likewise.
template <typename T, int kWidth>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kWidth>& v) {
  using Word = typename Vector<T, kWidth>::Word;
#pragma unroll
  for (int i = 0; i < Vector<T, kWidth>::kWords; ++i)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(&v)[i];
}

__device__ __forceinline__ bool is_vector_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// ---- Last block --------------------------------------------------------------------------------

// A counter that every block reads and the launch must advance once. The number of finished blocks
// is kept in the high bits of the very word, so that no workspace is needed: nothing to allocate, to
// clear or to share between streams, and the word is clean again when the launch is over.
// 44 bits leave room for 16 Ti rows; the other 20 count the blocks, of which there are at most 2^19.
constexpr int kTicketShift = 44;
constexpr unsigned long long kCounterMask = (1ull << kTicketShift) - 1;
constexpr int kMaxTickets = (1 << 19);

__device__ __forceinline__ unsigned long long read_counter(const unsigned long long* counter) {
  return *const_cast<const volatile unsigned long long*>(counter) & kCounterMask;
}

// True in the one block that comes last. Call from one thread, after a barrier: by then every thread
// of the block has read the counter. The fence orders those reads before the ticket.
__device__ __forceinline__ bool is_last_block(unsigned long long* counter) {
  __threadfence();
  const unsigned long long before = atomicAdd(counter, 1ull << kTicketShift);
  return (before >> kTicketShift) + 1 == gridDim.x;
}

// ---- Host --------------------------------------------------------------------------------------

// What the guard asks of the driver. A context is an opaque pointer, a device its number, a result has the
// numbers of cudaError_t. Found at run time: the module can be loaded where there is no driver.
class Driver {
 public:
  // The functions, or why there are none.
  static cudaError_t get(const Driver** driver) {
    static Driver found;
    static const cudaError_t error = found.find();
    *driver = &found;
    return error;
  }
  cudaError_t current(void** context) const { return static_cast<cudaError_t>(get_current_(context)); }
  cudaError_t make_current(void* context) const { return static_cast<cudaError_t>(set_current_(context)); }
  // The context that every runtime uses on a device. It is retained once and lives as long as the process.
  cudaError_t primary(int device, void** context) const {
    static std::mutex mutex;
    static std::map<int, void*> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at = known.find(device);
    if (at != known.end()) {
      *context = at->second;
      return cudaSuccess;
    }
    int handle = 0;
    auto error = static_cast<cudaError_t>(device_(&handle, device));
    if (error == cudaSuccess) error = static_cast<cudaError_t>(retain_(context, handle));
    if (error == cudaSuccess) known[device] = *context;
    return error;
  }

 private:
  template <typename Function>
  static cudaError_t find(const char* name, Function** function) {
    void* address = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault);
#endif
    if (error != cudaSuccess) return error;
    *function = reinterpret_cast<Function*>(address);
    return address == nullptr ? cudaErrorSymbolNotFound : cudaSuccess;
  }
  cudaError_t find() {
    cudaError_t error = find("cuCtxGetCurrent", &get_current_);
    if (error == cudaSuccess) error = find("cuCtxSetCurrent", &set_current_);
    if (error == cudaSuccess) error = find("cuDeviceGet", &device_);
    if (error == cudaSuccess) error = find("cuDevicePrimaryCtxRetain", &retain_);
    return error;
  }

  int (*get_current_)(void**) = nullptr;
  int (*set_current_)(void*) = nullptr;
  int (*device_)(int*, int) = nullptr;
  int (*retain_)(void**, int) = nullptr;
};

// Makes the context of `device` current for a launch and gives the caller its own back.
//
// Not by cudaGetDevice and cudaSetDevice: this module has a CUDA runtime linked in and torch uses another.
// Which device is current may be known to one and not to the other: after torch.cuda.set_device(1) ours could
// say 0, and "give back" 0. The context that is current on a thread belongs to the driver, which both share,
// and a runtime launches into it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    void* wanted = nullptr;
    error_ = Driver::get(&driver_);
    if (error_ == cudaSuccess) error_ = driver_->primary(device, &wanted);
    if (error_ == cudaSuccess) error_ = driver_->current(&previous_);
    if (error_ == cudaSuccess && wanted != previous_) {
      error_ = driver_->make_current(wanted);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) (void)driver_->make_current(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  const Driver* driver_ = nullptr;
  void* previous_ = nullptr;  // null on a thread that has used no device yet
  bool switched_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace sslkernels::cuda
