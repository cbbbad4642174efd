// SPDX-License-Identifier: Apache-2.0
// What every pass over the tiles shares: the prepared operands, the exclusion mask, the schedule.
//
// Logits are kept as t = S * log2(e) ("log2 units"), because the exponential is exp2.  There are three
// modes, chosen once per call from a bound on |S| (Cauchy-Schwarz over the row norms):
//   kFixed     |t| <= kFixedLimit / 2: one shift for all rows, e = exp2(t - shift) can neither overflow nor vanish
//   kOnline    any t: running maxima, one per row and lane (and one per column)
//   kSoftplus  softplus(S) and the logistic function instead of exp
#pragma once

#include <cmath>
#include <new>

#include "pack.h"
#include "schedule.h"
#include "workspace.h"

SSLK_BEGIN

enum class Mode { kFixed, kOnline, kSoftplus };

// Whether whole tiles have code of their own, without masks.  Where double exponentials dominate, a mask costs
// 1 %, and every variant less shortens what takes longest to compile.
template <class T, Mode kMode>
constexpr bool kUnmasked = kMode == Mode::kFixed || sizeof(T) == 4;

// Multiply-adds of one pass below which one thread is faster (the pass then takes about 10 us).
constexpr int64_t kSerialWork = int64_t(1) << 20;

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

// Rows of a block.  Few blocks would leave threads idle: below 4 full blocks it is the smallest there is.
template <class M>
inline int64_t block_rows(int64_t larger_side) {
  const int64_t small = Tile<M>::NR * (sizeof(AccOfMath<M>) == 4 ? 1 : 2);
  return larger_side <= 4 * Tile<M>::kBlock ? small : Tile<M>::kBlock;
}

// Logits kept for backward: [kKeptHeader], of which the first is the number of rows of a block, then
// [block][block] for every pair of blocks, self mode those of one triangle.
constexpr int64_t kKeptHeader = 16;

template <class M>
inline int64_t kept_elements(bool self, int64_t n, int64_t m) {
  const int64_t block = block_rows<M>(max64(n, m)), rows = ceil_div(n, block), cols = ceil_div(m, block);
  return kKeptHeader + (self ? rows * (rows + 1) / 2 : rows * cols) * block * block;
}

// One operand.
template <class M>
struct Side {
  Source<AccOfMath<M>> source;
  int64_t n = 0, n_pad = 0;  // rows, and rows rounded up to whole blocks
  ElemOf<M>* t = nullptr;    // T panels and
  ElemOf<M>* p = nullptr;    // P panels of all rows; null: packed when they are needed
  Ids<AccOfMath<M>> ids;
};

// Most blocks that a thread visits together, and most bytes of one of their arrays: L2 caches have 1 MB or more on
// processors with AVX-512, from 256 KB to 512 KB on most of those with AVX2 only.
constexpr int64_t kMaxGroup = 4;
#if defined(__AVX512F__)
constexpr int64_t kGroupBytes = int64_t(128) << 10;
#else
constexpr int64_t kGroupBytes = int64_t(88) << 10;
#endif

// Panels of the blocks of one group, packed by the thread that uses them.
template <class M>
struct OwnPanels {
  ElemOf<M>* memory = nullptr;
  int64_t block[kMaxGroup] = {-1, -1, -1, -1};  // whose panels they are
  static_assert(kMaxGroup == 4, "as many as there are -1");
};

// What a thread has for itself.
template <class M>
struct ThreadScratch {
  PackBuffer<M> buffer;
  OwnPanels<M> t_q, t_k, p_q, p_k;
  double norm2_q = 0, norm2_k = 0;  // largest squared row norms that it met
  AccOfMath<M>* g = nullptr;        // [kBlock][kLdG], see pairwise_backward.cpp
  ElemOf<M>* g_rows = nullptr;      // G in Elem: pairs along its rows,
  ElemOf<M>* g_cols = nullptr;      // and down its columns
};

template <class M>
struct Engine {
  using T = AccOfMath<M>;
  using Elem = ElemOf<M>;
  static constexpr int NR = Tile<M>::NR, MR = Tile<M>::MR, L = Tile<M>::L, kBlock = Tile<M>::kBlock;

  const PairwiseArgs& args;
  int64_t d, d_pad;
  int64_t depth;           // elements of a row in T panels
  int64_t block = kBlock;  // rows of a block: smaller for small problems, for parallelism
  int64_t group = 1;       // blocks that a thread visits together, at most
  int threads;
  bool resident;           // panels of all rows exist; else they are packed group by group
  bool with_t = true;      // T panels are needed: not when the logits were kept
  bool q_in_turn = false;  // each group of q meets all of k before the next: its panels need not outlive that
  Side<M> q, k;            // k aliases q in self mode
  PerThread<T> buffers;    // memory of ThreadScratch
  PerThread<Elem> panels;
  bool has_ids = false;
  Mode mode = Mode::kFixed;
  T unit = 0;        // t = unit * <q, k> + offset
  T offset = 0;      // minus the shift (kFixed), or the bias
  double shift = 0;  // kFixed: log2 units, an integer so that subtracting it is exact

  explicit Engine(const PairwiseArgs& a)
      : args(a), d(a.d), d_pad(round_up(a.d, NR)), depth(ceil_div(a.d, M::kPack)), threads(a.n_threads) {
    q.source = make_source<T>(a.dtype, a.q, a.inv_q, d);
    k.source = a.self ? q.source : make_source<T>(a.dtype, a.k, a.inv_k, d);
    q.n = q.source.rows();
    k.n = k.source.rows();
    const int64_t larger = max64(q.n, k.n);
    block = block_rows<M>(larger);
    q.n_pad = round_up(q.n, kBlock);
    k.n_pad = round_up(k.n, kBlock);
    has_ids = a.ids_q != nullptr;
    // Waking a second thread costs more than it saves below that.
    if (q.n * k.n * d < kSerialWork) threads = 1;
    // 16-bit inputs are not copied to float as a whole.
    const bool converts = M::kPack == 1 && (a.dtype == DType::bf16 || a.dtype == DType::f16);
    resident = !converts;
    // The panels and gradients of two groups, five arrays, stay in the L2 cache.
    group = max64(1, min64(kMaxGroup, kGroupBytes / max64(1, int64_t(sizeof(T)) * d_pad * block)));
  }

  int64_t blocks(const Side<M>& side) const { return ceil_div(side.n, block); }
  // Where the logits of a pair of blocks are kept (self mode: bi <= bj).
  int64_t kept_at(int64_t bi, int64_t bj) const {
    const int64_t cols = blocks(k);
    const int64_t pair = args.self ? bi * cols - bi * (bi - 1) / 2 + (bj - bi) : bi * cols + bj;
    return kKeptHeader + pair * block * block;
  }
  Groups groups(const Side<M>& side) const { return Groups(blocks(side), group); }

  // Whether the tiles read rows of q from P panels, which the gradients need anyway: T panels of q would be a
  // copy too many.  Pairs of rows can't be read as pairs of features.
  static bool q_from_p(bool with_p) { return with_p && M::kPack == 1; }

  // Whether threads pack the T panels of q for themselves.
  bool own_t_q(bool with_p) const { return !q_from_p(with_p) && (!resident || (q_in_turn && !args.self)); }

  // How many panels of a group each thread has memory for.
  int64_t own_panels(bool with_p) const { return own_t_q(with_p) + (resident ? 0 : 1 + 2 * with_p); }

  // Reserves ids, panels and the scratch of the threads.
  void plan(Workspace& w, ThreadScratch<M>** scratch, bool with_p) {
    plan_ids(w, q);
    if (!args.self || !has_ids) plan_ids(w, k);
    if (resident) plan_panels(w, q, with_t && (args.self || !(q_from_p(with_p) || own_t_q(with_p))), with_p);
    if (resident && !args.self) plan_panels(w, k, with_t, with_p);
    w.plan(scratch, threads);
    w.plan(&buffers, PackBuffer<M>::size(d), threads);
    if (own_panels(with_p) > 0) w.plan(&panels, group_elements() * own_panels(with_p), threads);
  }

  void plan_panels(Workspace& w, Side<M>& side, bool t_too, bool with_p) {
    if (t_too) w.plan(&side.t, side.n_pad * depth);
    if (with_p) w.plan(&side.p, side.n_pad / M::kPack * d_pad);
  }

  void plan_ids(Workspace& w, Side<M>& side) {
    w.plan(&side.ids.id, side.n_pad);
    w.plan(&side.ids.low, blocks(side));
    w.plan(&side.ids.high, blocks(side));
  }

  int64_t group_elements() const { return group * block * d_pad; }  // of T or P panels, rounded up

  // Hands out what `plan` reserved; to be called once the workspace is allocated.
  void set_up(ThreadScratch<M>* scratch, bool with_p) {
    if (args.self) k.t = q.t, k.p = q.p;
    for (int t = 0; t < threads; ++t) {
      ThreadScratch<M>& s = *new (scratch + t) ThreadScratch<M>();
      s.buffer = PackBuffer<M>(buffers.of(t), d);
      Elem* at = panels.of(t);
      const auto take = [&] {
        Elem* here = at;
        at += group_elements();
        return here;
      };
      if (own_t_q(with_p)) s.t_q.memory = take();
      if (resident) continue;
      s.t_k.memory = take();
      if (with_p) s.p_q.memory = take(), s.p_k.memory = take();
    }
    fill_all_ids();
  }

  // Bounds |S|, chooses the mode, and packs what is resident.
  void prepare(ThreadScratch<M>* scratch, bool with_p) {
    // Factors of rows are there to make them unit vectors, whose products need no bound.
    const bool bounded = args.kind == Kind::softplus || (args.inv_q && (args.self || args.inv_k));
    if (resident || !bounded) {
#pragma omp parallel num_threads(threads)
      {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        ThreadScratch<M>& s = scratch[thread];
        prepare_side(q, s, &s.norm2_q, thread, team, with_p, !bounded);
        if (!args.self) prepare_side(k, s, &s.norm2_k, thread, team, with_p, !bounded);
        if (args.self) s.norm2_k = s.norm2_q;
      }
    }
    choose_mode(bounded ? std::fabs(args.scale) : bound(scratch));
  }

  void prepare_side(const Side<M>& side, ThreadScratch<M>& s, double* norm2, int thread, int team, bool with_p,
                    bool want_norms) const {
    const int64_t all = side.n_pad / block;  // the last ones may be padding
    for (int64_t b = all * thread / team; b < all * (thread + 1) / team; ++b) {
      const int64_t first = b * block;
      if (want_norms) raise_norm2(side.source, first, min64(side.n, first + block), s, norm2);
      if (side.t != nullptr) pack_t<M>(side.source, first, block, side.t + first * depth, s.buffer);
      if (with_p && side.p != nullptr) {
        pack_p<M>(side.source, first, block, side.p + first / M::kPack * d_pad, s.buffer);
      }
    }
  }

  // Raises `norm2` to the largest squared norm of some rows but those with a NaN, whose products are NaN in any mode.
  void raise_norm2(const Source<T>& source, int64_t first, int64_t last, ThreadScratch<M>& s, double* norm2) const {
    for (int64_t i = first; i < last; ++i) {
      const double here = squared_norm(source.view(i, s.buffer.acc), d);
      if (here > *norm2) *norm2 = here;
    }
  }

  // |scale| * max|q_i| * max|k_j| from the norms that the threads met.
  double bound(const ThreadScratch<M>* scratch) const {
    double largest_q = 0, largest_k = 0;
    for (int t = 0; t < threads; ++t) {
      largest_q = std::fmax(largest_q, scratch[t].norm2_q);
      largest_k = std::fmax(largest_k, scratch[t].norm2_k);
    }
    return std::fabs(args.scale) * std::sqrt(largest_q) * std::sqrt(largest_k);
  }

  // T panels of a block; null when none are needed.
  const Elem* block_t(const Side<M>& side, int64_t b, OwnPanels<M>& own, const PackBuffer<M>& buffer) const {
    if (!with_t) return nullptr;
    if (side.t != nullptr) return side.t + b * block * depth;
    Elem* const at = own.memory + b % group * block * d_pad;
    if (own.block[b % group] != b) pack_t<M>(side.source, b * block, block, at, buffer);
    own.block[b % group] = b;
    return at;
  }

  // P panels of a block.
  const Elem* block_p(const Side<M>& side, int64_t b, OwnPanels<M>& own, const PackBuffer<M>& buffer) const {
    if (side.p != nullptr) return side.p + b * block / M::kPack * d_pad;
    Elem* const at = own.memory + b % group * block / M::kPack * d_pad;
    if (own.block[b % group] != b) pack_p<M>(side.source, b * block, block, at, buffer);
    own.block[b % group] = b;
    return at;
  }

  // Calls visit(scratch, bi, bj) for pairs of blocks, in self mode those of one triangle.
  // `col_results`: something is gathered for the blocks of k too.
  template <class Visit>
  void for_all_pairs(ThreadScratch<M>* scratch, bool col_results, Visit visit) const {
    const Groups rows = groups(q), cols = groups(k);
#pragma omp parallel num_threads(threads)
    {
      ThreadScratch<M>& s = scratch[omp_get_thread_num()];
      const auto meet = [&](int64_t bi, int64_t bj) { visit(s, bi, bj); };
      if (!col_results) {
        meet_for_rows(rows, cols, meet);
      } else if (args.self) {
        meet_within(rows, meet);
      } else {
        meet_across(rows, cols, meet);
      }
    }
  }

  void fill_ids(Side<M>& side, const int64_t* ids, Int<T> none) const {
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
    unit = T(args.scale * kLog2E);
    if (args.kind == Kind::softplus) {
      mode = Mode::kSoftplus;
      offset = T(args.bias * kLog2E);
      return;
    }
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

SSLK_END
