// SPDX-License-Identifier: Apache-2.0
// Bindings of the tile engine: what is reduced over the tiles of S = scale * Q K^T + bias.

#include "bindings.h"
#include "classes.h"
#include "narrow_ids.h"

namespace sslk {

template <>
struct Handle<PairwiseArgs> {
  static constexpr const char* kName = "tiles";
};

namespace {

struct Tiles {
  static constexpr const char* kName = Handle<PairwiseArgs>::kName;
  static constexpr const char* kDoc = "What S is.  m = -1: the keys are the queries (self mode), and k is None.";
  PairwiseArgs args;
  int64_t m = 0;
  const void* scale = nullptr;  // [1] acc
  const void* bias = nullptr;   // [1] acc or null

  static Fields fields() {
    return {
        SSLK_REQUIRED(Tiles, args.kind, "kind"),
        SSLK_REQUIRED(Tiles, args.dtype, "dtype"),
        SSLK_SIZE(Tiles, args.d, "d"),
        SSLK_REQUIRED(Tiles, args.q[0].data, "q"),
        SSLK_SIZE(Tiles, args.q[0].n, "n"),
        SSLK_REQUIRED(Tiles, args.k[0].data, "k"),
        SSLK_REQUIRED(Tiles, m, "m"),
        SSLK_REQUIRED(Tiles, scale, "scale"),
        SSLK_REQUIRED(Tiles, bias, "bias"),
        SSLK_REQUIRED(Tiles, args.ids_q, "ids_q"),
        SSLK_REQUIRED(Tiles, args.ids_k, "ids_k"),
        SSLK_THREADS(Tiles, args.n_threads),
    };
  }
  PairwiseArgs run() {
    args.self = m < 0;
    if (m < -1 || m > kMostElements) throw std::invalid_argument("tiles: m must be -1 or a size: 0 to 2^47");
    require(kName, {{"q", args.q[0].data, args.q[0].n, args.d},
                    {"k", args.k[0].data, args.self ? 0 : m, args.d},
                    {"scale", scale, 1},
                    {"ids_q", args.ids_q, !args.self && args.ids_k != nullptr ? args.q[0].n : 0},
                    {"ids_k", args.ids_k, !args.self && args.ids_q != nullptr ? m : 0}});
    args.q[0].stride = args.k[0].stride = args.d;
    args.k[0].n = args.self ? 0 : m;
    args.scale = read_scalar(scale, args.dtype);
    args.bias = read_scalar(bias, args.dtype);
    return args;
  }
};

// The tiles with ids that fit into 32 bits.
class NarrowTiles {
 public:
  explicit NarrowTiles(const PairwiseArgs& args) : args_(args) {
    narrow_.apply(args.dtype, &args_.ids_q, args.rows(), &args_.ids_k, args.self ? 0 : args.cols());
  }
  const PairwiseArgs& get() const { return args_; }

 private:
  PairwiseArgs args_;
  NarrowIds narrow_;
};

struct PairwiseForward {
  using Args = PairwiseArgs;
  static constexpr const char* kName = "pairwise_forward";
  static constexpr const char* kDoc = "Reductions of rows and columns, and ranks.";
  const Args* args = nullptr;
  PairwiseForwardOut out;

  static Fields fields() {
    using Call = PairwiseForward;
    return {
        SSLK_REQUIRED(Call, out.row, "row"),
        SSLK_REQUIRED(Call, out.col, "col"),
        SSLK_REQUIRED(Call, out.threshold_row, "threshold_row"),
        SSLK_REQUIRED(Call, out.threshold_col, "threshold_col"),
        SSLK_REQUIRED(Call, out.rank_row, "rank_row"),
        SSLK_REQUIRED(Call, out.rank_col, "rank_col"),
    };
  }
  void run() {
    const int64_t n = args->rows(), m = args->cols();
    if (!args->self && out.col == nullptr && out.threshold_col != nullptr) {
      throw std::invalid_argument("pairwise_forward: threshold_col needs col, ranks are counted beside the columns");
    }
    require(kName, {{"row", out.row, n},
                    {"rank_row", out.rank_row, out.threshold_row != nullptr ? n : 0},
                    {"rank_col", out.rank_col, out.threshold_col != nullptr ? m : 0}});
    check(kernels().pairwise_forward(NarrowTiles(*args).get(), out));
  }
};

struct PairwiseBackward {
  using Args = PairwiseArgs;
  static constexpr const char* kName = "pairwise_backward";
  static constexpr const char* kDoc = "Gradients of queries and keys; returns the one of the bias.";
  const Args* args = nullptr;
  PairwiseBackwardArgs out;

  static Fields fields() {
    using Call = PairwiseBackward;
    return {
        SSLK_REQUIRED(Call, out.row, "row"),   SSLK_REQUIRED(Call, out.col, "col"),
        SSLK_REQUIRED(Call, out.drow, "drow"), SSLK_REQUIRED(Call, out.dcol, "dcol"),
        SSLK_REQUIRED(Call, out.dq, "dq"),     SSLK_REQUIRED(Call, out.dk, "dk"),
    };
  }
  double run() {
    double dbias = 0.0;
    const bool lse = args->kind == Kind::lse;
    require(kName, {{"row", out.row, lse && out.drow != nullptr ? args->rows() : 0},
                    {"col", out.col, lse && out.dcol != nullptr && !args->self ? args->cols() : 0},
                    {"dq", out.dq, args->self ? args->rows() : 0, args->d}});
    if (args->self && out.dk != nullptr) throw std::invalid_argument("pairwise_backward: dk has no place in self mode");
    out.stride = args->d;
    out.capacity_q = args->q[0].n;
    out.capacity_k = args->k[0].n;
    out.dbias = &dbias;
    check(kernels().pairwise_backward(NarrowTiles(*args).get(), out));
    return dbias;
  }
};

struct Attend {
  using Args = PairwiseArgs;
  static constexpr const char* kName = "attend";
  static constexpr const char* kDoc = "Log-sum-exp of rows, and the mean of the keys with softmax weights.";
  const Args* args = nullptr;
  AttendOut out;

  static Fields fields() {
    using Call = Attend;
    return {
        SSLK_REQUIRED(Call, out.lse, "lse"),
        SSLK_REQUIRED(Call, out.mean_key, "mean_key"),
        SSLK_REQUIRED(Call, out.threshold, "threshold"),
        SSLK_REQUIRED(Call, out.rank, "rank"),
    };
  }
  void run() {
    const int64_t n = args->rows();
    require(kName, {{"lse", out.lse, n},
                    {"mean_key", out.mean_key, n, args->d},
                    {"rank", out.rank, out.threshold != nullptr ? n : 0}});
    check(kernels().attend(NarrowTiles(*args).get(), out));
  }
};

struct Extremes {
  using Args = PairwiseArgs;
  static constexpr const char* kName = "extremes";
  static constexpr const char* kDoc = "Of every row, the largest of the same id and the smallest of another.";
  const Args* args = nullptr;
  ExtremesOut out;

  static Fields fields() {
    using Call = Extremes;
    return {
        SSLK_REQUIRED(Call, out.bias_k, "bias_k"),
        SSLK_REQUIRED(Call, out.max_same, "max_same"),
        SSLK_REQUIRED(Call, out.min_other, "min_other"),
    };
  }
  void run() {
    const int64_t n = args->rows();
    require(kName, {{"ids_q", args->ids_q, n}, {"max_same", out.max_same, n}, {"min_other", out.min_other, n}});
    const NarrowTiles tiles(*args);
    const PairwiseArgs& narrow = tiles.get();
    GroupedRows rows;
    if (narrow.self && narrow.ids_q != nullptr) out.order = rows.sort(narrow.ids_q, narrow.rows());
    check(kernels().extremes(narrow, out));
  }
};

}  // namespace

void bind_pairwise(Definition& definition) {
  add_function<Tiles>(definition);
  add_function<PairwiseForward>(definition);
  add_function<PairwiseBackward>(definition);
  add_function<Attend>(definition);
  add_function<Extremes>(definition);
}

}  // namespace sslk
