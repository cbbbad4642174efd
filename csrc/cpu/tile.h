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

#include <utility>

#include "simd.h"

SSLK_BEGIN

// f(0), f(1), ... f(N - 1) with constants for arguments: arrays indexed by them stay in registers,
// which the compiler does not manage for loops that it unrolls late.
template <class F, int... I>
inline __attribute__((always_inline)) void unroll_indices(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline __attribute__((always_inline)) void unroll(F&& f) {
  unroll_indices(f, std::make_integer_sequence<int, N>{});
}
#define SSLK_INLINE __attribute__((always_inline))

template <class T>
struct Tile {
  static constexpr int L = Simd<T>::kLanes;
#if defined(__AVX512F__)
  static constexpr int MR = 8, NV = 2;
  static constexpr int kPanelsPerBlock = sizeof(T) == 4 ? 2 : 4;
#elif defined(__AVX2__)
  static constexpr int MR = 4, NV = 3;
  static constexpr int kPanelsPerBlock = sizeof(T) == 4 ? 3 : 6;
#else
  static constexpr int MR = 4, NV = 2;
  static constexpr int kPanelsPerBlock = sizeof(T) == 4 ? 8 : 16;
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// acc[r][v] = sum over k < depth of a[r * a_row + k * a_k] * b[k * NR + v * L ...].
// kUnitRow: the rows of A are adjacent (a packed panel or G^T), so a_row is 1 at compile time.
template <class T, int NV, bool kUnitRow>
inline SSLK_INLINE void dot_tile(const T* __restrict a, int64_t a_row, int64_t a_k, const T* __restrict b,
                                 int64_t depth, Vec<T> (&acc)[Tile<T>::MR][NV]) {
  constexpr int MR = Tile<T>::MR, NR = Tile<T>::NR, L = Tile<T>::L;
  const int64_t row = kUnitRow ? 1 : a_row;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bv[NV];
    unroll<NV>([&](auto v) SSLK_INLINE { bv[v] = load<T>(b + v * L); });
    unroll<MR>([&](auto r) SSLK_INLINE {
      const Vec<T> av = splat<T>(a[r * row]);
      unroll<NV>([&](auto v) SSLK_INLINE { acc[r][v] += av * bv[v]; });
    });
    a += a_k;
    b += NR;
  }
}

template <class T, int NV>
inline SSLK_INLINE void zero_tile(Vec<T> (&acc)[Tile<T>::MR][NV]) {
  unroll<Tile<T>::MR>([&](auto r) SSLK_INLINE { unroll<NV>([&](auto v) SSLK_INLINE { acc[r][v] = Vec<T>{}; }); });
}

// One panel of gemm_block: C[0:rows][0:NV*L] += A P for a panel that is NV vectors wide.
template <class T, int NV, bool kUnitRow>
inline void gemm_panel(T* c, int64_t ldc, int64_t rows, const T* a, int64_t a_row, int64_t a_k, const T* p,
                       int64_t depth) {
  constexpr int MR = Tile<T>::MR, L = Tile<T>::L;
  for (int64_t i = 0; i < rows; i += MR) {
    T* ci = c + i * ldc;
    Vec<T> acc[MR][NV];
    zero_tile<T, NV>(acc);
    dot_tile<T, NV, kUnitRow>(a + i * a_row, a_row, a_k, p, depth, acc);
    // C is added at the end: waiting for it at the start would stall the multiply-adds.
    unroll<MR>([&](auto r) SSLK_INLINE {
      unroll<NV>([&](auto v) SSLK_INLINE {
        T* at = ci + r * ldc + v * L;
        store<T>(at, load<T>(at) + acc[r][v]);
      });
    });
  }
}

// C[0:rows][0:D] += A[rows][depth] P, with P in D-panels: panel dp holds [p_rows][NR] elements.
// `rows` is a multiple of MR (C is padded), ldc a multiple of L; the last panel is as many vectors
// wide as D needs, which is what keeps odd D cheap.
template <class T, bool kUnitRow>
inline void gemm_block(T* c, int64_t ldc, int64_t rows, int64_t d, const T* a, int64_t a_row, int64_t a_k, const T* p,
                       int64_t p_rows, int64_t depth) {
  constexpr int NR = Tile<T>::NR, NV = Tile<T>::NV, L = Tile<T>::L;
  for (int64_t d0 = 0; d0 < d; d0 += NR, p += p_rows * NR) {
    const int64_t vectors = ceil_div(min64(NR, d - d0), L);
    if (vectors == NV) {
      gemm_panel<T, NV, kUnitRow>(c + d0, ldc, rows, a, a_row, a_k, p, depth);
    } else if (vectors == 1) {
      gemm_panel<T, 1, kUnitRow>(c + d0, ldc, rows, a, a_row, a_k, p, depth);
    } else {
      gemm_panel<T, NV == 3 ? 2 : 1, kUnitRow>(c + d0, ldc, rows, a, a_row, a_k, p, depth);
    }
  }
}

SSLK_END
