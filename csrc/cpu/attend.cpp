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

template <class T>
struct Pass {
  const Engine<T>& e;  // q: queries (packed), k: keys (read in place)
  const T* threshold = nullptr;
  int64_t stride = 0;
};

template <class T>
struct Scratch {
  T* g;       // [kBlock keys][kLdG]: exponentials, one column a query
  T* keys;    // [kBlock][d_pad] row-major keys of the block
  T* panels;  // P panels of the block
};

// Exponentials of one block of keys against one panel-aligned block of queries; updates the sums.
template <class T, Mode M>
void exponentials(const Pass<T>& pass, const Partial<T>& out, const T* keys, int64_t key_stride, int64_t j0, int64_t nj,
                  int64_t i0, int64_t ni, T* g, bool exclude) {
  constexpr int MR = Tile<T>::MR, NR = Tile<T>::NR, NV = Tile<T>::NV, L = Tile<T>::L, kLdG = Tile<T>::kLdG;
  const Engine<T>& e = pass.e;
  for (int64_t i = i0; i < i0 + ni; i += NR) {
    const T* b = e.q.panels + i * e.d;
    Vec<T> old[NV], now[NV], sum[NV];
    IVec<T> count[NV];
    for (int v = 0; v < NV; ++v) {
      old[v] = now[v] = load<T>(out.max + i + v * L);
      sum[v] = load<T>(out.sum + i + v * L);
      count[v] = IVec<T>{};
    }
    for (int64_t j = 0; j < nj; j += MR) {
      Vec<T> t[MR][NV];
      zero_tile<T, NV>(t);
      dot_tile<T, NV, false>(keys + j * key_stride, key_stride, 1, b, e.d, t);
      T* to = g + j * kLdG + (i - i0);
      const bool masked = exclude || j + MR > nj;
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          Vec<T> x = t[r][v] * e.unit + e.offset;
          IVec<T> mask = ~IVec<T>{};
          if (masked) {
            mask = load_int<T>(e.q.ids.id + i + v * L) != e.k.ids.id[j0 + j + r];
            if (j + r >= nj) mask = IVec<T>{};
          }
          if (pass.threshold != nullptr) {
            IVec<T> above = x > load<T>(pass.threshold + i + v * L);
            count[v] -= above & mask;
          }
          if (M == Mode::kOnline) {
            x = mask != 0 ? x : splat<T>(Limits<T>::kFloor);
            now[v] = x > now[v] ? x : now[v];
          } else {
            x = exp2_v(x);
            if (masked) x = keep<T>(x, mask);
            sum[v] += x;
          }
          store<T>(to + r * kLdG + v * L, x);
        }
      }
    }
    if (M == Mode::kOnline) {
      for (int v = 0; v < NV; ++v) {
        const IVec<T> seen = now[v] > splat<T>(Limits<T>::kFloor);
        sum[v] *= exp2_v(old[v] - now[v]);
        for (int64_t j = 0; j < round_up(nj, MR); ++j) {
          T* at = g + j * kLdG + (i - i0) + v * L;
          const Vec<T> x = load<T>(at);
          // A NaN logit is not above the floor and must stay NaN; a masked one is exactly the floor.
          const IVec<T> allowed = ~(x == splat<T>(Limits<T>::kFloor));
          const Vec<T> w = keep<T>(exp2_v(x - now[v]), allowed);
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
      }
    }
    for (int v = 0; v < NV; ++v) {
      store<T>(out.sum + i + v * L, sum[v]);
      for (int l = 0; pass.threshold != nullptr && l < L; ++l) out.rank[i + v * L + l] += count[v][l];
    }
  }
}

// One work item: a group of queries against a range of keys.
template <class T, Mode M>
void attend_range(const Pass<T>& pass, const Partial<T>& out, const Scratch<T>& s, int64_t q0, int64_t q1, int64_t k0,
                  int64_t k1) {
  constexpr int MR = Tile<T>::MR, NR = Tile<T>::NR, kBlock = Tile<T>::kBlock, kLdG = Tile<T>::kLdG;
  const Engine<T>& e = pass.e;
  for (int64_t j0 = k0; j0 < k1; j0 += kBlock) {
    const int64_t nj = min64(kBlock, k1 - j0);
    for (int64_t r = 0; r < round_up(nj, MR); ++r) {
      T* row = s.keys + r * e.d_pad;
      if (r < nj) {
        e.k.source.row(j0 + r, row);
        if (e.args.normalize_k) {
          const T inverse = inverse_norm(row, e.d);
          for (int64_t c = 0; c < e.d; ++c) row[c] *= inverse;
        }
      } else {
        std::memset(row, 0, size_t(e.d) * sizeof(T));
      }
      for (int64_t c = e.d; c < e.d_pad; ++c) row[c] = T(0);
      for (int64_t c = 0; c < e.d_pad; c += NR) {
        std::memcpy(s.panels + c * kBlock + r * NR, row + c, NR * sizeof(T));
      }
    }
    for (int64_t i0 = q0; i0 < q1; i0 += kBlock) {
      const int64_t ni = min64(round_up(e.q.n, NR), min64(q1, i0 + kBlock)) - i0;
      if (ni <= 0) break;
      bool exclude = false;
      if (e.has_ids) {
        for (int64_t b = i0 / e.block; b <= (min64(e.q.n, i0 + ni) - 1) / e.block; ++b) {
          for (int64_t c = j0 / e.block; c <= (j0 + nj - 1) / e.block; ++c) exclude |= e.may_exclude(b, c);
        }
      }
      exponentials<T, M>(pass, out, s.keys, e.d_pad, j0, nj, i0, ni, s.g, exclude);
      gemm_block<T, true>(out.weighted + i0 * pass.stride, pass.stride, round_up(ni, MR), e.d, s.g, 1, kLdG, s.panels,
                          kBlock, nj);
    }
  }
}

template <class T>
int attend_typed(const PairwiseArgs& args, const AttendOut& out) {
  constexpr int kBlock = Tile<T>::kBlock;
  Engine<T> e(args);
  Pass<T> pass{e};
  pass.stride = round_up(args.d, kRowAlign);
  const int64_t group = round_up(kGroupQueries, kBlock);
  const int64_t n_groups = max64(1, ceil_div(e.q.n, group));
  const int64_t ranges = max64(1, min64(ceil_div(kMinItems, n_groups), e.k.n / kMinRange));
  const int64_t range = round_up(ceil_div(e.k.n, ranges), kBlock);

  Workspace w;
  T *buffers = nullptr, *thresholds = nullptr, *scratch_memory = nullptr;
  double* norms = nullptr;
  Partial<T>* partial = nullptr;
  T *max = nullptr, *sum = nullptr, *weighted = nullptr;
  int64_t* rank = nullptr;
  const int64_t scratch_size = kBlock * (Tile<T>::kLdG + 2 * e.d_pad);
  w.plan(&buffers, e.d_pad * args.n_threads);
  w.plan(&norms, 2 * args.n_threads);
  w.plan(&scratch_memory, scratch_size * args.n_threads);
  w.plan(&partial, ranges);
  w.plan(&max, ranges * e.q.n_pad);
  w.plan(&sum, ranges * e.q.n_pad);
  w.plan(&weighted, ranges * e.q.n_pad * pass.stride);
  w.plan(&rank, ranges * e.q.n_pad);
  w.plan(&thresholds, e.q.n_pad);
  e.plan_sides(w, false);
  if (!w.allocate()) return -1;
  e.fill_all_ids();

  // Pack the queries and bound the logits.
#pragma omp parallel num_threads(args.n_threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    T* buffer = buffers + thread * e.d_pad;
    norms[2 * thread] = e.pack_side(e.q, thread, team, buffer);
    // Unit keys bound the logits; of other keys nothing is known without reading them all first.
    norms[2 * thread + 1] = args.normalize_k ? 1.0 : NAN;
    for (int t = team; thread == 0 && t < args.n_threads; ++t) norms[2 * t] = norms[2 * t + 1] = 0;
  }
  e.choose_mode(e.bound_from(norms));

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

#pragma omp parallel num_threads(args.n_threads)
  {
    const int64_t thread = omp_get_thread_num();
    T* base = scratch_memory + thread * scratch_size;
    const Scratch<T> s{base, base + kBlock * Tile<T>::kLdG, base + kBlock * (Tile<T>::kLdG + e.d_pad)};
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < n_groups * ranges; ++item) {
      const int64_t g = item / ranges, r = item % ranges;
      const int64_t q0 = g * group, q1 = min64(e.q.n_pad, q0 + group);
      const int64_t k0 = r * range, k1 = min64(e.k.n, k0 + range);
      std::memset(partial[r].weighted + q0 * pass.stride, 0, size_t(q1 - q0) * pass.stride * sizeof(T));
      if (e.mode == Mode::kFixed) {
        attend_range<T, Mode::kFixed>(pass, partial[r], s, q0, q1, k0, k1);
      } else {
        attend_range<T, Mode::kOnline>(pass, partial[r], s, q0, q1, k0, k1);
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
  return args.dtype == DType::f64 ? attend_typed<double>(args, out) : attend_typed<float>(args, out);
}

SSLK_END
