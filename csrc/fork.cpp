// SPDX-License-Identifier: Apache-2.0
// Threads do not live on in a forked child, and libgomp does not notice: the next parallel region of the thread that
// forked waits for ever for a pool that is gone.  A new thread gets a pool of its own.

#include "fork.h"

#include <pthread.h>

#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace sslk {
namespace {

std::atomic<bool> child{false};

// The module was loaded before the fork, or there would be no handler.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { child = true; });

// The kinds of exceptions that become different ones in Python (object.h).
enum class Failure { none, memory, argument, other };

struct Task {
  void (*work)(void*);
  void* data;
  Failure failure = Failure::none;
  std::string text{};
};

void* perform(void* pointer) {
  Task& task = *static_cast<Task*>(pointer);
  try {
    task.work(task.data);
  } catch (const std::bad_alloc&) {
    task.failure = Failure::memory;
  } catch (const std::invalid_argument& error) {
    task.failure = Failure::argument;
    task.text = error.what();
  } catch (const std::exception& error) {
    task.failure = Failure::other;
    task.text = error.what();
  }
  return nullptr;
}

}  // namespace

bool is_forked() { return child.load(std::memory_order_relaxed); }

void run_on_a_thread(void (*work)(void*), void* data) {
  Task task{work, data};
  pthread_t thread;
  if (pthread_create(&thread, nullptr, perform, &task) != 0) {
    throw std::runtime_error("a forked process could not start a thread for this call");
  }
  pthread_join(thread, nullptr);
  switch (task.failure) {
    case Failure::none: return;
    case Failure::memory: throw std::bad_alloc();
    case Failure::argument: throw std::invalid_argument(task.text);
    case Failure::other: throw std::runtime_error(task.text);
  }
}

}  // namespace sslk
