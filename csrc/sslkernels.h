// SPDX-License-Identifier: Apache-2.0
// The one C++ interface of the CPU kernels.  Torch-free: raw pointers, sizes, strides in elements.
//
// Kernels exist once per instruction set; `kernels()` returns the table of the one in use.
// Conventions: N, M rows; D features; every size and offset is int64_t.  Pointers marked "acc" are
// float for float32 and 16-bit inputs and double for float64.  Rows are contiguous in D unless a stride is given.
#pragma once

#include <cstdint>

namespace sslk {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

enum class Kind : int { lse = 0, softplus = 1 };

// A matrix of rows, each contiguous in D.
struct Rows {
  const void* data = nullptr;  // [n, d] of dtype
  int64_t n = 0;
  int64_t stride = 0;  // elements between rows
};

// One pass over the tiles of S = scale * Q K^T + bias; see sslkernels/backends/interface.py.
struct PairwiseArgs {
  Kind kind = Kind::lse;
  DType dtype = DType::f32;
  int64_t d = 0;
  bool self = false;  // K = Q: S is symmetric and only one triangle is computed
  // Rows are the concatenation of up to two matrices, so that NT-Xent needs no copy of its views.
  Rows q[2];
  Rows k[2];  // unused in self mode
  // [N] acc or null: row i is used as inv_q[i] * q_i, which must not be longer than 1 (fused normalisation).
  const void* inv_q = nullptr;
  const void* inv_k = nullptr;  // [M] acc or null
  bool normalize_k = false;     // attend only: keys are normalised as they are read
  double scale = 1.0;
  double bias = 0.0;
  const int64_t* ids_q = nullptr;  // [N] or null: (i, j) is excluded when ids_q[i] == ids_k[j]
  const int64_t* ids_k = nullptr;  // [M] or null; self mode: ids_q
  bool bf16 = false;               // multiply in bfloat16 (not float64; only where kernels().bf16 says so)
  int n_threads = 1;

  __attribute__((always_inline)) int64_t rows() const { return q[0].n + q[1].n; }
  __attribute__((always_inline)) int64_t cols() const { return self ? rows() : k[0].n + k[1].n; }
};

struct PairwiseForwardOut {
  void* row = nullptr;                  // [N] acc, or null
  void* col = nullptr;                  // [M] acc, or null: not wanted
  const void* threshold_row = nullptr;  // [N] acc in units of S, or null: no ranks
  const void* threshold_col = nullptr;  // [M] acc or null
  int64_t* rank_row = nullptr;          // [N]
  int64_t* rank_col = nullptr;          // [M]
  void* tiles = nullptr;                // acc, or null: the logits, kept for backward (see ContrastiveState)
};

struct PairwiseBackwardArgs {
  const void* row = nullptr;   // [N] acc
  const void* col = nullptr;   // [M] acc or null
  const void* drow = nullptr;  // [N] acc
  const void* dcol = nullptr;  // [M] acc or null
  void* dq = nullptr;          // [N, D] acc out: scale * (G k), or null
  void* dk = nullptr;          // [M, D] acc out: scale * (G^T q), or null
  // Elements between rows of dq and dk, and how many rows they hold.  With stride a multiple of 16
  // and capacity as large as padded_rows the kernel accumulates in place, without scratch.
  int64_t stride = 0;
  int64_t capacity_q = 0;
  int64_t capacity_k = 0;
  bool unscaled = false;        // leave the factor `scale` out of dq and dk
  const void* tiles = nullptr;  // what forward kept, or null: recomputed
  double* dbias = nullptr;      // sum of G, or null
};

struct AttendOut {
  void* lse = nullptr;              // [N] acc
  void* mean_key = nullptr;         // [N, D] acc
  const void* threshold = nullptr;  // [N] acc or null
  int64_t* rank = nullptr;          // [N]
};

// Whole losses with one positive a row, whose logit is l_r = scale * positive_r + bias.  Four of them have
// loss_r = softplus(lse over the negatives of r - l_r):
//   joint      NT-Xent: rows cat(a, b), the positive of row r is r + N mod 2N, negatives all other samples
//   cross      InfoNCE in the batch: rows a, columns b, the positive of row i is column i
//   both       CLIP: cross plus the same over the columns, averaged
//   bank       InfoNCE with a queue: rows a, positive b_i, negatives `bank`, which gets no gradient
// and three have heads of their own:
//   decoupled  DCL: rows of joint, loss_r = lse_r - w_r l_r (w_r = 1, or DCLW's: see ContrastiveArgs::sigma)
//   sigmoid    SigLIP: rows of cross, loss_r = softplus(-l_r) + sum of softplus over the negatives of r
//   classes    SupCon: rows a, against all other rows; the positives of row i are the others with its label,
//              positive_i their sum, loss_i = lse_i - scale * positive_i / how many they are, 0 without any
enum class Layout : int { joint = 0, cross = 1, both = 2, bank = 3, decoupled = 4, sigmoid = 5, classes = 6 };

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

// Rows grouped by label: class c is the rows order[begin[c]], ..., order[begin[c + 1] - 1], ascending.
struct Classes {
  const int64_t* order = nullptr;  // [N]
  const int64_t* begin = nullptr;  // [count + 1]
  int64_t count = 0;
};

struct ContrastiveArgs {
  Layout layout = Layout::joint;
  Reduction reduction = Reduction::mean;
  DType dtype = DType::f32;
  int64_t d = 0;
  Rows a;     // [N, D]
  Rows b;     // [N, D], not in layout classes
  Rows bank;  // [K, D], layout bank only
  bool normalize = true;
  double scale = 1.0;
  double bias = 0.0;               // layout sigmoid only
  double sigma = 0.0;              // layout decoupled: w_i = 2 - N softmax_i(positive / sigma); 0: w_i = 1
  const int64_t* ids_q = nullptr;  // [N] or null; null: the row number (bank: nothing is excluded)
  const int64_t* ids_k = nullptr;  // bank: [K] or null; otherwise ids_q serves both sides
  Classes classes;                 // layout classes only
  bool bf16 = false;               // as in PairwiseArgs; the positives are never rounded
  int n_threads = 1;

  // Whether S is that of rows with themselves.
  __attribute__((always_inline)) bool self() const { return joined() || layout == Layout::classes; }
  // Whether the rows are cat(a, b).
  __attribute__((always_inline)) bool joined() const { return layout == Layout::joint || layout == Layout::decoupled; }
  // Rows that are reduced: 2N where both sides count, N where one does.
  __attribute__((always_inline)) int64_t rows() const { return joined() || layout == Layout::both ? 2 * a.n : a.n; }
};

// What forward leaves for backward; R = rows().
struct ContrastiveState {
  void* lse = nullptr;       // [R] acc: log-sum-exp over the negatives (sigmoid: sum of softplus)
  void* positive = nullptr;  // [N] acc: <a_i, b_i> of the (normalised) rows, without scale
  void* inv = nullptr;       // [2N] acc: what a and b were multiplied with (1 without normalize)
  void* mean_key = nullptr;  // [N, D] acc, layout bank only
  // [kept_tiles()] acc, or null: the logits of all tiles.  With few rows they are as small as the inputs, and
  // reading them is faster than recomputing them.
  void* tiles = nullptr;
};

struct ContrastiveBackwardArgs {
  const void* dloss = nullptr;  // acc; element r * dloss_stride, r = 0 only unless reduction is none
  int64_t dloss_stride = 0;
  void* da = nullptr;  // [N, D] of dtype, contiguous, or null
  void* db = nullptr;  // [N, D] of dtype, contiguous, or null
  double* dscale = nullptr;
  double* dbias = nullptr;
};

// Rows divided by max(|x|, eps).
struct UnitArgs {
  DType dtype = DType::f32;  // of x; not f64
  double eps = 0;
  int64_t d = 0;
  Rows x;  // [N, D]
  int n_threads = 1;
};

// BYOL's regression, 2 - 2 cos(prediction_i, target_i), or SimSiam's -cos(prediction_i, target_i); the target
// gets no gradient.
struct RegressionArgs {
  bool cosine = false;
  Reduction reduction = Reduction::mean;
  DType dtype = DType::f32;
  int64_t d = 0;
  Rows prediction;  // [N, D]
  Rows target;      // [N, D]
  int n_threads = 1;
};

// InfoNCE with negatives of its own for every query; pair (i, m) is excluded when ids_q[i] == ids_k[i, m].
struct PairedArgs {
  Reduction reduction = Reduction::mean;
  DType dtype = DType::f32;
  int64_t d = 0;
  Rows query;                       // [N, D]
  Rows positive;                    // [N, D]
  const void* negatives = nullptr;  // [N, M, D] of dtype, contiguous in D; backward: null unless dnegatives
  int64_t m = 0;
  int64_t stride_row = 0;  // elements between the keys of one query and those of the next
  int64_t stride_key = 0;  // elements between keys
  bool normalize = true;
  double scale = 1.0;
  const int64_t* ids_q = nullptr;  // [N] or null: nothing is excluded
  const int64_t* ids_k = nullptr;  // [N, M] or null
  int n_threads = 1;
};

// What forward leaves for backward.
struct PairedState {
  void* lse = nullptr;       // [N] acc: log-sum-exp over the negatives
  void* positive = nullptr;  // [N] acc: <query_i, positive_i> of the (normalised) rows, without scale
  void* norms = nullptr;     // [2N] acc: what rows of query and positive were divided by
  void* mean_key = nullptr;  // [N, D] acc: softmax-weighted mean of the negatives
};

struct PairedForwardOut {
  void* loss = nullptr;          // acc, [N] or one element
  int64_t* rank = nullptr;       // [N] negatives above the positive
  double* similarity = nullptr;  // mean of <query_i, negative_im>, without scale
};

struct PairedBackwardArgs {
  const void* dloss = nullptr;  // acc; element i * dloss_stride, i = 0 only unless reduction is none
  int64_t dloss_stride = 0;
  void* dquery = nullptr;      // [N, D] of dtype, contiguous, or null
  void* dpositive = nullptr;   // [N, D] of dtype, contiguous, or null
  void* dnegatives = nullptr;  // [N, M, D] of dtype, contiguous, or null
  double* dscale = nullptr;
};

// The two terms of a variational autoencoder's loss by rows (csrc/cpu/vae.cpp): how well a decoder's output fits x...
enum class Likelihood : int { bernoulli = 0, gaussian = 1 };

struct VaeArgs {
  Likelihood likelihood = Likelihood::bernoulli;
  DType dtype = DType::f32;
  int64_t d = 0;
  Rows reconstruction;  // [N, D]
  Rows x;               // [N, D]
  Rows spread;          // [N, D] log-variances, gaussian only; or no data: variance 1
  int n_threads = 1;
};

// ... and how far the codes are from a standard normal.
struct VaeLatent {
  int64_t d = 0;                  // Z
  Rows mean;                      // [N, Z] of dtype
  Rows log_variance;              // [N, Z] of dtype
  const void* weights = nullptr;  // [Z] acc or null: 1
};

struct VaeBackwardArgs {
  const void* drec = nullptr;  // acc; element i * drec_stride
  int64_t drec_stride = 0;
  const void* dkl = nullptr;  // acc; element i * dkl_stride
  int64_t dkl_stride = 0;
  void* dreconstruction = nullptr;  // [N, D] of dtype, contiguous, or null
  void* dx = nullptr;               // the same
  void* dspread = nullptr;          // the same
  void* dmean = nullptr;            // [N, Z] of dtype, contiguous, or null
  void* dlog_variance = nullptr;    // the same
};

// Forward: out = mean + exp(log_variance / 2) eps; backward: out = dz exp(log_variance / 2) eps / 2.
struct NoiseArgs {
  DType dtype = DType::f32;            // of all that follow, contiguous
  int64_t n = 0;                       // elements
  const void* mean = nullptr;          // [n], forward only
  const void* log_variance = nullptr;  // [n]
  const void* dz = nullptr;            // [n], backward only
  void* out = nullptr;                 // [n]
  uint64_t seed = 0;                   // key of the random words
  int n_threads = 1;
};

// One feature map and what it should be.
struct FeatureEntry {
  const void* feature = nullptr;  // [N, d] of dtype, contiguous
  const void* target = nullptr;   // [N, d] of target_dtype, contiguous
  void* dfeature = nullptr;       // [N, d] of dtype, or null; backward only
  int64_t d = 0;
  DType dtype = DType::f32;
  DType target_dtype = DType::f32;
};

struct FeatureArgs {
  const FeatureEntry* entries = nullptr;  // [n_entries]
  int64_t n_entries = 0;                  // L
  int64_t n = 0;                          // samples
  bool smooth = false;                    // smooth L1 of width beta, not squares
  double beta = 1.0;
  bool wide = false;  // accumulate in float64: some entry is float64
  int n_threads = 1;
};

struct ExtremesOut {
  const void* bias_k = nullptr;  // [M] acc or null
  // [N] rows by ascending id, those of one id by ascending number, or null; self mode only.  It is there for speed.
  const int64_t* order = nullptr;
  int64_t* max_same = nullptr;   // [N]
  int64_t* min_other = nullptr;  // [N]
};

// The batch-hard triplet loss: of every row its hardest positive p and negative n (as extremes finds them) and
// loss_i = max(d(x_i, x_p) - d(x_i, x_n) + margin, 0); 0 where a row has no positive or no negative.
enum class TripletReduction : int { mean = 0, sum = 1, mean_nonzero = 2 };

struct TripletArgs {
  TripletReduction reduction = TripletReduction::mean;
  DType dtype = DType::f32;
  int64_t d = 0;
  Rows z;  // [N, D]
  bool normalize = false;
  bool cosine = false;  // 1 - <x, y> instead of |x - y|
  double margin = 0.0;
  const int64_t* ids = nullptr;    // [N]
  const int64_t* order = nullptr;  // [N], as in ExtremesOut; forward only
  int n_threads = 1;
};

// What forward leaves for backward.
struct TripletState {
  int64_t* chosen = nullptr;  // [2, N] positives and negatives, -1 where there is none
  void* distance = nullptr;   // [2, N] acc: from row i to those; 0 where one of the two is missing
  void* norm = nullptr;       // [N] acc: what rows were divided by
  void* share = nullptr;      // [1] acc: what a term counts in the loss; NaN where rows are not finite
};

struct TripletBackwardArgs {
  const void* dloss = nullptr;  // [1] acc
  void* dz = nullptr;           // [N, D] of dtype, contiguous, or null
  double* dmargin = nullptr;
};

// One pair of tensors of an EMA update, both contiguous; they may be the same memory but not overlap
// otherwise.
struct EmaEntry {
  void* target = nullptr;        // [n] of target_dtype
  const void* source = nullptr;  // [n] of source_dtype
  int64_t n = 0;
  int64_t begin = 0;  // elements in the entries before this one
  DType target_dtype = DType::f32;
  DType source_dtype = DType::f32;
  uint32_t index = 0;  // names the tensor in the counter of the random bits
  int64_t first = 0;   // place of target[0] in that tensor, of which this may be a part
};

// target = fma(decay, target, (1 - decay) * source), rounded once to the target's dtype.
struct EmaArgs {
  const EmaEntry* entries = nullptr;  // [n_entries], none empty
  int64_t n_entries = 0;
  int64_t n_elements = 0;  // in all entries
  double decay = 0.0;
  bool stochastic_rounding = false;  // of 16-bit targets
  uint64_t seed = 0;                 // key of the random bits
  uint32_t step = 0;                 // counter of the random bits
  int n_threads = 1;
};

// A batch of keys into a ring of rows: key i goes to row (ptr + i) mod K.
struct EnqueueArgs {
  void* queue = nullptr;  // [K, D] of queue_dtype
  DType queue_dtype = DType::f32;
  int64_t size = 0;         // K
  int64_t dim = 0;          // D
  int64_t* ptr = nullptr;   // [1] row to write next; advanced by n mod K
  int64_t* fill = nullptr;  // [1] valid rows; grows to K
  Rows keys;                // [N, D] of keys_dtype, not overlapping with the queue
  DType keys_dtype = DType::f32;
  bool normalize = true;
  int64_t* queue_labels = nullptr;  // [K] or null
  const int64_t* labels = nullptr;  // [N] or null
  int n_threads = 1;
};

// The kernels of one instruction set.  A function returns 0, or -1 when memory could not be had.
struct Kernels {
  const char* isa;
  bool bf16;  // PairwiseArgs::bf16 is implemented
  int (*pairwise_forward)(const PairwiseArgs&, const PairwiseForwardOut&);
  int (*pairwise_backward)(const PairwiseArgs&, const PairwiseBackwardArgs&);
  int (*attend)(const PairwiseArgs&, const AttendOut&);
  int (*extremes)(const PairwiseArgs&, const ExtremesOut&);
  double (*peak_flops)(bool bf16, int n_threads);
  int (*contrastive_forward)(const ContrastiveArgs&, const ContrastiveState&, void* loss, int64_t* rank);
  int (*contrastive_backward)(const ContrastiveArgs&, const ContrastiveState&, const ContrastiveBackwardArgs&);
  // Both for an incoming gradient of 1, with logits kept between them; neither layout bank nor Reduction::none.
  int (*contrastive_at_once)(const ContrastiveArgs&, const ContrastiveState&, void* loss,
                             const ContrastiveBackwardArgs&);
  int64_t (*kept_tiles)(Layout layout, DType dtype, int64_t n, int64_t d);          // elements; 0: not worth keeping
  int (*unit_forward)(const UnitArgs&, DType unit_dtype, void* unit, float* norm);  // [N, D], [N]
  int (*unit_backward)(const UnitArgs&, DType dunit_dtype, const Rows& dunit, const float* norm, void* dx);
  int (*regression_forward)(const RegressionArgs&, void* state, void* loss);
  int (*regression_backward)(const RegressionArgs&, const void* state, const void* dloss, int64_t dloss_stride,
                             void* dprediction);
  int (*paired_forward)(const PairedArgs&, const PairedState&, const PairedForwardOut&);
  int (*paired_backward)(const PairedArgs&, const PairedState&, const PairedBackwardArgs&);
  int (*triplet_forward)(const TripletArgs&, const TripletState&, void* loss);
  int (*triplet_backward)(const TripletArgs&, const TripletState&, const TripletBackwardArgs&);
  int (*vae_forward)(const VaeArgs&, const VaeLatent&, void* reconstruction, void* kl);  // [N] acc each
  int (*vae_backward)(const VaeArgs&, const VaeLatent&, const VaeBackwardArgs&);
  int (*reparameterize)(const NoiseArgs&);
  int (*features_forward)(const FeatureArgs&, void* out);          // [N, L] acc
  int (*features_backward)(const FeatureArgs&, const void* dout);  // [N, L] acc
  int (*ema_update)(const EmaArgs&);
  int (*enqueue)(const EnqueueArgs&);
};

const Kernels& kernels();

double round_trip(int exchanges);  // round_trip.cpp

}  // namespace sslk
