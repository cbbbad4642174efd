// SPDX-License-Identifier: Apache-2.0
// Packing rows for the micro-kernels.  Depth is D / kPack rounded up: 16-bit arithmetic multiplies pairs.
//
//   T panels: [rows / NR][depth][NR]            NR rows side by side, k-major; B (and A) of S = Q K^T
//   P panels: [D / NR][block / kPack][NR]       one set a block: NR features of each row; B of G K and G^T Q
//
// What lies beyond the last row or the last feature is packed as zero: nothing past a buffer is ever read.
#pragma once

#include "rows.h"

SSLK_BEGIN

// Scratch of one thread for packing: two rows in Acc, L rows in Elem.
template <class M>
struct PackBuffer {
  using T = AccOfMath<M>;
  static constexpr int L = Tile<M>::L;
  static_assert(sizeof(T) == sizeof(ElemOf<M>), "rows of Acc and Elem are the same size");
  // The extra 16 elements keep the L rows out of each other's cache sets when they are transposed.
  static int64_t row_size(int64_t d) { return round_up(d, 2 * Tile<M>::NR) + 16; }
  static int64_t size(int64_t d) { return (2 + L) * row_size(d); }

  T* acc = nullptr;
  ElemOf<M>* elem = nullptr;
  int64_t ld = 0;

  PackBuffer() = default;
  PackBuffer(T* memory, int64_t d)
      : acc(memory), elem(reinterpret_cast<ElemOf<M>*>(memory + 2 * row_size(d))), ld(row_size(d)) {}
};

// Row i in Elem, zero up to the leading dimension (and everywhere past the last row).
template <class M>
inline void encode_row(const Source<AccOfMath<M>>& source, int64_t i, const PackBuffer<M>& buffer, ElemOf<M>* out) {
  const int64_t d = source.d;
  if (i >= source.rows()) {
    std::memset(out, 0, size_t(buffer.ld) * sizeof *out);
  } else if constexpr (M::kPack == 1) {
    source.row(i, out);
    std::memset(out + d, 0, size_t(buffer.ld - d) * sizeof *out);
  } else {
#if defined(__AVX512BF16__)
    constexpr int L = Tile<M>::L;
    source.row(i, buffer.acc);
    std::memset(buffer.acc + d, 0, size_t(buffer.ld - d) * sizeof(float));
    for (int64_t k = 0; k < d; k += 2 * L) {
      store<ElemOf<M>>(out + k / 2, pair_along(load<float>(buffer.acc + k), load<float>(buffer.acc + k + L)));
    }
#endif
  }
}

// Rows [first, first + rows) as T panels; `first` and `rows` are multiples of NR.
template <class M>
inline void pack_t(const Source<AccOfMath<M>>& source, int64_t first, int64_t rows, ElemOf<M>* out,
                   const PackBuffer<M>& buffer) {
  using E = ElemOf<M>;
  constexpr int NR = Tile<M>::NR, L = Tile<M>::L;
  const int64_t depth = ceil_div(source.d, M::kPack);
  for (int64_t r = 0; r < rows; r += L) {
    for (int l = 0; l < L; ++l) encode_row<M>(source, first + r + l, buffer, buffer.elem + l * buffer.ld);
    E* to = out + (r / NR) * NR * depth + r % NR;
    for (int64_t k = 0; k < depth; k += L) {
      Vec<E> v[L];
      unroll<L>([&](auto l) SSLK_INLINE { v[l] = load<E>(buffer.elem + l * buffer.ld + k); });
      transpose<E>(v);
      if (k + L <= depth) {
        unroll<L>([&](auto l) SSLK_INLINE { store<E>(to + (k + l) * NR, v[l]); });
      } else {
        unroll<L>([&](auto l) SSLK_INLINE {
          if (k + l < depth) store<E>(to + (k + l) * NR, v[l]);
        });
      }
    }
  }
}

// Rows [first, first + rows) as the P panels of one block.
template <class M>
inline void pack_p(const Source<AccOfMath<M>>& source, int64_t first, int64_t rows, ElemOf<M>* out,
                   const PackBuffer<M>& buffer) {
  using T = AccOfMath<M>;
  constexpr int NR = Tile<M>::NR;
  const int64_t d = source.d, d_pad = round_up(d, NR), p_rows = rows / M::kPack;
  for (int64_t r = 0; r < p_rows; ++r) {
    for (int h = 0; h < M::kPack; ++h) {
      T* row = buffer.acc + h * buffer.ld;
      const int64_t i = first + M::kPack * r + h;
      const bool valid = i < source.rows();
      if (valid) source.row(i, row);
      const int64_t filled = valid ? d : 0;
      std::memset(row + filled, 0, size_t(d_pad - filled) * sizeof(T));
    }
    for (int64_t c = 0; c < d_pad; c += NR) {
      ElemOf<M>* to = out + c * p_rows + r * NR;
      if constexpr (M::kPack == 1) {
        std::memcpy(to, buffer.acc + c, NR * sizeof(T));
      } else {
#if defined(__AVX512BF16__)
        constexpr int L = Tile<M>::L;
        for (int v = 0; v < NR; v += L) {
          store<ElemOf<M>>(to + v, pair_across(load<T>(buffer.acc + c + v), load<T>(buffer.acc + buffer.ld + c + v)));
        }
#endif
      }
    }
  }
}

SSLK_END
