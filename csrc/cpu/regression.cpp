// SPDX-License-Identifier: Apache-2.0
// BYOL's regression loss_i = 2 - 2 cos(p_i, t_i), forward and backward for the prediction p, in one pass
// over the rows each.  Accumulates in float32 (float64 for float64); 2 - 2 cos is computed as
// |p_hat - t_hat|^2, which keeps its relative accuracy when the two agree.
//
// Plain-torch twin: sslkernels/reference.py (byol_loss).

#include "kernels.h"
#include "rows.h"
#include "workspace.h"

#include <omp.h>

SSLK_BEGIN
namespace {

// State of a row for backward: inverse norms and cosine.
template <class T>
struct RowState {
  T inv_p, inv_t, cosine;
};

constexpr int64_t kSerialElements = 1 << 15;  // below: one thread

template <class T>
struct Call {
  Source<T> p, t;
  int n_threads;
  explicit Call(const RegressionArgs& args) {
    const Rows parts_p[2] = {args.prediction, Rows{}}, parts_t[2] = {args.target, Rows{}};
    p = make_source<T>(args.dtype, parts_p, nullptr, args.d);
    t = make_source<T>(args.dtype, parts_t, nullptr, args.d);
    n_threads = args.prediction.n * args.d < kSerialElements ? 1 : args.n_threads;
  }
};

template <class T>
int forward(const RegressionArgs& args, RowState<T>* state, T* loss) {
  const int64_t n = args.prediction.n, d = args.d;
  const Call<T> call(args);
  Workspace w;
  T *buffers = nullptr, *row_loss = nullptr;
  w.plan(&buffers, 2 * d * call.n_threads);
  w.plan(&row_loss, n);
  if (!w.allocate()) return -1;
#pragma omp parallel num_threads(call.n_threads)
  {
    T* x = buffers + omp_get_thread_num() * 2 * d;
    T* y = x + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      call.p.row(i, x);
      call.t.row(i, y);
      RowState<T>& s = state[i];
      s.inv_p = inverse_norm(x, d);
      s.inv_t = inverse_norm(y, d);
      s.cosine = dot(x, y, d) * s.inv_p * s.inv_t;
      // |p_hat|^2 + |t_hat|^2 - |p_hat - t_hat|^2 = 2 cos; a row shorter than eps is not a unit vector.
      const bool unit = s.inv_p < T(1 / kNormEps) && s.inv_t < T(1 / kNormEps);
      T sum = 0;
      for (int64_t c = 0; c < d; ++c) x[c] = x[c] * s.inv_p - y[c] * s.inv_t;
      sum = T(squared_norm(x, d));
      row_loss[i] = unit ? sum : T(2) - T(2) * s.cosine;
    }
  }
  if (args.reduction == Reduction::none) {
    std::memcpy(loss, row_loss, size_t(n) * sizeof(T));
    return 0;
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(row_loss[i]);
  *loss = T(args.reduction == Reduction::mean && n > 0 ? sum / double(n) : sum);
  return 0;
}

template <class T>
int backward(const RegressionArgs& args, const RowState<T>* state, const T* dloss, int64_t dloss_stride,
             void* dprediction) {
  const int64_t n = args.prediction.n, d = args.d;
  const Call<T> call(args);
  Workspace w;
  T* buffers = nullptr;
  w.plan(&buffers, 2 * d * call.n_threads);
  if (!w.allocate()) return -1;
  const double mean = args.reduction == Reduction::mean ? 1.0 / double(max64(n, 1)) : 1.0;
#pragma omp parallel num_threads(call.n_threads)
  {
    T* x = buffers + omp_get_thread_num() * 2 * d;
    T* y = x + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      call.p.row(i, x);
      call.t.row(i, y);
      const RowState<T>& s = state[i];
      const double g = double(dloss[args.reduction == Reduction::none ? i * dloss_stride : 0]) * mean;
      // d loss / dp = -2 inv_p (t_hat - cos p_hat); with |p| below eps the norm is a constant.
      const T along = s.inv_p < T(1 / kNormEps) ? s.cosine : T(0);
      const T factor = T(-2.0 * g) * s.inv_p;
      for (int64_t c = 0; c < d; ++c) x[c] = factor * (y[c] * s.inv_t - along * (x[c] * s.inv_p));
      write_row<T>(args.dtype, x, d, dprediction, i * d);
    }
  }
  return 0;
}

}  // namespace

int regression_forward(const RegressionArgs& args, void* state, void* loss) {
  return args.dtype == DType::f64
             ? forward(args, static_cast<RowState<double>*>(state), static_cast<double*>(loss))
             : forward(args, static_cast<RowState<float>*>(state), static_cast<float*>(loss));
}

int regression_backward(const RegressionArgs& args, const void* state, const void* dloss, int64_t dloss_stride,
                        void* dprediction) {
  return args.dtype == DType::f64
             ? backward(args, static_cast<const RowState<double>*>(state), static_cast<const double*>(dloss),
                        dloss_stride, dprediction)
             : backward(args, static_cast<const RowState<float>*>(state), static_cast<const float*>(dloss),
                        dloss_stride, dprediction);
}

SSLK_END
