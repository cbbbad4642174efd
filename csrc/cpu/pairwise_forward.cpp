// SPDX-License-Identifier: Apache-2.0
// Forward pass over the tiles of S = scale * Q K^T: log-sum-exp (or sum of softplus) of every row and,
// when asked for, of every column, and the number of entries above a threshold (ranks).
//
// Plain-torch twin: sslkernels/backends/chunked.py.  Accumulates in float32 (float64 for float64): one
// running sum a row and vector lane, so that no horizontal sum is needed before the end.
// Self mode (S symmetric) visits one triangle: a tile adds to the rows of its row block and, through
// its columns, to the rows of its column block.

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

// Running reductions of one side.  Rows keep one value a lane, [n_pad][width = L]; columns are lanes
// already, [n_pad][width = 1].
template <class T>
struct State {
  T* max = nullptr;  // log2 units; only kOnline
  T* sum = nullptr;
  Int<T>* rank = nullptr;  // only with a threshold
  T* threshold = nullptr;  // [n_pad], in units of t
};

template <class T>
struct Pass {
  const Engine<T>& e;
  State<T> row, col;
};

// Columns of one panel while it travels down the rows of a block.
template <class T>
struct PanelColumns {
  static constexpr int NV = Tile<T>::NV;
  Vec<T> max[NV], sum[NV], threshold[NV];
  IVec<T> rank[NV], id[NV], valid[NV];
};

template <class T, Mode M, bool kCols, bool kMasked>
inline __attribute__((always_inline)) void reduce_tile(const Pass<T>& pass, PanelColumns<T>& columns, const T* a,
                                                       const T* b, int64_t i, bool col_rank) {
  constexpr int MR = Tile<T>::MR, NV = Tile<T>::NV, L = Tile<T>::L;
  const Engine<T>& e = pass.e;
  Vec<T> t[MR][NV];
  zero_tile<T, NV>(t);
  dot_tile<T, NV, true>(a, 1, Tile<T>::NR, b, e.d, t);

  IVec<T> mask[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      t[r][v] = t[r][v] * e.unit + e.offset;
      if (kMasked) {
        mask[r][v] = (columns.id[v] != e.q.ids.id[i + r]) & columns.valid[v];
        if (i + r >= e.q.n) mask[r][v] = IVec<T>{};
        if (M == Mode::kOnline) {
          t[r][v] = mask[r][v] != 0 ? t[r][v] : splat<T>(Limits<T>::kFloor);
        }
      }
    }
  }

  if (pass.row.rank != nullptr) {
    for (int r = 0; r < MR; ++r) {
      IVec<T> count = load_int<T>(pass.row.rank + (i + r) * L);
      for (int v = 0; v < NV; ++v) {
        IVec<T> above = t[r][v] > pass.row.threshold[i + r];
        count -= kMasked ? above & mask[r][v] : above;
      }
      store_int<T>(pass.row.rank + (i + r) * L, count);
    }
  }
  if (kCols && col_rank) {
    for (int v = 0; v < NV; ++v) {
      for (int r = 0; r < MR; ++r) {
        IVec<T> above = t[r][v] > columns.threshold[v];
        columns.rank[v] -= kMasked ? above & mask[r][v] : above;
      }
    }
  }

  if (M == Mode::kOnline) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      T* max_at = pass.row.max + (i + r) * L;
      T* sum_at = pass.row.sum + (i + r) * L;
      const Vec<T> old = load<T>(max_at);
      Vec<T> now = old;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) now = t[r][v] > now ? t[r][v] : now;
      Vec<T> sum = load<T>(sum_at) * exp2_v(old - now);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Vec<T> x = exp2_v(t[r][v] - now);
        sum += kMasked ? keep<T>(x, mask[r][v]) : x;
      }
      store<T>(max_at, now);
      store<T>(sum_at, sum);
    }
    if (kCols) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Vec<T> old = columns.max[v];
        Vec<T> now = old;
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) now = t[r][v] > now ? t[r][v] : now;
        Vec<T> sum = columns.sum[v] * exp2_v(old - now);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const Vec<T> x = exp2_v(t[r][v] - now);
          sum += kMasked ? keep<T>(x, mask[r][v]) : x;
        }
        columns.max[v] = now;
        columns.sum[v] = sum;
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    T* sum_at = pass.row.sum + (i + r) * L;
    Vec<T> sum = load<T>(sum_at);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Vec<T> x = M == Mode::kSoftplus ? softplus_v<T>(t[r][v]) : exp2_v(t[r][v]);
      if (kMasked) x = keep<T>(x, mask[r][v]);
      sum += x;
      if (kCols) columns.sum[v] += x;
    }
    store<T>(sum_at, sum);
  }
}

// Adds what a panel's columns have gathered to the running reductions of the column side.
template <class T, Mode M>
inline void merge_columns(const State<T>& col, const PanelColumns<T>& columns, int64_t j) {
  constexpr int NV = Tile<T>::NV, L = Tile<T>::L;
  for (int v = 0; v < NV; ++v) {
    T* sum_at = col.sum + j + v * L;
    if (M == Mode::kOnline) {
      T* max_at = col.max + j + v * L;
      const Vec<T> old = load<T>(max_at), here = columns.max[v];
      const Vec<T> now = here > old ? here : old;
      store<T>(sum_at, load<T>(sum_at) * exp2_v(old - now) + columns.sum[v] * exp2_v(here - now));
      store<T>(max_at, now);
    } else {
      store<T>(sum_at, load<T>(sum_at) + columns.sum[v]);
    }
    if (col.rank != nullptr) {
      Int<T>* rank_at = col.rank + j + v * L;
      store_int<T>(rank_at, load_int<T>(rank_at) + columns.rank[v]);
    }
  }
}

// All tiles of the block pair (bi, bj).
template <class T, Mode M, bool kCols>
void reduce_pair(const Pass<T>& pass, int64_t bi, int64_t bj) {
  constexpr int MR = Tile<T>::MR, NR = Tile<T>::NR, NV = Tile<T>::NV, L = Tile<T>::L;
  const Engine<T>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool exclude = e.may_exclude(bi, bj);
  const bool col_rank = kCols && pass.col.rank != nullptr;
  for (int64_t j = j0; j < j1; j += NR) {
    PanelColumns<T> columns;
    const T* b = e.k.panels + j * e.d;
    for (int v = 0; v < NV; ++v) {
      columns.max[v] = splat<T>(Limits<T>::kFloor);
      columns.sum[v] = Vec<T>{};
      columns.rank[v] = IVec<T>{};
      columns.threshold[v] = Vec<T>{};
      columns.id[v] = load_int<T>(e.k.ids.id + j + v * L);
      columns.valid[v] = lanes_below<T>(e.k.n - (j + v * L));
      if (col_rank) columns.threshold[v] = load<T>(pass.col.threshold + j + v * L);
    }
    const bool ragged = j + NR > e.k.n;
    for (int64_t i = i0; i < i1; i += MR) {
      const T* a = e.q.panels + (i / NR) * NR * e.d + i % NR;
      if (exclude || ragged || i + MR > e.q.n) {
        reduce_tile<T, M, kCols, true>(pass, columns, a, b, i, col_rank);
      } else {
        reduce_tile<T, M, kCols, false>(pass, columns, a, b, i, col_rank);
      }
    }
    if (kCols) merge_columns<T, M>(pass.col, columns, j);
  }
}

// The schedule.  The pairs of a round share no block, so it does not matter which thread takes which.
// Every row (and column) meets the blocks of the other side in an order that depends on
// the sizes only, so the sums have the same bits for any number of threads.
template <class T, Mode M>
void run(const Pass<T>& pass, bool want_col) {
  const Engine<T>& e = pass.e;
  const int64_t nq = e.blocks(e.q), nk = e.blocks(e.k);
#pragma omp parallel num_threads(e.args.n_threads)
  {
    if (e.args.self) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < nq; ++b) reduce_pair<T, M, false>(pass, b, b);
      const Tournament t(nq);
      for (int64_t round = 0; round < t.rounds(); ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < t.pairs(); ++p) {
          int64_t a, b;
          if (t.pair(round, p, &a, &b)) reduce_pair<T, M, true>(pass, a, b);
        }
      }
    } else if (want_col) {
      // Latin square: in round r block i meets block (i + r) mod max, so no two share a column block.
      const int64_t rounds = max64(nq, nk);
      for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < nq; ++i) {
          const int64_t j = (i + round) % rounds;
          if (j < nk) reduce_pair<T, M, true>(pass, i, j);
        }
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < nq; ++i) {
        for (int64_t j = 0; j < nk; ++j) reduce_pair<T, M, false>(pass, i, j);
      }
    }
  }
}

// Turns running reductions into results: lane sums of the row part, then the column part.
template <class T>
void finish(const Engine<T>& e, const State<T>& lanes, const State<T>& single, int64_t n, T* out, int64_t* rank) {
  constexpr int L = Tile<T>::L;
  for (int64_t i = 0; i < n; ++i) {
    double max = -HUGE_VAL, sum = 0;
    if (e.mode == Mode::kOnline) {
      for (int l = 0; lanes.sum != nullptr && l < L; ++l) {
        if (lanes.max[i * L + l] > max) max = lanes.max[i * L + l];
      }
      if (single.sum != nullptr && single.max[i] > max) max = single.max[i];
      for (int l = 0; lanes.sum != nullptr && l < L; ++l) {
        sum += double(lanes.sum[i * L + l]) * std::exp2(lanes.max[i * L + l] - max);
      }
      if (single.sum != nullptr) sum += double(single.sum[i]) * std::exp2(single.max[i] - max);
    } else {
      max = e.shift;
      for (int l = 0; lanes.sum != nullptr && l < L; ++l) sum += double(lanes.sum[i * L + l]);
      if (single.sum != nullptr) sum += double(single.sum[i]);
    }
    if (e.mode == Mode::kSoftplus) {
      out[i] = T(sum);
    } else {
      out[i] = T((max + std::log2(sum)) * kLn2);  // log2(0) = -inf: nothing was allowed
    }
    if (rank != nullptr) {
      int64_t count = 0;
      for (int l = 0; lanes.rank != nullptr && l < L; ++l) count += lanes.rank[i * L + l];
      if (single.rank != nullptr) count += single.rank[i];
      rank[i] = count;
    }
  }
}

template <class T>
void plan_state(Workspace& w, State<T>& state, int64_t count, int64_t n_pad, bool max, bool rank) {
  w.plan(&state.sum, count);
  if (max) w.plan(&state.max, count);
  if (rank) w.plan(&state.rank, count);
  if (rank) w.plan(&state.threshold, n_pad);
}

template <class T>
void clear_state(const State<T>& state, int64_t count) {
  std::memset(state.sum, 0, size_t(count) * sizeof(T));
  if (state.rank != nullptr) std::memset(state.rank, 0, size_t(count) * sizeof(T));
  for (int64_t i = 0; state.max != nullptr && i < count; ++i) state.max[i] = Limits<T>::kFloor;
}

template <class T>
void fill_threshold(const Engine<T>& e, T* out, const void* threshold, int64_t n, int64_t n_pad) {
  const T factor = e.mode == Mode::kSoftplus ? T(1) : T(kLog2E);
  for (int64_t i = 0; i < n_pad; ++i) {
    out[i] = i < n ? static_cast<const T*>(threshold)[i] * factor - T(e.shift) : T(0);
  }
}

template <class T>
int forward(const PairwiseArgs& args, const PairwiseForwardOut& out) {
  constexpr int L = Tile<T>::L;
  Engine<T> e(args);
  Pass<T> pass{e, {}, {}};
  const bool cols = args.self || out.col != nullptr;
  const bool ranks = out.threshold_row != nullptr;
  const bool col_ranks = args.self ? ranks : out.threshold_col != nullptr;

  Workspace w;
  T* buffers = nullptr;
  double* norms = nullptr;
  w.plan(&buffers, e.d_pad * args.n_threads);
  w.plan(&norms, 2 * args.n_threads);
  e.plan_sides(w, true);
  plan_state(w, pass.row, e.q.n_pad * L, e.q.n_pad, true, ranks);
  if (cols) plan_state(w, pass.col, e.k.n_pad, e.k.n_pad, true, col_ranks);
  if (!w.allocate()) return -1;

  e.fill_all_ids();
  e.choose_mode(e.pack_all(buffers, norms));
  clear_state(pass.row, e.q.n_pad * L);
  if (cols) clear_state(pass.col, e.k.n_pad);
  if (ranks) fill_threshold(e, pass.row.threshold, out.threshold_row, e.q.n, e.q.n_pad);
  if (col_ranks) {
    fill_threshold(e, pass.col.threshold, args.self ? out.threshold_row : out.threshold_col, e.k.n, e.k.n_pad);
  }
  switch (e.mode) {
    case Mode::kFixed: run<T, Mode::kFixed>(pass, cols); break;
    case Mode::kOnline: run<T, Mode::kOnline>(pass, cols); break;
    case Mode::kSoftplus: run<T, Mode::kSoftplus>(pass, cols); break;
  }
  if (args.self) {
    finish(e, pass.row, pass.col, e.q.n, static_cast<T*>(out.row), out.rank_row);
  } else {
    finish(e, pass.row, State<T>{}, e.q.n, static_cast<T*>(out.row), out.rank_row);
    if (cols) finish(e, State<T>{}, pass.col, e.k.n, static_cast<T*>(out.col), out.rank_col);
  }
  return 0;
}

}  // namespace

int pairwise_forward(const PairwiseArgs& args, const PairwiseForwardOut& out) {
  return args.dtype == DType::f64 ? forward<double>(args, out) : forward<float>(args, out);
}

SSLK_END
