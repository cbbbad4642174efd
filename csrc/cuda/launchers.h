// SPDX-License-Identifier: Apache-2.0
// The one C++ interface of the CUDA extension: what the bindings, the kernels and the emulated tests
// share. It needs no CUDA header, so that bindings_cuda.cpp compiles with the plain host compiler:
// `void* stream` is a cudaStream_t and the returned int is a cudaError_t (0 = success).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sslkernels::cuda {

// The numbers are part of the interface with sslkernels/backends/cuda.py.
enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;

constexpr int64_t dtype_bytes(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// ---- EMA ---------------------------------------------------------------------------------------

// One pair of the parameter list. 40 bytes, read by every thread of a block that works on it.
struct EmaTensor {
  uint64_t dst;       // address of the target, [n] of dst_dtype, updated in place
  uint64_t src;       // address of the source, [n] of src_dtype
  int64_t n;          // elements, taken in memory order
  int32_t dst_dtype;  // Dtype
  int32_t src_dtype;  // Dtype
  uint32_t index;     // position in the caller's list: a word of the random counter
  uint32_t padding;
};
static_assert(sizeof(EmaTensor) == 40);

// A run of at most kEmaChunk elements of one tensor: the unit that is dealt out to blocks.
struct EmaChunk {
  int32_t tensor;  // row in the table of tensors
  int32_t count;   // elements, 1 .. kEmaChunk
  int64_t begin;   // first element, a multiple of kEmaChunk
};
static_assert(sizeof(EmaChunk) == 16);

// 4096 elements: 16 KiB of float32, four 16-byte accesses a thread and array. ResNet-50 has about 6300
// chunks; on 132 multiprocessors, 528 blocks, a block gets 11 or 12 of them.
constexpr int kEmaChunk = 4096;
constexpr int kEmaThreads = 256;
// The grid is one wave: 4 blocks of 256 threads with at most 64 registers fit on a multiprocessor of
// every architecture built. With two 16-byte loads of both arrays in flight a thread that is 64 KiB;
// 3.35 TB/s at about 700 ns latency over 132 multiprocessors need 18 KiB (a model, not measured).
constexpr int kEmaBlocksPerMultiprocessor = 4;

struct EmaArgs {
  const EmaTensor* tensors;  // device
  const EmaChunk* chunks;    // device, [n_chunks]
  int64_t n_chunks;
  double decay;           // used when decay_ptr is null
  const void* decay_ptr;  // device, one float32 or float64, or null
  int32_t decay_dtype;    // kFloat32 or kFloat64
  uint32_t step;          // used when rng_state is null
  uint64_t seed;          // used when rng_state is null
  uint64_t* rng_state;    // device, [2]: seed and step; the launch adds 1 to the step. Or null
};

// The table of a plan as one block of bytes: n_tensors EmaTensor, then the chunks, both ready to be
// copied to the device. Pairs without elements have a row but no chunk. The rows of the chunk list
// go round the tensors in order; all chunks but the last of a tensor are full.
struct EmaTable {
  std::vector<unsigned char> bytes;
  int64_t n_tensors = 0;
  int64_t n_chunks = 0;
  size_t chunks_offset = 0;  // bytes from the start to the first EmaChunk, a multiple of 16
};

EmaTable build_ema_table(const std::vector<EmaTensor>& tensors);

// target = decay * target + (1 - decay) * source for every pair of the table, one launch.
// Nothing is launched for an empty table.
int ema_update(const EmaArgs& args, bool stochastic, int device, void* stream);

// ---- Queue -------------------------------------------------------------------------------------

constexpr int kEnqueueThreads = 128;  // four warps, a row of keys each

struct EnqueueArgs {
  void* queue;                    // device, [K, D] contiguous, queue_dtype
  const void* keys;               // device, [N, D], unit stride in D, key_dtype
  int64_t* queue_labels;          // device, [K], or null
  const int64_t* labels;          // device, [N], or null (both or neither)
  unsigned long long* queue_ptr;  // device, one int64 in [0, K): the next row to write
  int64_t* fill;                  // device, one int64 in [0, K]: the valid rows
  int64_t N, D, K;
  int64_t key_stride;  // elements between rows of keys; 0 for an expanded row
  double eps;
  int32_t normalize;  // 0 or 1
};

// Row i of the keys goes to row (queue_ptr + i) mod K, the newest K of them if N > K; then
// queue_ptr = (queue_ptr + N) mod K and fill = min(fill + N, K), on the device, in one launch.
// Nothing is launched for N = 0.
int enqueue(const EnqueueArgs& args, int32_t key_dtype, int32_t queue_dtype, int device, void* stream);

// ---- What was built, and for what it needs ------------------------------------------------------

const char* error_text(int error);

// The architectures that were compiled, ascending, each as its compute capability times ten: 80, 90.
std::vector<int> architectures();

// The CUDA version of the runtime inside the extension, and the newest one that the driver of this machine
// knows (0 without a driver): 13000 for CUDA 13.0.
int runtime_version();
int driver_version();

}  // namespace sslkernels::cuda
