// SPDX-License-Identifier: Apache-2.0
// In which order blocks meet, and which thread has them meet.
//
// Both blocks of a pair gather results, so no two pairs that share a block may run at the same time, and the
// order in which a block meets the others must not depend on the number of threads: sums then have the same
// bits for any number.  Blocks form groups whose panels and gradients fit the L2 cache of a core together, and
// whole groups meet, each pair of them on one thread.  Where that would leave threads idle, the same pairs of
// blocks are dealt in the same order one by one.
#pragma once

#include "../openmp.h"
#include "tile.h"

SSLK_BEGIN

// Round-robin tournament of `n` players (the circle method): in a round nobody is in two pairs.
struct Tournament {
  int64_t seats;  // even; the last one is a bye when the number of players is odd
  int64_t players;
  explicit Tournament(int64_t n) : seats(n + (n & 1)), players(n) {}
  int64_t rounds() const { return seats > 1 ? seats - 1 : 0; }
  int64_t pairs() const { return seats / 2; }
  // Pair p of a round as (a < b); false for the bye.  From one round to the next a player moves to the
  // neighbouring pair, so with fixed shares it mostly stays with its thread, and its gradients in that core's cache.
  bool pair(int64_t round, int64_t p, int64_t* a, int64_t* b) const {
    const int64_t m = seats - 1;
    const int64_t x = p == 0 ? m : (round + p) % m;
    const int64_t y = p == 0 ? round : (round - p + m) % m;
    *a = min64(x, y);
    *b = max64(x, y);
    return *b < players;
  }
};

// The groups of one side, as even as possible.
struct Groups {
  int64_t blocks, count;

  // `wanted`: blocks of a group at most.  Four, or a multiple of four, keep two and four threads equally busy.
  Groups(int64_t n_blocks, int64_t wanted)
      : blocks(n_blocks), count(max64(1, min64(n_blocks, round_up(ceil_div(n_blocks, wanted), 4)))) {}

  int64_t first(int64_t g) const { return g * blocks / count; }
  int64_t size(int64_t g) const { return first(g + 1) - first(g); }
  int64_t largest() const { return ceil_div(blocks, count); }
};

// The threads that share a loop, and wait for each other at its end.  (benchmarks/schedule.cpp plays other teams.)
struct Team {
  int64_t size() const { return omp_get_num_threads(); }
  // run(i) for i < n: equal shares, the same for every loop of n.
  template <class Run>
  void share(int64_t n, Run run) const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) run(i);
  }
  // Who is free takes the next one.
  template <class Run>
  void share_dynamically(int64_t n, Run run) const {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) run(i);
  }
};

// `n` meetings of groups at once, each of which takes `steps` steps of `lanes` pairs of blocks that may run at the
// same time: lane(meeting, step, lane).  Called by all threads of a team.
template <class Threads, class Lane>
inline void hold_meetings(const Threads& team, int64_t n, int64_t steps, int64_t lanes, Lane lane) {
  if (n % team.size() == 0 || n >= 4 * team.size()) {
    team.share(n, [&](int64_t m) {
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t l = 0; l < lanes; ++l) lane(m, s, l);
      }
    });
  } else {
    for (int64_t s = 0; s < steps; ++s) {
      team.share(n * lanes, [&](int64_t ml) { lane(ml / lanes, s, ml % lanes); });
    }
  }
}

// meet(i, j) for the blocks of groups a and b of two sides: lane l has block l of a.
template <class Meet>
inline void meet_groups(const Groups& side_a, int64_t a, const Groups& side_b, int64_t b, int64_t lanes, int64_t step,
                        int64_t lane, Meet meet) {
  const int64_t other = (lane + step) % lanes;
  if (lane < side_a.size(a) && other < side_b.size(b)) meet(side_a.first(a) + lane, side_b.first(b) + other);
}

// Every block with itself and with every other once, meet(i, j) with i <= j.
template <class Meet, class Threads = Team>
inline void meet_within(const Groups& side, Meet meet, const Threads& team = {}) {
  const int64_t largest = side.largest();
  hold_meetings(team, side.count, 1 + Tournament(largest).rounds(), largest,
                [&](int64_t g, int64_t step, int64_t lane) {
                  const int64_t first = side.first(g);
                  int64_t a, b;
                  if (step == 0) {
                    if (lane < side.size(g)) meet(first + lane, first + lane);
                  } else {
                    const Tournament inner(side.size(g));
                    if (step <= inner.rounds() && lane < inner.pairs() && inner.pair(step - 1, lane, &a, &b)) {
                      meet(first + a, first + b);
                    }
                  }
                });
  const Tournament outer(side.count);
  for (int64_t round = 0; round < outer.rounds(); ++round) {
    hold_meetings(team, outer.pairs(), largest, largest, [&](int64_t p, int64_t step, int64_t lane) {
      int64_t a, b;
      if (outer.pair(round, p, &a, &b)) meet_groups(side, a, side, b, largest, step, lane, meet);
    });
  }
}

// Every block of one side with every block of the other: in a round group i meets group i + round.
template <class Meet, class Threads = Team>
inline void meet_across(const Groups& side_a, const Groups& side_b, Meet meet, const Threads& team = {}) {
  const int64_t rounds = max64(side_a.count, side_b.count), lanes = max64(side_a.largest(), side_b.largest());
  for (int64_t round = 0; round < rounds; ++round) {
    hold_meetings(team, side_a.count, lanes, lanes, [&](int64_t a, int64_t step, int64_t lane) {
      const int64_t b = (a + round) % rounds;
      if (b < side_b.count) meet_groups(side_a, a, side_b, b, lanes, step, lane, meet);
    });
  }
}

// The same where only blocks of side a gather results: those are free to meet at any time.
template <class Meet, class Threads = Team>
inline void meet_for_rows(const Groups& side_a, const Groups& side_b, Meet meet, const Threads& team = {}) {
  const int64_t part = max64(1, min64(side_a.largest(), side_a.blocks / (4 * team.size())));
  team.share_dynamically(ceil_div(side_a.blocks, part), [&](int64_t p) {
    for (int64_t j = 0; j < side_b.blocks; ++j) {
      for (int64_t i = p * part; i < min64(side_a.blocks, (p + 1) * part); ++i) meet(i, j);
    }
  });
}

SSLK_END
