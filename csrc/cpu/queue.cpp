// SPDX-License-Identifier: Apache-2.0
// Enqueue: normalise a batch of keys, cast them to the queue's type and write them into a ring of rows.
//
//   queue[(ptr + i) mod K] = keys[i] / max(||keys[i]||, 1e-12)
//
// accumulated in float32, or float64 if keys or queue are float64.  Bound by memory: a key is read
// twice, the second time from L1.  The order of a row's sum is fixed, so results do not depend on the
// number of threads.

#include <cmath>
#include <cstdint>

#include "narrow.h"
#include "simd.h"
#include "sslkernels.h"

SSLK_BEGIN
namespace {

// Elements that make another thread worth starting: 8 bytes each, with stores that miss every cache,
// take about as long as starting a team.
constexpr int64_t kKeyGrain = 8192;

constexpr int64_t kRowsAhead = 8;

constexpr double kEps = 1e-12;  // torch.nn.functional.normalize

// x as accumulation type: the memory itself where the types agree, else converted into the buffer.
template <class K, class A>
inline __attribute__((always_inline)) const A* widened(const K* x, int n, A* buffer) {
  if constexpr (SameType<K, A>::value) {
    return x;
  } else {
    widen_block(x, n, buffer);
    return buffer;
  }
}

template <class A>
inline __attribute__((always_inline)) A sum_of_squares(const A* x, int n) {
  constexpr int kLanes = Simd<A>::kLanes;
  Vec<A> sum0{}, sum1{}, sum2{}, sum3{};  // 4 chains hide the latency of the FMA
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const Vec<A> x0 = load<A>(x + i), x1 = load<A>(x + i + kLanes);
    const Vec<A> x2 = load<A>(x + i + 2 * kLanes), x3 = load<A>(x + i + 3 * kLanes);
    sum0 += x0 * x0;
    sum1 += x1 * x1;
    sum2 += x2 * x2;
    sum3 += x3 * x3;
  }
  for (; i + kLanes <= n; i += kLanes) {
    const Vec<A> x0 = load<A>(x + i);
    sum0 += x0 * x0;
  }
  A sum = sum_lanes<A>((sum0 + sum1) + (sum2 + sum3));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

template <class Q, class K, class A>
void write_key(Q* out, const K* key, int64_t dim, bool normalize) {
  A buffer[kBlock];
  A divisor = A(1);
  if (normalize) {
    A sum = A(0);
    for (int64_t b = 0; b < dim; b += kBlock) {
      const int n = int(dim - b < kBlock ? dim - b : kBlock);
      sum += sum_of_squares<A>(widened(key + b, n, buffer), n);
    }
    const A norm = sqrt(sum);
    divisor = norm < A(kEps) ? A(kEps) : norm;  // a NaN compares false and stays
  }
  A scaled[kBlock];
  for (int64_t b = 0; b < dim; b += kBlock) {
    const int n = int(dim - b < kBlock ? dim - b : kBlock);
    const A* x = widened(key + b, n, buffer);
    if constexpr (SameType<Q, A>::value) {
      for (int i = 0; i < n; ++i) out[b + i] = x[i] / divisor;
    } else {
      for (int i = 0; i < n; ++i) scaled[i] = x[i] / divisor;
      narrow_block(scaled, n, out + b);
    }
  }
}

template <class Q, class K>
struct AccOfQueue {
  using type = float;
};
template <class K>
struct AccOfQueue<double, K> {
  using type = double;
};
template <class Q>
struct AccOfQueue<Q, double> {
  using type = double;
};
template <>
struct AccOfQueue<double, double> {
  using type = double;
};

template <class Q, class K>
void write_rows(const EnqueueArgs& args, int64_t ptr, int64_t first) {
  const int64_t n = args.keys.n, size = args.size, dim = args.dim;
  const K* keys = static_cast<const K*>(args.keys.data);
  Q* queue = static_cast<Q*>(args.queue);
  int64_t parts = (n - first) * dim / kKeyGrain;
  if (parts > args.n_threads) parts = args.n_threads;
  if (parts < 1) parts = 1;
#pragma omp parallel for num_threads(int(parts)) schedule(static) if (parts > 1)
  for (int64_t i = first; i < n; ++i) {
    const int64_t row = (ptr + i) % size;
    // The queue is in no cache: lines are fetched, to be written, some rows before they are.
    const char* ahead = reinterpret_cast<const char*>(queue + (row + kRowsAhead < size ? row + kRowsAhead : row) * dim);
    for (int64_t at = 0; at < dim * int64_t(sizeof(Q)); at += 64) __builtin_prefetch(ahead + at, 1);
    write_key<Q, K, typename AccOfQueue<Q, K>::type>(queue + row * dim, keys + i * args.keys.stride, dim,
                                                     args.normalize);
  }
}

template <class Q>
void write_queue(const EnqueueArgs& args, int64_t ptr, int64_t first) {
  switch (args.keys_dtype) {
    case DType::f32: write_rows<Q, float>(args, ptr, first); break;
    case DType::f64: write_rows<Q, double>(args, ptr, first); break;
    case DType::bf16: write_rows<Q, bf16>(args, ptr, first); break;
    case DType::f16: write_rows<Q, f16>(args, ptr, first); break;
  }
}

}  // namespace

int enqueue(const EnqueueArgs& args) {
  const int64_t n = args.keys.n, size = args.size;
  // A pointer from a damaged checkpoint must not write outside of the queue.
  const int64_t ptr = ((*args.ptr % size) + size) % size;
  const int64_t first = n > size ? n - size : 0;  // older keys would be overwritten by this batch
  switch (args.queue_dtype) {
    case DType::f32: write_queue<float>(args, ptr, first); break;
    case DType::f64: write_queue<double>(args, ptr, first); break;
    case DType::bf16: write_queue<bf16>(args, ptr, first); break;
    case DType::f16: write_queue<f16>(args, ptr, first); break;
  }
  if (args.queue_labels != nullptr) {
    for (int64_t i = first; i < n; ++i) args.queue_labels[(ptr + i) % size] = args.labels[i];
  }
  *args.ptr = (ptr + n % size) % size;
  const int64_t fill = *args.fill < 0 ? 0 : *args.fill;
  *args.fill = n >= size - fill ? size : fill + n;
  return 0;
}

SSLK_END
