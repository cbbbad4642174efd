// SPDX-License-Identifier: Apache-2.0
// Workspaces are mappings.  A thread keeps three between calls, because a fault of every page takes 0.1 to 0.6 ms a MB,
// several percent of the time of a call up to N = 8192; above that the arithmetic, which grows with N^2, hides it.

#include "memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace sslk {
namespace {

// Of one mapping: what NT-Xent needs at N = 8192, D = 128.
constexpr int64_t kMostKeptBytes = int64_t(32) << 20;

#if defined(__SANITIZE_ADDRESS__)
// So that the sanitizer sees what lies beyond the end.
void* map(int64_t bytes) { return std::aligned_alloc(64, size_t(bytes)); }
void unmap(void* data, int64_t) { std::free(data); }
#else
void* map(int64_t bytes) {
  void* data = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}
void unmap(void* data, int64_t bytes) {
  if (data != nullptr) munmap(data, size_t(bytes));
}
#endif

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  bool in_use = false;

  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() { release(); }

  bool reserve(int64_t wanted) {
    if (bytes >= wanted) return true;
    release();
    data = map(wanted);
    bytes = data != nullptr ? wanted : 0;
    return data != nullptr;
  }
  void release() { unmap(std::exchange(data, nullptr), std::exchange(bytes, 0)); }
};

// A loss with its gradients calls the loss, which calls a tile pass: as many workspaces can be open at once.
constexpr int kKept = 3;
thread_local Kept kept[kKept];

std::atomic<int64_t> in_use{0}, peak{0};
std::atomic<bool> filling{false};

void count(int64_t bytes) {
  const int64_t now = in_use.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
}

void begin(int64_t bytes, const Memory& memory) {
  count(memory.counted);
  if (filling.load(std::memory_order_relaxed)) std::memset(memory.data, 0xff, size_t(bytes));
}

}  // namespace

void fill_workspaces(bool with_nan) { filling.store(with_nan); }

bool take_memory(int64_t bytes, int64_t gaps, Memory* memory) {
  memory->counted = bytes - gaps;
  bytes = bytes > 0 ? (bytes + 63) / 64 * 64 : 64;
  for (int k = 0; k < kKept && memory->counted <= kMostKeptBytes; ++k) {
    if (kept[k].in_use) continue;
    if (!kept[k].reserve(bytes)) return false;
    kept[k].in_use = true;
    memory->data = kept[k].data;
    memory->kept = k;
    begin(bytes, *memory);
    return true;
  }
  memory->data = map(bytes);
  memory->mapped = bytes;
  if (memory->data == nullptr) return false;
  begin(bytes, *memory);
  return true;
}

void give_back(const Memory& memory) {
  if (memory.data == nullptr) return;
  if (memory.kept >= 0) {
    kept[memory.kept].in_use = false;
  } else {
    unmap(memory.data, memory.mapped);
  }
  in_use.fetch_sub(memory.counted, std::memory_order_relaxed);
}

int64_t workspace_peak() { return peak.load(); }

void reset_workspace_peak() { peak.store(in_use.load()); }

void release_workspaces() {
  for (Kept& k : kept) {
    if (!k.in_use) k.release();
  }
}

}  // namespace sslk
