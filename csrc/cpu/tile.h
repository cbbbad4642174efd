// SPDX-License-Identifier: Apache-2.0
// The two micro-kernels that do all the multiplications of the library.
//
//   dot_tile      acc[MR][NR]  = sum_k A[i][k] * B[k][j]          one tile of Q K^T, kept in registers
//   gemm_block    C[rows][D]  += sum_k A[i][k] * P[k][d]          G K and G^T Q, accumulated in memory
//
// A is broadcast element by element with strides (row, k), so the same code reads a packed panel, a
// row-major matrix, the scratch block G and its transpose.  B is packed in panels of NR columns,
// k-major: two loads of NV vectors feed MR * NV multiply-adds.
//
// Tile shapes: FMA latency is 4 cycles at 2 (AVX2) or 1 to 2 (AVX-512) a cycle, so at least 8 to 10
// independent accumulators are needed; NV loads and MR broadcasts per k must stay below 2 per cycle.
// AVX-512 has 32 registers (8 x 2 accumulators), AVX2 16 (4 x 3 accumulators, 3 for B, 1 for A).
#pragma once

#include "simd.h"

SSLK_BEGIN

// The arithmetic of a pass: Acc is accumulated in, Elem is what panels hold, kPack the number of
// consecutive k in one Elem.
struct MathF32 {
  using Acc = float;
  using Elem = float;
  static constexpr int kPack = 1;
};
struct MathF64 {
  using Acc = double;
  using Elem = double;
  static constexpr int kPack = 1;
};
#if defined(__AVX512BF16__)
// Operands rounded to bfloat16, in pairs: the first of the two in the low half.
struct MathBF16 {
  using Acc = float;
  using Elem = uint32_t;
  static constexpr int kPack = 2;
};
#endif

template <class M>
using AccOfMath = typename M::Acc;
template <class M>
using ElemOf = typename M::Elem;

// acc += a * b (bfloat16: + a' * b', the second of each pair).
template <class M>
inline SSLK_INLINE void multiply_add(Vec<AccOfMath<M>>& acc, Vec<ElemOf<M>> a, Vec<ElemOf<M>> b) {
  if constexpr (M::kPack == 1) {
    acc += a * b;
  } else {
#if defined(__AVX512BF16__)
    acc = bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
#endif
  }
}

// 2^t for |t| <= 126, as exact as the operands deserve.
template <class M>
inline SSLK_INLINE Vec<AccOfMath<M>> exponential(Vec<AccOfMath<M>> t) {
  if constexpr (sizeof(AccOfMath<M>) == 4) {
    return exp2_of<true, M::kPack == 2>(t);
  } else {
    return exp2_v(t);
  }
}

template <class M>
struct Tile {
  using Acc = AccOfMath<M>;
  static constexpr int L = Simd<Acc>::kLanes;
#if defined(__AVX512F__)
  static constexpr int MR = 8, NV = 2;
  static constexpr int kPanelsPerBlock = sizeof(Acc) == 4 ? 2 : 4;
#elif defined(__AVX2__)
  static constexpr int MR = 4, NV = 3;
  static constexpr int kPanelsPerBlock = sizeof(Acc) == 4 ? 3 : 6;
#else
  static constexpr int MR = 4, NV = 2;
  static constexpr int kPanelsPerBlock = sizeof(Acc) == 4 ? 8 : 16;
#endif
  static constexpr int NR = NV * L;
  // Rows of a block: 64 with AVX-512, 72 with AVX2.  The scratch block G and one packed panel of the
  // other operand share the L1 cache (20 + 8 KB in float32 with AVX-512).
  static constexpr int kBlock = NR * kPanelsPerBlock;
  // Leading dimension of G.  The extra 16 elements keep the rows of a column of G in different cache
  // sets when G is read transposed.
  static constexpr int kLdG = kBlock + 16;
  static_assert(NR % MR == 0, "row groups must not straddle two panels");
};

// Rows of accumulated gradients start a multiple of this many elements apart (whole vectors in every
// instruction set).
constexpr int64_t kRowAlign = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

template <class M, int R, int NV>
inline SSLK_INLINE void clear_tile(Vec<AccOfMath<M>> (&acc)[R][NV]) {
  unroll<R>([&](auto r) SSLK_INLINE { unroll<NV>([&](auto v) SSLK_INLINE { acc[r][v] = Vec<AccOfMath<M>>{}; }); });
}

// acc[r][v] += sum over k < depth of a[r * a_row + k * a_k] * b[k * b_k + v * L ...].
// kUnitRow: the rows of A are adjacent (a packed panel or G^T), so a_row is 1 at compile time.
template <class M, bool kUnitRow, int R, int NV>
inline SSLK_INLINE void add_dots(const ElemOf<M>* __restrict a, int64_t a_row, int64_t a_k,
                                 const ElemOf<M>* __restrict b, int64_t depth, Vec<AccOfMath<M>> (&acc)[R][NV],
                                 int64_t b_k = Tile<M>::NR) {
  using E = ElemOf<M>;
  constexpr int L = Tile<M>::L;
  const int64_t row = kUnitRow ? 1 : a_row;
  // The counters of a loop that is not unrolled are a tenth of its instructions (a sixth with AVX2).
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<E> bv[NV];
    unroll<NV>([&](auto v) SSLK_INLINE { bv[v] = load<E>(b + v * L); });
    unroll<R>([&](auto r) SSLK_INLINE {
      const Vec<E> av = splat<E>(a[r * row]);
      unroll<NV>([&](auto v) SSLK_INLINE { multiply_add<M>(acc[r][v], av, bv[v]); });
    });
    a += a_k;
    b += b_k;
  }
}

// Where a tile begins: zero, or what it was left at.
template <class M, int R, int NV>
inline SSLK_INLINE void begin_tile(Vec<AccOfMath<M>> (&acc)[R][NV], const Vec<AccOfMath<M>> (*from)[NV]) {
  if (from == nullptr) {
    clear_tile<M>(acc);
  } else {
    unroll<R>([&](auto r) SSLK_INLINE { unroll<NV>([&](auto v) SSLK_INLINE { acc[r][v] = from[r][v]; }); });
  }
}

// A tile from the beginning.
template <class M, bool kUnitRow, int R, int NV>
inline SSLK_INLINE void dot_tile(const ElemOf<M>* __restrict a, int64_t a_row, int64_t a_k,
                                 const ElemOf<M>* __restrict b, int64_t depth, Vec<AccOfMath<M>> (&acc)[R][NV],
                                 int64_t b_k = Tile<M>::NR) {
  clear_tile<M>(acc);
  add_dots<M, kUnitRow>(a, a_row, a_k, b, depth, acc, b_k);
}

template <class M>
using TileOf = Vec<AccOfMath<M>>[Tile<M>::MR][Tile<M>::NV];
template <class M>
using RowsOfTile = const Vec<AccOfMath<M>> (*)[Tile<M>::NV];  // null: a tile begins at zero

// The same on top of what the tile was left at, all in registers: for code that needs few itself.
template <class M, bool kUnitRow>
inline SSLK_INLINE void finish_tile(const ElemOf<M>* __restrict a, int64_t a_row, int64_t a_k,
                                    const ElemOf<M>* __restrict b, int64_t depth, RowsOfTile<M> from, TileOf<M>& acc) {
  begin_tile<M>(acc, from);
  add_dots<M, kUnitRow>(a, a_row, a_k, b, depth, acc);
}

// The same, in the same order, with A in the D-panels of gemm_block: `a` is its first row in the first panel.
template <class M>
inline SSLK_INLINE void finish_tile_of_p(const ElemOf<M>* __restrict a, int64_t p_rows, const ElemOf<M>* __restrict b,
                                         int64_t depth, RowsOfTile<M> from, TileOf<M>& acc) {
  static_assert(M::kPack == 1, "P panels hold pairs of rows, not pairs of features");
  constexpr int NR = Tile<M>::NR;
  begin_tile<M>(acc, from);
  for (int64_t k = 0; k < depth; k += NR) {
    add_dots<M, false>(a, NR, 1, b, min64(NR, depth - k), acc);
    a += p_rows * NR;
    b += NR * NR;
  }
}

// Both with the result in memory.
template <class M, bool kUnitRow>
__attribute__((noinline)) void store_tile(const ElemOf<M>* __restrict a, int64_t a_row, int64_t a_k,
                                          const ElemOf<M>* __restrict b, int64_t depth, RowsOfTile<M> from,
                                          TileOf<M>& out) {
  TileOf<M> acc;
  finish_tile<M, kUnitRow>(a, a_row, a_k, b, depth, from, acc);
  begin_tile<M>(out, acc);
}

template <class M>
__attribute__((noinline)) void store_tile_of_p(const ElemOf<M>* __restrict a, int64_t p_rows,
                                               const ElemOf<M>* __restrict b, int64_t depth, RowsOfTile<M> from,
                                               TileOf<M>& out) {
  TileOf<M> acc;
  finish_tile_of_p<M>(a, p_rows, b, depth, from, acc);
  begin_tile<M>(out, acc);
}

// And for code that has many registers in use itself.  AVX2 has 16, of which the loop needs all: GCC then has
// accumulators go to memory and back in every step, so there the loop is in a function of its own, and its result
// goes to memory once.
#if defined(__AVX512F__)
constexpr bool kFewRegisters = false;
#else
constexpr bool kFewRegisters = true;
#endif

template <class M, bool kUnitRow>
inline SSLK_INLINE void finish_tile_apart(const ElemOf<M>* __restrict a, int64_t a_row, int64_t a_k,
                                          const ElemOf<M>* __restrict b, int64_t depth, RowsOfTile<M> from,
                                          TileOf<M>& acc) {
  if constexpr (kFewRegisters) {
    TileOf<M> memory;
    store_tile<M, kUnitRow>(a, a_row, a_k, b, depth, from, memory);
    begin_tile<M>(acc, memory);
  } else {
    finish_tile<M, kUnitRow>(a, a_row, a_k, b, depth, from, acc);
  }
}

template <class M>
inline SSLK_INLINE void finish_tile_of_p_apart(const ElemOf<M>* __restrict a, int64_t p_rows,
                                               const ElemOf<M>* __restrict b, int64_t depth, RowsOfTile<M> from,
                                               TileOf<M>& acc) {
  if constexpr (kFewRegisters) {
    TileOf<M> memory;
    store_tile_of_p<M>(a, p_rows, b, depth, from, memory);
    begin_tile<M>(acc, memory);
  } else {
    finish_tile_of_p<M>(a, p_rows, b, depth, from, acc);
  }
}

// Tiles of one panel of columns whose rows are long: the panel does not stay in the L1 cache while all rows of a block
// go past it.  So all tiles take its first kStep elements of the depth, then all the next ones, and wait in memory in
// between; the order of additions is the same.
template <class M>
struct DeepPanel {
  // About 16 KB of the panel.
  static constexpr int64_t kStep =
      ceil_div(16384 / int64_t(sizeof(AccOfMath<M>)) / Tile<M>::NR, Tile<M>::NR) * Tile<M>::NR;
  TileOf<M> tile[Tile<M>::kBlock / Tile<M>::MR];
  int64_t done = 0;  // elements of the depth that are in them

  // store(i, k, from, out) for the tile at row i and elements [k, k + kStep) of the depth.
  template <class Store>
  void begin(int64_t depth, int64_t rows, Store store) {
    done = 0;
    if (depth <= 2 * kStep) return;
    for (; depth - done > kStep; done += kStep) {
      for (int64_t i = 0; i < rows; i += Tile<M>::MR) {
        TileOf<M>& here = tile[i / Tile<M>::MR];
        store(i, done, done > 0 ? here : nullptr, here);
      }
    }
  }
  RowsOfTile<M> at(int64_t i) const { return done > 0 ? tile[i / Tile<M>::MR] : nullptr; }
};

// Elements from one row to the next above which the processor does not fetch rows ahead by itself.
constexpr int64_t kFarRows = 384;

// Rows of one panel of gemm_block: C[0:rows][0:NV*L] += A P for a panel that is NV vectors wide, R rows at a time.
// kPacked: rows of P are NR apart, else p_row.  Returns how many rows are done: whole groups of R.
template <class M, int R, int NV, bool kUnitRow, bool kPacked>
inline SSLK_INLINE int64_t gemm_rows(AccOfMath<M>* c, int64_t ldc, int64_t first, int64_t rows, const ElemOf<M>* a,
                                     int64_t a_row, int64_t a_k, const ElemOf<M>* p, int64_t p_row, int64_t depth) {
  using T = AccOfMath<M>;
  constexpr int NR = Tile<M>::NR, L = Tile<M>::L;
  int64_t i = first;
  for (c += i * ldc; i + R <= rows; i += R) {
    Vec<T> acc[R][NV];
    if (ldc >= kFarRows) {
      unroll<R>([&](auto r) SSLK_INLINE {
        __builtin_prefetch(c + r * ldc, 1);
        __builtin_prefetch(c + r * ldc + NV * L - 1, 1);
      });
    }
    dot_tile<M, kUnitRow>(a + i * a_row, a_row, a_k, p, depth, acc, kPacked ? NR : p_row);
    // C is added at the end: waiting for it at the start would stall the multiply-adds.
    unroll<R>([&](auto r) SSLK_INLINE {
      unroll<NV>([&](auto v) SSLK_INLINE { store<T>(c + v * L, load<T>(c + v * L) + acc[r][v]); });
      c += ldc;
    });
  }
  return i;
}

// A panel of one vector has as many accumulators as a whole one: fewer would wait for each other.
template <class M, int NV, bool kUnitRow, bool kPacked>
void gemm_panel(AccOfMath<M>* c, int64_t ldc, int64_t rows, const ElemOf<M>* a, int64_t a_row, int64_t a_k,
                const ElemOf<M>* p, int64_t p_row, int64_t depth) {
  constexpr int MR = Tile<M>::MR, R = NV == 1 ? MR * Tile<M>::NV : MR;
  int64_t done = gemm_rows<M, R, NV, kUnitRow, kPacked>(c, ldc, 0, rows, a, a_row, a_k, p, p_row, depth);
  if constexpr (R != MR) gemm_rows<M, MR, NV, kUnitRow, kPacked>(c, ldc, done, rows, a, a_row, a_k, p, p_row, depth);
}

// C[0:rows][0:D] += A[rows][depth] P.  kPacked: P lies in D-panels, panel dp holds [p_size][NR] elements; else it is
// row-major, p_size elements a row.
// `rows` is a multiple of MR (C is padded), ldc a multiple of L; p_size and depth count elements, that
// is pairs of rows in bfloat16.  The last panel is as many vectors wide as D needs, which is what
// keeps odd D cheap.
template <class M, bool kUnitRow, bool kPacked = true>
inline void gemm_block(AccOfMath<M>* c, int64_t ldc, int64_t rows, int64_t d, const ElemOf<M>* a, int64_t a_row,
                       int64_t a_k, const ElemOf<M>* p, int64_t p_size, int64_t depth) {
  constexpr int NR = Tile<M>::NR, NV = Tile<M>::NV, L = Tile<M>::L;
  for (int64_t d0 = 0; d0 < d; d0 += NR, p += kPacked ? p_size * NR : NR) {
    const int64_t vectors = ceil_div(min64(NR, d - d0), L);
    if (vectors == NV) {
      gemm_panel<M, NV, kUnitRow, kPacked>(c + d0, ldc, rows, a, a_row, a_k, p, p_size, depth);
    } else if (vectors == 1) {
      gemm_panel<M, 1, kUnitRow, kPacked>(c + d0, ldc, rows, a, a_row, a_k, p, p_size, depth);
    } else {
      gemm_panel<M, NV == 3 ? 2 : 1, kUnitRow, kPacked>(c + d0, ldc, rows, a, a_row, a_k, p, p_size, depth);
    }
  }
}

SSLK_END
