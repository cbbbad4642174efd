// SPDX-License-Identifier: Apache-2.0
// Hardest positive and negative of every row: arg-max of v_ij = S_ij + bias_k[j] over equal ids (in self
// mode without i itself) and arg-min over different ids.  Ties go to the smallest index; -1 where there is
// no candidate.  The batch-hard triplet loss needs nothing else of the N x N distances.
//
// Every row keeps its best value so far.  The tiles of a panel are reduced to the best of their rows and columns, which
// is compared with those: after a few blocks hardly any holds something better, and the exact rule is left to code that
// looks at single lanes.  In self mode S is symmetric: one triangle is computed, whose tiles are offered to their
// columns too, and rows are taken in the order of their ids, so that nearly all tiles have only different or only equal
// ids. A NaN value never wins, nor has a row something to gain whose best is a NaN: so padding needs no masks.
// Plain-torch twin: `extremes` in sslkernels/backends/chunked.py.

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
  // Rows of padding have nothing that is as good as a NaN.
  void clear(int64_t n, int64_t n_pad, T worst) {
    for (int64_t i = 0; i < n_pad; ++i) value[i] = i < n ? worst : T(NAN), index[i] = -1;
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
  const T* bias = nullptr;         // [m_pad] NaN in padding, which then never wins
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

// The better of two values.  `x` comes first: where it is a NaN, what was best so far stays.
template <class M, Pairs kPairs>
inline SSLK_INLINE Vec<AccOfMath<M>> better(Vec<AccOfMath<M>> x, Vec<AccOfMath<M>> so_far) {
  return kPairs == Pairs::kEqual ? larger(x, so_far) : smaller(x, so_far);
}
template <class M, Pairs kPairs>
inline SSLK_INLINE Vec<AccOfMath<M>> no_value() {
  using T = AccOfMath<M>;
  return splat<T>(T(kPairs == Pairs::kEqual ? -HUGE_VAL : HUGE_VAL));
}

// The best of all lanes, in each.
template <class M, Pairs kPairs>
inline SSLK_INLINE Vec<AccOfMath<M>> best_lane(Vec<AccOfMath<M>> x) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L;
  for (int h = 1; h < L; h *= 2) {
    IVec<T> other = {};
    for (int l = 0; l < L; ++l) other[l] = l ^ h;
    x = better<M, kPairs>(shuffle<T>(x, x, other), x);
  }
  return x;
}

// Panels of tiles one below the other, from the first row of a block.
template <class M>
using PanelOf = TileOf<M>[Tile<M>::kBlock / Tile<M>::MR];

// Values of a row for columns j ... j + NR, and of columns j ... j + L for rows i ... i + MR: the best of them is
// offered where it is as good as the best so far.
template <class M, Pairs kPairs>
inline SSLK_INLINE void offer_row(const Pass<M>& pass, const Vec<AccOfMath<M>> (&x)[Tile<M>::NV], int64_t row,
                                  int64_t j) {
  using T = AccOfMath<M>;
  constexpr int NV = Tile<M>::NV, L = Tile<M>::L;
  constexpr bool kEqual = kPairs == Pairs::kEqual;
  Vec<T> all = no_value<M, kPairs>();
  unroll<NV>([&](auto v) SSLK_INLINE { all = better<M, kPairs>(x[v], all); });
  const Best<T>& best = kEqual ? pass.same : pass.other;
  if (lane_bits<T>(as_good<M, kPairs>(all, splat<T>(best.value[row]))) == 0) return;
  all = best_lane<M, kPairs>(all);
  if (all[0] == no_value<M, kPairs>()[0]) return;
  unroll<NV>([&](auto v) SSLK_INLINE {
    for_lanes(lane_bits<T>(x[v] == all), [&](int l) { pass.offer(row, j + v * L + l, all[0], kEqual); });
  });
}
template <class M, Pairs kPairs>
inline SSLK_INLINE void offer_columns(const Pass<M>& pass, const Vec<AccOfMath<M>> (&x)[Tile<M>::MR], int64_t i,
                                      int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR;
  constexpr bool kEqual = kPairs == Pairs::kEqual;
  Vec<T> all = no_value<M, kPairs>();
  unroll<MR>([&](auto r) SSLK_INLINE { all = better<M, kPairs>(x[r], all); });
  const Best<T>& best = kEqual ? pass.same : pass.other;
  const IVec<T> good = as_good<M, kPairs>(all, load<T>(best.value + j)) & (all != no_value<M, kPairs>());
  if (lane_bits<T>(good) == 0) return;
  unroll<MR>([&](auto r) SSLK_INLINE {
    for_lanes(lane_bits<T>((x[r] == all) & good), [&](int l) { pass.offer(j + l, i + r, all[l], kEqual); });
  });
}

// The rows of a tile at (i, j).
template <class M, Pairs kPairs>
__attribute__((noinline)) void settle_rows(const Pass<M>& pass, const TileOf<M>& s, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  for (int r = 0; r < MR; ++r) {
    Vec<T> here[NV];
    unroll<NV>([&](auto v) SSLK_INLINE { here[v] = pass.value(s[r][v], load<T>(pass.bias + j + v * L)); });
    offer_row<M, kPairs>(pass, here, i + r, j);
  }
}

// The columns j ... j + L of the tiles of rows begin ... end, whose best is `all`, where it is `good`.
template <class M, Pairs kPairs>
__attribute__((noinline)) void settle_columns(const Pass<M>& pass, const TileOf<M>* s, int v, int64_t begin,
                                              int64_t end, int64_t j, Vec<AccOfMath<M>> all, IVec<AccOfMath<M>> good) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR;
  for (int64_t i = begin; i < end; i += MR, ++s) {
    IVec<T> found[MR], any = {};
    unroll<MR>([&](auto r) SSLK_INLINE {
      found[r] = (pass.value((*s)[r][v], splat<T>(pass.bias[i + r])) == all) & good;
      any |= found[r];
    });
    if (lane_bits<T>(any) == 0) continue;
    for (int r = 0; r < MR; ++r) {
      for_lanes(lane_bits<T>(found[r]), [&](int l) { pass.offer(j + l, i + r, all[l], kPairs == Pairs::kEqual); });
    }
  }
}

// One tile at (i, j) of equal and different ids.
template <class M, bool kCols>
__attribute__((noinline)) void settle_mixed(const Pass<M>& pass, const TileOf<M>& s, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  const Vec<T> none_same = no_value<M, Pairs::kEqual>(), none_other = no_value<M, Pairs::kDifferent>();
  const auto equal = [&](int r, int v)
                         SSLK_INLINE { return load_int<T>(e.k.ids.id + j + v * L) == splat_int<T>(e.q.ids.id[i + r]); };
  for (int r = 0; r < MR; ++r) {
    Vec<T> same[NV], other[NV];
    unroll<NV>([&](auto v) SSLK_INLINE {
      const Vec<T> here = pass.value(s[r][v], load<T>(pass.bias + j + v * L));
      const IVec<T> is_same = equal(r, v);
      same[v] = is_same ? here : none_same;
      other[v] = is_same ? none_other : here;
    });
    const int64_t self = i + r - j;  // a row is no positive of its own
    if (e.args.self && self >= 0 && self < NV * L) same[self / L][self % L] = none_same[0];
    offer_row<M, Pairs::kEqual>(pass, same, i + r, j);
    offer_row<M, Pairs::kDifferent>(pass, other, i + r, j);
  }
  for (int v = 0; kCols && v < NV; ++v) {
    Vec<T> same[MR], other[MR];
    unroll<MR>([&](auto r) SSLK_INLINE {
      const Vec<T> there = pass.value(s[r][v], splat<T>(pass.bias[i + r]));
      const IVec<T> is_same = equal(r, v);
      same[r] = is_same ? there : none_same;
      other[r] = is_same ? none_other : there;
    });
    offer_columns<M, Pairs::kEqual>(pass, same, i, j + v * L);
    offer_columns<M, Pairs::kDifferent>(pass, other, i, j + v * L);
  }
}

// Tiles at (begin ... end, j), of different or of equal ids alone.  kCols: offered to the columns' rows too, whose best
// of all these rows is kept in registers.
template <class M, bool kCols, Pairs kPairs>
void offer_tiles(const Pass<M>& pass, const TileOf<M>* s, int64_t begin, int64_t end, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  constexpr bool kEqual = kPairs == Pairs::kEqual;
  const Best<T>& best = kEqual ? pass.same : pass.other;
  Vec<T> of_columns[NV], of_row_bias[NV];
  unroll<NV>([&](auto v) SSLK_INLINE {
    of_columns[v] = no_value<M, kPairs>();
    of_row_bias[v] = load<T>(pass.bias + j + v * L);
  });
  for (int64_t i = begin; i < end; i += MR) {
    const TileOf<M>& here = s[(i - begin) / MR];
    IVec<T> hit = {};
    unroll<MR>([&](auto r) SSLK_INLINE {
      Vec<T> of_row = no_value<M, kPairs>();
      unroll<NV>([&](auto v) SSLK_INLINE {
        of_row = better<M, kPairs>(pass.value(here[r][v], of_row_bias[v]), of_row);
        if constexpr (kCols)
          of_columns[v] = better<M, kPairs>(pass.value(here[r][v], splat<T>(pass.bias[i + r])), of_columns[v]);
      });
      hit |= as_good<M, kPairs>(of_row, splat<T>(best.value[i + r]));
    });
    if (lane_bits<T>(hit) != 0) settle_rows<M, kPairs>(pass, here, i, j);
  }
  for (int v = 0; kCols && v < NV; ++v) {
    const IVec<T> hit = as_good<M, kPairs>(of_columns[v], load<T>(best.value + j + v * L));
    if (lane_bits<T>(hit) != 0) settle_columns<M, kPairs>(pass, s, v, begin, end, j + v * L, of_columns[v], hit);
  }
}

// What the tile at (i, j) of a pair of blocks holds.  `sorted`: rows are in the order of their ids.
template <class M>
inline Pairs pairs_of_tile(const Engine<M>& e, bool may_match, bool sorted, int64_t i, int64_t j) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  if (!may_match) return Pairs::kDifferent;
  if (!sorted) return Pairs::kMixed;
  const Int<AccOfMath<M>>*id = e.q.ids.id, first_i = id[i], first_j = id[j];
  const Int<AccOfMath<M>> last_i = id[min64(i + MR, e.q.n) - 1], last_j = id[min64(j + NR, e.k.n) - 1];
  if (last_i < first_j || last_j < first_i) return Pairs::kDifferent;
  const bool apart = i + MR <= j || j + NR <= i;
  return apart && first_i == last_j && first_j == last_i ? Pairs::kEqual : Pairs::kMixed;
}

// Which tiles of a pair of blocks are visited.
enum class Part {
  kAll,
  kSquares,  // of a block with itself: panels of columns with their own rows, (i, j) and (j, i)
  kAbove,    // and with the rows above them
};

// Tiles of the block pair (bi, bj), whose T panels are given.
template <class M, bool kCols>
void visit_pair(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* t_q, const ElemOf<M>* t_k,
                Part part = Part::kAll) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool may_match = e.may_exclude(bi, bj) || (e.args.self && bi == bj), sorted = pass.order != nullptr;
  PanelOf<M> panel;
  for (int64_t j = j0; j < j1; j += NR) {
    const int64_t begin = part == Part::kSquares ? j : i0;
    const int64_t end = part == Part::kAll ? i1 : min64(i1, part == Part::kSquares ? j + NR : j);
    for (int64_t i = begin; i < end; i += MR) {
      const ElemOf<M>* a = t_q + (i - i0) / NR * NR * e.depth + (i - i0) % NR;
      store_tile<M, true>(a, 1, NR, t_k + (j - j0) * e.depth, e.depth, nullptr, panel[(i - begin) / MR]);
    }
    // Whole runs of one kind.
    const auto pairs_at = [&](int64_t i) { return pairs_of_tile(e, may_match, sorted, i, j); };
    for (int64_t i = begin, next; i < end; i = next) {
      const Pairs pairs = pairs_at(i);
      const TileOf<M>* s = panel + (i - begin) / MR;
      next = !may_match ? end : i + MR;
      while (next < end && pairs_at(next) == pairs) next += MR;
      if (pairs == Pairs::kDifferent) {
        offer_tiles<M, kCols, Pairs::kDifferent>(pass, s, i, next, j);
      } else if (pairs == Pairs::kEqual) {
        offer_tiles<M, kCols, Pairs::kEqual>(pass, s, i, next, j);
      } else {
        for (; i < next; i += MR) settle_mixed<M, kCols>(pass, *s++, i, j);
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
  e.group = min64(kMaxGroup, 2 * e.group);  // of five arrays there are two: no P panels, no gradients
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
    const T none = j < e.k.n ? T(0) : T(NAN);
    bias[j] = out.bias_k != nullptr && j < e.k.n ? static_cast<const T*>(out.bias_k)[pass.index(j)] : none;
  }
  pass.bias = bias;
  pass.same.clear(e.q.n, e.q.n_pad, T(-HUGE_VAL));
  pass.other.clear(e.q.n, e.q.n_pad, T(HUGE_VAL));
  e.for_all_pairs(scratch, args.self, [&](ThreadScratch<M>& s, int64_t bi, int64_t bj) {
    const bool diagonal = args.self && bi == bj;
    const ElemOf<M>* t_q = e.block_t(e.q, bi, s.t_q, s.buffer);
    const ElemOf<M>* t_k = diagonal ? t_q : e.block_t(e.k, bj, s.t_k, s.buffer);
    if (diagonal) {
      visit_pair<M, false>(pass, bi, bj, t_q, t_k, Part::kSquares);
      visit_pair<M, true>(pass, bi, bj, t_q, t_k, Part::kAbove);
    } else if (args.self) {
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
