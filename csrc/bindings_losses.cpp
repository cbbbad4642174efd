// SPDX-License-Identifier: Apache-2.0
// Bindings of unit rows and of whole losses: regression (BYOL, SimSiam), paired (InfoNCE with negatives of its own
// for every query), triplet (batch-hard).  The contrastive ones are in bindings_contrastive.cpp.

#include "bindings.h"
#include "classes.h"
#include "narrow_ids.h"

namespace sslk {

template <>
struct Handle<RegressionArgs> {
  static constexpr const char* kName = "regression";
};
template <>
struct Handle<PairedArgs> {
  static constexpr const char* kName = "paired";
};
template <>
struct Handle<TripletArgs> {
  static constexpr const char* kName = "triplet";
};
template <>
struct Names<TripletReduction> {
  static constexpr const char* all[] = {"mean", "sum", "mean_nonzero"};
};

namespace {

// ---- Unit rows -----------------------------------------------------------------------------------

struct UnitFields {
  UnitArgs args;

  static Fields fields() {
    using Call = UnitFields;
    return {
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.x.n, "n"),
        SSLK_REQUIRED(Call, args.x.data, "x"),
        SSLK_SIZE(Call, args.x.stride, "x_stride"),
        SSLK_REQUIRED(Call, args.eps, "eps"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  // Checked; `other` is the dtype of the other rows.
  const UnitArgs& checked(const char* op, DType other) {
    require(op, {{"x", args.x.data, args.x.n, args.d, args.x.stride}});
    if (args.dtype == DType::f64 || other == DType::f64) {
      throw std::invalid_argument(std::string(op) + ": dtypes must be float32, bfloat16 or float16");
    }
    args.x.stride = stride_of(args.x.stride, args.d);
    return args;
  }
};

struct UnitForward {
  static constexpr const char* kName = "unit_forward";
  static constexpr const char* kDoc = "Rows over max(|x|, eps), and |x|.";
  UnitFields rows;
  DType unit_dtype = DType::f32;
  void* unit = nullptr;
  void* norm = nullptr;

  static Fields fields() {
    using Call = UnitForward;
    return inside(offsetof(Call, rows), UnitFields::fields()) + Fields{SSLK_REQUIRED(Call, unit_dtype, "unit_dtype"),
                                                                       SSLK_REQUIRED(Call, unit, "unit"),
                                                                       SSLK_REQUIRED(Call, norm, "norm")};
  }
  void run() {
    const UnitArgs& args = rows.checked(kName, unit_dtype);
    require(kName, {{"unit", unit, args.x.n, args.d}, {"norm", norm, args.x.n}});
    check(kernels().unit_forward(args, unit_dtype, unit, static_cast<float*>(norm)));
  }
};

struct UnitBackward {
  static constexpr const char* kName = "unit_backward";
  static constexpr const char* kDoc = "The gradient of x.";
  UnitFields rows;
  DType dunit_dtype = DType::f32;
  Rows dunit;
  const void* norm = nullptr;
  void* dx = nullptr;

  static Fields fields() {
    using Call = UnitBackward;
    return inside(offsetof(Call, rows), UnitFields::fields()) +
           Fields{SSLK_REQUIRED(Call, dunit_dtype, "dunit_dtype"), SSLK_REQUIRED(Call, dunit.data, "dunit"),
                  SSLK_SIZE(Call, dunit.stride, "dunit_stride"), SSLK_REQUIRED(Call, norm, "norm"),
                  SSLK_REQUIRED(Call, dx, "dx")};
  }
  void run() {
    const UnitArgs& args = rows.checked(kName, dunit_dtype);
    const int64_t n = dunit.n = args.x.n;
    require(kName, {{"dunit", dunit.data, n, args.d, dunit.stride}, {"norm", norm, n}, {"dx", dx, n, args.d}});
    dunit.stride = stride_of(dunit.stride, args.d);
    check(kernels().unit_backward(args, dunit_dtype, dunit, static_cast<const float*>(norm), dx));
  }
};

// ---- Regression ----------------------------------------------------------------------------------

struct Regression {
  static constexpr const char* kName = Handle<RegressionArgs>::kName;
  static constexpr const char* kDoc = "2 - 2 cos by rows, or -cos.";
  RegressionArgs args;

  static Fields fields() {
    using Call = Regression;
    return {
        SSLK_REQUIRED(Call, args.reduction, "reduction"),
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.prediction.n, "n"),
        SSLK_REQUIRED(Call, args.prediction.data, "prediction"),
        SSLK_SIZE(Call, args.prediction.stride, "prediction_stride"),
        SSLK_REQUIRED(Call, args.target.data, "target"),
        SSLK_SIZE(Call, args.target.stride, "target_stride"),
        SSLK_OPTIONAL(Call, args.cosine, "cosine"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  RegressionArgs run() {
    const int64_t n = args.target.n = args.prediction.n;
    require(kName, {{"prediction", args.prediction.data, n, args.d, args.prediction.stride},
                    {"target", args.target.data, n, args.d, args.target.stride}});
    args.prediction.stride = stride_of(args.prediction.stride, args.d);
    args.target.stride = stride_of(args.target.stride, args.d);
    return args;
  }
};

struct RegressionForward {
  using Args = RegressionArgs;
  static constexpr const char* kName = "regression_forward";
  static constexpr const char* kDoc = "The loss, and what backward needs.";
  const Args* args = nullptr;
  void* state = nullptr;
  void* loss = nullptr;

  static Fields fields() {
    using Call = RegressionForward;
    return {SSLK_REQUIRED(Call, state, "state"), SSLK_REQUIRED(Call, loss, "loss")};
  }
  void run() {
    const int64_t n = args->prediction.n;
    require(kName, {{"state", state, n}, {"loss", loss, values_of_loss(args->reduction, n)}});
    check(kernels().regression_forward(*args, state, loss));
  }
};

struct RegressionBackward {
  using Args = RegressionArgs;
  static constexpr const char* kName = "regression_backward";
  static constexpr const char* kDoc = "The gradient of the prediction.";
  const Args* args = nullptr;
  const void* state = nullptr;
  const void* dloss = nullptr;
  int64_t dloss_stride = 0;
  void* dprediction = nullptr;

  static Fields fields() {
    using Call = RegressionBackward;
    return {
        SSLK_REQUIRED(Call, state, "state"),
        SSLK_REQUIRED(Call, dloss, "dloss"),
        SSLK_SIZE(Call, dloss_stride, "dloss_stride"),
        SSLK_REQUIRED(Call, dprediction, "dprediction"),
    };
  }
  void run() {
    const int64_t n = args->prediction.n;
    require(kName, {{"state", state, n}, {"dloss", dloss, n}, {"dprediction", dprediction, n, args->d}});
    check(kernels().regression_backward(*args, state, dloss, dloss_stride, dprediction));
  }
};

// ---- Paired --------------------------------------------------------------------------------------

struct Paired {
  static constexpr const char* kName = Handle<PairedArgs>::kName;
  static constexpr const char* kDoc = "The loss without its negatives, which backward may not need.";
  PairedArgs args;
  const void* scale = nullptr;  // [1] acc

  static Fields fields() {
    using Call = Paired;
    return {
        SSLK_REQUIRED(Call, args.reduction, "reduction"),
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_REQUIRED(Call, args.normalize, "normalize"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.query.n, "n"),
        SSLK_REQUIRED(Call, args.query.data, "query"),
        SSLK_SIZE(Call, args.query.stride, "query_stride"),
        SSLK_REQUIRED(Call, args.positive.data, "positive_key"),
        SSLK_SIZE(Call, args.positive.stride, "positive_stride"),
        SSLK_REQUIRED(Call, scale, "scale"),
        SSLK_REQUIRED(Call, args.ids_q, "ids_q"),
        SSLK_REQUIRED(Call, args.ids_k, "ids_k"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  PairedArgs run() {
    const int64_t n = args.positive.n = args.query.n;
    require(kName, {{"query", args.query.data, n, args.d, args.query.stride},
                    {"positive_key", args.positive.data, n, args.d, args.positive.stride},
                    {"scale", scale, 1}});
    args.query.stride = stride_of(args.query.stride, args.d);
    args.positive.stride = stride_of(args.positive.stride, args.d);
    args.scale = read_scalar(scale, args.dtype);
    return args;
  }
};

// The negatives, and what forward leaves for backward.
struct PairedFields {
  const void* negatives = nullptr;
  int64_t m = 0;
  int64_t row_stride = 0;
  int64_t key_stride = 0;
  PairedState state;

  static Fields fields() {
    using Call = PairedFields;
    return {
        SSLK_REQUIRED(Call, negatives, "negatives"), SSLK_SIZE(Call, m, "m"),
        SSLK_SIZE(Call, row_stride, "row_stride"),   SSLK_SIZE(Call, key_stride, "key_stride"),
        SSLK_REQUIRED(Call, state.lse, "lse"),       SSLK_REQUIRED(Call, state.positive, "positive"),
        SSLK_REQUIRED(Call, state.norms, "norms"),   SSLK_REQUIRED(Call, state.mean_key, "mean_key"),
    };
  }
  // `read`: the negatives are needed.
  PairedArgs completed(const char* function, PairedArgs args, bool read) const {
    const int64_t n = args.query.n;
    require(function, {{"negatives", this, m, args.d, key_stride}});  // sizes alone
    require(function, {{"negatives", negatives, read ? n : 0, m * args.d, row_stride},
                       {"ids_k", args.ids_k, args.ids_q != nullptr ? n : 0, m},
                       {"lse", state.lse, n},
                       {"positive", state.positive, n},
                       {"norms", state.norms, n},
                       {"mean_key", state.mean_key, n, args.d}});
    args.negatives = negatives;
    args.m = m;
    args.stride_row = stride_of(row_stride, m * args.d);
    args.stride_key = stride_of(key_stride, args.d);
    return args;
  }
};

struct PairedForward {
  using Args = PairedArgs;
  static constexpr const char* kName = "paired_forward";
  static constexpr const char* kDoc = "The loss; returns the mean similarity of a query and its negatives.";
  const Args* args = nullptr;
  PairedFields paired;
  PairedForwardOut out;

  static Fields fields() {
    using Call = PairedForward;
    return inside(offsetof(Call, paired), PairedFields::fields()) +
           Fields{SSLK_REQUIRED(Call, out.loss, "loss"), SSLK_REQUIRED(Call, out.rank, "rank")};
  }
  double run() {
    double similarity = 0.0;
    out.similarity = &similarity;
    require(kName,
            {{"loss", out.loss, values_of_loss(args->reduction, args->query.n)}, {"rank", out.rank, args->query.n}});
    check(kernels().paired_forward(paired.completed(kName, *args, true), paired.state, out));
    return similarity;
  }
};

struct PairedBackward {
  using Args = PairedArgs;
  static constexpr const char* kName = "paired_backward";
  static constexpr const char* kDoc = "Gradients of queries and keys; returns the one of the scale.";
  const Args* args = nullptr;
  PairedFields paired;
  PairedBackwardArgs out;

  static Fields fields() {
    using Call = PairedBackward;
    return inside(offsetof(Call, paired), PairedFields::fields()) +
           Fields{
               SSLK_REQUIRED(Call, out.dloss, "dloss"),           SSLK_SIZE(Call, out.dloss_stride, "dloss_stride"),
               SSLK_REQUIRED(Call, out.dquery, "dquery"),         SSLK_REQUIRED(Call, out.dpositive, "dpositive"),
               SSLK_REQUIRED(Call, out.dnegatives, "dnegatives"),
           };
  }
  double run() {
    double dscale = 0.0;
    out.dscale = &dscale;
    require(kName, {{"dloss", out.dloss, args->query.n}});
    const PairedArgs all = paired.completed(kName, *args, out.dnegatives != nullptr);
    check(kernels().paired_backward(all, paired.state, out));
    return dscale;
  }
};

// ---- Triplet -------------------------------------------------------------------------------------

struct Triplet {
  static constexpr const char* kName = Handle<TripletArgs>::kName;
  static constexpr const char* kDoc = "Batch-hard triplets.";
  TripletArgs args;
  const void* margin = nullptr;  // [1] acc

  static Fields fields() {
    using Call = Triplet;
    return {
        SSLK_REQUIRED(Call, args.reduction, "reduction"),
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_REQUIRED(Call, args.normalize, "normalize"),
        SSLK_REQUIRED(Call, args.cosine, "cosine"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.z.n, "n"),
        SSLK_REQUIRED(Call, args.z.data, "z"),
        SSLK_SIZE(Call, args.z.stride, "z_stride"),
        SSLK_REQUIRED(Call, margin, "margin"),
        SSLK_REQUIRED(Call, args.ids, "ids"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  TripletArgs run() {
    const int64_t n = args.z.n;
    require(kName, {{"z", args.z.data, n, args.d, args.z.stride}, {"margin", margin, 1}, {"ids", args.ids, n}});
    args.z.stride = stride_of(args.z.stride, args.d);
    args.margin = read_scalar(margin, args.dtype);
    return args;
  }
};

struct TripletStateFields {
  TripletState state;

  static Fields fields() {
    using Call = TripletStateFields;
    return {
        SSLK_REQUIRED(Call, state.chosen, "chosen"),
        SSLK_REQUIRED(Call, state.distance, "distance"),
        SSLK_REQUIRED(Call, state.norm, "norm"),
        SSLK_REQUIRED(Call, state.share, "share"),
    };
  }
  const TripletState& checked(const char* function, const TripletArgs& args) const {
    const int64_t n = args.z.n;
    require(function, {{"chosen", state.chosen, 2, n},
                       {"distance", state.distance, 2, n},
                       {"norm", state.norm, n},
                       {"share", state.share, 1}});
    return state;
  }
};

struct TripletForward {
  using Args = TripletArgs;
  static constexpr const char* kName = "triplet_forward";
  static constexpr const char* kDoc = "The loss, and what backward needs.";
  const Args* args = nullptr;
  TripletStateFields out;
  void* loss = nullptr;

  static Fields fields() {
    using Call = TripletForward;
    return inside(offsetof(Call, out), TripletStateFields::fields()) + Fields{SSLK_REQUIRED(Call, loss, "loss")};
  }
  void run() {
    const TripletState& state = out.checked(kName, *args);
    require(kName, {{"loss", loss, 1}});
    TripletArgs all = *args;
    const int64_t* none = nullptr;
    NarrowIds narrow;
    narrow.apply(all.dtype, &all.ids, all.z.n, &none, 0);
    GroupedRows rows;
    all.order = rows.sort(all.ids, all.z.n);
    check(kernels().triplet_forward(all, state, loss));
  }
};

struct TripletBackward {
  using Args = TripletArgs;
  static constexpr const char* kName = "triplet_backward";
  static constexpr const char* kDoc = "The gradient of z; returns the one of the margin.";
  const Args* args = nullptr;
  TripletStateFields kept;
  TripletBackwardArgs out;

  static Fields fields() {
    using Call = TripletBackward;
    return inside(offsetof(Call, kept), TripletStateFields::fields()) +
           Fields{SSLK_REQUIRED(Call, out.dloss, "dloss"), SSLK_REQUIRED(Call, out.dz, "dz")};
  }
  double run() {
    double dmargin = 0.0;
    out.dmargin = &dmargin;
    require(kName, {{"dloss", out.dloss, 1}});
    check(kernels().triplet_backward(*args, kept.checked(kName, *args), out));
    return dmargin;
  }
};

}  // namespace

void bind_losses(Definition& definition) {
  add_function<UnitForward>(definition);
  add_function<UnitBackward>(definition);
  add_function<Regression>(definition);
  add_function<RegressionForward>(definition);
  add_function<RegressionBackward>(definition);
  add_function<Paired>(definition);
  add_function<PairedForward>(definition);
  add_function<PairedBackward>(definition);
  add_function<Triplet>(definition);
  add_function<TripletForward>(definition);
  add_function<TripletBackward>(definition);
}

}  // namespace sslk
