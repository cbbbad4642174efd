// SPDX-License-Identifier: Apache-2.0
// Plays csrc/cpu/schedule.h for a team of any size without running it (benchmarks/schedule.py compiles it).
//
//   schedule triangle|rectangle BLOCKS GROUP THREADS
//
// Prints: work (in products of two blocks), the work of the busiest thread summed over all barriers, barriers, blocks
// of gradients that a thread adds to and another one wrote last, and meetings of two blocks.

#include "cpu/schedule.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace sslk::SSLK_ISA_NS;

namespace {

struct Play {
  int64_t threads, thread = 0;
  std::vector<int64_t> busy;  // work of each thread since the last barrier
  int64_t work = 0, busiest = 0, barriers = 0, moved = 0, meetings = 0;
  explicit Play(int64_t n) : threads(n), busy(size_t(n)) {}

  void barrier() {
    int64_t most = 0;
    for (int64_t& b : busy) most = max64(most, b), b = 0;
    busiest += most;
    ++barriers;
  }
};

// The threads of a Play, one after the other; shares are those of OpenMP's schedule(static).
struct Simulated {
  Play* play;
  int64_t size() const { return play->threads; }
  template <class Run>
  void share(int64_t n, Run run) const {
    const int64_t each = n / size(), more = n % size();
    int64_t i = 0;
    for (int64_t t = 0; t < size(); ++t) {
      play->thread = t;
      for (const int64_t end = i + each + (t < more); i < end; ++i) run(i);
    }
    play->barrier();
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const bool triangle = std::strcmp(argv[1], "triangle") == 0;
  const int64_t blocks = std::atoll(argv[2]);
  const Groups groups(blocks, std::atoll(argv[3]));
  Play play(std::atoll(argv[4]));
  std::vector<int64_t> wrote_a(size_t(blocks), -1), wrote_b(size_t(blocks), -1);
  const auto add_to = [&](int64_t& last) {
    play.moved += last >= 0 && last != play.thread;
    last = play.thread;
  };
  const auto meet = [&](int64_t i, int64_t j) {
    // Forward one product; backward S again and a product for each gradient.
    const bool diagonal = triangle && i == j;
    const int64_t products = diagonal ? 3 : 4;
    play.busy[size_t(play.thread)] += products;
    play.work += products;
    ++play.meetings;
    add_to(wrote_a[size_t(i)]);
    if (!diagonal) add_to((triangle ? wrote_a : wrote_b)[size_t(j)]);
  };
  if (triangle) {
    meet_within(groups, meet, Simulated{&play});
  } else {
    meet_across(groups, groups, meet, Simulated{&play});
  }
  std::printf("%lld %lld %lld %lld %lld\n", static_cast<long long>(play.work), static_cast<long long>(play.busiest),
              static_cast<long long>(play.barriers), static_cast<long long>(play.moved),
              static_cast<long long>(play.meetings));
  return 0;
}
