// SPDX-License-Identifier: Apache-2.0
// Rows divided by their norm, y = x / max(|x|, eps), and the gradient of that.  Halves are computed in float32.
//
// Plain-torch twin: torch.nn.functional.normalize, and sslkernels/ops/normalization.py.

#include "../openmp.h"
#include "kernels.h"
#include "rows.h"
#include "workspace.h"

SSLK_BEGIN
namespace {

int threads_for(const UnitArgs& args) { return args.x.n * args.d < kSerialElements ? 1 : args.n_threads; }

Source<float> source_of(DType dtype, const Rows& rows, int64_t d) {
  const Rows parts[2] = {rows, Rows{}};
  return make_source<float>(dtype, parts, nullptr, d);
}

// What a row is divided by; a NaN stays one.
float divisor_of(float norm, float eps) { return norm < eps ? eps : norm; }

}  // namespace

int unit_forward(const UnitArgs& args, DType unit_dtype, void* unit, float* norm) {
  const int64_t n = args.x.n, d = args.d;
  const Source<float> source = source_of(args.dtype, args.x, d);
  const int n_threads = threads_for(args);
  Workspace w;
  PerThread<float> buffers;
  w.plan(&buffers, 2 * d, n_threads);
  if (!w.allocate()) return -1;
#pragma omp parallel num_threads(n_threads)
  {
    float* buffer = buffers.mine();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const float* x = source.view(i, buffer);
      float* y = unit_dtype == DType::f32 ? static_cast<float*>(unit) + i * d : buffer + d;
      norm[i] = float(std::sqrt(squared_norm(x, d)));
      const float divisor = divisor_of(norm[i], float(args.eps));
      for (int64_t c = 0; c < d; ++c) y[c] = x[c] / divisor;
      if (unit_dtype != DType::f32) write_row<float>(unit_dtype, y, d, unit, i * d);
    }
  }
  return 0;
}

// dx = (dy - y <y, dy>) / |x|; below eps, where the norm is a constant, dy / eps.
int unit_backward(const UnitArgs& args, DType dunit_dtype, const Rows& dunit, const float* norm, void* dx) {
  const int64_t n = args.x.n, d = args.d;
  const Source<float> source = source_of(args.dtype, args.x, d), incoming = source_of(dunit_dtype, dunit, d);
  const int n_threads = threads_for(args);
  Workspace w;
  PerThread<float> buffers;
  w.plan(&buffers, 3 * d, n_threads);
  if (!w.allocate()) return -1;
#pragma omp parallel num_threads(n_threads)
  {
    float* buffer = buffers.mine();
    float* y = buffer + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const float* x = source.view(i, buffer);
      const float divisor = divisor_of(norm[i], float(args.eps));
      // Divided again, so that a row of one feature is exactly 1 and its gradient exactly 0.
      for (int64_t c = 0; c < d; ++c) y[c] = x[c] / divisor;
      const float* dy = incoming.view(i, buffer + 2 * d);
      const float along = norm[i] < float(args.eps) ? 0.0f : dot(y, dy, d);
      float* out = args.dtype == DType::f32 ? static_cast<float*>(dx) + i * d : y;
      for (int64_t c = 0; c < d; ++c) out[c] = (dy[c] - y[c] * along) / divisor;
      if (args.dtype != DType::f32) write_row<float>(args.dtype, out, d, dx, i * d);
    }
  }
  return 0;
}

SSLK_END
