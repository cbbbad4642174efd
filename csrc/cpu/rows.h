// SPDX-License-Identifier: Apache-2.0
// Reading and writing rows of any dtype, and what is done with a single row.
//
// Row i of a source is used as inv[i] * x_i, which is how normalisation costs no copy of the input.
#pragma once

#include <cmath>

#include "../sslkernels.h"
#include "tile.h"

SSLK_BEGIN

// Elements below which a loop over rows is not worth a second thread: about 10 us of work.
constexpr int64_t kSerialRows = 1 << 14;
// The same for passes over every element that keep a few sums.
constexpr int64_t kSerialElements = 1 << 15;

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
  bool plain = true;               // elements are T in memory
  int64_t element = sizeof(T);     // bytes
  const int64_t* order = nullptr;  // row i is row order[i] of the matrices; null: row i

  int64_t rows() const { return part[0].n + part[1].n; }

  // out[0:d] = inv[i] * x_i
  void row(int64_t i, T* out) const {
    if (order != nullptr) i = order[i];
    const Rows& p = i < part[0].n ? part[0] : part[1];
    const int64_t local = i < part[0].n ? i : i - part[0].n;
    read(p.data, local * p.stride, d, inv ? inv[i] : T(1), out);
  }

  // The same, in place where memory holds it already; `buffer` has room for d elements.
  const T* view(int64_t i, T* buffer) const {
    if (!plain || inv != nullptr) {
      row(i, buffer);
      return buffer;
    }
    if (order != nullptr) i = order[i];
    const Rows& p = i < part[0].n ? part[0] : part[1];
    return static_cast<const T*>(p.data) + (i < part[0].n ? i : i - part[0].n) * p.stride;
  }
};

// Lines of some rows that will be read soon, fetched into the L2 cache a few at a time.
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  template <class T>
  Ahead(const Source<T>& source, int64_t first, int64_t last) {
    for (const Rows& p : source.part) {
      // Rows far apart are not worth the lines between them.
      if (first >= 0 && first < last && last <= p.n && p.stride < 2 * source.d) {
        at = static_cast<const char*>(p.data) + first * p.stride * source.element;
        end = at + (last - first) * p.stride * source.element;
      }
      first -= p.n;
      last -= p.n;
    }
  }
  void fetch(int64_t lines) {
    for (const char* stop = at + 64 * lines; at < stop && at < end; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

inline Source<double> make_source_f64(const Rows* part, const void* inv, int64_t d) {
  return {{part[0], part[1]}, static_cast<const double*>(inv), d, read_row_as<double, double>, true};
}

template <class T>
Source<T> make_source(DType dtype, const Rows* part, const void* inv, int64_t d);

template <>
inline Source<double> make_source<double>(DType, const Rows* part, const void* inv, int64_t d) {
  return make_source_f64(part, inv, d);
}

template <>
inline Source<float> make_source<float>(DType dtype, const Rows* part, const void* inv, int64_t d) {
  Source<float> s{{part[0], part[1]}, static_cast<const float*>(inv), d, read_row_as<float, float>, true};
  if (dtype == DType::bf16) s.read = read_row_as<float, bf16>;
  if (dtype == DType::f16) s.read = read_row_as<float, f16>;
  s.plain = dtype == DType::f32;
  if (!s.plain) s.element = 2;
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

// 1 / max(|x|, eps) as torch.nn.functional.normalize has it; halves are normalised in float32.
constexpr double kNormEps = 1e-12;

template <class T>
inline T clamped_norm(const T* x, int64_t d) {
  const double norm = std::sqrt(squared_norm(x, d));
  return T(norm < kNormEps ? kNormEps : norm);  // a NaN norm stays NaN
}

template <class T>
inline T inverse_norm(const T* x, int64_t d) {
  return T(1) / clamped_norm(x, d);
}

template <class T>
inline T dot(const T* x, const T* y, int64_t d) {
  constexpr int L = Simd<T>::kLanes;
  Vec<T> sum = {};
  int64_t k = 0;
  for (; k + L <= d; k += L) sum += load<T>(x + k) * load<T>(y + k);
  T tail = sum_lanes<T>(sum);
  for (; k < d; ++k) tail += x[k] * y[k];
  return tail;
}

template <class Out>
inline void write_row_as(const float* g, int64_t d, void* out, int64_t offset) {
  Out* to = static_cast<Out*>(out) + offset;
  for (int64_t c = 0; c < d; ++c) from_float(g[c], &to[c]);
}

// out[offset : offset + d] = g, rounded to the dtype.
template <class T>
void write_row(DType dtype, const T* g, int64_t d, void* out, int64_t offset);
template <>
inline void write_row<double>(DType, const double* g, int64_t d, void* out, int64_t offset) {
  if (d > 0) std::memcpy(static_cast<double*>(out) + offset, g, size_t(d) * sizeof(double));
}
template <>
inline void write_row<float>(DType dtype, const float* g, int64_t d, void* out, int64_t offset) {
  if (dtype == DType::bf16) return write_row_as<bf16>(g, d, out, offset);
  if (dtype == DType::f16) return write_row_as<f16>(g, d, out, offset);
  write_row_as<float>(g, d, out, offset);
}

SSLK_END
