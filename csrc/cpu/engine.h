// SPDX-License-Identifier: Apache-2.0
// What every pass over the tiles shares: the prepared operands, the exclusion mask, the schedule.
//
// Logits are kept as t = S * log2(e) ("log2 units"), because the exponential is exp2.  There are three
// modes, chosen once per call from a bound on |S| (Cauchy-Schwarz over the row norms):
//   kFixed     |t| <= kFixedLimit / 2: one shift for all rows, e = exp2(t - shift) can neither overflow nor vanish
//   kOnline    any t: running maxima, one per row and lane (and one per column)
//   kSoftplus  softplus(S) and the logistic function instead of exp
#pragma once

#include <omp.h>

#include <cmath>

#include "pack.h"
#include "workspace.h"

SSLK_BEGIN

enum class Mode { kFixed, kOnline, kSoftplus };

// 2^-126 is the smallest exponential; 116 leaves room for the sum of 2^10 of them to be exact to rounding.
constexpr double kFixedLimit = 116.0;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kFloor = -1e30f;  // "no logit seen yet": finite, so that floor - floor = 0
};
template <>
struct Limits<double> {
  static constexpr double kFloor = -1e300;
};

// The exclusion mask of one side: ids as integers of the element width, and their range in each block.
template <class T>
struct Ids {
  Int<T>* id = nullptr;     // [n_pad]
  int64_t* low = nullptr;   // [blocks]
  int64_t* high = nullptr;  // [blocks]
};

// One operand, packed.
template <class T>
struct Side {
  Source<T> source;
  int64_t n = 0, n_pad = 0;  // rows, and rows rounded up to whole blocks
  T* panels = nullptr;       // T panels
  Ids<T> ids;
};

template <class T>
struct Engine {
  static constexpr int NR = Tile<T>::NR, MR = Tile<T>::MR, L = Tile<T>::L;

  const PairwiseArgs& args;
  int64_t d, d_pad;
  int64_t block = Tile<T>::kBlock;  // rows of a block: smaller for small problems, for parallelism
  Side<T> q, k;                     // k aliases q in self mode
  bool has_ids = false;
  Mode mode = Mode::kFixed;
  T unit = 0;        // t = unit * <q, k> + offset
  T offset = 0;      // minus the shift (kFixed), or the bias
  double shift = 0;  // kFixed: log2 units, an integer so that subtracting it is exact

  explicit Engine(const PairwiseArgs& a) : args(a), d(a.d), d_pad(round_up(a.d, NR)) {
    q.source = make_source<T>(a.dtype, a.q, a.inv_q, d);
    k.source = a.self ? q.source : make_source<T>(a.dtype, a.k, a.inv_k, d);
    q.n = q.source.rows();
    k.n = k.source.rows();
    // Few blocks would leave threads idle: below 4 full blocks use the smallest block there is.
    const int64_t small = NR * (sizeof(T) == 4 ? 1 : 2);
    if (max64(q.n, k.n) <= 4 * Tile<T>::kBlock) block = small;
    q.n_pad = round_up(q.n, Tile<T>::kBlock);
    k.n_pad = round_up(k.n, Tile<T>::kBlock);
    has_ids = a.ids_q != nullptr;
  }

  int64_t blocks(const Side<T>& side) const { return ceil_div(side.n, block); }

  // Reserves packed operands and ids; keys read in place (attend) need no panels.
  void plan_sides(Workspace& w, bool with_key_panels) {
    w.plan(&q.panels, q.n_pad * d);
    plan_ids(w, q);
    if (!args.self && with_key_panels) w.plan(&k.panels, k.n_pad * d);
    if (!args.self || !has_ids) plan_ids(w, k);
  }

  void plan_ids(Workspace& w, Side<T>& side) {
    w.plan(&side.ids.id, side.n_pad);
    w.plan(&side.ids.low, blocks(side));
    w.plan(&side.ids.high, blocks(side));
  }

  // One thread's share of packing a side; called inside a parallel region.  Returns the largest
  // squared row norm that it met, or NaN if a row holds one.
  double pack_side(const Side<T>& side, int thread, int n_threads, T* buffer) const {
    const int64_t panels = ceil_div(side.n, NR);
    double largest = 0;
    for (int64_t p = panels * thread / n_threads; p < panels * (thread + 1) / n_threads; ++p) {
      pack_t_panel(side.source, p, side.panels + p * d * NR, buffer, &largest);
    }
    // Panels past the last row belong to padding rows of the last block: zero.
    if (thread == n_threads - 1) {
      std::memset(side.panels + panels * d * NR, 0, size_t(side.n_pad - panels * NR) * d * sizeof(T));
    }
    return largest;
  }

  // Packs both sides with all threads and returns the bound |scale| * max|q_i| * max|k_j| on |S|.
  // `buffers` holds d_pad elements a thread, `norms` 2 doubles a thread.
  double pack_all(T* buffers, double* norms) {
    const int n_threads = args.n_threads;
#pragma omp parallel num_threads(n_threads)
    {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
      T* buffer = buffers + thread * d_pad;
      norms[2 * thread] = pack_side(q, thread, team, buffer);
      norms[2 * thread + 1] = args.self ? norms[2 * thread] : pack_side(k, thread, team, buffer);
      for (int t = team; thread == 0 && t < n_threads; ++t) norms[2 * t] = norms[2 * t + 1] = 0;
    }
    if (args.self) k.panels = q.panels;
    return bound_from(norms);
  }

  // |scale| * max|q_i| * max|k_j| from the squared norms that each thread met; NaN if there is one.
  double bound_from(const double* norms) const {
    double largest[2] = {0, 0};
    for (int t = 0; t < args.n_threads; ++t) {
      for (int s = 0; s < 2; ++s) {
        const double norm2 = norms[2 * t + s];
        if (norm2 != norm2) return norm2;
        if (norm2 > largest[s]) largest[s] = norm2;
      }
    }
    return std::fabs(args.scale) * std::sqrt(largest[0]) * std::sqrt(largest[1]);
  }

  void fill_ids(Side<T>& side, const int64_t* ids, Int<T> none) const {
    for (int64_t i = 0; i < side.n_pad; ++i) {
      side.ids.id[i] = ids != nullptr && i < side.n ? Int<T>(ids[i]) : none;
    }
    for (int64_t b = 0; b < blocks(side); ++b) {
      int64_t low = side.ids.id[b * block], high = low;
      for (int64_t i = b * block; i < min64(side.n, (b + 1) * block); ++i) {
        low = min64(low, side.ids.id[i]);
        high = max64(high, side.ids.id[i]);
      }
      side.ids.low[b] = low;
      side.ids.high[b] = high;
    }
  }

  // Without ids the two sides get different constants, so that nothing is equal.
  void fill_all_ids() {
    fill_ids(q, args.ids_q, -2);
    if (args.self && has_ids) {
      k.ids = q.ids;
    } else {
      fill_ids(k, has_ids ? args.ids_k : nullptr, -3);
    }
  }

  bool may_exclude(int64_t bi, int64_t bj) const {
    return has_ids && q.ids.low[bi] <= k.ids.high[bj] && k.ids.low[bj] <= q.ids.high[bi];
  }

  // bound: a proven upper bound of |S|, or NaN when nothing is known.
  void choose_mode(double bound) {
    if (args.kind == Kind::softplus) {
      mode = Mode::kSoftplus;
      unit = T(args.scale);
      offset = T(args.bias);
      return;
    }
    unit = T(args.scale * kLog2E);
    const double limit = std::ceil(bound * kLog2E + 1e-3 * std::fabs(bound) + 1e-6);
    if (2 * limit <= kFixedLimit && args.bias == 0) {  // false for NaN
      mode = Mode::kFixed;
      shift = limit;
      offset = T(-limit);
    } else {
      mode = Mode::kOnline;
      shift = 0;
      offset = T(args.bias * kLog2E);
    }
  }
};

// Round-robin tournament of `n` blocks (the circle method): in a round no two pairs share a block, so
// both blocks of a pair can be written without locks, and the order in which a block meets the
// others does not depend on the number of threads.
struct Tournament {
  int64_t players;  // even; the last one is a bye when the number of blocks is odd
  int64_t blocks;
  explicit Tournament(int64_t n) : players(n + (n & 1)), blocks(n) {}
  int64_t rounds() const { return players > 1 ? players - 1 : 0; }
  int64_t pairs() const { return players / 2; }
  // Pair p of a round as (a < b); false for the bye.
  bool pair(int64_t round, int64_t p, int64_t* a, int64_t* b) const {
    const int64_t m = players - 1;
    const int64_t x = p == 0 ? m : (round + p) % m;
    const int64_t y = p == 0 ? round : (round - p + m) % m;
    *a = min64(x, y);
    *b = max64(x, y);
    return *b < blocks;
  }
};

SSLK_END
