// SPDX-License-Identifier: Apache-2.0
// The Python module sslkernels._C: addresses in, GIL released, exceptions out; no mathematics.
//
// Addresses are data_ptr() integers, 0 for null.  sslkernels/backends/cpu.py is the only caller and
// has checked shapes and dtypes.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "narrow_ids.h"

namespace py = pybind11;

namespace sslk {
namespace {

double read_scalar(uintptr_t address, DType dtype) {
  if (address == 0) return 0.0;
  return dtype == DType::f64 ? *at<const double>(address) : double(*at<const float>(address));
}

PairwiseArgs make_args(int dtype, int64_t d, uintptr_t q, int64_t n, uintptr_t k, int64_t m, uintptr_t scale,
                       uintptr_t bias, uintptr_t ids_q, uintptr_t ids_k, int n_threads) {
  PairwiseArgs args;
  args.dtype = DType(dtype);
  args.d = d;
  args.self = k == 0 && m < 0;
  args.q[0] = {at<const void>(q), n, d};
  if (!args.self) args.k[0] = {at<const void>(k), m, d};
  args.scale = read_scalar(scale, args.dtype);
  args.bias = read_scalar(bias, args.dtype);
  args.ids_q = at<const int64_t>(ids_q);
  args.ids_k = at<const int64_t>(ids_k);
  args.n_threads = n_threads;
  return args;
}

void pairwise_forward(int kind, int dtype, int64_t d, uintptr_t q, int64_t n, uintptr_t k, int64_t m, uintptr_t scale,
                      uintptr_t bias, uintptr_t ids_q, uintptr_t ids_k, int n_threads, uintptr_t row, uintptr_t col,
                      uintptr_t threshold_row, uintptr_t threshold_col, uintptr_t rank_row, uintptr_t rank_col) {
  py::gil_scoped_release release;
  PairwiseArgs args = make_args(dtype, d, q, n, k, m, scale, bias, ids_q, ids_k, n_threads);
  args.kind = Kind(kind);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, args.rows(), &args.ids_k, args.self ? 0 : args.cols());
  PairwiseForwardOut out;
  out.row = at<void>(row);
  out.col = at<void>(col);
  out.threshold_row = at<const void>(threshold_row);
  out.threshold_col = at<const void>(threshold_col);
  out.rank_row = at<int64_t>(rank_row);
  out.rank_col = at<int64_t>(rank_col);
  check(kernels().pairwise_forward(args, out));
}

double pairwise_backward(int kind, int dtype, int64_t d, uintptr_t q, int64_t n, uintptr_t k, int64_t m,
                         uintptr_t scale, uintptr_t bias, uintptr_t ids_q, uintptr_t ids_k, int n_threads,
                         uintptr_t row, uintptr_t col, uintptr_t drow, uintptr_t dcol, uintptr_t dq, uintptr_t dk) {
  py::gil_scoped_release release;
  PairwiseArgs args = make_args(dtype, d, q, n, k, m, scale, bias, ids_q, ids_k, n_threads);
  args.kind = Kind(kind);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, args.rows(), &args.ids_k, args.self ? 0 : args.cols());
  double dbias = 0.0;
  PairwiseBackwardArgs b;
  b.row = at<const void>(row);
  b.col = at<const void>(col);
  b.drow = at<const void>(drow);
  b.dcol = at<const void>(dcol);
  b.dq = at<void>(dq);
  b.dk = at<void>(dk);
  b.stride = d;
  b.capacity_q = n;
  b.capacity_k = m;
  b.dbias = &dbias;
  check(kernels().pairwise_backward(args, b));
  return dbias;
}

void attend(int dtype, int64_t d, uintptr_t q, int64_t n, uintptr_t k, int64_t m, uintptr_t scale, uintptr_t ids_q,
            uintptr_t ids_k, int n_threads, uintptr_t lse, uintptr_t mean_key, uintptr_t threshold, uintptr_t rank) {
  py::gil_scoped_release release;
  PairwiseArgs args = make_args(dtype, d, q, n, k, m, scale, 0, ids_q, ids_k, n_threads);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, args.rows(), &args.ids_k, args.self ? 0 : args.cols());
  AttendOut out;
  out.lse = at<void>(lse);
  out.mean_key = at<void>(mean_key);
  out.threshold = at<const void>(threshold);
  out.rank = at<int64_t>(rank);
  check(kernels().attend(args, out));
}

void extremes(int dtype, int64_t d, uintptr_t q, int64_t n, uintptr_t k, int64_t m, uintptr_t scale, uintptr_t bias_k,
              uintptr_t ids_q, uintptr_t ids_k, int n_threads, uintptr_t max_same, uintptr_t min_other) {
  py::gil_scoped_release release;
  PairwiseArgs args = make_args(dtype, d, q, n, k, m, scale, 0, ids_q, ids_k, n_threads);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, args.rows(), &args.ids_k, args.self ? 0 : args.cols());
  ExtremesOut out;
  out.bias_k = at<const void>(bias_k);
  out.max_same = at<int64_t>(max_same);
  out.min_other = at<int64_t>(min_other);
  check(kernels().extremes(args, out));
}

}  // namespace
}  // namespace sslk

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of sslkernels; called through sslkernels.backends.cpu.";
  m.def("isa", [] { return std::string(sslk::kernels().isa); });
  m.def("available_isas", &sslk::available_isas);
  m.def("set_isa", &sslk::set_isa);
  m.def("has_bf16", [] { return sslk::kernels().bf16; });
  m.def(
      "peak_flops", [](bool bf16, int n_threads) { return sslk::kernels().peak_flops(bf16, n_threads); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("round_trip", &sslk::round_trip, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("pairwise_forward", &sslk::pairwise_forward);
  m.def("pairwise_backward", &sslk::pairwise_backward);
  m.def("attend", &sslk::attend);
  m.def("extremes", &sslk::extremes);
  sslk::bind_losses(m);
  sslk::bind_updates(m);
}
