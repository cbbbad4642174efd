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
//
// kSoftplus: log2(1 + 2^t) = max(t, 0) + log2(1 + e), e = 2^-|t|.  `sum` has the first, and the second is the logarithm
// of a product: one multiply-add instead of a polynomial for every logit.  The product is kept less 1, so that it
// has the digits of the smallest e, and is taken out before it can overflow.
template <class T>
struct State {
  T* max = nullptr;  // log2 units; only kOnline
  T* sum = nullptr;
  T* product = nullptr;        // of all 1 + e, less 1; only kSoftplus
  int64_t* factors = nullptr;  // [blocks] of a lane since it was taken out
  Int<T>* rank = nullptr;      // only with a threshold
  T* threshold = nullptr;      // [n_pad], in units of t
};

template <class M>
struct Pass {
  const Engine<M>& e;
  State<AccOfMath<M>> row, col;
  AccOfMath<M>* tiles = nullptr;  // logits kept for backward, see Engine::kept_at
};

// Columns of one panel while it travels down the rows of a block.
template <class M>
struct PanelColumns {
  using T = AccOfMath<M>;
  static constexpr int NV = Tile<M>::NV;
  Vec<T> max[NV], sum[NV], product[NV], threshold[NV];
  IVec<T> rank[NV], id[NV], valid[NV];
};

// (1 + product) (1 + e) less 1.
template <class V>
inline SSLK_INLINE V times_one_plus(V product, V e) {
  return e * (product + 1) + product;
}

template <class M, Mode kMode, bool kCols, bool kMasked>
inline SSLK_INLINE void reduce_tile(const Pass<M>& pass, PanelColumns<M>& columns, const ElemOf<M>* a,
                                    const ElemOf<M>* b, int64_t depth, RowsOfTile<M> from, int64_t i, bool col_rank,
                                    AccOfMath<M>* keep_at) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  Vec<T> t[MR][NV];
  if constexpr (kMode == Mode::kFixed) {
    finish_tile<M, true>(a, 1, Tile<M>::NR, b, depth, from, t);
  } else {
    finish_tile_apart<M, true>(a, 1, Tile<M>::NR, b, depth, from, t);
  }

  IVec<T> mask[MR][NV];
  unroll<MR>([&](auto r)
                 SSLK_INLINE { unroll<NV>([&](auto v) SSLK_INLINE { t[r][v] = t[r][v] * e.unit + e.offset; }); });
  if (keep_at != nullptr) {
    unroll<MR>([&](auto r) SSLK_INLINE {
      unroll<NV>([&](auto v) SSLK_INLINE { store<T>(keep_at + r * e.block + v * L, t[r][v]); });
    });
  }
  unroll<MR>([&](auto r) SSLK_INLINE {
    unroll<NV>([&](auto v) SSLK_INLINE {
      if constexpr (kMasked) {
        mask[r][v] = (columns.id[v] != e.q.ids.id[i + r]) & columns.valid[v];
        if (i + r >= e.q.n) mask[r][v] = IVec<T>{};
        if constexpr (kMode == Mode::kOnline) {
          t[r][v] = mask[r][v] != 0 ? t[r][v] : splat<T>(Limits<T>::kFloor);
        }
      }
    });
  });

  if (pass.row.rank != nullptr) {
    unroll<MR>([&](auto r) SSLK_INLINE {
      IVec<T> count = load_int<T>(pass.row.rank + (i + r) * L);
      unroll<NV>([&](auto v) SSLK_INLINE {
        const IVec<T> above = t[r][v] > pass.row.threshold[i + r];
        count -= kMasked ? above & mask[r][v] : above;
      });
      store_int<T>(pass.row.rank + (i + r) * L, count);
    });
  }
  if (kCols && col_rank) {
    unroll<NV>([&](auto v) SSLK_INLINE {
      unroll<MR>([&](auto r) SSLK_INLINE {
        const IVec<T> above = t[r][v] > columns.threshold[v];
        columns.rank[v] -= kMasked ? above & mask[r][v] : above;
      });
    });
  }

  if constexpr (kMode == Mode::kOnline) {
    unroll<MR>([&](auto r) SSLK_INLINE {
      T* max_at = pass.row.max + (i + r) * L;
      T* sum_at = pass.row.sum + (i + r) * L;
      const Vec<T> old = load<T>(max_at);
      Vec<T> now = old;
      unroll<NV>([&](auto v) SSLK_INLINE { now = larger(t[r][v], now); });
      Vec<T> sum = load<T>(sum_at) * exp2_v(old - now);
      unroll<NV>([&](auto v) SSLK_INLINE {
        const Vec<T> x = exp2_v(t[r][v] - now);
        sum += kMasked ? keep<T>(x, mask[r][v]) : x;
      });
      store<T>(max_at, now);
      store<T>(sum_at, sum);
    });
    if constexpr (kCols) {
      unroll<NV>([&](auto v) SSLK_INLINE {
        const Vec<T> old = columns.max[v];
        Vec<T> now = old;
        unroll<MR>([&](auto r) SSLK_INLINE { now = larger(t[r][v], now); });
        Vec<T> sum = columns.sum[v] * exp2_v(old - now);
        unroll<MR>([&](auto r) SSLK_INLINE {
          const Vec<T> x = exp2_v(t[r][v] - now);
          sum += kMasked ? keep<T>(x, mask[r][v]) : x;
        });
        columns.max[v] = now;
        columns.sum[v] = sum;
      });
    }
  } else if constexpr (kMode == Mode::kSoftplus) {
    unroll<MR>([&](auto r) SSLK_INLINE {
      T *sum_at = pass.row.sum + (i + r) * L, *product_at = pass.row.product + (i + r) * L;
      Vec<T> sum = load<T>(sum_at), product = load<T>(product_at);
      unroll<NV>([&](auto v) SSLK_INLINE {
        Vec<T> above = larger(Vec<T>{}, t[r][v]), e = exp2_v(minus_abs(t[r][v]));
        if constexpr (kMasked) above = keep<T>(above, mask[r][v]), e = keep<T>(e, mask[r][v]);
        sum += above;
        product = times_one_plus(product, e);
        if constexpr (kCols) {
          columns.sum[v] += above;
          columns.product[v] = times_one_plus(columns.product[v], e);
        }
      });
      store<T>(sum_at, sum);
      store<T>(product_at, product);
    });
  } else {
    unroll<MR>([&](auto r) SSLK_INLINE {
      T* sum_at = pass.row.sum + (i + r) * L;
      Vec<T> sum = load<T>(sum_at);
      unroll<NV>([&](auto v) SSLK_INLINE {
        Vec<T> x = exponential<M>(t[r][v]);
        if constexpr (kMasked) x = keep<T>(x, mask[r][v]);
        sum += x;
        if constexpr (kCols) columns.sum[v] += x;
      });
      store<T>(sum_at, sum);
    });
  }
}

// Adds what a panel's columns have gathered to the running reductions of the column side.
template <class M, Mode kMode>
inline void merge_columns(const State<AccOfMath<M>>& col, const PanelColumns<M>& columns, int64_t j) {
  using T = AccOfMath<M>;
  constexpr int NV = Tile<M>::NV, L = Tile<M>::L;
  unroll<NV>([&](auto v) SSLK_INLINE {
    T* sum_at = col.sum + j + v * L;
    if (kMode == Mode::kOnline) {
      T* max_at = col.max + j + v * L;
      const Vec<T> old = load<T>(max_at), here = columns.max[v];
      const Vec<T> now = here > old ? here : old;
      store<T>(sum_at, load<T>(sum_at) * exp2_v(old - now) + columns.sum[v] * exp2_v(here - now));
      store<T>(max_at, now);
    } else {
      store<T>(sum_at, load<T>(sum_at) + columns.sum[v]);
    }
    if constexpr (kMode == Mode::kSoftplus) {
      constexpr int W = Simd<double>::kLanes;
      for (int l = 0; l < L; l += W) {
        Vec<double> products = {};
        for (int w = 0; w < W; ++w) products[w] = double(columns.product[v][l + w]);
        const Vec<double> logs = log2_1p_v(products);
        for (int w = 0; w < W; ++w) sum_at[l + w] += T(logs[w]);
      }
    }
    if (col.rank != nullptr) {
      Int<T>* rank_at = col.rank + j + v * L;
      store_int<T>(rank_at, load_int<T>(rank_at) + columns.rank[v]);
    }
  });
}

// A product of so many factors up to 2 can't overflow, nor can that of all lanes in float64.
template <class M>
constexpr int64_t kMostFactors = 960 / Tile<M>::L < 126 ? 960 / Tile<M>::L : 126;

// The logarithms of the products of rows i .. last, at most as many as a vector has lanes.  Leaves empty products.
template <class M>
Vec<double> take_products(const State<AccOfMath<M>>& row, int64_t i, int64_t last) {
  constexpr int L = Tile<M>::L;
  Vec<double> products = {};
  for (int r = 0; i + r < last; ++r) {
    AccOfMath<M>* const lanes = row.product + (i + r) * L;
    double product = 0;
    for (int l = 0; l < L; ++l) product = times_one_plus(product, double(lanes[l]));
    for (int l = 0; l < L; ++l) lanes[l] = 0;
    products[r] = product;
  }
  return log2_1p_v(products);
}

// Makes room for the factors of one more pair of blocks in the products of the row block bi.
template <class M>
void make_room(const Engine<M>& e, const State<AccOfMath<M>>& row, int64_t bi) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L, W = Simd<double>::kLanes;
  int64_t& factors = row.factors[bi];
  factors += e.block / L;
  if (factors <= kMostFactors<M>) return;
  factors = e.block / L;
  const int64_t last = min64(e.q.n, (bi + 1) * e.block);
  for (int64_t i = bi * e.block; i < last; i += W) {
    const Vec<double> taken = take_products<M>(row, i, min64(last, i + W));
    for (int64_t r = 0; r < min64(W, last - i); ++r) row.sum[(i + r) * L] += T(taken[int(r)]);
  }
}

// All tiles of the block pair (bi, bj), whose T panels are given.
template <class M, Mode kMode, bool kCols>
void reduce_pair(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* t_q, const ElemOf<M>* t_k) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool exclude = e.may_exclude(bi, bj);
  const bool col_rank = kCols && pass.col.rank != nullptr;
  T* const tiles = pass.tiles == nullptr ? nullptr : pass.tiles + e.kept_at(bi, bj);
  if constexpr (kMode == Mode::kSoftplus) make_room(e, pass.row, bi);
  DeepPanel<M> deep;
  const auto rows_at = [&](int64_t i) { return t_q + i / NR * NR * e.depth + i % NR; };
  for (int64_t j = j0; j < j1; j += NR) {
    PanelColumns<M> columns;
    const ElemOf<M>* b = t_k + (j - j0) * e.depth;
    unroll<NV>([&](auto v) SSLK_INLINE {
      columns.max[v] = splat<T>(Limits<T>::kFloor);
      columns.sum[v] = Vec<T>{};
      columns.product[v] = Vec<T>{};
      columns.rank[v] = IVec<T>{};
      columns.threshold[v] = Vec<T>{};
      columns.id[v] = load_int<T>(e.k.ids.id + j + v * L);
      columns.valid[v] = lanes_below<T>(e.k.n - (j + v * L));
      if (col_rank) columns.threshold[v] = load<T>(pass.col.threshold + j + v * L);
    });
    const bool ragged = j + NR > e.k.n;
    deep.begin(e.depth, i1 - i0, [&](int64_t i, int64_t k, RowsOfTile<M> from, TileOf<M>& out) {
      store_tile<M, true>(rows_at(i) + k * NR, 1, NR, b + k * NR, DeepPanel<M>::kStep, from, out);
    });
    const int64_t left = e.depth - deep.done;
    b += deep.done * NR;
    for (int64_t i = i0; i < i1; i += MR) {
      const ElemOf<M>* a = rows_at(i - i0) + deep.done * NR;
      const RowsOfTile<M> from = deep.at(i - i0);
      T* const keep_at = tiles == nullptr ? nullptr : tiles + (i - i0) * e.block + (j - j0);
      if constexpr (kUnmasked<T, kMode>) {
        if (!exclude && !ragged && i + MR <= e.q.n) {
          reduce_tile<M, kMode, kCols, false>(pass, columns, a, b, left, from, i, col_rank, keep_at);
          continue;
        }
      }
      reduce_tile<M, kMode, kCols, true>(pass, columns, a, b, left, from, i, col_rank, keep_at);
    }
    if (kCols) merge_columns<M, kMode>(pass.col, columns, j);
  }
}

template <class M, Mode kMode>
void run(const Pass<M>& pass, ThreadScratch<M>* scratch, bool want_col) {
  const Engine<M>& e = pass.e;
  e.for_all_pairs(scratch, want_col, [&](ThreadScratch<M>& s, int64_t bi, int64_t bj) {
    const bool diagonal = e.args.self && bi == bj;
    const ElemOf<M>* t_q = e.block_t(e.q, bi, s.t_q, s.buffer);
    const ElemOf<M>* t_k = diagonal ? t_q : e.block_t(e.k, bj, s.t_k, s.buffer);
    // A diagonal block holds (i, j) and (j, i): its rows are enough.
    if (want_col && !diagonal) {
      reduce_pair<M, kMode, true>(pass, bi, bj, t_q, t_k);
    } else {
      reduce_pair<M, kMode, false>(pass, bi, bj, t_q, t_k);
    }
  });
}

// Sum of the L lanes of one row, with the running maxima of the lanes in kOnline (`max` is raised to the largest).
template <class M>
double sum_of_lanes(const Engine<M>& e, const State<AccOfMath<M>>& lanes, int64_t i, double* max) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L;
  const T* sums = lanes.sum + i * L;
  double sum = 0;
  if (e.mode == Mode::kOnline) {
    const T* maxima = lanes.max + i * L;
    for (int l = 0; l < L; ++l) *max = maxima[l] > *max ? double(maxima[l]) : *max;
    for (int l = 0; l < L; ++l) sum += double(sums[l]) * std::exp2(double(maxima[l]) - *max);
  } else {
    double part[4] = {0, 0, 0, 0};
    for (int l = 0; l < L; ++l) part[l % 4] += double(sums[l]);
    sum = (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum;
}

// Turns running reductions into results: lane sums of the row part, then the column part.
template <class M>
void finish(const Engine<M>& e, const State<AccOfMath<M>>& lanes, const State<AccOfMath<M>>& single, int64_t n,
            void* result, int64_t* rank) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L, W = Simd<double>::kLanes;
  T* out = static_cast<T*>(result);
#pragma omp parallel for num_threads(n* L < kSerialRows ? 1 : e.threads) schedule(static)
  for (int64_t i0 = 0; i0 < n; i0 += W) {
    Vec<double> sums = {}, maxima = splat<double>(e.shift);
    for (int64_t i = i0; i < min64(n, i0 + W); ++i) {
      double max = e.mode == Mode::kOnline ? double(Limits<T>::kFloor) : e.shift, sum = 0;
      if (lanes.sum != nullptr) sum = sum_of_lanes(e, lanes, i, &max);
      if (single.sum != nullptr && e.mode == Mode::kOnline) {
        const double here = single.max[i], both = here > max ? here : max;
        sum = sum * std::exp2(max - both) + double(single.sum[i]) * std::exp2(here - both);
        max = both;
      } else if (single.sum != nullptr) {
        sum += double(single.sum[i]);
      }
      sums[int(i - i0)] = sum;
      maxima[int(i - i0)] = max;
    }
    if (lanes.product != nullptr) sums += take_products<M>(lanes, i0, min64(n, i0 + W));
    // log2(0) = -inf: nothing was allowed.
    const Vec<double> lse = (e.mode == Mode::kSoftplus ? sums : maxima + log2_v(sums)) * kLn2;
    for (int64_t i = i0; i < min64(n, i0 + W); ++i) {
      out[i] = T(lse[int(i - i0)]);
      if (rank == nullptr) continue;
      int64_t count = 0;
      for (int l = 0; lanes.rank != nullptr && l < L; ++l) count += lanes.rank[i * L + l];
      if (single.rank != nullptr) count += single.rank[i];
      rank[i] = count;
    }
  }
}

template <class T>
void plan_state(Workspace& w, State<T>& state, Kind kind, int64_t count, int64_t n_pad, bool rank) {
  w.plan(&state.sum, count);
  if (kind == Kind::lse) w.plan(&state.max, count);
  if (rank) w.plan(&state.rank, count);
  if (rank) w.plan(&state.threshold, n_pad);
}

template <class T>
void clear_state(const State<T>& state, int64_t count, Mode mode) {
  std::memset(state.sum, 0, size_t(count) * sizeof(T));
  if (state.rank != nullptr) std::memset(state.rank, 0, size_t(count) * sizeof(T));
  for (int64_t i = 0; mode == Mode::kOnline && i < count; ++i) state.max[i] = Limits<T>::kFloor;
}

template <class M>
void fill_threshold(const Engine<M>& e, AccOfMath<M>* out, const void* threshold, int64_t n, int64_t n_pad) {
  using T = AccOfMath<M>;
  for (int64_t i = 0; i < n_pad; ++i) {
    out[i] = i < n ? static_cast<const T*>(threshold)[i] * T(kLog2E) - T(e.shift) : T(0);
  }
}

template <class M>
int forward(const PairwiseArgs& args, const PairwiseForwardOut& out) {
  using T = AccOfMath<M>;
  constexpr int L = Tile<M>::L;
  Engine<M> e(args);
  Pass<M> pass{e, {}, {}, static_cast<T*>(out.tiles)};
  if (pass.tiles != nullptr) pass.tiles[0] = T(e.block);
  const bool cols = args.self || out.col != nullptr;
  e.q_in_turn = !cols;
  const bool ranks = out.threshold_row != nullptr;
  const bool col_ranks = args.self ? ranks : out.threshold_col != nullptr;

  Workspace w;
  ThreadScratch<M>* scratch = nullptr;
  e.plan(w, &scratch, false);
  plan_state(w, pass.row, args.kind, e.q.n_pad * L, e.q.n_pad, ranks);
  if (cols) plan_state(w, pass.col, args.kind, e.k.n_pad, e.k.n_pad, col_ranks);
  if (args.kind == Kind::softplus) {
    w.plan(&pass.row.product, e.q.n_pad * L);
    w.plan(&pass.row.factors, e.blocks(e.q));
  }
  if (!w.allocate()) return -1;

  e.set_up(scratch, false);
  e.prepare(scratch, false);
  clear_state(pass.row, e.q.n_pad * L, e.mode);
  if (cols) clear_state(pass.col, e.k.n_pad, e.mode);
  if (args.kind == Kind::softplus) {
    std::memset(pass.row.product, 0, size_t(e.q.n_pad * L) * sizeof(T));
    std::memset(pass.row.factors, 0, size_t(e.blocks(e.q)) * sizeof(int64_t));
  }
  if (ranks) fill_threshold(e, pass.row.threshold, out.threshold_row, e.q.n, e.q.n_pad);
  if (col_ranks) {
    fill_threshold(e, pass.col.threshold, args.self ? out.threshold_row : out.threshold_col, e.k.n, e.k.n_pad);
  }
  switch (e.mode) {
    case Mode::kFixed: run<M, Mode::kFixed>(pass, scratch, cols); break;
    case Mode::kOnline: run<M, Mode::kOnline>(pass, scratch, cols); break;
    case Mode::kSoftplus: run<M, Mode::kSoftplus>(pass, scratch, cols); break;
  }
  if (args.self) {
    finish(e, pass.row, pass.col, e.q.n, out.row, out.rank_row);
  } else {
    finish(e, pass.row, State<T>{}, e.q.n, out.row, out.rank_row);
    if (cols) finish(e, State<T>{}, pass.col, e.k.n, out.col, out.rank_col);
  }
  return 0;
}

}  // namespace

int pairwise_forward(const PairwiseArgs& args, const PairwiseForwardOut& out) {
#if defined(__AVX512BF16__)
  return args.bf16 ? forward<MathBF16>(args, out) : avx512::pairwise_forward(args, out);
#else
  return args.dtype == DType::f64 ? forward<MathF64>(args, out) : forward<MathF32>(args, out);
#endif
}

SSLK_END
