// SPDX-License-Identifier: Apache-2.0
// InfoNCE against keys that need no gradient (a MoCo queue): log-sum-exp of every query over all keys
// and the softmax-weighted mean key in one pass, so that nothing of the queue is kept for backward:
// d lse_i / d q_i = scale * mean_key_i.  4 N M D operations, nothing recomputed.
//
// The tile is transposed: keys are broadcast straight from their row-major memory (A), queries are the
// packed columns (B).  So the queue is never packed, and the running maximum of a query lives in a lane.
// Work is cut into (group of queries) x (range of keys); ranges depend on the sizes only and their
// partial results are joined in order, so the bits do not depend on the number of threads.
//
// Plain-torch twin: `attend` in sslkernels/backends/chunked.py.

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

constexpr int64_t kGroupQueries = 256;  // queries that share one visit of a key block (their sums stay in L2)
constexpr int64_t kMinRange = 2048;     // keys of a range: the join then costs below one percent
constexpr int64_t kMinItems = 32;       // work items wanted, so that many threads find work

// Partial results of one range of keys.
template <class T>
struct Partial {
  T* max;         // [n_pad]
  T* sum;         // [n_pad]
  T* weighted;    // [n_pad][stride]
  int64_t* rank;  // [n_pad]
};

template <class M>
struct Pass {
  using T = AccOfMath<M>;
  const Engine<M>& e;  // q: queries, k: keys
  const T* threshold = nullptr;
  int64_t stride = 0;
};

template <class M>
struct Scratch {
  AccOfMath<M>* g;     // [kBlock keys][kLdG]: exponentials, one column a query
  ElemOf<M>* g_cols;   // the same in Elem, pairs of keys; g where Elem is Acc
  AccOfMath<M>* rows;  // [kPack][row_size]: keys as they are read, where Elem is not Acc
  ElemOf<M>* keys;     // [kBlock][row_size] row-major keys of the block
  ElemOf<M>* panels;   // P panels of the block, where Elem is not Acc
  ElemOf<M>* queries;  // T panels of a group of queries
};

// Reads a block of keys, row-major, and, where a product takes pairs of keys, as P panels.
template <class M>
void read_keys(const Pass<M>& pass, const Scratch<M>& s, int64_t j0, int64_t nj) {
  using T = AccOfMath<M>;
  const Engine<M>& e = pass.e;
  const int64_t ld = PackBuffer<M>::row_size(e.d);
  for (int64_t r = 0; r < round_up(nj, Tile<M>::MR); r += M::kPack) {
    for (int h = 0; h < M::kPack; ++h) {
      ElemOf<M>* key = s.keys + (r + h) * ld;
      T* row = M::kPack == 1 ? reinterpret_cast<T*>(key) : s.rows + h * ld;
      const bool valid = r + h < nj;
      if (valid) {
        e.k.source.row(j0 + r + h, row);
        if (e.args.normalize_k) {
          const T inverse = inverse_norm(row, e.d);
          for (int64_t c = 0; c < e.d; ++c) row[c] *= inverse;
        }
      }
      const int64_t filled = valid ? e.d : 0;
      std::memset(row + filled, 0, size_t(ld - filled) * sizeof(T));
#if defined(__AVX512BF16__)
      constexpr int L = Tile<M>::L;
      for (int64_t k = 0; k < e.d; k += 2 * L) {
        store<ElemOf<M>>(key + k / 2, pair_along(load<T>(row + k), load<T>(row + k + L)));
      }
#endif
    }
#if defined(__AVX512BF16__)
    constexpr int NR = Tile<M>::NR, L = Tile<M>::L, kPairs = Tile<M>::kBlock / M::kPack;
    for (int64_t c = 0; c < e.d_pad; c += NR) {
      for (int v = 0; v < NR; v += L) {
        store<ElemOf<M>>(s.panels + c * kPairs + r / M::kPack * NR + v,
                         pair_across(load<T>(s.rows + c + v), load<T>(s.rows + ld + c + v)));
      }
    }
#endif
  }
}

// Exponentials of one block of keys against one panel-aligned block of queries; updates the sums.
template <class M, Mode kMode>
void exponentials(const Pass<M>& pass, const Partial<AccOfMath<M>>& out, const Scratch<M>& s, const ElemOf<M>* t_q,
                  int64_t j0, int64_t nj, int64_t i0, int64_t ni, bool exclude, Ahead& ahead, int64_t lines) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L, kLdG = Tile<M>::kLdG;
  const Engine<M>& e = pass.e;
  const int64_t ld = PackBuffer<M>::row_size(e.d);
  const bool any_masked = exclude || nj % MR != 0;
  for (int64_t i = i0; i < i0 + ni; i += NR) {
    const ElemOf<M>* b = t_q + (i - i0) * e.depth;
    Vec<T> old[NV], now[NV], sum[NV];
    IVec<T> count[NV];
    unroll<NV>([&](auto v) SSLK_INLINE {
      old[v] = now[v] = load<T>(out.max + i + v * L);
      sum[v] = load<T>(out.sum + i + v * L);
      count[v] = IVec<T>{};
    });
    for (int64_t j = 0; j < nj; j += MR) {
      Vec<T> t[MR][NV];
      ahead.fetch(lines);
      finish_tile_apart<M, false>(s.keys + j * ld, ld, 1, b, e.depth, nullptr, t);
      T* to = s.g + j * kLdG + (i - i0);
      const bool masked = exclude || j + MR > nj;
      unroll<MR>([&](auto r) SSLK_INLINE {
        unroll<NV>([&](auto v) SSLK_INLINE {
          Vec<T> x = t[r][v] * e.unit + e.offset;
          IVec<T> mask = ~IVec<T>{};
          if (masked) {
            mask = load_int<T>(e.q.ids.id + i + v * L) != e.k.ids.id[j0 + j + r];
            if (j + r >= nj) mask = IVec<T>{};
          }
          if (pass.threshold != nullptr) {
            const IVec<T> above = x > load<T>(pass.threshold + i + v * L);
            count[v] -= above & mask;
          }
          if constexpr (kMode == Mode::kOnline) {
            if (masked) x = mask != 0 ? x : splat<T>(Limits<T>::kFloor);
            now[v] = larger(x, now[v]);
          } else {
            x = exponential<M>(x);
            if (masked) x = keep<T>(x, mask);
            sum[v] += x;
          }
          store<T>(to + r * kLdG + v * L, x);
        });
      });
    }
    if constexpr (kMode == Mode::kOnline) {
      unroll<NV>([&](auto v) SSLK_INLINE {
        const IVec<T> seen = now[v] > splat<T>(Limits<T>::kFloor);
        sum[v] *= exp2_v(old[v] - now[v]);
        for (int64_t j = 0; j < round_up(nj, MR); ++j) {
          T* at = s.g + j * kLdG + (i - i0) + v * L;
          const Vec<T> x = load<T>(at);
          Vec<T> w = exp2_v(x - now[v]);
          // A NaN logit is not above the floor and must stay NaN; a masked one is exactly the floor.
          if (any_masked) w = keep<T>(w, ~(x == splat<T>(Limits<T>::kFloor)));
          sum[v] += w;
          store<T>(at, w);
        }
        store<T>(out.max + i + v * L, now[v]);
        // Earlier weighted sums were relative to the old maximum.
        const Vec<T> shrink = exp2_v(old[v] - now[v]);
        for (int l = 0; l < L; ++l) {
          if (!seen[l] || shrink[l] == T(1)) continue;
          T* row = out.weighted + (i + v * L + l) * pass.stride;
          for (int64_t c = 0; c < pass.stride; ++c) row[c] *= shrink[l];
        }
      });
    }
    unroll<NV>([&](auto v) SSLK_INLINE {
      store<T>(out.sum + i + v * L, sum[v]);
      for (int l = 0; pass.threshold != nullptr && l < L; ++l) out.rank[i + v * L + l] += count[v][l];
    });
  }
}

// One work item: a group of queries against a range of keys.
template <class M, Mode kMode>
void attend_range(const Pass<M>& pass, const Partial<AccOfMath<M>>& out, const Scratch<M>& s,
                  const PackBuffer<M>& buffer, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, kBlock = Tile<M>::kBlock, kLdG = Tile<M>::kLdG;
  const Engine<M>& e = pass.e;
  pack_t<M>(e.q.source, q0, q1 - q0, s.queries, buffer);
  for (int64_t j0 = k0; j0 < k1; j0 += kBlock) {
    const int64_t nj = min64(kBlock, k1 - j0);
    read_keys(pass, s, j0, nj);
    Ahead ahead(e.k.source, j0 + nj, min64(k1, j0 + nj + kBlock));
    const int64_t lines = ceil_div((ahead.end - ahead.at) / 64, max64(1, (min64(q1, e.q.n) - q0) / NR * (nj / MR)));
    for (int64_t i0 = q0; i0 < q1; i0 += kBlock) {
      const int64_t ni = min64(round_up(e.q.n, NR), min64(q1, i0 + kBlock)) - i0;
      if (ni <= 0) break;
      bool exclude = false;
      if (e.has_ids) {
        for (int64_t b = i0 / e.block; b <= (min64(e.q.n, i0 + ni) - 1) / e.block; ++b) {
          for (int64_t c = j0 / e.block; c <= (j0 + nj - 1) / e.block; ++c) exclude |= e.may_exclude(b, c);
        }
      }
      exponentials<M, kMode>(pass, out, s, s.queries + (i0 - q0) * e.depth, j0, nj, i0, ni, exclude, ahead, lines);
      if constexpr (M::kPack == 2) {
#if defined(__AVX512BF16__)
        for (int64_t j = 0; j < round_up(nj, 2); j += 2) {
          for (int64_t i = 0; i < ni; i += Tile<M>::L) {
            const float* at = s.g + j * kLdG + i;
            store<ElemOf<M>>(s.g_cols + j / 2 * kLdG + i, pair_across(load<float>(at), load<float>(at + kLdG)));
          }
        }
#endif
      }
      T* const weighted = out.weighted + i0 * pass.stride;
      if constexpr (M::kPack == 1) {
        gemm_block<M, true, false>(weighted, pass.stride, round_up(ni, MR), e.d, s.g_cols, 1, kLdG, s.keys,
                                   PackBuffer<M>::row_size(e.d), nj);
      } else {
        gemm_block<M, true>(weighted, pass.stride, round_up(ni, MR), e.d, s.g_cols, 1, kLdG, s.panels,
                            kBlock / M::kPack, ceil_div(nj, M::kPack));
      }
    }
  }
}

template <class M>
int attend_typed(const PairwiseArgs& args, const AttendOut& out) {
  using T = AccOfMath<M>;
  using E = ElemOf<M>;
  constexpr int kBlock = Tile<M>::kBlock, kLdG = Tile<M>::kLdG;
  Engine<M> e(args);
  Pass<M> pass{e};
  pass.stride = round_up(args.d, kRowAlign);
  const int64_t group = round_up(kGroupQueries, kBlock), ld = PackBuffer<M>::row_size(e.d);
  const int64_t n_groups = max64(1, ceil_div(e.q.n, group));
  const int64_t ranges = max64(1, min64(ceil_div(kMinItems, n_groups), e.k.n / kMinRange));
  const int64_t range = round_up(ceil_div(e.k.n, ranges), kBlock);

  Workspace w;
  PerThread<T> memory;
  T* thresholds = nullptr;
  double* norms = nullptr;
  Partial<T>* partial = nullptr;
  T *max = nullptr, *sum = nullptr, *weighted = nullptr;
  int64_t* rank = nullptr;
  const int64_t g_size = kBlock * kLdG, query_rows = min64(group, e.q.n_pad);
  constexpr int64_t kKeyCopies = M::kPack == 1 ? 1 : 2;
  const int64_t scratch_size = PackBuffer<M>::size(e.d) + 2 * g_size + 2 * ld + (kKeyCopies * kBlock + query_rows) * ld;
  w.plan(&memory, scratch_size, e.threads);
  w.plan(&norms, e.threads);
  w.plan(&partial, ranges);
  w.plan(&max, ranges * e.q.n_pad);
  w.plan(&sum, ranges * e.q.n_pad);
  w.plan(&weighted, ranges * e.q.n_pad * pass.stride);
  w.plan(&rank, ranges * e.q.n_pad);
  w.plan(&thresholds, e.q.n_pad);
  e.plan_ids(w, e.q);
  e.plan_ids(w, e.k);
  if (!w.allocate()) return -1;
  e.fill_all_ids();

  // Unit keys and queries bound the logits; of other keys nothing is known without reading them all first.
  double bound = NAN;
  if (args.normalize_k && args.inv_q != nullptr) {
    bound = std::fabs(args.scale);
  } else if (args.normalize_k) {
#pragma omp parallel num_threads(e.threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      ThreadScratch<M> s;
      s.buffer = PackBuffer<M>(memory.of(thread), e.d);
      e.raise_norm2(e.q.source, e.q.n * thread / team, e.q.n * (thread + 1) / team, s, &s.norm2_q);
      norms[thread] = s.norm2_q;
      for (int64_t t = team; thread == 0 && t < e.threads; ++t) norms[t] = 0;
    }
    double largest = 0;
    for (int t = 0; t < e.threads; ++t) largest = std::fmax(largest, norms[t]);
    bound = std::fabs(args.scale) * std::sqrt(largest);
  }
  e.choose_mode(bound);

  std::memset(sum, 0, size_t(ranges * e.q.n_pad) * sizeof(T));
  std::memset(rank, 0, size_t(ranges * e.q.n_pad) * sizeof(int64_t));
  for (int64_t i = 0; i < ranges * e.q.n_pad; ++i) max[i] = Limits<T>::kFloor;
  for (int64_t r = 0; r < ranges; ++r) {
    partial[r] = {max + r * e.q.n_pad, sum + r * e.q.n_pad, weighted + r * e.q.n_pad * pass.stride,
                  rank + r * e.q.n_pad};
  }
  if (out.threshold != nullptr) {
    for (int64_t i = 0; i < e.q.n_pad; ++i) {
      const T raw = i < e.q.n ? static_cast<const T*>(out.threshold)[i] : T(0);
      thresholds[i] = raw * T(kLog2E) - T(e.shift);
    }
    pass.threshold = thresholds;
  }

#pragma omp parallel num_threads(e.threads)
  {
    T* at = memory.mine();
    const PackBuffer<M> buffer(at, e.d);
    at += PackBuffer<M>::size(e.d);
    E* elems = reinterpret_cast<E*>(at + g_size + 2 * ld);
    E* keys = elems + g_size;
    Scratch<M> s{at, elems, at + g_size, keys, keys + kBlock * ld, keys + kKeyCopies * kBlock * ld};
    if constexpr (M::kPack == 1) s.g_cols = s.g;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < n_groups * ranges; ++item) {
      const int64_t g = item / ranges, r = item % ranges;
      const int64_t q0 = g * group, q1 = min64(e.q.n_pad, q0 + group);
      const int64_t k0 = r * range, k1 = min64(e.k.n, k0 + range);
      std::memset(partial[r].weighted + q0 * pass.stride, 0, size_t(q1 - q0) * pass.stride * sizeof(T));
      if (e.mode == Mode::kFixed) {
        attend_range<M, Mode::kFixed>(pass, partial[r], s, buffer, q0, q1, k0, k1);
      } else {
        attend_range<M, Mode::kOnline>(pass, partial[r], s, buffer, q0, q1, k0, k1);
      }
    }
    // Join the ranges in order.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < e.q.n; ++i) {
      double top = e.mode == Mode::kFixed ? e.shift : -HUGE_VAL, total = 0;
      int64_t count = 0;
      for (int64_t r = 0; r < ranges && e.mode == Mode::kOnline; ++r) {
        if (partial[r].max[i] > top) top = partial[r].max[i];
      }
      T* mean = static_cast<T*>(out.mean_key) + i * args.d;
      for (int64_t c = 0; c < args.d; ++c) mean[c] = T(0);
      for (int64_t r = 0; r < ranges; ++r) {
        const double f = e.mode == Mode::kFixed ? 1.0 : std::exp2(double(partial[r].max[i]) - top);
        total += double(partial[r].sum[i]) * f;
        count += partial[r].rank[i];
        const T* part = partial[r].weighted + i * pass.stride;
        for (int64_t c = 0; c < args.d; ++c) mean[c] += part[c] * T(f);
      }
      // No key allowed: lse = -inf and a zero mean.
      const T inverse = total == 0 ? T(0) : T(1.0 / total);
      for (int64_t c = 0; c < args.d; ++c) mean[c] *= inverse;
      static_cast<T*>(out.lse)[i] = T((top + std::log2(total)) * kLn2);
      if (out.rank != nullptr) out.rank[i] = count;
    }
  }
  return 0;
}

}  // namespace

int attend(const PairwiseArgs& args, const AttendOut& out) {
#if defined(__AVX512BF16__)
  return args.bf16 ? attend_typed<MathBF16>(args, out) : avx512::attend(args, out);
#else
  return args.dtype == DType::f64 ? attend_typed<MathF64>(args, out) : attend_typed<MathF32>(args, out);
#endif
}

SSLK_END
