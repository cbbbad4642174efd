// SPDX-License-Identifier: Apache-2.0
// Hardest positive and negative of every row: arg-max of v_ij = S_ij + bias_k[j] over equal ids (in self
// mode without i itself) and arg-min over different ids.  Ties go to the smallest index; -1 where there is
// no candidate.  The batch-hard triplet loss needs nothing else of the N x N distances.
//
// One running best a row and lane, as in pairwise_forward.cpp.  A NaN value never wins a comparison.
// Plain-torch twin: `extremes` in sslkernels/backends/chunked.py.

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

template <class T>
struct Best {
  T* value;       // [n_pad][L]
  Int<T>* index;  // [n_pad][L]
};

template <class M>
struct Pass {
  using T = AccOfMath<M>;
  const Engine<M>& e;
  const T* bias = nullptr;  // [m_pad]
  Best<T> same, other;
};

// All tiles of the block pair (bi, bj), whose T panels are given.
template <class M>
void visit_pair(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* t_q, const ElemOf<M>* t_k) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool may_match = e.may_exclude(bi, bj);
  IVec<T> lane = {};
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t j = j0; j < j1; j += NR) {
    for (int64_t i = i0; i < i1; i += MR) {
      Vec<T> x[MR][NV];
      dot_tile<M, NV, true>(t_q + (i - i0) / NR * NR * e.depth + (i - i0) % NR, 1, NR, t_k + (j - j0) * e.depth,
                            e.depth, x);
      unroll<NV>([&](auto v) SSLK_INLINE {
        const int64_t first = j + v * L;
        const IVec<T> valid = lanes_below<T>(e.k.n - first);
        const IVec<T> index = lane + Int<T>(first);
        const IVec<T> id = load_int<T>(e.k.ids.id + first);
        const Vec<T> bias = load<T>(pass.bias + first);
        unroll<MR>([&](auto r) SSLK_INLINE {
          const Vec<T> value = x[r][v] * e.unit + bias;
          const int64_t at = (i + r) * L;
          IVec<T> equal = may_match ? (id == e.q.ids.id[i + r]) & valid : IVec<T>{};
          IVec<T> better = (~equal & valid) & (value < load<T>(pass.other.value + at));
          store<T>(pass.other.value + at, better != 0 ? value : load<T>(pass.other.value + at));
          store_int<T>(pass.other.index + at, better != 0 ? index : load_int<T>(pass.other.index + at));
          if (may_match) {
            if (e.args.self) equal &= index != Int<T>(i + r);
            better = equal & (value > load<T>(pass.same.value + at));
            store<T>(pass.same.value + at, better != 0 ? value : load<T>(pass.same.value + at));
            store_int<T>(pass.same.index + at, better != 0 ? index : load_int<T>(pass.same.index + at));
          }
        });
      });
    }
  }
}

// The best of the lanes; `sign` +1 for a maximum, -1 for a minimum.
template <class T>
int64_t best_lane(const Best<T>& best, int64_t i, T sign) {
  constexpr int L = Simd<T>::kLanes;
  int64_t index = -1;
  T value = 0;
  for (int l = 0; l < L; ++l) {
    const int64_t candidate = best.index[i * L + l];
    const T v = best.value[i * L + l] * sign;
    if (candidate < 0) continue;
    if (index < 0 || v > value || (v == value && candidate < index)) {
      index = candidate;
      value = v;
    }
  }
  return index;
}

template <class M>
int extremes_typed(const PairwiseArgs& args, const ExtremesOut& out) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L;
  Engine<M> e(args);
  e.q_in_turn = true;
  Pass<M> pass{e, nullptr, {}, {}};
  Workspace w;
  ThreadScratch<M>* scratch = nullptr;
  T* bias = nullptr;
  e.plan(w, &scratch, false);
  w.plan(&bias, e.k.n_pad);
  w.plan(&pass.same.value, e.q.n_pad * L);
  w.plan(&pass.same.index, e.q.n_pad * L);
  w.plan(&pass.other.value, e.q.n_pad * L);
  w.plan(&pass.other.index, e.q.n_pad * L);
  if (!w.allocate()) return -1;
  e.set_up(scratch, false);
  e.prepare(scratch, false);
  e.unit = T(args.scale);
  for (int64_t j = 0; j < e.k.n_pad; ++j) {
    bias[j] = out.bias_k != nullptr && j < e.k.n ? static_cast<const T*>(out.bias_k)[j] : T(0);
  }
  pass.bias = bias;
  for (int64_t i = 0; i < e.q.n_pad * L; ++i) {
    pass.same.value[i] = T(-HUGE_VAL);
    pass.other.value[i] = T(HUGE_VAL);
    pass.same.index[i] = pass.other.index[i] = -1;
  }
  // Self mode too visits the whole square: only rows gather results.
  e.for_all_pairs(scratch, false, [&](ThreadScratch<M>& s, int64_t bi, int64_t bj) {
    visit_pair(pass, bi, bj, e.block_t(e.q, bi, s.t_q, s.buffer), e.block_t(e.k, bj, s.t_k, s.buffer));
  });
#pragma omp parallel for num_threads(e.threads) schedule(static)
  for (int64_t i = 0; i < e.q.n; ++i) {
    out.max_same[i] = best_lane(pass.same, i, T(1));
    out.min_other[i] = best_lane(pass.other, i, T(-1));
  }
  return 0;
}

}  // namespace

int extremes(const PairwiseArgs& args, const ExtremesOut& out) {
  return args.dtype == DType::f64 ? extremes_typed<MathF64>(args, out) : extremes_typed<MathF32>(args, out);
}

SSLK_END
