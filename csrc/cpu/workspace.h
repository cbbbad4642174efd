// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one kernel call: one allocation, carved into 64-byte aligned arrays.
//
// Small workspaces are kept by the calling thread between calls: returning them to the system
// would fault every page in again, which costs several percent at N = 512.  Larger ones are freed.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "isa.h"

SSLK_BEGIN

constexpr int64_t kKeptWorkspaceBytes = int64_t(4) << 20;

struct KeptWorkspace {
  void* data = nullptr;
  int64_t bytes = 0;
  bool in_use = false;
  ~KeptWorkspace() { std::free(data); }
};

// A whole loss calls a tile pass, so two workspaces can be open at once.
inline KeptWorkspace* free_kept_workspace() {
  static thread_local KeptWorkspace kept[2];
  for (KeptWorkspace& k : kept) {
    if (!k.in_use) return &k;
  }
  return nullptr;
}

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

  ~Workspace() {
    if (kept_ != nullptr) {
      kept_->in_use = false;
    } else {
      std::free(base_);
    }
  }

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
    KeptWorkspace* kept = total_ - gaps_ <= kKeptWorkspaceBytes ? free_kept_workspace() : nullptr;
    if (kept != nullptr) {
      if (kept->bytes < total_) {
        std::free(kept->data);
        kept->bytes = 0;
        kept->data = std::aligned_alloc(64, size_t(total_));
        if (kept->data == nullptr) return false;
        kept->bytes = total_;
      }
      kept->in_use = true;
      kept_ = kept;
      base_ = kept->data;
    } else {
      base_ = std::aligned_alloc(64, size_t(total_ > 0 ? total_ : 64));
      if (base_ == nullptr) return false;
    }
    for (int s = 0; s < n_slots_; ++s) *slots_[s] = static_cast<char*>(base_) + offsets_[s];
    return true;
  }

 private:
  static constexpr int kMaxSlots = 24;
  void** slots_[kMaxSlots] = {};
  int64_t offsets_[kMaxSlots] = {};
  int n_slots_ = 0;
  int64_t total_ = 0, gaps_ = 0;
  void* base_ = nullptr;
  KeptWorkspace* kept_ = nullptr;
};

SSLK_END
