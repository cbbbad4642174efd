// SPDX-License-Identifier: Apache-2.0
// Packing rows for the micro-kernels.
//
//   T panels: [ceil(n / NR)][D][NR]     NR rows side by side, k-major; B (and A) of S = Q K^T
//   P panels: [ceil(D / NR)][rows][NR]  NR features of each row of one block; B of G K and G^T Q
//
// What lies beyond the last row or the last feature is packed as zero: nothing past a buffer is ever read.
#pragma once

#include "rows.h"

SSLK_BEGIN

// Packs rows [panel * NR, panel * NR + NR) as one T panel.  `buffer` holds D elements; `largest` is
// raised to the largest squared norm (a NaN stays).
template <class T>
inline void pack_t_panel(const Source<T>& source, int64_t panel, T* out, T* buffer, double* largest) {
  constexpr int NR = Tile<T>::NR;
  const int64_t n = source.rows(), d = source.d, first = panel * NR;
  for (int r = 0; r < NR; ++r) {
    if (first + r < n) {
      source.row(first + r, buffer);
      const double norm2 = squared_norm(buffer, d);
      if (*largest == *largest && !(norm2 <= *largest)) *largest = norm2;
      for (int64_t k = 0; k < d; ++k) out[k * NR + r] = buffer[k];
    } else {
      for (int64_t k = 0; k < d; ++k) out[k * NR + r] = T(0);
    }
  }
}

// Packs rows [first, first + rows) of the source as P panels with `rows` rows each (zero past the end).
template <class T>
inline void pack_p(const Source<T>& source, int64_t first, int64_t rows, T* out, T* buffer) {
  constexpr int NR = Tile<T>::NR;
  const int64_t n = source.rows(), d = source.d, d_pad = round_up(d, NR);
  for (int64_t k = d; k < d_pad; ++k) buffer[k] = T(0);
  for (int64_t r = 0; r < rows; ++r) {
    const bool valid = first + r < n;
    if (valid) source.row(first + r, buffer);
    for (int64_t d0 = 0; d0 < d_pad; d0 += NR) {
      T* to = out + d0 * rows + r * NR;
      for (int k = 0; k < NR; ++k) to[k] = valid ? buffer[d0 + k] : T(0);
    }
  }
}

SSLK_END
