// SPDX-License-Identifier: Apache-2.0
// Distances of two lists of feature maps, all of them in one call: for sample i and map l of d_l elements
//
//   out[i, l] = sum_j rho(feature - target) / d_l
//
// with rho(x) = x^2, or the smooth L1 of width beta: x^2 / (2 beta) below beta and |x| - beta / 2 above.  Every
// sample of every map is cut into units of kUnit elements, which threads share; the sums of units are added in
// order, so that the number of threads changes no bit.
//
// Plain-torch twin: sslkernels/backends/autoencoders_torch.py.

#include "../openmp.h"
#include "blocks.h"
#include "kernels.h"
#include "rows.h"
#include "workspace.h"

SSLK_BEGIN
namespace {

constexpr int64_t kUnit = 16 * kBlock;  // 8192: 32 KB of float32 a side, some 5 us

// Where a unit lies.
struct Unit {
  int64_t row, entry, begin, count;
};

struct Units {
  const FeatureArgs& args;
  int64_t of_row = 0, elements = 0;

  explicit Units(const FeatureArgs& all) : args(all) {
    for (int64_t l = 0; l < args.n_entries; ++l) of_row += of(l), elements += args.n * args.entries[l].d;
  }
  int64_t of(int64_t l) const { return (args.entries[l].d + kUnit - 1) / kUnit; }
  int64_t count() const { return args.n * of_row; }
  int threads() const { return elements < kSerialElements ? 1 : args.n_threads; }
  Unit at(int64_t u) const {
    Unit unit = {u / of_row, 0, u % of_row, 0};
    while (unit.begin >= of(unit.entry)) unit.begin -= of(unit.entry++);
    unit.begin *= kUnit;
    const int64_t left = args.entries[unit.entry].d - unit.begin;
    unit.count = left < kUnit ? left : kUnit;
    return unit;
  }
};

template <class T>
struct Distance {
  bool smooth;
  T beta, inverse;

  explicit Distance(const FeatureArgs& args) : smooth(args.smooth), beta(T(args.beta)) {
    inverse = beta > T(0) ? T(1) / beta : T(0);
  }
  inline SSLK_INLINE Vec<T> value(Vec<T> x) const {
    if (!smooth) return x * x;
    const Vec<T> size = x < T(0) ? -x : x;
    return size < beta ? (T(0.5) * inverse) * x * x : size - T(0.5) * beta;
  }
  inline SSLK_INLINE Vec<T> slope(Vec<T> x) const {
    if (!smooth) return x + x;
    const Vec<T> size = x < T(0) ? -x : x;
    const Vec<T> sign = x > T(0) ? splat<T>(T(1)) : (x < T(0) ? splat<T>(T(-1)) : x);  // 0 and NaN stay
    return size < beta ? inverse * x : sign;
  }
};

template <class T>
double forward_unit(const FeatureArgs& args, const Unit& unit, const Distance<T>& distance) {
  constexpr int L = Simd<T>::kLanes;
  const FeatureEntry& entry = args.entries[unit.entry];
  const ReadBlock<T> read = reader_of<T>(entry.dtype), read_target = reader_of<T>(entry.target_dtype);
  alignas(64) T f[kBlock], t[kBlock];
  double total = 0;
  for (int64_t b = 0; b < unit.count; b += kBlock) {
    const int count = int(unit.count - b < kBlock ? unit.count - b : kBlock);
    const int64_t at = unit.row * entry.d + unit.begin + b;
    read(entry.feature, at, count, f);
    read_target(entry.target, at, count, t);
    Vec<T> sum = {};
    // What is left of the last vector is 0 on both sides, and rho(0) = 0.
    for (int k = 0; k < count; k += L) sum += distance.value(load<T>(f + k) - load<T>(t + k));
    total += double(sum_lanes<T>(sum));
  }
  return total;
}

template <class T>
void backward_unit(const FeatureArgs& args, const Unit& unit, const Distance<T>& distance, T g) {
  constexpr int L = Simd<T>::kLanes;
  const FeatureEntry& entry = args.entries[unit.entry];
  const ReadBlock<T> read = reader_of<T>(entry.dtype), read_target = reader_of<T>(entry.target_dtype);
  const WriteBlock<T> write = writer_of<T>(entry.dtype);
  alignas(64) T f[kBlock], t[kBlock];
  for (int64_t b = 0; b < unit.count; b += kBlock) {
    const int count = int(unit.count - b < kBlock ? unit.count - b : kBlock);
    const int64_t at = unit.row * entry.d + unit.begin + b;
    read(entry.feature, at, count, f);
    read_target(entry.target, at, count, t);
    for (int k = 0; k < count; k += L) store<T>(f + k, g * distance.slope(load<T>(f + k) - load<T>(t + k)));
    write(f, count, entry.dfeature, at);
  }
}

template <class T>
int features_forward_of(const FeatureArgs& args, T* out) {
  const Units units(args);
  const Distance<T> distance(args);
  Workspace w;
  double* sums = nullptr;
  w.plan(&sums, units.count());
  if (!w.allocate()) return -1;
#pragma omp parallel for num_threads(units.threads()) schedule(static)
  for (int64_t u = 0; u < units.count(); ++u) sums[u] = forward_unit<T>(args, units.at(u), distance);
  const double* next = sums;
  for (int64_t i = 0; i < args.n; ++i) {
    for (int64_t l = 0; l < args.n_entries; ++l) {
      double total = 0;
      for (int64_t u = 0; u < units.of(l); ++u) total += *next++;
      out[i * args.n_entries + l] = T(total / double(args.entries[l].d > 0 ? args.entries[l].d : 1));
    }
  }
  return 0;
}

template <class T>
int features_backward_of(const FeatureArgs& args, const T* dout) {
  const Units units(args);
  const Distance<T> distance(args);
#pragma omp parallel for num_threads(units.threads()) schedule(static)
  for (int64_t u = 0; u < units.count(); ++u) {
    const Unit unit = units.at(u);
    if (args.entries[unit.entry].dfeature == nullptr) continue;
    const double share = double(dout[unit.row * args.n_entries + unit.entry]) / double(args.entries[unit.entry].d);
    backward_unit<T>(args, unit, distance, T(share));
  }
  return 0;
}

}  // namespace

int features_forward(const FeatureArgs& args, void* out) {
  return args.wide ? features_forward_of(args, static_cast<double*>(out))
                   : features_forward_of(args, static_cast<float*>(out));
}

int features_backward(const FeatureArgs& args, const void* dout) {
  return args.wide ? features_backward_of(args, static_cast<const double*>(dout))
                   : features_backward_of(args, static_cast<const float*>(dout));
}

SSLK_END
