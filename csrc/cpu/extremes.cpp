// SPDX-License-Identifier: Apache-2.0
// Hardest positive and negative of every row: arg-max of v_ij = S_ij + bias_k[j] over equal ids (in self
// mode without i itself) and arg-min over different ids.  Ties go to the smallest index; -1 where there is
// no candidate.  The batch-hard triplet loss needs nothing else of the N x N distances.
//
// Every row keeps its best value so far.  A tile is reduced to the best of its rows and columns, which is compared with
// those: after a few blocks hardly any tile holds something better, and the exact rule is left to code that looks
// at single lanes.  In self mode S is symmetric: one triangle is computed, whose tiles are offered to their columns
// too, and rows are taken in the order of their ids, so that nearly all tiles have only different or only equal ids.
// A NaN value never wins.  Plain-torch twin: `extremes` in sslkernels/backends/chunked.py.

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

// By row.  The order of offers does not matter: values first, then indices.
template <class T>
struct Best {
  T* value = nullptr;       // [n_pad]
  Int<T>* index = nullptr;  // [n_pad] -1: none yet

  void plan(Workspace& w, int64_t n_pad) {
    w.plan(&value, n_pad);
    w.plan(&index, n_pad);
  }
  void clear(int64_t n_pad, T worst) {
    for (int64_t i = 0; i < n_pad; ++i) value[i] = worst, index[i] = -1;
  }
  // `better`: whether x is strictly better than the best so far.
  void offer(int64_t row, T x, int64_t at, bool better) const {
    if (!better && !(x == value[row] && Int<T>(at) < index[row])) return;
    value[row] = x;
    index[row] = Int<T>(at);
  }
};

template <class M>
struct Pass {
  using T = AccOfMath<M>;
  const Engine<M>& e;
  const int64_t* order = nullptr;  // [n] what index a row has; null: its own
  const T* bias = nullptr;         // [m_pad]
  Best<T> same, other;             // largest of equal ids, smallest of different ids

  // The value of S_ij for row i, with the bias of j.  One expression, so that it has the same bits everywhere.
  Vec<T> value(Vec<T> s, Vec<T> bias_j) const { return s * e.unit + bias_j; }

  int64_t index(int64_t row) const { return order == nullptr ? row : order[row]; }

  void offer(int64_t row, int64_t at, T value, bool equal) const {
    if (equal) {
      same.offer(row, value, index(at), value > same.value[row]);
    } else {
      other.offer(row, value, index(at), value < other.value[row]);
    }
  }
};

// What a tile holds.
enum class Pairs { kDifferent, kEqual, kMixed };

// offer(lane) for the lanes of a mask.
template <class Offer>
inline void for_lanes(uint32_t bits, Offer offer) {
  for (; bits != 0; bits &= bits - 1) offer(__builtin_ctz(bits));
}

// Which lanes are as good as the best so far.
template <class M, Pairs kPairs>
inline IVec<AccOfMath<M>> as_good(Vec<AccOfMath<M>> value, Vec<AccOfMath<M>> best) {
  return kPairs == Pairs::kEqual ? value >= best : value <= best;
}

// One tile at (i, j) whose best is as good as that of a row or column.
template <class M, bool kCols, Pairs kPairs>
__attribute__((noinline)) void settle_tile(const Pass<M>& pass, const TileOf<M>& s, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  constexpr bool kEqual = kPairs == Pairs::kEqual;
  const Best<T>& best = kEqual ? pass.same : pass.other;
  for (int v = 0; v < NV; ++v) {
    const int64_t first = j + v * L;
    const Vec<T> of_row = load<T>(pass.bias + first);
    for (int r = 0; r < MR; ++r) {
      const Vec<T> here = pass.value(s[r][v], of_row);
      for_lanes(lane_bits<T>(as_good<M, kPairs>(here, splat<T>(best.value[i + r]))),
                [&](int l) { pass.offer(i + r, first + l, here[l], kEqual); });
      if constexpr (kCols) {
        const Vec<T> there = pass.value(s[r][v], splat<T>(pass.bias[i + r]));
        for_lanes(lane_bits<T>(as_good<M, kPairs>(there, load<T>(best.value + first))),
                  [&](int l) { pass.offer(first + l, i + r, there[l], kEqual); });
      }
    }
  }
}

// One tile at (i, j) of equal and different ids, or with rows or columns beyond the end.
template <class M, bool kCols>
__attribute__((noinline)) void settle_mixed(const Pass<M>& pass, const TileOf<M>& s, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  for (int v = 0; v < NV; ++v) {
    const int64_t first = j + v * L;
    const Vec<T> of_row = load<T>(pass.bias + first);
    const IVec<T> id = load_int<T>(e.k.ids.id + first), valid = lanes_below<T>(e.k.n - first);
    for (int r = 0; r < MR && i + r < e.q.n; ++r) {
      const int64_t row = i + r;
      const Vec<T> here = pass.value(s[r][v], of_row);
      const IVec<T> equal = id == splat_int<T>(e.q.ids.id[row]);
      const auto equal_at = [&](int l) { return equal[l] != 0; };
      const IVec<T> good =
          (equal & (here >= splat<T>(pass.same.value[row]))) | (~equal & (here <= splat<T>(pass.other.value[row])));
      for_lanes(lane_bits<T>(good & valid), [&](int l) {
        if (!e.args.self || row != first + l) pass.offer(row, first + l, here[l], equal_at(l));
      });
      if constexpr (kCols) {
        const Vec<T> there = pass.value(s[r][v], splat<T>(pass.bias[row]));
        const IVec<T> better = (equal & (there >= load<T>(pass.same.value + first))) |
                               (~equal & (there <= load<T>(pass.other.value + first)));
        for_lanes(lane_bits<T>(better & valid), [&](int l) { pass.offer(first + l, row, there[l], equal_at(l)); });
      }
    }
  }
}

// One tile at (i, j).  kCols: offered to the columns' rows too.
template <class M, bool kCols, Pairs kPairs>
inline SSLK_INLINE void offer_tile(const Pass<M>& pass, const ElemOf<M>* a, const ElemOf<M>* b, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L;
  TileOf<M> s;
  dot_tile<M, true>(a, 1, NR, b, pass.e.depth, s);
  if constexpr (kPairs == Pairs::kMixed) {
    settle_mixed<M, kCols>(pass, s, i, j);
  } else {
    constexpr bool kEqual = kPairs == Pairs::kEqual;
    const Best<T>& best = kEqual ? pass.same : pass.other;
    // `x` comes first: where it is a NaN, what was best so far stays.
    const auto better = [](Vec<T> x, Vec<T> so_far)
                            SSLK_INLINE { return kEqual ? larger(x, so_far) : smaller(x, so_far); };
    const Vec<T> none = splat<T>(T(kEqual ? -HUGE_VAL : HUGE_VAL));
    IVec<T> hit = {};
    Vec<T> of_columns[NV];
    unroll<NV>([&](auto v) SSLK_INLINE { of_columns[v] = none; });
    unroll<MR>([&](auto r) SSLK_INLINE {
      Vec<T> of_row = none;
      unroll<NV>([&](auto v) SSLK_INLINE {
        of_row = better(pass.value(s[r][v], load<T>(pass.bias + j + v * L)), of_row);
        if constexpr (kCols) of_columns[v] = better(pass.value(s[r][v], splat<T>(pass.bias[i + r])), of_columns[v]);
      });
      hit |= as_good<M, kPairs>(of_row, splat<T>(best.value[i + r]));
    });
    if constexpr (kCols) {
      unroll<NV>([&](auto v)
                     SSLK_INLINE { hit |= as_good<M, kPairs>(of_columns[v], load<T>(best.value + j + v * L)); });
    }
    if (lane_bits<T>(hit) != 0) settle_tile<M, kCols, kPairs>(pass, s, i, j);
  }
}

// What the tile at (i, j) of a pair of blocks holds.  `sorted`: rows are in the order of their ids.
template <class M>
inline Pairs pairs_of_tile(const Engine<M>& e, bool may_match, bool sorted, int64_t i, int64_t j) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  if (i + MR > e.q.n || j + NR > e.k.n) return Pairs::kMixed;
  if (!may_match) return Pairs::kDifferent;
  if (!sorted) return Pairs::kMixed;
  const Int<AccOfMath<M>>*id = e.q.ids.id, first_i = id[i], last_i = id[i + MR - 1], first_j = id[j];
  const Int<AccOfMath<M>> last_j = id[j + NR - 1];
  if (last_i < first_j || last_j < first_i) return Pairs::kDifferent;
  const bool apart = i + MR <= j || j + NR <= i;
  return apart && first_i == last_j && first_j == last_i ? Pairs::kEqual : Pairs::kMixed;
}

// All tiles of the block pair (bi, bj), whose T panels are given.
template <class M, bool kCols>
void visit_pair(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* t_q, const ElemOf<M>* t_k) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool may_match = e.may_exclude(bi, bj) || (e.args.self && bi == bj), sorted = pass.order != nullptr;
  for (int64_t j = j0; j < j1; j += NR) {
    for (int64_t i = i0; i < i1; i += MR) {
      const ElemOf<M>* a = t_q + (i - i0) / NR * NR * e.depth + (i - i0) % NR;
      const ElemOf<M>* b = t_k + (j - j0) * e.depth;
      switch (pairs_of_tile(e, may_match, sorted, i, j)) {
        case Pairs::kDifferent: offer_tile<M, kCols, Pairs::kDifferent>(pass, a, b, i, j); break;
        case Pairs::kEqual: offer_tile<M, kCols, Pairs::kEqual>(pass, a, b, i, j); break;
        case Pairs::kMixed: offer_tile<M, kCols, Pairs::kMixed>(pass, a, b, i, j); break;
      }
    }
  }
}

template <class M>
int extremes_typed(const PairwiseArgs& given, const ExtremesOut& out) {
  using T = AccOfMath<M>;
  PairwiseArgs args = given;
  const int64_t* const order = given.self && given.ids_q != nullptr ? out.order : nullptr;
  Engine<M> e(args);
  e.q_in_turn = !args.self;
  e.q.source.order = e.k.source.order = order;
  Pass<M> pass{e, order, nullptr, {}, {}};
  Workspace w;
  ThreadScratch<M>* scratch = nullptr;
  T* bias = nullptr;
  int64_t* ids = nullptr;
  e.plan(w, &scratch, false);
  w.plan(&bias, e.k.n_pad);
  if (order != nullptr) w.plan(&ids, e.q.n);
  pass.same.plan(w, e.q.n_pad);
  pass.other.plan(w, e.q.n_pad);
  if (!w.allocate()) return -1;
  for (int64_t i = 0; order != nullptr && i < e.q.n; ++i) ids[i] = given.ids_q[order[i]];
  if (order != nullptr) args.ids_q = ids;
  e.set_up(scratch, false);
  e.prepare(scratch, false);
  e.unit = T(args.scale);
  for (int64_t j = 0; j < e.k.n_pad; ++j) {
    bias[j] = out.bias_k != nullptr && j < e.k.n ? static_cast<const T*>(out.bias_k)[pass.index(j)] : T(0);
  }
  pass.bias = bias;
  pass.same.clear(e.q.n_pad, T(-HUGE_VAL));
  pass.other.clear(e.q.n_pad, T(HUGE_VAL));
  e.for_all_pairs(scratch, args.self, [&](ThreadScratch<M>& s, int64_t bi, int64_t bj) {
    const bool diagonal = args.self && bi == bj;
    const ElemOf<M>* t_q = e.block_t(e.q, bi, s.t_q, s.buffer);
    const ElemOf<M>* t_k = diagonal ? t_q : e.block_t(e.k, bj, s.t_k, s.buffer);
    // A diagonal block holds (i, j) and (j, i): its rows are enough.
    if (args.self && !diagonal) {
      visit_pair<M, true>(pass, bi, bj, t_q, t_k);
    } else {
      visit_pair<M, false>(pass, bi, bj, t_q, t_k);
    }
  });
  for (int64_t i = 0; i < e.q.n; ++i) {
    out.max_same[pass.index(i)] = pass.same.index[i];
    out.min_other[pass.index(i)] = pass.other.index[i];
  }
  return 0;
}

}  // namespace

int extremes(const PairwiseArgs& args, const ExtremesOut& out) {
  return args.dtype == DType::f64 ? extremes_typed<MathF64>(args, out) : extremes_typed<MathF32>(args, out);
}

SSLK_END
