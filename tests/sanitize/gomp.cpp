// SPDX-License-Identifier: Apache-2.0
// The few functions of libgomp that the kernels call, on std::thread.
//
// ThreadSanitizer knows mutexes and condition variables, and not the futexes of libgomp, whose barriers it takes for
// none: every loop would be reported.  With these it sees each edge that OpenMP promises (fork, join, barrier, the
// next chunk of a dynamic loop) and no other.

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned n) : size(n) {}
  const unsigned size;
  std::mutex mutex;
  std::condition_variable turned;
  unsigned waiting = 0, round = 0;
  // The dynamic loop of now; `loops` counts those that were begun.
  long next = 0, end = 0, chunk = 1;
  unsigned begun = 0;

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      turned.notify_all();
      return;
    }
    turned.wait(lock, [&] { return round != mine; });
  }
};

struct Place {
  Team* team = nullptr;
  unsigned thread = 0;
  unsigned loops = 0;  // dynamic loops that this thread has come to
};

thread_local Place place;
std::mutex critical;

}  // namespace

extern "C" {

int omp_get_thread_num() { return int(place.thread); }
int omp_get_num_threads() { return place.team != nullptr ? int(place.team->size) : 1; }
int omp_get_max_threads() { return 4; }
double omp_get_wtime() { return 0.0; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned n_threads, unsigned) {
  const Place outer = place;
  Team team(n_threads > 0 ? n_threads : 1);
  std::vector<std::thread> others;
  for (unsigned t = 1; t < team.size; ++t) {
    others.emplace_back([&, t] {
      place = {&team, t, 0};
      body(data);
    });
  }
  place = {&team, 0, 0};
  body(data);
  for (std::thread& thread : others) thread.join();
  place = outer;
}

void GOMP_barrier() {
  if (place.team != nullptr) place.team->barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
  Team& team = *place.team;
  const std::lock_guard<std::mutex> lock(team.mutex);
  if (team.next >= team.end) return false;
  *start = team.next;
  *end = team.next = team.next + team.chunk < team.end ? team.next + team.chunk : team.end;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long chunk, long* from, long* to) {
  Team& team = *place.team;
  {
    const std::lock_guard<std::mutex> lock(team.mutex);
    if (++place.loops > team.begun) {  // the first to come
      team.begun = place.loops;
      team.next = start, team.end = end, team.chunk = chunk;
    }
  }
  return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}

bool GOMP_loop_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  return GOMP_loop_nonmonotonic_dynamic_start(start, end, step, chunk, from, to);
}
bool GOMP_loop_dynamic_next(long* start, long* end) { return GOMP_loop_nonmonotonic_dynamic_next(start, end); }

void GOMP_critical_start() { critical.lock(); }
void GOMP_critical_end() { critical.unlock(); }

void GOMP_loop_end() { GOMP_barrier(); }
// Two loops without a barrier between them would need more than one loop a team; the kernels have none.
void GOMP_loop_end_nowait() {}

}  // extern "C"
