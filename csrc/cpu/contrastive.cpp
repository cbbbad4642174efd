// SPDX-License-Identifier: Apache-2.0
// Whole contrastive losses in one call: normalisation, tiles, head and reduction, forward and backward.
// At N = 64 the Python and dispatch cost of composing them from separate ops would be several times
// that of the mathematics.
//
// The head takes the positive out of the tiles (Layout in sslkernels.h):
//
//   loss_r = log(1 + exp(lse_r - p_r)),   lse_r over the negatives,   p_r = scale * <x_r, x_r'>
//   w_r = dloss_r / (1 + exp(p_r - lse_r)) = d loss_r / d lse_r = -d loss_r / d p_r
//
// which keeps full relative accuracy when the positive dominates (small temperatures, aligned views),
// where 1 - softmax cancels.  Sums over rows are in double and in row order.
//
// The tiles are called through the table of kernels: in bfloat16 they belong to another instruction set.
//
// Plain-torch twin: sslkernels/reference.py (nt_xent_loss, info_nce_loss, clip_loss).

#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

// f(x), but 0 where a row has no negatives (lse = -inf) or e^x is not a normal number.
Vec<double> flush(Vec<double> x, Vec<double> f) { return x < -708.0 ? Vec<double>{} : f; }

// The head, several rows at a time: visit(r, count, lse - p) for rows r .. r + count, count <= W.
template <class T, class Visit>
void for_all_rows(const ContrastiveArgs& args, const ContrastiveState& state, Visit visit) {
  constexpr int W = Simd<double>::kLanes;
  const T* lse = static_cast<const T*>(state.lse);
  const T* positive = static_cast<const T*>(state.positive);
  const int64_t n = args.a.n;
  for (int64_t half = 0; half < args.rows(); half += n > 0 ? n : 1) {
    for (int64_t i = 0; i < n; i += W) {
      const int count = int(min64(W, n - i));
      Vec<double> l = {}, p = {};
      for (int c = 0; c < count; ++c) l[c] = double(lse[half + i + c]), p[c] = double(positive[i + c]);
      visit(half + i, count, l - args.scale * p);
    }
  }
}

int row_threads(const ContrastiveArgs& args) { return args.a.n * args.d < kSerialRows ? 1 : args.n_threads; }

// Inverse norms of both views and the dot product of every positive pair.
template <class T>
void prepare(const ContrastiveArgs& args, const ContrastiveState& state, const PerThread<T>& buffers) {
  T* inv = static_cast<T*>(state.inv);
  T* positive = static_cast<T*>(state.positive);
  const Rows none{};
  const Rows a[2] = {args.a, none}, b[2] = {args.b, none};
  const Source<T> sa = make_source<T>(args.dtype, a, nullptr, args.d);
  const Source<T> sb = make_source<T>(args.dtype, b, nullptr, args.d);
#pragma omp parallel num_threads(row_threads(args))
  {
    T* x = buffers.mine();
    T* y = x + args.d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.a.n; ++i) {
      const T *xa = sa.view(i, x), *xb = sb.view(i, y);
      const T ia = args.normalize ? inverse_norm(xa, args.d) : T(1);
      const T ib = args.normalize ? inverse_norm(xb, args.d) : T(1);
      inv[i] = ia;
      inv[args.a.n + i] = ib;
      positive[i] = dot(xa, xb, args.d) * ia * ib;
    }
  }
}

// The tile pass of a layout.  `row_ids` is filled here when the caller gave none.
PairwiseArgs tiles(const ContrastiveArgs& args, const ContrastiveState& state, int64_t* row_ids) {
  PairwiseArgs p;
  p.dtype = args.dtype;
  p.d = args.d;
  p.scale = args.scale;
  p.bf16 = args.bf16;
  p.n_threads = args.n_threads;
  p.q[0] = args.a;
  const int64_t n = args.a.n;
  const int64_t size = args.dtype == DType::f64 ? 8 : 4;
  p.inv_q = args.normalize ? state.inv : nullptr;
  if (args.layout == Layout::bank) {
    p.k[0] = args.bank;
    p.normalize_k = args.normalize;
    p.ids_q = args.ids_q;
    p.ids_k = args.ids_k;
    return p;
  }
  for (int64_t i = 0; i < 2 * n; ++i) {
    row_ids[i] = args.ids_q != nullptr ? args.ids_q[i % n] : i % n;
  }
  p.ids_q = row_ids;
  if (args.layout == Layout::joint) {
    p.self = true;
    p.q[1] = args.b;
  } else {
    p.k[0] = args.b;
    p.ids_k = row_ids;
    if (args.normalize) p.inv_k = static_cast<const char*>(state.inv) + n * size;
  }
  return p;
}

// Logits are kept while they are about twice as many as the inputs, and never more bytes than this.
constexpr int64_t kMostKeptBytes = int64_t(4) << 20;

template <class T>
int forward(const ContrastiveArgs& args, const ContrastiveState& state, T* loss, int64_t* rank) {
  const int64_t n = args.a.n, rows = args.rows();
  Workspace w;
  PerThread<T> buffers;
  T* threshold = nullptr;
  int64_t* row_ids = nullptr;
  w.plan(&buffers, 2 * args.d, args.n_threads);
  w.plan(&threshold, 2 * n);
  w.plan(&row_ids, 2 * n);
  if (!w.allocate()) return -1;

  prepare(args, state, buffers);
  const T* positive = static_cast<const T*>(state.positive);
  T* lse = static_cast<T*>(state.lse);
  const PairwiseArgs p = tiles(args, state, row_ids);
  for (int64_t i = 0; rank != nullptr && i < 2 * n; ++i) threshold[i] = positive[i % n] * T(args.scale);
  int status;
  if (args.layout == Layout::bank) {
    AttendOut out;
    out.lse = lse;
    out.mean_key = state.mean_key;
    out.threshold = rank != nullptr ? threshold : nullptr;
    out.rank = rank;
    status = kernels().attend(p, out);
  } else {
    PairwiseForwardOut out;
    out.row = lse;
    out.threshold_row = rank != nullptr ? threshold : nullptr;
    out.rank_row = rank;
    out.tiles = state.tiles;
    if (args.layout == Layout::both) {
      out.col = lse + n;
      out.threshold_col = out.threshold_row;
      out.rank_col = rank != nullptr ? rank + n : nullptr;
    }
    status = kernels().pairwise_forward(p, out);
  }
  if (status != 0) return status;

  const bool none = args.reduction == Reduction::none, both = args.layout == Layout::both;
  double sum = 0;
  for_all_rows<T>(args, state, [&](int64_t r, int count, Vec<double> x) {
    const Vec<double> value = flush(x, softplus_v<double>(x));
    for (int c = 0; c < count; ++c) {
      sum += value[c];
      if (!none) continue;
      T* at = loss + (both ? (r + c) % n : r + c);
      *at = T(both ? (r < n ? 0.0 : double(*at)) + value[c] / 2 : value[c]);
    }
  });
  if (args.reduction == Reduction::mean) *loss = T(rows > 0 ? sum / double(rows) : 0.0);
  if (args.reduction == Reduction::sum) *loss = T(args.layout == Layout::both ? sum / 2 : sum);
  return 0;
}

// d(normalise): dx = inv * (g - x_hat <x_hat, g>); below the eps of the norm the factor is a constant.
template <class T>
void finish_row(const ContrastiveArgs& args, const T* x_hat, T inv, T* g) {
  if (!args.normalize) return;
  const T along = inv < T(1.0 / kNormEps) ? dot(x_hat, g, args.d) : T(0);
  for (int64_t c = 0; c < args.d; ++c) g[c] = (g[c] - x_hat[c] * along) * inv;
}

template <class T>
int backward(const ContrastiveArgs& args, const ContrastiveState& state, const ContrastiveBackwardArgs& b) {
  const int64_t n = args.a.n, d = args.d, rows = args.rows();
  const bool joint = args.layout == Layout::joint, bank = args.layout == Layout::bank;
  const bool want_scale = b.dscale != nullptr;
  // dscale is read off the gradient of a (joint: of both views), so that one is then computed too.
  const bool want_a = joint || bank || b.da != nullptr || want_scale;
  const bool want_b = joint || b.db != nullptr;
  const int64_t stride = round_up(d, kRowAlign);
  const int64_t pad_a = bank ? 0 : padded_rows(joint ? 2 * n : n);
  const int64_t pad_b = joint || bank || !want_b ? 0 : padded_rows(n);
  // Where the results have the shape that the tiles accumulate in, they need no scratch.
  const bool in_place =
      !joint && !bank && stride == d && pad_a == n && (args.dtype == DType::f32 || args.dtype == DType::f64);

  Workspace w;
  PerThread<T> buffers;
  T *weight = nullptr, *ga = nullptr, *gb = nullptr;
  double* along = nullptr;
  int64_t* row_ids = nullptr;
  w.plan(&buffers, 4 * d, args.n_threads);
  w.plan(&weight, 2 * n);
  w.plan(&along, n);
  w.plan(&row_ids, 2 * n);
  const bool scratch_a = want_a && !(in_place && b.da != nullptr), scratch_b = want_b && !in_place;
  if (scratch_a) w.plan(&ga, pad_a * stride);
  if (scratch_b) w.plan(&gb, pad_b * stride);
  if (!w.allocate()) return -1;
  if (want_a && !scratch_a) ga = static_cast<T*>(b.da);
  if (want_b && !scratch_b) gb = static_cast<T*>(b.db);

  const T* lse = static_cast<const T*>(state.lse);
  const T* inv = static_cast<const T*>(state.inv);
  const T* dloss = static_cast<const T*>(b.dloss);
  const double mean = args.reduction == Reduction::mean ? 1.0 / double(max64(rows, 1)) : 1.0;
  const double half = args.layout == Layout::both && args.reduction != Reduction::mean ? 0.5 : 1.0;
  const int64_t outputs = joint ? 2 * n : n;
  const bool none = args.reduction == Reduction::none;
  for_all_rows<T>(args, state, [&](int64_t r, int count, Vec<double> x) {
    const Vec<double> probability = flush(x, logistic_v<double>(x));
    for (int c = 0; c < count; ++c) {
      const double g = dloss[none ? (r + c) % outputs * b.dloss_stride : 0];
      weight[r + c] = T(g * mean * half * probability[c]);
    }
  });

  if (!bank) {
    const PairwiseArgs p = tiles(args, state, row_ids);
    PairwiseBackwardArgs out;
    out.row = lse;
    out.drow = weight;
    if (args.layout == Layout::both) {
      out.col = lse + n;
      out.dcol = weight + n;
    }
    out.dq = ga;
    out.dk = joint ? nullptr : gb;
    out.stride = stride;
    out.capacity_q = pad_a;
    out.capacity_k = pad_b;
    out.unscaled = true;
    out.tiles = state.tiles;
    const int status = kernels().pairwise_backward(p, out);
    if (status != 0) return status;
  }

  // Add the positives, undo the normalisation, write.
  const Rows empty{};
  const Rows part_a[2] = {args.a, empty}, part_b[2] = {args.b, empty};
  const Source<T> sa = make_source<T>(args.dtype, part_a, inv, d);
  const Source<T> sb = make_source<T>(args.dtype, part_b, inv + n, d);
  const T scale = T(args.scale);
#pragma omp parallel num_threads(row_threads(args))
  {
    T* xa = buffers.mine();
    T *xb = xa + d, *fa = xb + d, *fb = fa + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      sa.row(i, xa);
      sb.row(i, xb);
      const T pair = weight[i] + (rows > n ? weight[n + i] : T(0));
      const T* from_a = bank ? static_cast<const T*>(state.mean_key) + i * d : ga + i * stride;
      const T* from_b = joint ? ga + (n + i) * stride : gb + i * stride;
      const T times_a = bank ? weight[i] : T(1);
      double dot_sum = 0;
      if (want_a) {
        for (int64_t c = 0; c < d; ++c) fa[c] = from_a[c] * times_a - pair * xb[c];
        dot_sum += double(dot(xa, fa, d));
      }
      if (want_b) {
        for (int64_t c = 0; c < d; ++c) fb[c] = (bank ? T(0) : from_b[c]) - pair * xa[c];
        if (joint) dot_sum = (dot_sum + double(dot(xb, fb, d))) / 2;
      }
      along[i] = dot_sum;
      for (int64_t c = 0; want_a && c < d; ++c) fa[c] *= scale;
      for (int64_t c = 0; want_b && c < d; ++c) fb[c] *= scale;
      if (b.da != nullptr) {
        finish_row(args, xa, inv[i], fa);
        write_row<T>(args.dtype, fa, d, b.da, i * d);
      }
      if (b.db != nullptr) {
        finish_row(args, xb, inv[n + i], fb);
        write_row<T>(args.dtype, fb, d, b.db, i * d);
      }
    }
  }
  if (want_scale) {
    *b.dscale = 0;
    for (int64_t i = 0; i < n; ++i) *b.dscale += along[i];
  }
  return 0;
}

}  // namespace

int contrastive_forward(const ContrastiveArgs& args, const ContrastiveState& state, void* loss, int64_t* rank) {
  return args.dtype == DType::f64 ? forward(args, state, static_cast<double*>(loss), rank)
                                  : forward(args, state, static_cast<float*>(loss), rank);
}

int contrastive_backward(const ContrastiveArgs& args, const ContrastiveState& state, const ContrastiveBackwardArgs& b) {
  return args.dtype == DType::f64 ? backward<double>(args, state, b) : backward<float>(args, state, b);
}

int64_t kept_tiles(Layout layout, DType dtype, int64_t n, int64_t d) {
  const bool joint = layout == Layout::joint;
  const int64_t rows = joint ? 2 * n : n;
  // Rows that one thread finishes in 10 us are not worth another array.
  if (layout == Layout::bank || rows > 4 * d || rows * rows * d < kSerialWork) return 0;
  const bool f64 = dtype == DType::f64;
  const int64_t size = f64 ? kept_elements<MathF64>(joint, rows, rows) : kept_elements<MathF32>(joint, rows, rows);
  return size * (f64 ? 8 : 4) <= kMostKeptBytes ? size : 0;
}

SSLK_END
