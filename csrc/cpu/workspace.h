// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one kernel call: one piece (csrc/memory.h), carved into 64-byte aligned arrays.
#pragma once

#include <cstdint>
#include <cstring>

#include "../memory.h"
#include "../openmp.h"
#include "isa.h"

SSLK_BEGIN

// An array for every thread, `step` elements apart: see Workspace::plan.
template <class T>
struct PerThread {
  T* first = nullptr;
  int64_t step = 0;
  T* of(int64_t thread) const { return first + thread * step; }
  T* mine() const { return of(omp_get_thread_num()); }
};

// Hardware prefetchers read past the end of an array, and take lines that another core is writing.  4 KB between
// arrays of two threads do little, 64 KB take a tenth off the time where the cores share no L3 cache (docs/cpu.md).
constexpr int64_t kApartBytes = int64_t(64) << 10;

// Declare arrays with `plan`, call `allocate` once, then read the pointers.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  ~Workspace() { give_back(memory_); }

  template <class T>
  void plan(T** slot, int64_t count) {
    slots_[n_slots_] = reinterpret_cast<void**>(slot);
    offsets_[n_slots_++] = total_;
    total_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

  // `count` elements for every thread, far from what other threads write.
  template <class T>
  void plan(PerThread<T>* own, int64_t count, int64_t threads) {
    const int64_t gap = threads > 1 ? kApartBytes : 0, bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    own->step = (bytes + gap) / int64_t(sizeof(T));
    total_ += gap;
    gaps_ += (threads + 1) * gap;
    plan(&own->first, threads * own->step);
  }

  bool allocate() {
    if (!take_memory(total_, gaps_, &memory_)) return false;
    for (int s = 0; s < n_slots_; ++s) *slots_[s] = static_cast<char*>(memory_.data) + offsets_[s];
    return true;
  }

 private:
  static constexpr int kMaxSlots = 24;
  void** slots_[kMaxSlots] = {};
  int64_t offsets_[kMaxSlots] = {};
  int n_slots_ = 0;
  int64_t total_ = 0, gaps_ = 0;
  Memory memory_;
};

SSLK_END
