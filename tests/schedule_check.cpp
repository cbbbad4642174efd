// SPDX-License-Identifier: Apache-2.0
// Runs csrc/cpu/schedule.h for many sizes and numbers of threads (tests/test_schedule.py compiles it).
// Every pair of blocks must meet once, no block may be in two meetings at a time, and the order in which a
// block meets the others must be that of one thread.  Prints what went wrong and returns 1, or returns 0.

#include <atomic>
#include <cstdio>
#include <set>
#include <utility>
#include <vector>

#include "cpu/schedule.h"

using namespace sslk::SSLK_ISA_NS;

namespace {

enum Kind { kWithin, kAcross, kForRows };

struct Record {
  std::vector<std::vector<int64_t>> met_a, met_b;  // whom each block met, in order
  bool overlap = false;
};

Record play(Kind kind, int64_t n, int64_t m, int64_t wanted, int threads) {
  const Groups a(n, wanted), b(m, wanted);
  Record record;
  record.met_a.resize(size_t(n));
  record.met_b.resize(size_t(kind == kWithin ? n : m));
  std::vector<std::atomic<int>> busy_a(record.met_a.size()), busy_b(record.met_b.size());
  std::atomic<bool> overlap{false};
  const auto meet = [&](int64_t i, int64_t j) {
    auto& other = kind == kWithin ? busy_a[size_t(j)] : busy_b[size_t(j)];
    const bool one = kind == kWithin && i == j, both = kind != kForRows && !one;
    if (busy_a[size_t(i)].exchange(1) != 0) overlap = true;
    if (both && other.exchange(1) != 0) overlap = true;
    record.met_a[size_t(i)].push_back(j);
    if (both) (kind == kWithin ? record.met_a : record.met_b)[size_t(j)].push_back(i);
    for (int spin = 0; spin < 50; ++spin) busy_a[size_t(i)].load();
    if (both) other = 0;
    busy_a[size_t(i)] = 0;
  };
#pragma omp parallel num_threads(threads)
  {
    if (kind == kWithin) meet_within(a, meet);
    if (kind == kAcross) meet_across(a, b, meet);
    if (kind == kForRows) meet_for_rows(a, b, meet);
  }
  record.overlap = overlap;
  return record;
}

bool complete(const Record& record, Kind kind, int64_t n, int64_t m) {
  for (int64_t i = 0; i < n; ++i) {
    const auto& met = record.met_a[size_t(i)];
    const size_t want = size_t(kind == kWithin ? n : m);
    if (met.size() != want || std::set<int64_t>(met.begin(), met.end()).size() != want) return false;
  }
  return true;
}

}  // namespace

int main() {
  int failures = 0;
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{0, 0}, {0, 3},  {1, 1},  {2, 5},   {3, 2},  {4, 4},  {5, 1},
                                                          {7, 9}, {8, 16}, {9, 33}, {16, 16}, {17, 4}, {33, 20}};
  for (Kind kind : {kWithin, kAcross, kForRows}) {
    for (auto [n, m] : sizes) {
      for (int64_t wanted = 1; wanted <= 4; ++wanted) {
        const Record one = play(kind, n, m, wanted, 1);
        for (int threads = 1; threads <= 6; ++threads) {
          const Record many = play(kind, n, m, wanted, threads);
          const bool same = many.met_a == one.met_a && many.met_b == one.met_b;
          if (!many.overlap && same && complete(many, kind, n, m)) continue;
          std::printf("kind %d, %d x %d blocks, groups of %d, %d threads:%s%s%s\n", int(kind), int(n), int(m),
                      int(wanted), threads, many.overlap ? " two meetings of one block at a time" : "",
                      same ? "" : " another order than one thread's",
                      complete(many, kind, n, m) ? "" : " pairs missing or repeated");
          ++failures;
        }
      }
    }
  }
  return failures != 0;
}
