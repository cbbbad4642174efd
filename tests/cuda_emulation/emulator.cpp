// SPDX-License-Identifier: Apache-2.0
// The scheduler behind cuda_emulation.h: fibers (ucontext) on one host thread.
//
// A fiber runs threads to completion one after another and goes to a waiting state only when the
// thread it runs has to wait, so a kernel without barriers costs one stack and no switches.

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace sslk_emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kDevices = 2;  // so that a device guard has something to switch

struct Context {
  ucontext_t machine;
  const void* bottom = nullptr;  // of the stack, for the address sanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

struct Block;
struct Worker;

struct Fiber : Thread {
  Block* block = nullptr;
  int index = 0;             // in the block
  long long order = 0;       // by age of the block, then by index
  Worker* worker = nullptr;  // set while it has a stack
  int generation = 0;        // shuffles done
  int wait_line = 0;         // where it waits, 0 if it does not
  bool done = false;
};

struct Worker {  // a stack
  Context context;
  Fiber* running = nullptr;
};

struct Warp {
  uint64_t value[2][kWarp] = {};
  unsigned arrived[2] = {0, 0};
  unsigned mask[2] = {0, 0};
  int line[2] = {0, 0};
  std::vector<Fiber*> waiting;
};

struct SharedArray {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size = 0;
};

struct Block {
  std::vector<Fiber> threads;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  int barrier_line = 0;
  int alive = 0;
  std::map<int, SharedArray> shared;  // by source line
};

struct Scheduler {
  Config config;
  std::mt19937_64 random{1};
  int policy = 0;
  Context main;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<Worker*> idle;
  std::vector<Fiber*> runnable;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<unsigned> pending;  // block numbers, the next one last
  dim3 grid, block;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  int resident = 0;
  long long admitted = 0;
  int device = -1;  // whose context is current; -1: no context, as on a new thread
  long long launches = 0;
  int launch_device = -1;
  void* launch_stream = nullptr;
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

[[noreturn]] void fail(const char* what, const Fiber* fiber, int line) {
  std::fprintf(stderr, "cuda emulation: %s", what);
  if (fiber != nullptr)
    std::fprintf(stderr, " (block %u, thread %d, line %d)", fiber->block_index.x, fiber->index, line);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::abort();
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
  swapcontext(&from.machine, &to.machine);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void admit_block() {
  Scheduler& s = scheduler();
  if (s.pending.empty()) return;
  const unsigned number = s.pending.back();
  s.pending.pop_back();
  auto block = std::make_unique<Block>();
  const int count = static_cast<int>(s.block.x);
  block->threads.resize(static_cast<size_t>(count));
  block->warps.resize(static_cast<size_t>((count + kWarp - 1) / kWarp));
  block->alive = count;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = block->threads[static_cast<size_t>(i)];
    fiber.thread_index = dim3(static_cast<unsigned>(i), 0, 0);
    fiber.block_index = dim3(number, 0, 0);
    fiber.block_dim = s.block;
    fiber.grid_dim = s.grid;
    fiber.block = block.get();
    fiber.index = i;
    fiber.order = s.admitted * 1024 + i;
    s.runnable.push_back(&fiber);
  }
  ++s.admitted;
  ++s.resident;
  s.blocks.push_back(std::move(block));
}

Fiber* pick() {
  Scheduler& s = scheduler();
  size_t at = 0;
  if (s.policy == 2) {
    at = s.random() % s.runnable.size();
  } else {
    for (size_t i = 1; i < s.runnable.size(); ++i) {
      const bool before = s.runnable[i]->order < s.runnable[at]->order;
      if (before == (s.policy == 0)) at = i;
    }
  }
  Fiber* fiber = s.runnable[at];
  s.runnable[at] = s.runnable.back();
  s.runnable.pop_back();
  return fiber;
}

void finish(Fiber* fiber) {
  Scheduler& s = scheduler();
  fiber->done = true;
  fiber->worker = nullptr;
  Block* block = fiber->block;
  if (!block->at_barrier.empty())
    fail("a thread returned while others of its block wait at a barrier", fiber, block->barrier_line);
  if (--block->alive > 0) return;
  for (auto& owned : s.blocks) {
    if (owned.get() == block) {
      std::swap(owned, s.blocks.back());
      s.blocks.pop_back();
      break;
    }
  }
  --s.resident;
  admit_block();
}

void worker_main() {
  Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.main.bottom, &s.main.bytes);
#endif
  Worker* self = s.current->worker;
  for (;;) {
    (*s.body)();
    finish(s.current);
    self->running = nullptr;
    // Go on with a thread that has not started yet, on this very stack.
    if (!s.runnable.empty()) {
      Fiber* next = pick();
      if (next->worker == nullptr) {
        next->worker = self;
        self->running = next;
        s.current = next;
        continue;
      }
      s.runnable.push_back(next);
    }
    s.idle.push_back(self);
    switch_context(self->context, s.main);
  }
}

Worker* take_worker() {
  Scheduler& s = scheduler();
  if (!s.idle.empty()) {
    Worker* worker = s.idle.back();
    s.idle.pop_back();
    return worker;
  }
  auto worker = std::make_unique<Worker>();
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a stack", nullptr, 0);
  getcontext(&worker->context.machine);
  worker->context.machine.uc_stack.ss_sp = stack;
  worker->context.machine.uc_stack.ss_size = kStackBytes;
  worker->context.machine.uc_link = nullptr;
  worker->context.bottom = stack;
  worker->context.bytes = kStackBytes;
  makecontext(&worker->context.machine, worker_main, 0);
  s.workers.push_back(std::move(worker));
  return s.workers.back().get();
}

void wait_here() {  // the current thread has been put where something will find it
  Scheduler& s = scheduler();
  switch_context(s.current->worker->context, s.main);
}

}  // namespace

const Thread& current() { return *scheduler().current; }

int lane() { return scheduler().current->index % kWarp; }

void configure(const Config& config) {
  Scheduler& s = scheduler();
  s.config = config;
  s.random.seed(config.seed);
}

void launch(dim3 grid, dim3 block, void* stream, const std::function<void()>& body) {
  Scheduler& s = scheduler();
  if (grid.x == 0 || block.x == 0 || block.x > 1024) fail("invalid launch configuration", nullptr, 0);
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
    fail("only one-dimensional grids are emulated", nullptr, 0);
  ++s.launches;
  s.launch_device = s.device < 0 ? 0 : s.device;  // a runtime takes device 0 where there is no context
  s.launch_stream = stream;
  s.policy = static_cast<int>(s.config.seed % 3);
  s.grid = grid;
  s.block = block;
  s.body = &body;
  s.pending.resize(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) s.pending[i] = i;
  std::shuffle(s.pending.begin(), s.pending.end(), s.random);
  while (s.resident < s.config.resident_blocks && !s.pending.empty()) admit_block();
  while (!s.runnable.empty()) {
    Fiber* next = pick();
    if (next->worker == nullptr) {
      next->worker = take_worker();
      next->worker->running = next;
    }
    s.current = next;
    switch_context(s.main, next->worker->context);
  }
  s.current = nullptr;
  if (s.resident != 0) {
    for (const auto& owned : s.blocks)
      for (const Fiber& fiber : owned->threads)
        if (!fiber.done) fail("deadlock: a thread waits for ever", &fiber, fiber.wait_line);
  }
}

void barrier(int line) {
  Scheduler& s = scheduler();
  Fiber* fiber = s.current;
  Block* block = fiber->block;
  if (block->at_barrier.empty()) block->barrier_line = line;
  if (block->barrier_line != line) fail("threads of one block wait at different barriers", fiber, line);
  if (block->alive != static_cast<int>(block->threads.size()))
    fail("a barrier after a thread of the block has returned", fiber, line);
  block->at_barrier.push_back(fiber);
  fiber->wait_line = line;
  if (static_cast<int>(block->at_barrier.size()) == block->alive) {
    for (Fiber* waiting : block->at_barrier) {
      waiting->wait_line = 0;
      s.runnable.push_back(waiting);
    }
    block->at_barrier.clear();
  }
  wait_here();
}

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, int line) {
  Scheduler& s = scheduler();
  Fiber* fiber = s.current;
  const int me = fiber->index % kWarp;
  Warp& warp = fiber->block->warps[static_cast<size_t>(fiber->index / kWarp)];
  const int slot = fiber->generation++ & 1;
  if ((mask >> me & 1u) == 0) fail("a shuffle whose mask leaves out the caller", fiber, line);
  if (source_lane < 0 || source_lane >= kWarp || (mask >> source_lane & 1u) == 0)
    fail("a shuffle from a lane outside the mask", fiber, line);
  if (warp.arrived[slot] == 0) {
    warp.mask[slot] = mask;
    warp.line[slot] = line;
  }
  if (warp.mask[slot] != mask || warp.line[slot] != line)
    fail("lanes of one warp meet in different shuffles", fiber, line);
  warp.value[slot][me] = value;
  warp.arrived[slot] |= 1u << me;
  fiber->wait_line = line;
  warp.waiting.push_back(fiber);
  if (warp.arrived[slot] == mask) {
    warp.arrived[slot] = 0;
    for (Fiber* waiting : warp.waiting) {
      waiting->wait_line = 0;
      s.runnable.push_back(waiting);
    }
    warp.waiting.clear();
  }
  wait_here();
  return warp.value[slot][source_lane];
}

void maybe_switch() {
  Scheduler& s = scheduler();
  if (s.policy == 0 || (s.policy == 2 && s.random() % 2 == 0)) return;
  s.runnable.push_back(s.current);
  wait_here();
}

void* shared_memory(size_t bytes, int line) {
  SharedArray& array = scheduler().current->block->shared[line];
  if (array.bytes == nullptr) {
    array.bytes.reset(new unsigned char[bytes]);
    array.size = bytes;
    std::memset(array.bytes.get(), 0xff, bytes);
  }
  return array.bytes.get();
}

}  // namespace sslk_emulation

// ---- Runtime -----------------------------------------------------------------------------------

using sslk_emulation::scheduler;

namespace {

// A context is the address of its device's number.
int contexts[sslk_emulation::kDevices] = {0, 1};
static_assert(sslk_emulation::kDevices == 2);

int get_current(void** context) {
  const int device = scheduler().device;
  *context = device < 0 ? nullptr : &contexts[device];
  return cudaSuccess;
}
int set_current(void* context) {
  scheduler().device = context == nullptr ? -1 : *static_cast<int*>(context);
  return cudaSuccess;
}
int device_get(int* handle, int device) {
  if (device < 0 || device >= sslk_emulation::kDevices) return cudaErrorInvalidDevice;
  *handle = device + 40;  // a handle, not the number
  return cudaSuccess;
}
int primary_retain(void** context, int handle) {
  *context = &contexts[handle - 40];
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long) {
  const std::pair<const char*, void*> known[] = {{"cuCtxGetCurrent", reinterpret_cast<void*>(get_current)},
                                                 {"cuCtxSetCurrent", reinterpret_cast<void*>(set_current)},
                                                 {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
                                                 {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(primary_retain)}};
  for (const auto& [what, address] : known)
    if (std::strcmp(what, name) == 0) *function = address;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= sslk_emulation::kDevices) return cudaErrorInvalidDevice;
  *value = scheduler().config.multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                           : "invalid argument";
}

// ---- What the tests call through ctypes ----------------------------------------------------------

#pragma GCC visibility push(default)
extern "C" {

void emulation_configure(unsigned long long seed, int multiprocessors, int resident_blocks) {
  sslk_emulation::Config config;
  config.seed = seed;
  config.multiprocessors = multiprocessors;
  config.resident_blocks = resident_blocks;
  sslk_emulation::configure(config);
}
long long emulation_launches() { return scheduler().launches; }
int emulation_launch_device() { return scheduler().launch_device; }
void* emulation_launch_stream() { return scheduler().launch_stream; }
int emulation_device() { return scheduler().device; }
void emulation_set_device(int device) { scheduler().device = device; }
// Memory whose end lies against a red zone of the address sanitizer, `shift` bytes off 16.
void* emulation_allocate(size_t bytes, size_t shift) { return static_cast<char*>(std::malloc(bytes + shift)) + shift; }
void emulation_free(void* address, size_t shift) { std::free(static_cast<char*>(address) - shift); }

}  // extern "C"
#pragma GCC visibility pop
