// SPDX-License-Identifier: Apache-2.0
// BYOL's regression loss_i = 2 - 2 cos(p_i, t_i), or SimSiam's -cos(p_i, t_i), forward and backward for the
// prediction p, in one pass over the rows each.  Accumulates in float32 (float64 for float64); 2 - 2 cos is
// computed as |p_hat - t_hat|^2, which keeps its relative accuracy when the two agree.
//
// Plain-torch twins: sslkernels/reference.py (byol_loss, simsiam_loss).

#include "../openmp.h"
#include "kernels.h"
#include "rows.h"
#include "workspace.h"

SSLK_BEGIN
namespace {

// State of a row for backward: norms (at least eps) and cosine.  Rows are divided by their norm, not
// multiplied with an inverse, so that a row of one feature becomes exactly 1 and its gradient exactly 0.
template <class T>
struct RowState {
  T norm_p, norm_t, cosine;
};

// Whether a row that is divided by its norm becomes a unit vector; false for NaN.
template <class T>
bool is_length(T norm) {
  return norm > T(kNormEps) && norm < T(HUGE_VAL);
}

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
  PerThread<T> buffers;
  T* row_loss = nullptr;
  w.plan(&buffers, 2 * d, call.n_threads);
  w.plan(&row_loss, n);
  if (!w.allocate()) return -1;
#pragma omp parallel num_threads(call.n_threads)
  {
    T* x = buffers.mine();
    T* y = x + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      call.p.row(i, x);
      call.t.row(i, y);
      RowState<T>& s = state[i];
      s.norm_p = clamped_norm(x, d);
      s.norm_t = clamped_norm(y, d);
      for (int64_t c = 0; c < d; ++c) x[c] /= s.norm_p, y[c] /= s.norm_t;
      s.cosine = dot(x, y, d);
      if (args.cosine) {
        row_loss[i] = -s.cosine;
        continue;
      }
      // |p_hat|^2 + |t_hat|^2 - |p_hat - t_hat|^2 = 2 cos; a row shorter than eps is not a unit vector, nor is
      // one whose norm overflows: x / inf = 0.
      const bool unit = is_length(s.norm_p) && is_length(s.norm_t);
      for (int64_t c = 0; c < d; ++c) x[c] -= y[c];
      row_loss[i] = unit ? T(squared_norm(x, d)) : T(2) - T(2) * s.cosine;
    }
  }
  if (args.reduction == Reduction::none) {
    if (n > 0) std::memcpy(loss, row_loss, size_t(n) * sizeof(T));
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
  PerThread<T> buffers;
  w.plan(&buffers, 2 * d, call.n_threads);
  if (!w.allocate()) return -1;
  const double mean = args.reduction == Reduction::mean ? 1.0 / double(max64(n, 1)) : 1.0;
#pragma omp parallel num_threads(call.n_threads)
  {
    T* x = buffers.mine();
    T* y = x + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      call.p.row(i, x);
      call.t.row(i, y);
      const RowState<T>& s = state[i];
      const double g = double(dloss[args.reduction == Reduction::none ? i * dloss_stride : 0]) * mean;
      // d cos / dp = (t_hat - cos p_hat) / |p|; with |p| below eps the norm is a constant.
      const T along = s.norm_p > T(kNormEps) ? s.cosine : T(0);
      const T factor = T((args.cosine ? -1.0 : -2.0) * g / double(s.norm_p));
      for (int64_t c = 0; c < d; ++c) x[c] = factor * (y[c] / s.norm_t - along * (x[c] / s.norm_p));
      write_row<T>(args.dtype, x, d, dprediction, i * d);
    }
  }
  return 0;
}

}  // namespace

int regression_forward(const RegressionArgs& args, void* state, void* loss) {
  return args.dtype == DType::f64 ? forward(args, static_cast<RowState<double>*>(state), static_cast<double*>(loss))
                                  : forward(args, static_cast<RowState<float>*>(state), static_cast<float*>(loss));
}

int regression_backward(const RegressionArgs& args, const void* state, const void* dloss, int64_t dloss_stride,
                        void* dprediction) {
  return args.dtype == DType::f64 ? backward(args, static_cast<const RowState<double>*>(state),
                                             static_cast<const double*>(dloss), dloss_stride, dprediction)
                                  : backward(args, static_cast<const RowState<float>*>(state),
                                             static_cast<const float*>(dloss), dloss_stride, dprediction);
}

SSLK_END
