// SPDX-License-Identifier: Apache-2.0
// A kernel that needs everything the emulator promises: sums of blocks through shared memory, twice in
// a row so that the array is used again. The tests compile it whole, and with one thing left out, which
// the emulator must notice: LEAVE_OUT = 0 nothing, 1 the barrier before reading, 2 the barrier before
// using the array again, 3 a barrier that only half of the threads reach, 4 a lane missing in a mask,
// 5 one element too many of shared memory, 6 a misaligned vector, 7 an atomic.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common.cuh"

#ifndef LEAVE_OUT
#define LEAVE_OUT 0
#endif

namespace {

constexpr int kThreads = 96, kWarps = 3, kBlocks = 5, kRounds = 2;

struct Args {
  const float* in;           // [kBlocks, kRounds, kThreads]
  float* out;                // [kBlocks, kRounds, kThreads]: the sum over the block, in every thread
  unsigned long long* done;  // finished threads
};

void block_sums(Args args) {
  SSLK_SHARED(float, partial, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int round = 0; round < kRounds; ++round) {
    const unsigned at = (blockIdx.x * kRounds + static_cast<unsigned>(round)) * kThreads;
    float sum = args.in[at + threadIdx.x];
    const unsigned mask = LEAVE_OUT == 4 && lane == 7 ? 0xffffff7fu : 0xffffffffu;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
    if (lane == 0) partial[warp + (LEAVE_OUT == 5 ? 1 : 0)] = sum;
    if (LEAVE_OUT != 1 && (LEAVE_OUT != 3 || warp == 0)) __syncthreads();
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    args.out[at + threadIdx.x] = total;
    if (LEAVE_OUT != 2) __syncthreads();
  }
  if (LEAVE_OUT == 6) {
    const auto v = sslkernels::cuda::load_vector<float, 4>(args.in + 1);
    args.out[0] += 0 * v.element[0];
  }
  if (LEAVE_OUT == 7) {
    const unsigned long long before = *args.done;
    __threadfence();  // where another thread may come between
    *args.done = before + 1;
  } else {
    atomicAdd(args.done, 1ull);
  }
}

}  // namespace

int main() {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 9; ++seed) {
    sslk_emulation::Config config;
    config.seed = seed;
    sslk_emulation::configure(config);
    std::vector<float> in(kBlocks * kRounds * kThreads), out(in.size(), -1.f);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 61);
    unsigned long long done = 0;
    const Args args = {in.data(), out.data(), &done};
    SSLK_LAUNCH(block_sums, kBlocks, kThreads, nullptr, args);
    for (int row = 0; row < kBlocks * kRounds; ++row) {
      float total = 0;  // whole numbers: exact in any order
      for (int i = 0; i < kThreads; ++i) total += in[static_cast<size_t>(row * kThreads + i)];
      for (int i = 0; i < kThreads; ++i) wrong += out[static_cast<size_t>(row * kThreads + i)] != total;
    }
    wrong += done != kBlocks * kThreads;
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
