// SPDX-License-Identifier: Apache-2.0
// Threads do not live on in a forked child, and libgomp does not notice: the next parallel region of the thread that
// forked waits for ever for a pool that is gone.  A new thread gets a pool of its own.

#include "fork.h"

#include <pthread.h>

#include <atomic>

namespace sslk {
namespace {

std::atomic<bool> child{false};

// The module was loaded before the fork, or there would be no handler.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { child = true; });

}  // namespace

bool is_forked() { return child.load(std::memory_order_relaxed); }

}  // namespace sslk
