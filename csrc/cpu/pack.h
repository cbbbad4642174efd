// SPDX-License-Identifier: Apache-2.0
// Reading rows of any dtype and packing them for the micro-kernels.
//
//   T panels: [ceil(n / NR)][D][NR]     NR rows side by side, k-major; B (and A) of S = Q K^T
//   P panels: [ceil(D / NR)][rows][NR]  NR features of each row of one block; B of G K and G^T Q
//
// Row i is used as inv[i] * x_i, which is how normalisation costs no copy of the input.  What lies
// beyond the last row or the last feature is packed as zero: nothing past a buffer is ever read.
#pragma once

#include "../sslkernels.h"
#include "tile.h"

SSLK_BEGIN

template <class T, class In>
inline void read_row_as(const void* data, int64_t offset, int64_t d, T factor, T* out) {
  const In* x = static_cast<const In*>(data) + offset;
  for (int64_t k = 0; k < d; ++k) out[k] = T(to_float(x[k])) * factor;
}

// A row source: up to two matrices one after the other, in any dtype, with an optional factor a row.
template <class T>
struct Source {
  Rows part[2];
  const T* inv = nullptr;
  int64_t d = 0;
  void (*read)(const void*, int64_t, int64_t, T, T*) = nullptr;

  int64_t rows() const { return part[0].n + part[1].n; }

  // out[0:d] = inv[i] * x_i
  void row(int64_t i, T* out) const {
    const Rows& p = i < part[0].n ? part[0] : part[1];
    const int64_t local = i < part[0].n ? i : i - part[0].n;
    read(p.data, local * p.stride, d, inv ? inv[i] : T(1), out);
  }
};

inline Source<double> make_source_f64(const Rows* part, const void* inv, int64_t d) {
  return {{part[0], part[1]}, static_cast<const double*>(inv), d, read_row_as<double, double>};
}

template <class T>
Source<T> make_source(DType dtype, const Rows* part, const void* inv, int64_t d);

template <>
inline Source<double> make_source<double>(DType, const Rows* part, const void* inv, int64_t d) {
  return make_source_f64(part, inv, d);
}

template <>
inline Source<float> make_source<float>(DType dtype, const Rows* part, const void* inv, int64_t d) {
  Source<float> s{{part[0], part[1]}, static_cast<const float*>(inv), d, read_row_as<float, float>};
  if (dtype == DType::bf16) s.read = read_row_as<float, bf16>;
  if (dtype == DType::f16) s.read = read_row_as<float, f16>;
  return s;
}

// |x|^2 in vector lanes.
template <class T>
inline double squared_norm(const T* x, int64_t d) {
  constexpr int L = Simd<T>::kLanes;
  Vec<T> sum = {};
  int64_t k = 0;
  for (; k + L <= d; k += L) {
    const Vec<T> v = load<T>(x + k);
    sum += v * v;
  }
  T tail = sum_lanes<T>(sum);
  for (; k < d; ++k) tail += x[k] * x[k];
  return double(tail);
}

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
