// SPDX-License-Identifier: Apache-2.0
// Bindings of the contrastive losses (NT-Xent, InfoNCE, CLIP, DCL, SigLIP, SupCon): forward, backward, both at once.

#include "bindings.h"
#include "classes.h"
#include "narrow_ids.h"

namespace sslk {

template <>
struct Handle<ContrastiveArgs> {
  static constexpr const char* kName = "contrastive";
};

namespace {

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

}  // namespace

void bind_contrastive(Definition& definition) {
  add_function<Contrastive>(definition);
  add_function<ContrastiveForward>(definition);
  add_function<ContrastiveBackward>(definition);
  add_function<ContrastiveAtOnce>(definition);
  add_function<KeptTiles>(definition);
}

}  // namespace sslk
