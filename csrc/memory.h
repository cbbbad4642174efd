// SPDX-License-Identifier: Apache-2.0
// Memory of workspaces (csrc/cpu/workspace.h): mapped, so that what goes back goes back to the system at once and
// the peak of a process is a function of its shapes.  malloc would keep or return it by what else was freed before.
#pragma once

#include <cstdint>

namespace sslk {

// One workspace; `data` is aligned to 64 bytes at least, null before `take_memory` and where it failed.
struct Memory {
  void* data = nullptr;
  int64_t counted = 0;  // bytes without gaps
  int64_t mapped = 0;   // bytes, unless kept
  int kept = -1;        // which of the mappings that the thread keeps, or -1
};

// `gaps`: how many of the bytes are never touched.  False when memory could not be had.
bool take_memory(int64_t bytes, int64_t gaps, Memory* memory);
void give_back(const Memory& memory);

// Bytes without gaps that the workspaces of all threads held at once, at most, since the last reset.
int64_t workspace_peak();
void reset_workspace_peak();
// Whether every workspace starts full of NaN (bytes of 0xff), so that a read of what no kernel wrote is noticed.
void fill_workspaces(bool with_nan);
// Returns to the system what the calling thread keeps between calls.
void release_workspaces();

}  // namespace sslk
