// SPDX-License-Identifier: Apache-2.0
// Bindings of whole losses: contrastive (NT-Xent, InfoNCE, CLIP), regression (BYOL), paired (InfoNCE with
// negatives of its own for every query).
//
// Addresses are data_ptr() integers, 0 for null; strides are in elements.

#include "bindings.h"
#include "narrow_ids.h"
#include "sslkernels.h"

namespace py = pybind11;

namespace sslk {
namespace {

ContrastiveArgs contrastive_args(int layout, int reduction, int dtype, bool normalize, int64_t d, int64_t n,
                                 uintptr_t a, int64_t stride_a, uintptr_t b, int64_t stride_b, uintptr_t bank,
                                 int64_t bank_rows, int64_t stride_bank, uintptr_t scale, uintptr_t ids_q,
                                 uintptr_t ids_k, bool bf16, int n_threads) {
  ContrastiveArgs args;
  args.layout = Layout(layout);
  args.reduction = Reduction(reduction);
  args.dtype = DType(dtype);
  args.normalize = normalize;
  args.d = d;
  args.a = {at<const void>(a), n, stride_a};
  args.b = {at<const void>(b), n, stride_b};
  args.bank = {at<const void>(bank), bank_rows, stride_bank};
  args.scale = args.dtype == DType::f64 ? *at<const double>(scale) : double(*at<const float>(scale));
  args.ids_q = at<const int64_t>(ids_q);
  args.ids_k = at<const int64_t>(ids_k);
  args.bf16 = bf16;
  args.n_threads = n_threads;
  return args;
}

// state: [rows + 3 N] acc, which holds lse, positive and inv one after the other.
ContrastiveState split_state(const ContrastiveArgs& args, uintptr_t state, uintptr_t mean_key, uintptr_t tiles) {
  const uintptr_t size = args.dtype == DType::f64 ? 8 : 4;
  const uintptr_t positive = state + uintptr_t(args.rows()) * size, inv = positive + uintptr_t(args.a.n) * size;
  return {at<void>(state), at<void>(positive), at<void>(inv), at<void>(mean_key), at<void>(tiles)};
}

void contrastive_forward(int layout, int reduction, int dtype, bool normalize, int64_t d, int64_t n, uintptr_t a,
                         int64_t stride_a, uintptr_t b, int64_t stride_b, uintptr_t bank, int64_t bank_rows,
                         int64_t stride_bank, uintptr_t scale, uintptr_t ids_q, uintptr_t ids_k, bool bf16,
                         int n_threads, uintptr_t state, uintptr_t mean_key, uintptr_t tiles, uintptr_t loss,
                         uintptr_t rank) {
  py::gil_scoped_release release;
  ContrastiveArgs args = contrastive_args(layout, reduction, dtype, normalize, d, n, a, stride_a, b, stride_b, bank,
                                          bank_rows, stride_bank, scale, ids_q, ids_k, bf16, n_threads);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, n, &args.ids_k, bank_rows);
  check(kernels().contrastive_forward(args, split_state(args, state, mean_key, tiles), at<void>(loss),
                                      at<int64_t>(rank)));
}

double contrastive_backward(int layout, int reduction, int dtype, bool normalize, int64_t d, int64_t n, uintptr_t a,
                            int64_t stride_a, uintptr_t b, int64_t stride_b, uintptr_t bank, int64_t bank_rows,
                            int64_t stride_bank, uintptr_t scale, uintptr_t ids_q, uintptr_t ids_k, bool bf16,
                            int n_threads, uintptr_t state, uintptr_t mean_key, uintptr_t tiles, uintptr_t dloss,
                            int64_t dloss_stride, uintptr_t da, uintptr_t db, bool want_scale) {
  py::gil_scoped_release release;
  ContrastiveArgs args = contrastive_args(layout, reduction, dtype, normalize, d, n, a, stride_a, b, stride_b, bank,
                                          bank_rows, stride_bank, scale, ids_q, ids_k, bf16, n_threads);
  NarrowIds narrow;
  narrow.apply(args.dtype, &args.ids_q, n, &args.ids_k, bank_rows);
  double dscale = 0.0;
  ContrastiveBackwardArgs out;
  out.dloss = at<const void>(dloss);
  out.dloss_stride = dloss_stride;
  out.da = at<void>(da);
  out.db = at<void>(db);
  out.dscale = want_scale ? &dscale : nullptr;
  check(kernels().contrastive_backward(args, split_state(args, state, mean_key, tiles), out));
  return dscale;
}

int64_t kept_tiles(int layout, int dtype, int64_t n, int64_t d) {
  return kernels().kept_tiles(Layout(layout), DType(dtype), n, d);
}

RegressionArgs regression_args(int reduction, int dtype, int64_t d, int64_t n, uintptr_t prediction,
                               int64_t stride_prediction, uintptr_t target, int64_t stride_target, int n_threads) {
  RegressionArgs args;
  args.reduction = Reduction(reduction);
  args.dtype = DType(dtype);
  args.d = d;
  args.prediction = {at<const void>(prediction), n, stride_prediction};
  args.target = {at<const void>(target), n, stride_target};
  args.n_threads = n_threads;
  return args;
}

void regression_forward(int reduction, int dtype, int64_t d, int64_t n, uintptr_t prediction, int64_t stride_prediction,
                        uintptr_t target, int64_t stride_target, int n_threads, uintptr_t state, uintptr_t loss) {
  py::gil_scoped_release release;
  check(kernels().regression_forward(
      regression_args(reduction, dtype, d, n, prediction, stride_prediction, target, stride_target, n_threads),
      at<void>(state), at<void>(loss)));
}

void regression_backward(int reduction, int dtype, int64_t d, int64_t n, uintptr_t prediction,
                         int64_t stride_prediction, uintptr_t target, int64_t stride_target, int n_threads,
                         uintptr_t state, uintptr_t dloss, int64_t dloss_stride, uintptr_t dprediction) {
  py::gil_scoped_release release;
  check(kernels().regression_backward(
      regression_args(reduction, dtype, d, n, prediction, stride_prediction, target, stride_target, n_threads),
      at<const void>(state), at<const void>(dloss), dloss_stride, at<void>(dprediction)));
}

PairedArgs paired_args(int reduction, int dtype, bool normalize, int64_t d, int64_t n, uintptr_t query,
                       int64_t stride_query, uintptr_t positive_key, int64_t stride_positive, uintptr_t negatives,
                       int64_t m, int64_t stride_row, int64_t stride_key, uintptr_t scale, uintptr_t ids_q,
                       uintptr_t ids_k, int n_threads) {
  PairedArgs args;
  args.reduction = Reduction(reduction);
  args.dtype = DType(dtype);
  args.normalize = normalize;
  args.d = d;
  args.query = {at<const void>(query), n, stride_query};
  args.positive = {at<const void>(positive_key), n, stride_positive};
  args.negatives = at<const void>(negatives);
  args.m = m;
  args.stride_row = stride_row;
  args.stride_key = stride_key;
  args.scale = args.dtype == DType::f64 ? *at<const double>(scale) : double(*at<const float>(scale));
  args.ids_q = at<const int64_t>(ids_q);
  args.ids_k = at<const int64_t>(ids_k);
  args.n_threads = n_threads;
  return args;
}

double paired_forward(int reduction, int dtype, bool normalize, int64_t d, int64_t n, uintptr_t query,
                      int64_t stride_query, uintptr_t positive_key, int64_t stride_positive, uintptr_t negatives,
                      int64_t m, int64_t stride_row, int64_t stride_key, uintptr_t scale, uintptr_t ids_q,
                      uintptr_t ids_k, int n_threads, uintptr_t lse, uintptr_t positive, uintptr_t norms,
                      uintptr_t mean_key, uintptr_t loss, uintptr_t rank) {
  py::gil_scoped_release release;
  const PairedArgs args =
      paired_args(reduction, dtype, normalize, d, n, query, stride_query, positive_key, stride_positive, negatives, m,
                  stride_row, stride_key, scale, ids_q, ids_k, n_threads);
  double similarity = 0.0;
  const PairedState state{at<void>(lse), at<void>(positive), at<void>(norms), at<void>(mean_key)};
  check(kernels().paired_forward(args, state, {at<void>(loss), at<int64_t>(rank), &similarity}));
  return similarity;
}

double paired_backward(int reduction, int dtype, bool normalize, int64_t d, int64_t n, uintptr_t query,
                       int64_t stride_query, uintptr_t positive_key, int64_t stride_positive, uintptr_t negatives,
                       int64_t m, int64_t stride_row, int64_t stride_key, uintptr_t scale, uintptr_t ids_q,
                       uintptr_t ids_k, int n_threads, uintptr_t lse, uintptr_t positive, uintptr_t norms,
                       uintptr_t mean_key, uintptr_t dloss, int64_t dloss_stride, uintptr_t dquery, uintptr_t dpositive,
                       uintptr_t dnegatives) {
  py::gil_scoped_release release;
  const PairedArgs args =
      paired_args(reduction, dtype, normalize, d, n, query, stride_query, positive_key, stride_positive, negatives, m,
                  stride_row, stride_key, scale, ids_q, ids_k, n_threads);
  double dscale = 0.0;
  PairedBackwardArgs out;
  out.dloss = at<const void>(dloss);
  out.dloss_stride = dloss_stride;
  out.dquery = at<void>(dquery);
  out.dpositive = at<void>(dpositive);
  out.dnegatives = at<void>(dnegatives);
  out.dscale = &dscale;
  const PairedState state{at<void>(lse), at<void>(positive), at<void>(norms), at<void>(mean_key)};
  check(kernels().paired_backward(args, state, out));
  return dscale;
}

}  // namespace

void bind_losses(py::module_& m) {
  m.def("contrastive_forward", &contrastive_forward);
  m.def("contrastive_backward", &contrastive_backward);
  m.def("kept_tiles", &kept_tiles);
  m.def("regression_forward", &regression_forward);
  m.def("regression_backward", &regression_backward);
  m.def("paired_forward", &paired_forward);
  m.def("paired_backward", &paired_backward);
}

}  // namespace sslk
