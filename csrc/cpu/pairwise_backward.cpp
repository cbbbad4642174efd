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

template <class T>
struct Pass {
  const Engine<T>& e;
  Weight<T> row, col;
  T* g_sum = nullptr;  // [n_pad][L], softplus only: sums of G for the bias
  T* dq = nullptr;     // [n_pad][stride]
  T* dk = nullptr;     // [m_pad][stride]; dq in self mode
  int64_t stride = 0;
  int64_t group = 1;  // blocks that share one packing of P panels
};

template <class T, Mode M, bool kCols, bool kMasked>
inline __attribute__((always_inline)) void weight_tile(const Pass<T>& pass, const T* a, const T* b, int64_t i,
                                                       int64_t j, T* g, T g_share) {
  constexpr int MR = Tile<T>::MR, NV = Tile<T>::NV, L = Tile<T>::L;
  const Engine<T>& e = pass.e;
  Vec<T> t[MR][NV];
  zero_tile<T, NV>(t);
  dot_tile<T, NV, true>(a, 1, Tile<T>::NR, b, e.d, t);

  Vec<T> col_factor[NV], col_lse[NV];
  IVec<T> id[NV], valid[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    if (kCols) col_factor[v] = load<T>(pass.col.factor + j + v * L);
    if (kCols && M == Mode::kOnline) col_lse[v] = load<T>(pass.col.lse + j + v * L);
    if (kMasked) {
      id[v] = load_int<T>(e.k.ids.id + j + v * L);
      valid[v] = lanes_below<T>(e.k.n - (j + v * L));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const T row_factor = pass.row.factor[i + r];
    Vec<T> total = {};
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const Vec<T> x = t[r][v] * e.unit + e.offset;
      Vec<T> w;
      if (M == Mode::kOnline) {
        w = exp2_v(x - pass.row.lse[i + r]) * row_factor;
        if (kCols) w += exp2_v(x - col_lse[v]) * col_factor[v];
      } else {
        const Vec<T> factor = kCols ? col_factor[v] + row_factor : splat<T>(row_factor);
        w = (M == Mode::kFixed ? exp2_v(x) : logistic_v<T>(x)) * factor;
      }
      if (kMasked) {
        IVec<T> mask = (id[v] != e.q.ids.id[i + r]) & valid[v];
        if (i + r >= e.q.n) mask = IVec<T>{};
        w = keep<T>(w, mask);
      }
      store<T>(g + r * Tile<T>::kLdG + v * L, w);
      if (M == Mode::kSoftplus) total += w;
    }
    if (M == Mode::kSoftplus) {
      T* at = pass.g_sum + (i + r) * L;
      store<T>(at, load<T>(at) + total * g_share);
    }
  }
}

// G of the block pair (bi, bj), rows padded to MR and columns to NR with zeros.
template <class T, Mode M, bool kCols>
void weight_block(const Pass<T>& pass, int64_t bi, int64_t bj, T* g) {
  // A diagonal block of self mode holds (i, j) and (j, i), each with both terms: count it half.
  const T g_share = pass.e.args.self && bi == bj ? T(0.5) : T(1);
  constexpr int MR = Tile<T>::MR, NR = Tile<T>::NR;
  const Engine<T>& e = pass.e;
  const int64_t i0 = bi * e.block, i1 = min64(e.q.n, i0 + e.block);
  const int64_t j0 = bj * e.block, j1 = min64(e.k.n, j0 + e.block);
  const bool exclude = e.may_exclude(bi, bj);
  for (int64_t j = j0; j < j1; j += NR) {
    const T* b = e.k.panels + j * e.d;
    const bool ragged = j + NR > e.k.n;
    for (int64_t i = i0; i < i1; i += MR) {
      const T* a = e.q.panels + (i / NR) * NR * e.d + i % NR;
      T* to = g + (i - i0) * Tile<T>::kLdG + (j - j0);
      if (exclude || ragged || i + MR > e.q.n) {
        weight_tile<T, M, kCols, true>(pass, a, b, i, j, to, g_share);
      } else {
        weight_tile<T, M, kCols, false>(pass, a, b, i, j, to, g_share);
      }
    }
  }
}

// Scratch of one thread.
template <class T>
struct Scratch {
  T* g;       // [kBlock][kLdG]
  T* p_rows;  // P panels of the group of row blocks
  T* p_cols;  // P panels of the group of column blocks
  T* buffer;  // [d_pad]
};

// All block pairs of two groups.  want_q, want_k: which products are needed.  `diagonal`: the groups
// are the same and only pairs on and above the diagonal are visited (self mode).
template <class T, Mode M, bool kCols>
void group_pair(const Pass<T>& pass, const Scratch<T>& s, int64_t gi, int64_t gj, bool want_q, bool want_k,
                bool diagonal) {
  constexpr int NR = Tile<T>::NR, MR = Tile<T>::MR, kLdG = Tile<T>::kLdG;
  const Engine<T>& e = pass.e;
  const int64_t rows = pass.group * e.block;
  const int64_t bi0 = gi * pass.group, bi1 = min64(e.blocks(e.q), bi0 + pass.group);
  const int64_t bj0 = gj * pass.group, bj1 = min64(e.blocks(e.k), bj0 + pass.group);
  // One scratch row block may reach past the group's end when the last block is short: P is zero there.
  if (want_k) pack_p(e.q.source, bi0 * e.block, rows, s.p_rows, s.buffer);
  const T* p_cols = s.p_cols;
  if (diagonal) {
    p_cols = s.p_rows;
  } else if (want_q) {
    pack_p(e.k.source, bj0 * e.block, rows, s.p_cols, s.buffer);
  }
  for (int64_t bi = bi0; bi < bi1; ++bi) {
    const int64_t ni = min64(e.q.n - bi * e.block, e.block);
    for (int64_t bj = diagonal ? bi : bj0; bj < bj1; ++bj) {
      const int64_t nj = min64(e.k.n - bj * e.block, e.block);
      weight_block<T, M, kCols>(pass, bi, bj, s.g);
      if (want_q) {
        gemm_block<T, false>(pass.dq + bi * e.block * pass.stride, pass.stride, round_up(ni, MR), e.d, s.g, kLdG, 1,
                             p_cols + (bj - bj0) * e.block * NR, rows, nj);
      }
      if (want_k && !(diagonal && bi == bj)) {
        gemm_block<T, true>(pass.dk + bj * e.block * pass.stride, pass.stride, round_up(nj, MR), e.d, s.g, 1, kLdG,
                            s.p_rows + (bi - bi0) * e.block * NR, rows, ni);
      }
    }
  }
}

template <class T, Mode M, bool kCols>
void run(const Pass<T>& pass, const Scratch<T>* scratch, bool want_q, bool want_k) {
  const Engine<T>& e = pass.e;
  const int64_t nq = ceil_div(e.blocks(e.q), pass.group), nk = ceil_div(e.blocks(e.k), pass.group);
#pragma omp parallel num_threads(e.args.n_threads)
  {
    const Scratch<T>& s = scratch[omp_get_thread_num()];
    if (e.args.self) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < nq; ++b) group_pair<T, M, kCols>(pass, s, b, b, true, true, true);
      const Tournament t(nq);
      for (int64_t round = 0; round < t.rounds(); ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < t.pairs(); ++p) {
          int64_t a, b;
          if (t.pair(round, p, &a, &b)) group_pair<T, M, kCols>(pass, s, a, b, true, true, false);
        }
      }
    } else if (want_k) {
      const int64_t rounds = max64(nq, nk);
      for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < nq; ++i) {
          const int64_t j = (i + round) % rounds;
          if (j < nk) group_pair<T, M, kCols>(pass, s, i, j, want_q, true, false);
        }
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < nq; ++i) {
        for (int64_t j = 0; j < nk; ++j) group_pair<T, M, kCols>(pass, s, i, j, true, false, false);
      }
    }
  }
}

template <class T, bool kCols>
void run_mode(const Pass<T>& pass, const Scratch<T>* scratch, bool want_q, bool want_k) {
  switch (pass.e.mode) {
    case Mode::kFixed: return run<T, Mode::kFixed, kCols>(pass, scratch, want_q, want_k);
    case Mode::kOnline: return run<T, Mode::kOnline, kCols>(pass, scratch, want_q, want_k);
    case Mode::kSoftplus: return run<T, Mode::kSoftplus, kCols>(pass, scratch, want_q, want_k);
  }
}

// Rows with nothing allowed have lse = -inf and get no gradient.
template <class T>
void fill_weight(const Engine<T>& e, const Weight<T>& w, const void* lse, const void* dlse, int64_t n, int64_t n_pad,
                 double scale) {
  const T* l = static_cast<const T*>(lse);
  const T* g = static_cast<const T*>(dlse);
  for (int64_t i = 0; i < n_pad; ++i) {
    double factor = i < n ? double(g[i]) : 0.0;
    double lse2 = 0.0;
    if (e.mode != Mode::kSoftplus) {
      factor *= scale;
      if (i < n && l[i] == -HUGE_VAL) {
        factor = 0.0;
      } else if (i < n) {
        lse2 = double(l[i]) * kLog2E;
      }
      if (e.mode == Mode::kFixed) factor *= std::exp2(e.shift - lse2);
    }
    w.factor[i] = T(factor);
    w.lse[i] = T(lse2);
  }
}

// Blocks that share one packing: more for large problems (less traffic), bounded so that the packed
// rows of a group stay within 128 KB and every thread of a large machine has a pair in each round.
template <class T>
int64_t group_size(const Engine<T>& e) {
  const int64_t by_cache = (int64_t(128) << 10) / (int64_t(sizeof(T)) * e.d_pad * e.block);
  const int64_t by_threads = max64(e.blocks(e.q), e.blocks(e.k)) / 64;
  return max64(1, min64(4, min64(by_cache, by_threads)));
}

template <class T>
struct Output {
  T* at = nullptr;       // where the kernel accumulates
  T* scratch = nullptr;  // equal to `at` when the caller's buffer can't hold padded rows
  void plan(Workspace& w, void* out, const PairwiseBackwardArgs& args, int64_t capacity, int64_t n_pad,
            int64_t stride) {
    if (out == nullptr) return;
    if (args.stride == stride && capacity >= n_pad) {
      at = static_cast<T*>(out);
    } else {
      w.plan(&scratch, n_pad * stride);
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

template <class T>
int backward(const PairwiseArgs& args, const PairwiseBackwardArgs& b) {
  constexpr int L = Tile<T>::L, kBlock = Tile<T>::kBlock;
  if (!args.self && b.dq == nullptr && b.dk != nullptr) {  // the same problem, transposed
    PairwiseArgs swapped = args;
    PairwiseBackwardArgs out = b;
    for (int p = 0; p < 2; ++p) swapped.q[p] = args.k[p], swapped.k[p] = args.q[p];
    swapped.inv_q = args.inv_k, swapped.inv_k = args.inv_q;
    swapped.ids_q = args.ids_k, swapped.ids_k = args.ids_q;
    out.row = b.col, out.col = b.row, out.drow = b.dcol, out.dcol = b.drow;
    out.dq = b.dk, out.dk = nullptr, out.capacity_q = b.capacity_k, out.capacity_k = 0;
    return backward<T>(swapped, out);
  }
  Engine<T> e(args);
  Pass<T> pass{e, {}, {}};
  pass.stride = round_up(args.d, kRowAlign);
  const bool cols = args.self || b.dcol != nullptr;
  const bool rows_only_cols = b.drow == nullptr;  // only the column term: rows weigh nothing
  const bool softplus = args.kind == Kind::softplus;

  Workspace w;
  T* buffers = nullptr;
  double* norms = nullptr;
  T* scratch_memory = nullptr;
  Scratch<T>* scratch = nullptr;
  Output<T> dq, dk;
  pass.group = group_size(e);
  const int64_t p_size = round_up(pass.group * e.block * e.d_pad, 16);
  const int64_t g_size = kBlock * Tile<T>::kLdG;
  w.plan(&buffers, e.d_pad * args.n_threads);
  w.plan(&norms, 2 * args.n_threads);
  w.plan(&scratch_memory, (g_size + 2 * p_size) * args.n_threads);
  w.plan(&scratch, args.n_threads);
  e.plan_sides(w, true);
  w.plan(&pass.row.factor, e.q.n_pad);
  w.plan(&pass.row.lse, e.q.n_pad);
  if (!args.self && cols) {
    w.plan(&pass.col.factor, e.k.n_pad);
    w.plan(&pass.col.lse, e.k.n_pad);
  }
  if (softplus) w.plan(&pass.g_sum, e.q.n_pad * L);
  dq.plan(w, b.dq, b, b.capacity_q, e.q.n_pad, pass.stride);
  if (!args.self) dk.plan(w, b.dk, b, b.capacity_k, e.k.n_pad, pass.stride);
  if (!w.allocate()) return -1;
  if (dq.scratch != nullptr) dq.at = dq.scratch;
  if (dk.scratch != nullptr) dk.at = dk.scratch;
  for (int t = 0; t < args.n_threads; ++t) {
    T* base = scratch_memory + t * (g_size + 2 * p_size);
    scratch[t] = {base, base + g_size, base + g_size + p_size, buffers + t * e.d_pad};
  }

  e.fill_all_ids();
  e.choose_mode(e.pack_all(buffers, norms));
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
  }
  if (softplus) std::memset(pass.g_sum, 0, size_t(e.q.n_pad) * L * sizeof(T));
  pass.dq = dq.at;
  pass.dk = args.self ? dq.at : dk.at;
#pragma omp parallel for num_threads(args.n_threads) schedule(static)
  for (int64_t i = 0; i < e.q.n_pad + (dk.at != nullptr ? e.k.n_pad : 0); ++i) {
    T* row = i < e.q.n_pad ? pass.dq + i * pass.stride : pass.dk + (i - e.q.n_pad) * pass.stride;
    std::memset(row, 0, size_t(pass.stride) * sizeof(T));
  }

  if (cols) {
    run_mode<T, true>(pass, scratch, true, args.self || dk.at != nullptr);
  } else {
    run_mode<T, false>(pass, scratch, true, dk.at != nullptr);
  }

  const double factor = softplus ? args.scale : 1.0;  // lse: the scale is in the weights already
  if (dq.scratch != nullptr || softplus) dq.finish(b.dq, e.q.n, args.d, b.stride, pass.stride, factor);
  if (dk.scratch != nullptr || softplus) dk.finish(b.dk, e.k.n, args.d, b.stride, pass.stride, factor);
  if (b.dbias != nullptr) {
    double sum = 0;
    for (int64_t i = 0; softplus && i < e.q.n * L; ++i) sum += double(pass.g_sum[i]);
    *b.dbias = sum;
  }
  return 0;
}

}  // namespace

int pairwise_backward(const PairwiseArgs& args, const PairwiseBackwardArgs& b) {
  return args.dtype == DType::f64 ? backward<double>(args, b) : backward<float>(args, b);
}

// Rows that a gradient buffer must hold for the kernel to accumulate in it (see PairwiseBackwardArgs).
int64_t padded_rows(DType dtype, int64_t n) {
  return round_up(n, dtype == DType::f64 ? Tile<double>::kBlock : Tile<float>::kBlock);
}

SSLK_END
