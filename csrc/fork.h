// SPDX-License-Identifier: Apache-2.0
// Kernels with threads in a process that was forked (fork.cpp).
#pragma once

#include <type_traits>

namespace sslk {

// Whether this process is a forked child of one that had loaded the module.
bool is_forked();

// Calls `work(data)` on a new thread and waits for it; throws what it threw.  std::async would do, but asks for a
// newer libstdc++ and glibc than torch (portable.h).
void run_on_a_thread(void (*work)(void*), void* data);

// What `work` returns.  In a forked child it runs on a thread of its own, which takes tens of microseconds.
template <class Work>
auto with_threads(const Work& work) {
  using Result = decltype(work());
  if (!is_forked()) return work();
  if constexpr (std::is_void_v<Result>) {
    run_on_a_thread([](void* data) { (*static_cast<const Work*>(data))(); }, const_cast<Work*>(&work));
  } else {
    struct {
      const Work& work;
      Result result;
    } call{work, {}};
    run_on_a_thread(
        [](void* data) {
          auto& mine = *static_cast<decltype(call)*>(data);
          mine.result = mine.work();
        },
        &call);
    return call.result;
  }
}

}  // namespace sslk
