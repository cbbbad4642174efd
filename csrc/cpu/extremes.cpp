// SPDX-License-Identifier: Apache-2.0
// Hardest positive and negative of every row: arg-max of v_ij = S_ij + bias_k[j] over equal ids (in self
// mode without i itself) and arg-min over different ids.  Ties go to the smallest index; -1 where there is
// no candidate.  The batch-hard triplet loss needs nothing else of the N x N distances.
//
// Every row keeps its best value so far, and a tile is compared with those of its rows: after a few blocks hardly any
// vector holds something better, and the exact rule is left to scalar code for those that do.  In self mode S is
// symmetric: one triangle is computed, whose tiles are offered to their columns too.  A NaN value never wins.
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
  const T* bias = nullptr;  // [m_pad]
  Best<T> same, other;      // largest of equal ids, smallest of different ids

  // S_ij + bias of j as a candidate of row i, or S_ij + bias of i as one of row j (self mode).
  void offer(int64_t row, int64_t at, T value, bool equal) const {
    if (equal) {
      same.offer(row, value, at, value > same.value[row]);
    } else {
      other.offer(row, value, at, value < other.value[row]);
    }
  }
};

// offer(lane) for the lanes of a mask.
template <class Offer>
inline void for_lanes(uint32_t bits, Offer offer) {
  for (; bits != 0; bits &= bits - 1) offer(__builtin_ctz(bits));
}

// One tile at (i, j).  kCols: offered to the columns' rows too.  kMasked: some ids may be equal, or rows or columns
// are beyond the end.
template <class M, bool kCols, bool kMasked>
inline SSLK_INLINE void offer_tile(const Pass<M>& pass, const ElemOf<M>* a, const ElemOf<M>* b, int64_t i, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  Vec<T> x[MR][NV], of_row[NV], lowest[NV];
  IVec<T> id[NV], valid[NV], hit[NV];
  dot_tile<M, NV, true>(a, 1, NR, b, e.depth, x);
  unroll<NV>([&](auto v) SSLK_INLINE {
    of_row[v] = load<T>(pass.bias + j + v * L);
    lowest[v] = splat<T>(T(HUGE_VAL));
    hit[v] = IVec<T>{};
    if constexpr (kMasked) {
      id[v] = load_int<T>(e.k.ids.id + j + v * L);
      valid[v] = lanes_below<T>(e.k.n - (j + v * L));
    }
  });
  IVec<T> row_hit[MR][NV];
  unroll<MR>([&](auto r) SSLK_INLINE {
    const T of_column = pass.bias[kCols ? i + r : 0], best = pass.other.value[i + r];
    unroll<NV>([&](auto v) SSLK_INLINE {
      x[r][v] *= e.unit;
      const Vec<T> here = x[r][v] + of_row[v], there = x[r][v] + of_column;
      row_hit[r][v] = here <= best;
      IVec<T> lower = there < lowest[v];
      if constexpr (kMasked) {
        IVec<T> equal = (id[v] == e.q.ids.id[i + r]) & valid[v], in = valid[v];
        if (i + r >= e.q.n) equal = in = IVec<T>{};
        row_hit[r][v] = (row_hit[r][v] & in) | equal;
        lower &= in & ~equal;
        hit[v] |= equal;
      }
      if constexpr (kCols) lowest[v] = lower != 0 ? there : lowest[v];
    });
  });
  const auto equal_ids = [&](int64_t row, int64_t column) {
    return kMasked && e.has_ids && e.q.ids.id[row] == e.k.ids.id[column];
  };
  unroll<MR>([&](auto r) SSLK_INLINE {
    unroll<NV>([&](auto v) SSLK_INLINE {
      const uint32_t bits = lane_bits<T>(row_hit[r][v]);
      if (bits == 0) return;
      for_lanes(bits, [&](int l) {
        const int64_t row = i + r, at = j + v * L + l;
        if (e.args.self && row == at) return;
        pass.offer(row, at, x[r][v][l] + pass.bias[at], equal_ids(row, at));
      });
    });
  });
  if constexpr (kCols) {
    unroll<NV>([&](auto v) SSLK_INLINE {
      const int64_t first = j + v * L;
      const uint32_t bits = lane_bits<T>(hit[v] | (lowest[v] <= load<T>(pass.other.value + first)));
      if (bits == 0) return;
      for_lanes(bits, [&](int l) {
        const int64_t row = first + l;
        for (int r = 0; row < e.k.n && r < MR && i + r < e.q.n; ++r) {
          pass.offer(row, i + r, x[r][v][l] + pass.bias[i + r], equal_ids(i + r, row));
        }
      });
    });
  }
}

// All tiles of the block pair (bi, bj), whose T panels are given.
template <class M, bool kCols>
void visit_pair(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* t_q, const ElemOf<M>* t_k) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool may_match = e.may_exclude(bi, bj);
  for (int64_t j = j0; j < j1; j += NR) {
    for (int64_t i = i0; i < i1; i += MR) {
      const ElemOf<M>* a = t_q + (i - i0) / NR * NR * e.depth + (i - i0) % NR;
      const ElemOf<M>* b = t_k + (j - j0) * e.depth;
      if (!may_match && i + MR <= e.q.n && j + NR <= e.k.n) {
        offer_tile<M, kCols, false>(pass, a, b, i, j);
      } else {
        offer_tile<M, kCols, true>(pass, a, b, i, j);
      }
    }
  }
}

template <class M>
int extremes_typed(const PairwiseArgs& args, const ExtremesOut& out) {
  using T = AccOfMath<M>;
  Engine<M> e(args);
  e.q_in_turn = !args.self;
  Pass<M> pass{e, nullptr, {}, {}};
  Workspace w;
  ThreadScratch<M>* scratch = nullptr;
  T* bias = nullptr;
  e.plan(w, &scratch, false);
  w.plan(&bias, e.k.n_pad);
  pass.same.plan(w, e.q.n_pad);
  pass.other.plan(w, e.q.n_pad);
  if (!w.allocate()) return -1;
  e.set_up(scratch, false);
  e.prepare(scratch, false);
  e.unit = T(args.scale);
  for (int64_t j = 0; j < e.k.n_pad; ++j) {
    bias[j] = out.bias_k != nullptr && j < e.k.n ? static_cast<const T*>(out.bias_k)[j] : T(0);
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
    out.max_same[i] = pass.same.index[i];
    out.min_other[i] = pass.other.index[i];
  }
  return 0;
}

}  // namespace

int extremes(const PairwiseArgs& args, const ExtremesOut& out) {
  return args.dtype == DType::f64 ? extremes_typed<MathF64>(args, out) : extremes_typed<MathF32>(args, out);
}

SSLK_END
