// SPDX-License-Identifier: Apache-2.0
// Kernels with threads in a process that was forked (fork.cpp).
#pragma once

#include <future>

namespace sslk {

// Whether this process is a forked child of one that had loaded the module.
bool is_forked();

// What `work` returns.  In a forked child it runs on a thread of its own, which takes tens of microseconds.
template <class Work>
auto with_threads(const Work& work) {
  return is_forked() ? std::async(std::launch::async, work).get() : work();
}

}  // namespace sslk
