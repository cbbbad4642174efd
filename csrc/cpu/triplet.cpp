// SPDX-License-Identifier: Apache-2.0
// The batch-hard triplet loss around its mining (extremes.cpp): rows are normalised, mined, and the distances of the
// chosen ones computed from the rows themselves, which does not cancel.
//
//   loss_i = max(d(x_i, x_p) - d(x_i, x_n) + margin, 0)
//
// A row gathers its gradient from its own term and from those whose positive or negative it is, which are listed
// first, in ascending order: nothing is scattered, no gradient of all rows is held beside the result, and the number of
// threads changes no bit.  Plain-torch twin: sslkernels/ops/triplet_hard.py.

#include "../openmp.h"
#include "kernels.h"
#include "rows.h"
#include "workspace.h"

SSLK_BEGIN
namespace {

// Rows that are added up before their sum is added to that of others.
constexpr int64_t kSumRows = 64;

// What both passes have: the rows as they are used, in place where memory holds them already.
template <class T>
struct TripletRows {
  const TripletArgs& args;
  const int64_t n, d;
  const int n_threads;
  Source<T> source;
  T* copy = nullptr;  // [n, d], if `copied`

  explicit TripletRows(const TripletArgs& all)
      : args(all), n(all.z.n), d(all.d), n_threads(n * d < kSerialElements ? 1 : all.n_threads) {
    const Rows parts[2] = {all.z, Rows{}};
    source = make_source<T>(all.dtype, parts, nullptr, d);
  }
  bool copied() const { return args.normalize || !source.plain; }
  void plan(Workspace& w) {
    if (copied()) w.plan(&copy, n * d);
  }
  const T* row(int64_t i) const {
    return copied() ? copy + i * d : static_cast<const T*>(args.z.data) + i * args.z.stride;
  }
  // Row i, copied where that is needed, divided by its norm, which `norm_of` makes of the row as it is given.
  template <class NormOf>
  const T* read(int64_t i, NormOf norm_of) const {
    if (!copied()) return row(i);
    T* const x = copy + i * d;
    const T* const given = source.view(i, x);
    if (args.normalize) {
      const T norm = norm_of(given);
      for (int64_t c = 0; c < d; ++c) x[c] = given[c] / norm;
    }
    return x;
  }
};

// The sum of term(x_c) over a row, or of term(x_c, y_c); four sums do not wait for each other.
template <class T, class Term, class... Rows>
inline T sum_over(int64_t d, Term term, const Rows*... rows) {
  constexpr int L = Simd<T>::kLanes;
  Vec<T> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) {
    unroll<4>([&](auto s) SSLK_INLINE { sum[s] += term(load<T>(rows + c + s * L)...); });
  }
  for (; c + L <= d; c += L) sum[0] += term(load<T>(rows + c)...);
  T tail = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; c < d; ++c) tail += term(splat<T>(rows[c])...)[0];
  return tail;
}

// 0, or NaN where an element is not finite.
template <class T>
inline T nothing_of(const T* x, int64_t d) {
  return sum_over<T>(d, [](Vec<T> a) { return a * T(0); }, x);
}

// <x, y> or |x - y|
template <class T>
inline T distance_of(bool cosine, const T* x, const T* y, int64_t d) {
  if (cosine) return T(1) - sum_over<T>(d, [](Vec<T> a, Vec<T> b) { return a * b; }, x, y);
  return T(std::sqrt(double(sum_over<T>(d, [](Vec<T> a, Vec<T> b) { return (a - b) * (a - b); }, x, y))));
}

// g += weight (x - y), and g += weight y.
template <class T>
inline void add_gap(T* g, T weight, const T* x, const T* y, int64_t d) {
  for (int64_t c = 0; c < d; ++c) g[c] += weight * (x[c] - y[c]);
}
template <class T>
inline void add_row(T* g, T weight, const T* y, int64_t d) {
  for (int64_t c = 0; c < d; ++c) g[c] += weight * y[c];
}

// The terms, from what forward found.
template <class T>
struct TripletTerms {
  const int64_t n;
  const int64_t* chosen;  // [2, n]
  const T* distance;      // [2, n]
  const T margin;

  TripletTerms(const TripletArgs& args, const TripletState& state)
      : n(args.z.n), chosen(state.chosen), distance(static_cast<const T*>(state.distance)), margin(T(args.margin)) {}
  bool is_row(int64_t index) const { return index >= 0 && index < n; }
  bool valid(int64_t i) const { return is_row(chosen[i]) && is_row(chosen[n + i]); }
  // A NaN stays.
  T at(int64_t i) const {
    const T term = distance[i] - distance[n + i] + margin;
    return term <= T(0) ? T(0) : term;
  }
  bool active(int64_t i) const { return valid(i) && at(i) != T(0); }
};

// The rows less their mean, which moves no distance and leaves less to cancel, and their squares.
template <class T>
void centre(const TripletRows<T>& unit, const T* sums, T* mean, T* centred, T* square) {
  const int64_t n = unit.n, d = unit.d;
  for (int64_t c = 0; c < d; ++c) {
    double total = 0;
    for (int64_t b = 0; b < ceil_div(n, kSumRows); ++b) total += double(sums[b * d + c]);
    mean[c] = T(total / double(n));
  }
#pragma omp parallel for num_threads(unit.n_threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const T* const x = unit.row(i);
    T* const to = centred + i * d;
    for (int64_t c = 0; c < d; ++c) to[c] = x[c] - mean[c];
    square[i] = sum_over<T>(d, [](Vec<T> a) { return a * a; }, to);
  }
}

template <class T>
int mine(const TripletArgs& args, const TripletRows<T>& unit, const T* centred, const T* square, int64_t* chosen) {
  PairwiseArgs tiles;
  tiles.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  tiles.d = args.d;
  tiles.self = true;
  tiles.q[0].n = args.z.n;
  tiles.q[0].data = args.cosine ? unit.row(0) : centred;
  tiles.q[0].stride = args.cosine && !unit.copied() ? args.z.stride : args.d;
  tiles.ids_q = args.ids;
  tiles.n_threads = args.n_threads;
  // 1 - <x, y> and |x - y|^2 - |x|^2 = |y|^2 - 2 <x, y>: the largest is the farthest.
  tiles.scale = args.cosine ? -1.0 : -2.0;
  ExtremesOut out;
  out.bias_k = args.cosine ? nullptr : square;
  out.order = args.order;
  out.max_same = chosen;
  out.min_other = chosen + args.z.n;
  return extremes(tiles, out);
}

template <class T>
int forward(const TripletArgs& args, const TripletState& state, T* loss) {
  TripletRows<T> unit(args);
  const int64_t n = unit.n, d = unit.d, blocks = ceil_div(n, kSumRows);
  T *norm = static_cast<T*>(state.norm), *distance = static_cast<T*>(state.distance);
  T *nothing = nullptr, *sums = nullptr, *mean = nullptr, *centred = nullptr, *square = nullptr;
  Workspace w;
  unit.plan(w);
  w.plan(&nothing, blocks);
  if (!args.cosine) w.plan(&sums, blocks * d), w.plan(&mean, d), w.plan(&centred, n * d), w.plan(&square, n);
  if (!w.allocate()) return -1;
#pragma omp parallel for num_threads(unit.n_threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    nothing[b] = T(0);
    for (int64_t c = 0; !args.cosine && c < d; ++c) sums[b * d + c] = T(0);
    for (int64_t i = b * kSumRows; i < min64(n, (b + 1) * kSumRows); ++i) {
      norm[i] = T(1);
      const T* const x = unit.read(i, [&](const T* given) { return norm[i] = clamped_norm(given, d); });
      nothing[b] += nothing_of(x, d);
      for (int64_t c = 0; !args.cosine && c < d; ++c) sums[b * d + c] += x[c];
    }
  }
  if (!args.cosine) centre(unit, sums, mean, centred, square);
  if (mine(args, unit, centred, square, state.chosen) != 0) return -1;
  const TripletTerms<T> terms(args, state);
#pragma omp parallel for num_threads(unit.n_threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const bool valid = terms.valid(i);
    for (int64_t at = i; at < 2 * n; at += n) {
      distance[at] = valid ? distance_of(args.cosine, unit.row(i), unit.row(state.chosen[at]), d) : T(0);
    }
  }
  double total = 0, count = 0, poison = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!terms.valid(i)) continue;
    const T term = terms.at(i);
    total += double(term);
    if (args.reduction == TripletReduction::mean || term > T(0)) ++count;
  }
  // A NaN distance is neither the largest nor the smallest: mining alone would pass over it.
  for (int64_t b = 0; b < blocks; ++b) poison += double(nothing[b]);
  const double share = (args.reduction == TripletReduction::sum || count == 0 ? 1.0 : 1.0 / count) + poison;
  *static_cast<T*>(state.share) = T(share);
  *loss = T(total * share);
  return 0;
}

// Who chose whom: the terms in which row j is the positive or the negative are with[begin[j]], ...,
// with[begin[j + 1] - 1], as 2n numbers of which the first n are positives.
struct ChosenBy {
  int64_t *begin = nullptr, *with = nullptr;

  template <class T>
  void list(const TripletTerms<T>& terms) {
    const int64_t n = terms.n;
    for (int64_t j = 0; j <= n; ++j) begin[j] = 0;
    for (int64_t at = 0; at < 2 * n; ++at) {
      if (terms.active(at % n)) ++begin[terms.chosen[at]];
    }
    int64_t total = 0;
    for (int64_t j = 0; j <= n; ++j) total += begin[j], begin[j] = total;
    for (int64_t at = 2 * n - 1; at >= 0; --at) {
      if (terms.active(at % n)) with[--begin[terms.chosen[at]]] = at;
    }
  }
};

template <class T>
int backward(const TripletArgs& args, const TripletState& state, const TripletBackwardArgs& b) {
  TripletRows<T> unit(args);
  const int64_t n = unit.n, d = unit.d;
  const T* norm = static_cast<const T*>(state.norm);
  const TripletTerms<T> terms(args, state);
  const double each = double(*static_cast<const T*>(b.dloss)) * double(*static_cast<const T*>(state.share));
  double active = 0;
  for (int64_t i = 0; i < n; ++i) active += terms.active(i);
  *b.dmargin = active > 0 ? each * active : 0.0;
  if (b.dz == nullptr) return 0;
  ChosenBy chosen;
  T* weight = nullptr;
  PerThread<T> buffers;
  Workspace w;
  unit.plan(w);
  w.plan(&weight, 2 * n);
  w.plan(&chosen.begin, n + 1);
  w.plan(&chosen.with, 2 * n);
  w.plan(&buffers, d, unit.n_threads);
  if (!w.allocate()) return -1;
  chosen.list(terms);
#pragma omp parallel for num_threads(unit.n_threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    unit.read(i, [&](const T*) { return norm[i]; });
    for (int64_t at = i; at < 2 * n; at += n) {
      // d |x - y| = (x - y) / |x - y|, 0 where the two are equal;  d (1 - <x, y>) = -y
      const double by_distance = at < n ? each : -each;
      weight[at] = args.cosine               ? T(-by_distance)
                   : terms.distance[at] == 0 ? T(0)
                                             : T(by_distance / double(terms.distance[at]));
    }
  }
#pragma omp parallel num_threads(unit.n_threads)
  {
    T* const g = buffers.mine();
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n; ++j) {
      const T* const x = unit.row(j);
      const auto add = [&](int64_t at, int64_t other) {
        if (args.cosine) {
          add_row(g, weight[at], unit.row(other), d);
        } else {
          add_gap(g, weight[at], x, unit.row(other), d);
        }
      };
      for (int64_t c = 0; c < d; ++c) g[c] = T(0);
      if (terms.active(j)) add(j, terms.chosen[j]), add(n + j, terms.chosen[n + j]);
      for (int64_t e = chosen.begin[j]; e < chosen.begin[j + 1]; ++e) add(chosen.with[e], chosen.with[e] % n);
      if (args.normalize) {
        // d (z / norm): below the eps the norm is a constant.
        const T along = norm[j] > T(kNormEps) ? dot(x, g, d) : T(0);
        for (int64_t c = 0; c < d; ++c) g[c] = (g[c] - x[c] * along) / norm[j];
      }
      write_row<T>(args.dtype, g, d, b.dz, j * d);
    }
  }
  return 0;
}

}  // namespace

int triplet_forward(const TripletArgs& args, const TripletState& state, void* loss) {
  return args.dtype == DType::f64 ? forward(args, state, static_cast<double*>(loss))
                                  : forward(args, state, static_cast<float*>(loss));
}

int triplet_backward(const TripletArgs& args, const TripletState& state, const TripletBackwardArgs& b) {
  return args.dtype == DType::f64 ? backward<double>(args, state, b) : backward<float>(args, state, b);
}

SSLK_END
