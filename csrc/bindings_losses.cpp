// SPDX-License-Identifier: Apache-2.0
// Bindings of whole losses: contrastive (NT-Xent, InfoNCE, CLIP, DCL, SigLIP), regression (BYOL), paired (InfoNCE with
// negatives of its own for every query), triplet (batch-hard).

#include "bindings.h"
#include "classes.h"
#include "narrow_ids.h"

namespace sslk {

template <>
struct Handle<ContrastiveArgs> {
  static constexpr const char* kName = "contrastive";
};
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

int64_t values_of_loss(Reduction reduction, int64_t n) { return reduction == Reduction::none ? n : 1; }

// ---- Contrastive ---------------------------------------------------------------------------------

struct Contrastive {
  static constexpr const char* kName = Handle<ContrastiveArgs>::kName;
  static constexpr const char* kDoc = "The loss; a bank is given to forward only, which needs nothing of it later.";
  ContrastiveArgs args;
  const void* scale = nullptr;  // [1] acc
  const void* bias = nullptr;   // [1] acc, or null for 0

  static Fields fields() {
    using Call = Contrastive;
    return {
        SSLK_REQUIRED(Call, args.layout, "layout"),
        SSLK_REQUIRED(Call, args.reduction, "reduction"),
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_REQUIRED(Call, args.normalize, "normalize"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.a.n, "n"),
        SSLK_REQUIRED(Call, args.a.data, "a"),
        SSLK_SIZE(Call, args.a.stride, "a_stride"),
        SSLK_REQUIRED(Call, args.b.data, "b"),
        SSLK_SIZE(Call, args.b.stride, "b_stride"),
        SSLK_REQUIRED(Call, scale, "scale"),
        SSLK_REQUIRED(Call, bias, "bias"),
        SSLK_REQUIRED(Call, args.ids_q, "ids_q"),
        SSLK_REQUIRED(Call, args.bf16, "bf16"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  ContrastiveArgs run() {
    args.b.n = args.a.n;
    const bool labels = args.layout == Layout::classes;
    const int64_t n = args.a.n;
    require(kName, {{"a", args.a.data, n, args.d, args.a.stride},
                    {"b", args.b.data, labels ? 0 : n, args.d, args.b.stride},
                    {"ids_q", args.ids_q, labels ? n : 0},
                    {"scale", scale, 1}});
    if (args.bf16 && (args.dtype == DType::f64 || !kernels().bf16)) {
      throw std::invalid_argument("contrastive: bf16 needs AVX512-BF16 and other inputs than float64");
    }
    args.a.stride = stride_of(args.a.stride, args.d);
    args.b.stride = stride_of(args.b.stride, labels ? 0 : args.d);
    args.scale = read_scalar(scale, args.dtype);
    args.bias = read_scalar(bias, args.dtype);
    return args;
  }
};

// `state`: [R + 3 N] acc, which holds lse, positive and inv one after the other; R = rows().
void split_state(const char* function, const ContrastiveArgs& args, ContrastiveState* state) {
  const int64_t n = args.a.n, size = args.dtype == DType::f64 ? 8 : 4;
  require(function, {{"state", state->lse, n}});
  state->positive = static_cast<char*>(state->lse) + args.rows() * size;
  state->inv = static_cast<char*>(state->positive) + n * size;
}

struct ContrastiveStateFields {
  ContrastiveState state;

  static Fields fields() {
    using Call = ContrastiveStateFields;
    return {
        SSLK_REQUIRED(Call, state.lse, "state"),
        SSLK_REQUIRED(Call, state.mean_key, "mean_key"),
        SSLK_REQUIRED(Call, state.tiles, "tiles"),
    };
  }
  const ContrastiveState& split(const char* function, const ContrastiveArgs& args) {
    split_state(function, args, &state);
    require(function, {{"mean_key", state.mean_key, args.layout == Layout::bank ? args.a.n : 0, args.d}});
    return state;
  }
};

// Ids as the kernels want them: 32 bits wide beside float lanes; labels as groups of rows.
struct ContrastiveIds {
  NarrowIds narrow;
  GroupedRows grouped;

  void apply(ContrastiveArgs* args) {
    if (args->layout == Layout::classes) {
      grouped.apply(args);
      args->ids_q = nullptr;
    } else {
      narrow.apply(args->dtype, &args->ids_q, args->a.n, &args->ids_k, args->bank.n);
    }
  }
};

struct ContrastiveForward {
  using Args = ContrastiveArgs;
  static constexpr const char* kName = "contrastive_forward";
  static constexpr const char* kDoc = "The value of the loss, and what backward needs.";
  const Args* args = nullptr;
  Rows bank;
  const int64_t* ids_k = nullptr;
  double sigma = 0.0;
  ContrastiveStateFields out;
  void* loss = nullptr;
  int64_t* rank = nullptr;

  static Fields fields() {
    using Call = ContrastiveForward;
    return inside(offsetof(Call, out), ContrastiveStateFields::fields()) +
           Fields{
               SSLK_OPTIONAL(Call, bank.data, "bank"),
               SSLK_OPTIONAL_SIZE(Call, bank.n, "bank_rows"),
               SSLK_OPTIONAL_SIZE(Call, bank.stride, "bank_stride"),
               SSLK_OPTIONAL(Call, ids_k, "ids_k"),
               SSLK_OPTIONAL(Call, sigma, "sigma"),
               SSLK_REQUIRED(Call, loss, "loss"),
               SSLK_REQUIRED(Call, rank, "rank"),
           };
  }
  void run() {
    ContrastiveArgs all = *args;
    all.bank = bank;
    all.bank.stride = stride_of(bank.stride, all.d);
    all.ids_k = ids_k;
    all.sigma = sigma;
    require(kName, {{"bank", bank.data, bank.n, all.d, bank.stride},
                    {"ids_k", ids_k, all.layout == Layout::bank && all.ids_q != nullptr ? bank.n : 0},
                    {"loss", loss, values_of_loss(all.reduction, all.a.n)}});
    const ContrastiveState& state = out.split(kName, all);
    ContrastiveIds ids;
    ids.apply(&all);
    check(kernels().contrastive_forward(all, state, loss, rank));
  }
};

// What a backward pass writes; the gradient of the scale is returned.
struct ContrastiveGradients {
  ContrastiveBackwardArgs out;
  bool want_dscale = false;
  void* dbias = nullptr;  // [1] acc, or null
  double dscale_value = 0.0, dbias_value = 0.0;

  static Fields fields() {
    using Call = ContrastiveGradients;
    return {
        SSLK_REQUIRED(Call, out.da, "da"),
        SSLK_REQUIRED(Call, out.db, "db"),
        SSLK_REQUIRED(Call, want_dscale, "want_dscale"),
        SSLK_OPTIONAL(Call, dbias, "dbias"),
    };
  }
  const ContrastiveBackwardArgs& begin() {
    out.dscale = want_dscale ? &dscale_value : nullptr;
    out.dbias = dbias != nullptr ? &dbias_value : nullptr;
    return out;
  }
  double finish(DType dtype) const {
    if (dbias != nullptr) write_scalar(dbias, dtype, dbias_value);
    return dscale_value;
  }
};

struct ContrastiveBackward {
  using Args = ContrastiveArgs;
  static constexpr const char* kName = "contrastive_backward";
  static constexpr const char* kDoc = "Gradients of a, b and the bias; returns the one of the scale.";
  const Args* args = nullptr;
  double sigma = 0.0;
  ContrastiveStateFields kept;
  ContrastiveGradients gradients;

  static Fields fields() {
    using Call = ContrastiveBackward;
    return inside(offsetof(Call, kept), ContrastiveStateFields::fields()) +
           Fields{
               SSLK_REQUIRED(Call, gradients.out.dloss, "dloss"),
               SSLK_SIZE(Call, gradients.out.dloss_stride, "dloss_stride"),
           } +
           inside(offsetof(Call, gradients), ContrastiveGradients::fields()) +
           Fields{
               SSLK_OPTIONAL(Call, sigma, "sigma"),
           };
  }
  double run() {
    ContrastiveArgs all = *args;
    all.sigma = sigma;
    require(kName, {{"dloss", gradients.out.dloss, all.a.n}});
    const ContrastiveState& state = kept.split(kName, all);
    ContrastiveIds ids;
    ids.apply(&all);
    check(kernels().contrastive_backward(all, state, gradients.begin()));
    return gradients.finish(all.dtype);
  }
};

struct ContrastiveAtOnce {
  using Args = ContrastiveArgs;
  static constexpr const char* kName = "contrastive_at_once";
  static constexpr const char* kDoc =
      "The value of a reduced loss without a bank, and its gradients; returns the one of the scale.";
  const Args* args = nullptr;
  double sigma = 0.0;
  ContrastiveState state;
  void* loss = nullptr;
  ContrastiveGradients gradients;

  static Fields fields() {
    using Call = ContrastiveAtOnce;
    return Fields{
               SSLK_REQUIRED(Call, state.lse, "state"),
               SSLK_REQUIRED(Call, loss, "loss"),
           } +
           inside(offsetof(Call, gradients), ContrastiveGradients::fields()) +
           Fields{
               SSLK_OPTIONAL(Call, sigma, "sigma"),
           };
  }
  double run() {
    if (args->layout == Layout::bank || args->reduction == Reduction::none) {
      throw std::invalid_argument("contrastive_at_once: it takes no layout 'bank' and no reduction 'none'");
    }
    ContrastiveArgs all = *args;
    all.sigma = sigma;
    require(kName, {{"loss", loss, 1}});
    split_state(kName, all, &state);
    ContrastiveIds ids;
    ids.apply(&all);
    check(kernels().contrastive_at_once(all, state, loss, gradients.begin()));
    return gradients.finish(all.dtype);
  }
};

struct KeptTiles {
  static constexpr const char* kName = "kept_tiles";
  static constexpr const char* kDoc = "Elements of the logits that forward should keep for backward, 0 for none.";
  Layout layout = Layout::joint;
  DType dtype = DType::f32;
  int64_t n = 0;
  int64_t d = 0;

  static Fields fields() {
    return {
        SSLK_REQUIRED(KeptTiles, layout, "layout"),
        SSLK_REQUIRED(KeptTiles, dtype, "dtype"),
        SSLK_SIZE(KeptTiles, n, "n"),
        SSLK_SIZE(KeptTiles, d, "d"),
    };
  }
  int64_t run() {
    // Of more rows nothing is kept, and their square is no number of 64 bits.
    return n < (int64_t(1) << 20) && d < (int64_t(1) << 20) ? kernels().kept_tiles(layout, dtype, n, d) : 0;
  }
};

// ---- Regression ----------------------------------------------------------------------------------

struct Regression {
  static constexpr const char* kName = Handle<RegressionArgs>::kName;
  static constexpr const char* kDoc = "2 - 2 cos by rows.";
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
  add_function<Contrastive>(definition);
  add_function<ContrastiveForward>(definition);
  add_function<ContrastiveBackward>(definition);
  add_function<ContrastiveAtOnce>(definition);
  add_function<KeptTiles>(definition);
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
