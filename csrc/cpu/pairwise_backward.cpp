// SPDX-License-Identifier: Apache-2.0
// Backward pass over the tiles of S = scale * Q K^T.  S is recomputed tile by tile, turned into
//
//   lse:       G_ij = drow_i exp(S_ij - row_i) + dcol_j exp(S_ij - col_j)
//   softplus:  G_ij = (drow_i + dcol_j) / (1 + exp(-S_ij))
//
// in a scratch block of kBlock x kBlock, and multiplied at once: dQ_I += G K_J, dK_J += G^T Q_I.
// Self mode visits one triangle and adds both products to dQ: 6 N^2 D operations in full would be
// 4 N^2 D for forward and backward together with the symmetry.
//
// Plain-torch twin: sslkernels/backends/chunked.py.

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

// Per row (or column): what turns exp2(t) into its share of G.
template <class T>
struct Weight {
  T* factor = nullptr;  // [n_pad] kFixed: d * scale * exp2(shift - lse); else d (* scale)
  T* lse = nullptr;     // [n_pad] kOnline: log-sum-exp in log2 units
};

template <class M>
struct Pass {
  using T = AccOfMath<M>;
  const Engine<M>& e;
  Weight<T> row, col;
  double* g_sum = nullptr;  // [blocks of q], softplus only: sums of G for the bias
  T* dq = nullptr;          // [padded_rows(N)][stride], or null: not wanted
  T* dk = nullptr;          // [padded_rows(M)][stride]; dq in self mode
  int64_t stride = 0;
  const T* tiles = nullptr;  // logits that forward kept, see Engine::kept_at
  bool far = false;          // panels and gradients of all rows are more than kFarBytes
};

// What is smaller is found in a near cache, where fetching it ahead costs more than it saves.
constexpr int64_t kFarBytes = int64_t(4) << 20;

// What the products with G of a pair of blocks need, fetched into the L2 cache some lines a tile while G is computed.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) { ranges_[count_++] = {static_cast<const char*>(from), bytes / kLine}; }

  void deal(int64_t tiles) {
    for (int r = 0; r < count_; ++r) lines_a_tile_ = max64(lines_a_tile_, ceil_div(ranges_[r].lines, tiles));
  }

  void fetch() {
    for (int r = 0; r < count_; ++r) {
      Range& range = ranges_[r];
      const int64_t lines = min64(lines_a_tile_, range.lines);
      for (int64_t l = 0; l < lines; ++l) __builtin_prefetch(range.at + l * kLine, 0, 2);
      range.at += lines * kLine;
      range.lines -= lines;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Range {
    const char* at = nullptr;
    int64_t lines = 0;
  };
  Range ranges_[3];
  int count_ = 0;
  int64_t lines_a_tile_ = 0;
};

// The rows of q that a tile reads from element k on: of P panels, or of T panels where those hold something else.
template <class M>
inline const ElemOf<M>* tile_rows(const Engine<M>& e, const ElemOf<M>* block, int64_t i, int64_t k) {
  constexpr int NR = Tile<M>::NR;
  if constexpr (M::kPack == 1) {
    return block + k * e.block + i * NR;
  } else {
    return block + i / NR * NR * e.depth + i % NR + k * NR;
  }
}

template <class M, Mode kMode, bool kCols, bool kMasked>
inline SSLK_INLINE void weight_tile(const Pass<M>& pass, const ElemOf<M>* a, const ElemOf<M>* b, int64_t depth,
                                    RowsOfTile<M> from, int64_t i, int64_t j, AccOfMath<M>* g, Vec<AccOfMath<M>>& g_sum,
                                    const AccOfMath<M>* kept) {
  using T = AccOfMath<M>;
  constexpr int MR = Tile<M>::MR, NV = Tile<M>::NV, L = Tile<M>::L;
  const Engine<M>& e = pass.e;
  Vec<T> t[MR][NV];
  if (kept != nullptr) {
    unroll<MR>([&](auto r) SSLK_INLINE {
      unroll<NV>([&](auto v) SSLK_INLINE { t[r][v] = load<T>(kept + r * e.block + v * L); });
    });
  } else {
    if constexpr (M::kPack == 1 && kMode == Mode::kFixed) {
      finish_tile_of_p<M>(a, e.block, b, depth, from, t);
    } else if constexpr (M::kPack == 1) {
      finish_tile_of_p_apart<M>(a, e.block, b, depth, from, t);
    } else {
      finish_tile<M, true>(a, 1, Tile<M>::NR, b, depth, from, t);
    }
    unroll<MR>([&](auto r)
                   SSLK_INLINE { unroll<NV>([&](auto v) SSLK_INLINE { t[r][v] = t[r][v] * e.unit + e.offset; }); });
  }

  Vec<T> col_factor[NV], col_lse[NV];
  IVec<T> id[NV], valid[NV];
  unroll<NV>([&](auto v) SSLK_INLINE {
    if constexpr (kCols) col_factor[v] = load<T>(pass.col.factor + j + v * L);
    if constexpr (kCols && kMode == Mode::kOnline) col_lse[v] = load<T>(pass.col.lse + j + v * L);
    if constexpr (kMasked) {
      id[v] = load_int<T>(e.k.ids.id + j + v * L);
      valid[v] = lanes_below<T>(e.k.n - (j + v * L));
    }
  });
  unroll<MR>([&](auto r) SSLK_INLINE {
    const T row_factor = pass.row.factor[i + r];
    unroll<NV>([&](auto v) SSLK_INLINE {
      const Vec<T> x = t[r][v];
      Vec<T> w;
      if constexpr (kMode == Mode::kOnline) {
        w = exp2_v(x - pass.row.lse[i + r]) * row_factor;
        if constexpr (kCols) w += exp2_v(x - col_lse[v]) * col_factor[v];
      } else {
        Vec<T> factor = splat<T>(row_factor);
        if constexpr (kCols) factor += col_factor[v];
        w = (kMode == Mode::kFixed ? exponential<M>(x) : logistic2_v(x)) * factor;
      }
      if constexpr (kMasked) {
        IVec<T> mask = (id[v] != e.q.ids.id[i + r]) & valid[v];
        if (i + r >= e.q.n) mask = IVec<T>{};
        w = keep<T>(w, mask);
      }
      store<T>(g + r * Tile<M>::kLdG + v * L, w);
      if constexpr (kMode == Mode::kSoftplus) g_sum += w;
    });
  });
}

// G of the block pair (bi, bj), rows padded to MR and columns to NR with zeros.  `q`: see tile_rows.
template <class M, Mode kMode, bool kCols>
void weight_block(const Pass<M>& pass, int64_t bi, int64_t bj, const ElemOf<M>* q, const ElemOf<M>* t_k,
                  AccOfMath<M>* g, Ahead& ahead) {
  using T = AccOfMath<M>;
  Vec<T> g_sum = {};
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR;
  const Engine<M>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool exclude = e.may_exclude(bi, bj);
  const T* const tiles = pass.tiles == nullptr ? nullptr : pass.tiles + e.kept_at(bi, bj);
  DeepPanel<M> deep;
  for (int64_t j = j0; j < j1; j += NR) {
    const ElemOf<M>* b = tiles != nullptr ? nullptr : t_k + (j - j0) * e.depth;
    const bool ragged = j + NR > e.k.n;
    deep.begin(tiles != nullptr ? 0 : e.depth, i1 - i0, [&](int64_t i, int64_t k, RowsOfTile<M> from, TileOf<M>& out) {
      const ElemOf<M>* a = tile_rows<M>(e, q, i, k);
      if constexpr (M::kPack == 1) {
        store_tile_of_p<M>(a, e.block, b + k * NR, DeepPanel<M>::kStep, from, out);
      } else {
        store_tile<M, true>(a, 1, NR, b + k * NR, DeepPanel<M>::kStep, from, out);
      }
    });
    const int64_t left = e.depth - deep.done;
    if (tiles == nullptr) b += deep.done * NR;
    for (int64_t i = i0; i < i1; i += MR) {
      const ElemOf<M>* a = tiles != nullptr ? nullptr : tile_rows<M>(e, q, i - i0, deep.done);
      const RowsOfTile<M> from = deep.at(i - i0);
      const T* const kept = tiles == nullptr ? nullptr : tiles + (i - i0) * e.block + (j - j0);
      T* to = g + (i - i0) * Tile<M>::kLdG + (j - j0);
      ahead.fetch();
      if constexpr (kUnmasked<T, kMode>) {
        if (!exclude && !ragged && i + MR <= e.q.n) {
          weight_tile<M, kMode, kCols, false>(pass, a, b, left, from, i, j, to, g_sum, kept);
          continue;
        }
      }
      weight_tile<M, kMode, kCols, true>(pass, a, b, left, from, i, j, to, g_sum, kept);
    }
  }
  if constexpr (kMode == Mode::kSoftplus) {
    // A diagonal block of self mode holds (i, j) and (j, i), each with both terms: count it half.
    pass.g_sum[bi] += double(sum_lanes<T>(g_sum)) * (e.args.self && bi == bj ? 0.5 : 1.0);
  }
}

// G in Elem, for G K (pairs along rows) and G^T Q (pairs down columns); in place where Elem is Acc.
// `rows` is a multiple of MR, `cols` of NR.
#if defined(__AVX512BF16__)
inline void encode_g(const ThreadScratch<MathBF16>& s, int64_t rows, int64_t cols) {
  constexpr int L = Tile<MathBF16>::L, kLdG = Tile<MathBF16>::kLdG;
  for (int64_t i = 0; i < rows; i += 2) {
    const float *even = s.g + i * kLdG, *odd = even + kLdG;
    uint32_t* along = s.g_rows + i * kLdG;
    uint32_t* across = s.g_cols + i / 2 * kLdG;
    for (int64_t j = 0; j < cols; j += 2 * L) {
      const Vec<float> a = load<float>(even + j), b = load<float>(even + j + L);
      const Vec<float> c = load<float>(odd + j), d = load<float>(odd + j + L);
      store<uint32_t>(along + j / 2, pair_along(a, b));
      store<uint32_t>(along + kLdG + j / 2, pair_along(c, d));
      store<uint32_t>(across + j, pair_across(a, c));
      store<uint32_t>(across + j + L, pair_across(b, d));
    }
  }
}
#endif
template <class M>
inline void encode_g(const ThreadScratch<M>&, int64_t, int64_t) {}

// One pair of blocks.
template <class M, Mode kMode, bool kCols>
void block_pair(const Pass<M>& pass, ThreadScratch<M>& s, int64_t bi, int64_t bj) {
  constexpr int MR = Tile<M>::MR, NR = Tile<M>::NR, kLdG = Tile<M>::kLdG;
  const Engine<M>& e = pass.e;
  const bool diagonal = e.args.self && bi == bj;
  const bool want_q = pass.dq != nullptr, want_k = pass.dk != nullptr && !diagonal;
  const bool q_from_p = e.q_from_p(true);
  const ElemOf<M>* p_q = q_from_p || want_k || diagonal ? e.block_p(e.q, bi, s.p_q, s.buffer) : nullptr;
  const ElemOf<M>* p_k = diagonal ? p_q : (want_q ? e.block_p(e.k, bj, s.p_k, s.buffer) : nullptr);
  // Without T panels the logits were kept, and nothing of q and k is read for them.
  const ElemOf<M>* q = q_from_p ? p_q : e.block_t(e.q, bi, s.t_q, s.buffer);
  const ElemOf<M>* t_k = diagonal && !q_from_p ? q : e.block_t(e.k, bj, s.t_k, s.buffer);
  const int64_t ni = min64(e.q.n - bi * e.block, e.block), nj = min64(e.k.n - bj * e.block, e.block);
  const int64_t p_rows = e.block / M::kPack;
  AccOfMath<M>* const dq = want_q ? pass.dq + bi * e.block * pass.stride : nullptr;
  AccOfMath<M>* const dk = want_k ? pass.dk + bj * e.block * pass.stride : nullptr;
  Ahead ahead;
  if (pass.far) {
    const int64_t row_bytes = pass.stride * int64_t(sizeof(AccOfMath<M>));
    if (want_q) ahead.add(p_k, p_rows * e.d_pad * int64_t(sizeof(ElemOf<M>)));
    if (want_q) ahead.add(dq, ni * row_bytes);
    if (want_k) ahead.add(dk, nj * row_bytes);
    ahead.deal(ceil_div(ni, MR) * ceil_div(nj, NR));
  }
  weight_block<M, kMode, kCols>(pass, bi, bj, q, t_k, s.g, ahead);
  encode_g(s, round_up(ni, MR), round_up(nj, NR));
  if (want_q) {
    gemm_block<M, false>(dq, pass.stride, round_up(ni, MR), e.d, s.g_rows, kLdG, 1, p_k, p_rows,
                         ceil_div(nj, M::kPack));
  }
  if (want_k) {
    gemm_block<M, true>(dk, pass.stride, round_up(nj, MR), e.d, s.g_cols, 1, kLdG, p_q, p_rows, ceil_div(ni, M::kPack));
  }
}

template <class M, Mode kMode, bool kCols>
void run(const Pass<M>& pass, ThreadScratch<M>* scratch, bool col_results) {
  pass.e.for_all_pairs(scratch, col_results, [&](ThreadScratch<M>& s, int64_t bi, int64_t bj) {
    block_pair<M, kMode, kCols>(pass, s, bi, bj);
  });
}

// kSoftplus has one variant, with factors of columns: they are zero where there are none.
template <class M, bool kCols>
void run_mode(const Pass<M>& pass, ThreadScratch<M>* scratch, bool col_results) {
  switch (pass.e.mode) {
    case Mode::kFixed: return run<M, Mode::kFixed, kCols>(pass, scratch, col_results);
    case Mode::kOnline: return run<M, Mode::kOnline, kCols>(pass, scratch, col_results);
    case Mode::kSoftplus: return run<M, Mode::kSoftplus, true>(pass, scratch, col_results);
  }
}

// Factors of G, several rows at a time.  Rows with nothing allowed have lse = -inf and get no gradient: 0 / inf of
// every pair, if there are some.
template <class M>
void fill_weight(const Engine<M>& e, const Weight<AccOfMath<M>>& w, const void* lse, const void* dlse, int64_t n,
                 int64_t n_pad, double scale) {
  using T = AccOfMath<M>;
  constexpr int W = Simd<double>::kLanes;
  const T* l = static_cast<const T*>(lse);
  const T* g = static_cast<const T*>(dlse);
  const bool softplus = e.mode == Mode::kSoftplus;
  for (int64_t i0 = 0; i0 < n_pad; i0 += W) {
    Vec<double> factor = {}, lse2 = {};
    for (int64_t i = i0; i < min64(n, i0 + W); ++i) {
      const bool nothing = !softplus && l[i] == -HUGE_VAL;
      factor[int(i - i0)] = nothing ? 0.0 : double(g[i]);
      lse2[int(i - i0)] = softplus ? 0.0 : nothing ? HUGE_VAL : double(l[i]) * kLog2E;
    }
    if (!softplus) factor *= scale;
    if (e.mode == Mode::kFixed) factor *= exp2_v(e.shift - lse2);
    for (int64_t i = i0; i < i0 + W; ++i) {
      w.factor[i] = T(factor[int(i - i0)]);
      w.lse[i] = T(lse2[int(i - i0)]);
    }
  }
}

template <class T>
struct Output {
  T* at = nullptr;       // where the kernel accumulates
  T* scratch = nullptr;  // equal to `at` when the caller's buffer can't hold padded rows
  void plan(Workspace& w, void* out, const PairwiseBackwardArgs& args, int64_t capacity, int64_t rows, int64_t stride) {
    if (out == nullptr) return;
    if (args.stride == stride && capacity >= rows) {
      at = static_cast<T*>(out);
    } else {
      w.plan(&scratch, rows * stride);
    }
  }
  void finish(void* out, int64_t n, int64_t d, int64_t out_stride, int64_t stride, double factor) const {
    if (out == nullptr) return;
    T* to = static_cast<T*>(out);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < d; ++c) to[i * out_stride + c] = at[i * stride + c] * T(factor);
    }
  }
};

template <class M>
int backward(const PairwiseArgs& args, const PairwiseBackwardArgs& b) {
  using T = AccOfMath<M>;
  constexpr int kBlock = Tile<M>::kBlock, kLdG = Tile<M>::kLdG;
  if (!args.self && b.dq == nullptr && b.dk != nullptr) {  // the same problem, transposed
    PairwiseArgs swapped = args;
    PairwiseBackwardArgs out = b;
    for (int p = 0; p < 2; ++p) swapped.q[p] = args.k[p], swapped.k[p] = args.q[p];
    swapped.inv_q = args.inv_k, swapped.inv_k = args.inv_q;
    swapped.ids_q = args.ids_k, swapped.ids_k = args.ids_q;
    out.row = b.col, out.col = b.row, out.drow = b.dcol, out.dcol = b.drow;
    out.tiles = nullptr;  // they lie the other way round
    out.dq = b.dk, out.dk = nullptr, out.capacity_q = b.capacity_k, out.capacity_k = 0;
    return backward<M>(swapped, out);
  }
  Engine<M> e(args);
  Pass<M> pass{e, {}, {}};
  pass.stride = round_up(args.d, kRowAlign);
  pass.far = (e.q.n_pad + (args.self ? 0 : e.k.n_pad)) * pass.stride * 3 * int64_t(sizeof(T)) > kFarBytes;
  const bool cols = args.self || b.dcol != nullptr;
  const bool rows_only_cols = b.drow == nullptr;  // only the column term: rows weigh nothing
  const bool softplus = args.kind == Kind::softplus;

  const T* tiles = static_cast<const T*>(b.tiles);
  if (tiles != nullptr && tiles[0] == T(e.block)) {  // else another instruction set kept them
    pass.tiles = tiles;
    e.with_t = false;
  }

  Workspace w;
  ThreadScratch<M>* scratch = nullptr;
  PerThread<T> g;
  PerThread<ElemOf<M>> g_elems;
  Output<T> dq, dk;
  const int64_t g_size = kBlock * kLdG;
  e.plan(w, &scratch, true);
  w.plan(&g, g_size, e.threads);
  if (M::kPack > 1) w.plan(&g_elems, 2 * g_size, e.threads);
  w.plan(&pass.row.factor, e.q.n_pad);
  w.plan(&pass.row.lse, e.q.n_pad);
  if (!args.self && (cols || softplus)) {
    w.plan(&pass.col.factor, e.k.n_pad);
    w.plan(&pass.col.lse, e.k.n_pad);
  }
  if (softplus) w.plan(&pass.g_sum, e.blocks(e.q));
  const int64_t dq_rows = padded_rows(e.q.n), dk_rows = padded_rows(e.k.n);
  dq.plan(w, b.dq, b, b.capacity_q, dq_rows, pass.stride);
  if (!args.self) dk.plan(w, b.dk, b, b.capacity_k, dk_rows, pass.stride);
  if (!w.allocate()) return -1;
  if (dq.scratch != nullptr) dq.at = dq.scratch;
  if (dk.scratch != nullptr) dk.at = dk.scratch;

  e.set_up(scratch, true);
  for (int t = 0; t < e.threads; ++t) {
    scratch[t].g = g.of(t);
    if constexpr (M::kPack == 1) {
      scratch[t].g_rows = scratch[t].g_cols = scratch[t].g;
    } else {
      scratch[t].g_rows = g_elems.of(t);
      scratch[t].g_cols = scratch[t].g_rows + g_size;
    }
  }
  e.prepare(scratch, true);
  const double fold = b.unscaled ? 1.0 : args.scale;
  if (rows_only_cols) {
    for (int64_t i = 0; i < e.q.n_pad; ++i) {
      pass.row.factor[i] = T(0);
      pass.row.lse[i] = -Limits<T>::kFloor;  // 0 * exp2(t - lse) must not meet an overflow
    }
  } else {
    fill_weight(e, pass.row, b.row, b.drow, e.q.n, e.q.n_pad, fold);
  }
  if (args.self) {
    pass.col = pass.row;
  } else if (cols) {
    fill_weight(e, pass.col, b.col, b.dcol, e.k.n, e.k.n_pad, fold);
  } else if (softplus) {
    std::memset(pass.col.factor, 0, size_t(e.k.n_pad) * sizeof(T));
  }
  for (int64_t i = 0; softplus && i < e.blocks(e.q); ++i) pass.g_sum[i] = 0;
  pass.dq = dq.at;
  pass.dk = args.self ? dq.at : dk.at;
  // Where only the bias has a gradient, or the rows are none or empty, neither is wanted.
  const int64_t q_rows = dq.at != nullptr ? dq_rows : 0, rows = q_rows + (dk.at != nullptr ? dk_rows : 0);
#pragma omp parallel for num_threads(rows* args.d < kSerialRows ? 1 : e.threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    T* row = i < q_rows ? pass.dq + i * pass.stride : pass.dk + (i - q_rows) * pass.stride;
    std::memset(row, 0, size_t(pass.stride) * sizeof(T));
  }

  if (cols) {
    run_mode<M, true>(pass, scratch, args.self || dk.at != nullptr);
  } else {
    run_mode<M, false>(pass, scratch, dk.at != nullptr);
  }

  const bool scaled = softplus && !b.unscaled;  // lse: the scale is in the weights already
  const double factor = scaled ? args.scale : 1.0;
  if (dq.scratch != nullptr || scaled) dq.finish(b.dq, e.q.n, args.d, b.stride, pass.stride, factor);
  if (dk.scratch != nullptr || scaled) dk.finish(b.dk, e.k.n, args.d, b.stride, pass.stride, factor);
  if (b.dbias != nullptr) {
    double sum = 0;
    for (int64_t i = 0; softplus && i < e.blocks(e.q); ++i) sum += pass.g_sum[i];
    *b.dbias = sum;
  }
  return 0;
}

}  // namespace

int pairwise_backward(const PairwiseArgs& args, const PairwiseBackwardArgs& b) {
#if defined(__AVX512BF16__)
  return args.bf16 ? backward<MathBF16>(args, b) : avx512::pairwise_backward(args, b);
#else
  return args.dtype == DType::f64 ? backward<MathF64>(args, b) : backward<MathF32>(args, b);
#endif
}

// Rows that a gradient buffer must hold for the kernel to accumulate in it (see PairwiseBackwardArgs): products are
// added in groups of that many, the same in every precision of an instruction set.
int64_t padded_rows(int64_t n) {
  static_assert(Tile<MathF64>::MR == Tile<MathF32>::MR);
  return round_up(n, Tile<MathF32>::MR);
}

SSLK_END
