// SPDX-License-Identifier: Apache-2.0
// Whole contrastive losses in one call: normalisation, tiles, head and reduction, forward and backward.
// At N = 64 the Python and dispatch cost of composing them from separate ops would be several times
// that of the mathematics.
//
// The head takes the positive out of the tiles (Layout in sslkernels.h).  With row_r reduced over the negatives
// and l_r = scale * <x_r, x_r'> + bias, the softmax family has
//
//   loss_r = log(1 + exp(row_r - l_r)),   d loss_r / d row_r = -d loss_r / d l_r = 1 / (1 + exp(l_r - row_r))
//
// which keeps full relative accuracy when the positive dominates (small temperatures, aligned views),
// where 1 - softmax cancels.  Sums over rows are in double and in row order.
//
// The tiles are called through the table of kernels: in bfloat16 they belong to another instruction set.
//
// Plain-torch twin: sslkernels/reference.py (nt_xent_loss, info_nce_loss, clip_loss, dcl_loss, siglip_loss,
// sup_con_loss).

#include "classes.h"
#include "engine.h"
#include "kernels.h"

SSLK_BEGIN
namespace {

// f(x), but 0 where a row has no negatives (lse = -inf) or e^x is not a normal number.
Vec<double> flush(Vec<double> x, Vec<double> f) { return x < -708.0 ? Vec<double>{} : f; }

// Several rows as the head sees them.
struct HeadRows {
  Vec<double> row, logit;
  Vec<double> weight;  // of the positive: layout decoupled; classes: 0 where a row has none, and no loss
};

Vec<double> head_loss(Layout layout, const HeadRows& h) {
  if (layout == Layout::decoupled) {
    return (h.row == -HUGE_VAL ? Vec<double>{} : h.row) - h.weight * h.logit;
  }
  if (layout == Layout::classes) return h.weight == 0 ? Vec<double>{} : h.row - h.weight * h.logit;
  const Vec<double> x = layout == Layout::sigmoid ? -h.logit : h.row - h.logit;
  const Vec<double> loss = flush(x, softplus_v(x));
  return layout == Layout::sigmoid ? loss + h.row : loss;
}

// The derivative by `row`, and minus the one by `logit`.
struct Slopes {
  Vec<double> row, pull;
};

Slopes head_slopes(Layout layout, const HeadRows& h) {
  const Vec<double> one = splat<double>(1.0);
  if (layout == Layout::decoupled) return {one, h.weight};
  if (layout == Layout::classes) return {h.weight == 0 ? Vec<double>{} : one, h.weight};
  const Vec<double> x = layout == Layout::sigmoid ? -h.logit : h.row - h.logit;
  const Vec<double> probability = flush(x, logistic_v(x));
  return {layout == Layout::sigmoid ? one : probability, probability};
}

// The weights of DCLW's positives.
template <class T>
void fill_weights(const ContrastiveArgs& args, const ContrastiveState& state, double* weight) {
  const T* positive = static_cast<const T*>(state.positive);
  const int64_t n = args.a.n;
  double most = -HUGE_VAL, sum = 0;
  for (int64_t i = 0; i < n; ++i) most = positive[i] > most ? double(positive[i]) : most;
  for (int64_t i = 0; i < n; ++i) sum += weight[i] = std::exp((double(positive[i]) - most) / args.sigma);
  for (int64_t i = 0; i < n; ++i) weight[i] = 2.0 - double(n) * weight[i] / sum;
}

// The head, several rows at a time: visit(r, count, rows) for rows r .. r + count, count <= W.
// `weight`: [N], or null for 1.
template <class T, class Visit>
void for_all_rows(const ContrastiveArgs& args, const ContrastiveState& state, const double* weight, Visit visit) {
  constexpr int W = Simd<double>::kLanes;
  const T* lse = static_cast<const T*>(state.lse);
  const T* positive = static_cast<const T*>(state.positive);
  const int64_t n = args.a.n;
  for (int64_t half = 0; half < args.rows(); half += n > 0 ? n : 1) {
    for (int64_t i = 0; i < n; i += W) {
      const int count = int(min64(W, n - i));
      HeadRows h{{}, {}, splat<double>(1.0)};
      for (int c = 0; c < count; ++c) h.row[c] = double(lse[half + i + c]), h.logit[c] = double(positive[i + c]);
      for (int c = 0; weight != nullptr && c < count; ++c) h.weight[c] = weight[i + c];
      h.logit = args.scale * h.logit + args.bias;
      visit(half + i, count, h);
    }
  }
}

int row_threads(const ContrastiveArgs& args) { return args.a.n * args.d < kSerialRows ? 1 : args.n_threads; }

// Inverse norms, and for every row the sum of its dot products with the others of its class.
template <class T>
void prepare_classes(const ContrastiveArgs& args, const ContrastiveState& state, const PerThread<T>& buffers,
                     const PerThread<double>& sums) {
  const Classes& classes = args.classes;
  T* inv = static_cast<T*>(state.inv);
  T* positive = static_cast<T*>(state.positive);
  const Rows part[2] = {args.a, Rows{}};
  const Source<T> raw = make_source<T>(args.dtype, part, nullptr, args.d);
  const Source<T> rows = make_source<T>(args.dtype, part, args.normalize ? inv : nullptr, args.d);
  for (int64_t i = 0; i < args.a.n; ++i) inv[args.a.n + i] = T(1);
#pragma omp parallel num_threads(row_threads(args))
  {
    T* x = buffers.mine();
    double* sum = sums.mine();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.a.n; ++i) inv[i] = args.normalize ? inverse_norm(raw.view(i, x), args.d) : T(1);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < classes.count; ++c) {
      sum_class<T>(classes, c, rows, nullptr, x, sum);
      for (int64_t at = classes.begin[c]; at < classes.begin[c + 1]; ++at) {
        const int64_t i = classes.order[at];
        const T* row = rows.view(i, x);
        double product = 0;
        for (int64_t k = 0; k < args.d; ++k) product += (sum[k] - double(row[k])) * double(row[k]);
        positive[i] = T(product);
      }
    }
  }
}

// <ia a, ib b>, where <a, b> overflows: rows whose norms do become rows of zeros, as for the tiles.
template <class T>
T dot_of_units(const T* a, T ia, const T* b, T ib, int64_t d) {
  T sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += (a[c] * ia) * (b[c] * ib);
  return sum;
}

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
      const T product = dot(xa, xb, args.d) * ia * ib;
      positive[i] = product == product ? product : dot_of_units(xa, ia, xb, ib, args.d);
    }
  }
}

// The tile pass of a layout.  `row_ids` is filled here when the caller gave none.
PairwiseArgs tiles(const ContrastiveArgs& args, const ContrastiveState& state, int64_t* row_ids) {
  PairwiseArgs p;
  p.dtype = args.dtype;
  p.d = args.d;
  p.scale = args.scale;
  p.bias = args.bias;
  if (args.layout == Layout::sigmoid) p.kind = Kind::softplus;
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
  for (int64_t i = 0; i < 2 * n; ++i) row_ids[i] = args.ids_q != nullptr ? args.ids_q[i % n] : i % n;
  p.ids_q = row_ids;
  if (args.self()) {
    p.self = true;
    if (args.joined()) p.q[1] = args.b;
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
  const bool by_class = args.layout == Layout::classes;
  Workspace w;
  PerThread<T> buffers;
  PerThread<double> sums;
  T* threshold = nullptr;
  int64_t* row_ids = nullptr;
  double* positive_weight = nullptr;
  w.plan(&buffers, 2 * args.d, args.n_threads);
  w.plan(&threshold, 2 * n);
  w.plan(&row_ids, 2 * n);
  if (by_class || args.sigma > 0) w.plan(&positive_weight, n);
  if (by_class) w.plan(&sums, args.d, args.n_threads);
  if (!w.allocate()) return -1;

  int64_t terms = rows;
  if (by_class) {
    terms = fill_class_weights(args.classes, positive_weight);
    prepare_classes(args, state, buffers, sums);
  } else {
    prepare(args, state, buffers);
  }
  if (args.sigma > 0) fill_weights<T>(args, state, positive_weight);
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
  for_all_rows<T>(args, state, positive_weight, [&](int64_t r, int count, const HeadRows& h) {
    const Vec<double> value = head_loss(args.layout, h);
    for (int c = 0; c < count; ++c) {
      sum += value[c];
      if (!none) continue;
      T* at = loss + (both ? (r + c) % n : r + c);
      *at = T(both ? (r < n ? 0.0 : double(*at)) + value[c] / 2 : value[c]);
    }
  });
  if (args.reduction == Reduction::mean) *loss = T(terms > 0 ? sum / double(terms) : 0.0);
  if (args.reduction == Reduction::sum) *loss = T(args.layout == Layout::both ? sum / 2 : sum);
  return 0;
}

// d(normalise): dx = inv * (g - x_hat <x_hat, g>); below the eps of the norm the factor is a constant.
template <class T>
void finish_row(const ContrastiveArgs& args, const T* x_hat, T inv, T* g) {
  if (!args.normalize) return;
  // Of one feature the unit is a sign, where x_hat may be a rounding off: what cancels must cancel.
  const T sign = args.d == 1 ? std::copysign(T(1), x_hat[0]) : T(1);
  if (args.d == 1) x_hat = &sign;
  const T along = inv < T(1.0 / kNormEps) ? dot(x_hat, g, args.d) : T(0);
  for (int64_t c = 0; c < args.d; ++c) g[c] = (g[c] - x_hat[c] * along) * inv;
}

// Adds the positives of layout classes to the gradient of the tiles, undoes the normalisation, writes.  With v the
// gradients of the positives' logits, C the sum of a class and V its sum of v_j x_j, row i gets
// -(v_i (C - x_i) + V - v_i x_i).
template <class T>
void add_classes(const ContrastiveArgs& args, const ContrastiveBackwardArgs& b, const PerThread<T>& buffers,
                 const PerThread<double>& sums, const T* pull, const T* inv, const T* from_tiles, int64_t stride,
                 double* along) {
  const Classes& classes = args.classes;
  const int64_t d = args.d;
  const Rows part[2] = {args.a, Rows{}};
  const Source<T> rows = make_source<T>(args.dtype, part, args.normalize ? inv : nullptr, d);
#pragma omp parallel num_threads(row_threads(args))
  {
    T *buffer = buffers.mine(), *f = buffer + d;
    double *sum = sums.mine(), *weighted = sum + d;
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < classes.count; ++c) {
      sum_class<T>(classes, c, rows, nullptr, buffer, sum);
      sum_class<T>(classes, c, rows, pull, buffer, weighted);
      for (int64_t at = classes.begin[c]; at < classes.begin[c + 1]; ++at) {
        const int64_t i = classes.order[at];
        const T* x = rows.view(i, buffer);
        const double v = pull[i];
        for (int64_t k = 0; k < d; ++k) {
          const double own = v * double(x[k]);
          f[k] = T(double(from_tiles[i * stride + k]) - ((v * sum[k] - own) + (weighted[k] - own)));
        }
        along[i] = double(dot(x, f, d)) / 2;
        if (b.da == nullptr) continue;
        for (int64_t k = 0; k < d; ++k) f[k] *= T(args.scale);
        finish_row(args, x, inv[i], f);
        write_row<T>(args.dtype, f, d, b.da, i * d);
      }
    }
  }
}

// The same for one positive a row.  `weight`: layout bank, of its mean keys.
template <class T>
void add_pairs(const ContrastiveArgs& args, const ContrastiveBackwardArgs& b, const PerThread<T>& buffers,
               const T* pull, const T* weight, const ContrastiveState& state, const T* ga, const T* gb, int64_t stride,
               double* along) {
  const int64_t n = args.a.n, d = args.d;
  const bool joint = args.joined(), bank = weight != nullptr;
  const bool want_a = ga != nullptr || bank, want_b = joint || b.db != nullptr;
  const T* inv = static_cast<const T*>(state.inv);
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
      const T pair = pull[i];
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
}

template <class T>
int backward(const ContrastiveArgs& args, const ContrastiveState& state, const ContrastiveBackwardArgs& b) {
  const int64_t n = args.a.n, d = args.d, rows = args.rows();
  const bool joint = args.joined(), bank = args.layout == Layout::bank, by_class = args.layout == Layout::classes;
  const bool want_scale = b.dscale != nullptr;
  // dscale is read off the gradient of a (joint: of both views), so that one is then computed too.
  const bool want_a = args.self() || bank || b.da != nullptr || want_scale;
  const bool want_b = joint || b.db != nullptr;
  const int64_t stride = round_up(d, kRowAlign);
  const int64_t pad_a = bank ? 0 : padded_rows(joint ? 2 * n : n);
  const int64_t pad_b = args.self() || bank || !want_b ? 0 : padded_rows(n);
  // Where the results have the shape that the tiles accumulate in, they need no scratch.
  const bool in_place =
      !joint && !bank && stride == d && pad_a == n && (args.dtype == DType::f32 || args.dtype == DType::f64);

  Workspace w;
  PerThread<T> buffers;
  PerThread<double> sums;
  T *weight = nullptr, *pull = nullptr, *ga = nullptr, *gb = nullptr;
  double *along = nullptr, *positive_weight = nullptr;
  int64_t* row_ids = nullptr;
  w.plan(&buffers, 4 * d, args.n_threads);
  w.plan(&weight, 2 * n);
  w.plan(&pull, n);
  if (by_class || args.sigma > 0) w.plan(&positive_weight, n);
  if (by_class) w.plan(&sums, 2 * d, args.n_threads);
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
  int64_t terms = rows;
  if (by_class) terms = fill_class_weights(args.classes, positive_weight);
  const double mean = args.reduction == Reduction::mean ? 1.0 / double(max64(terms, 1)) : 1.0;
  const double half = args.layout == Layout::both && args.reduction != Reduction::mean ? 0.5 : 1.0;
  const int64_t outputs = joint ? 2 * n : n;
  const bool none = args.reduction == Reduction::none;
  if (args.sigma > 0) fill_weights<T>(args, state, positive_weight);
  // weight: gradients of the reduced rows; pull: minus those of the positives' logits, of both halves.
  for_all_rows<T>(args, state, positive_weight, [&](int64_t r, int count, const HeadRows& h) {
    const Slopes slope = head_slopes(args.layout, h);
    for (int c = 0; c < count; ++c) {
      const double g = dloss[none ? (r + c) % outputs * b.dloss_stride : 0];
      const double incoming = g * mean * half;
      const T here = T(incoming * slope.pull[c]);
      weight[r + c] = T(incoming * slope.row[c]);
      if (r < n) {
        pull[r + c] = here;
      } else {
        pull[r + c - n] += here;
      }
    }
  });
  double dbias = 0;

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
    out.dk = args.self() ? nullptr : gb;
    out.stride = stride;
    out.capacity_q = pad_a;
    out.capacity_k = pad_b;
    out.unscaled = true;
    out.tiles = state.tiles;
    out.dbias = b.dbias != nullptr ? &dbias : nullptr;
    const int status = kernels().pairwise_backward(p, out);
    if (status != 0) return status;
  }

  if (by_class) {
    add_classes(args, b, buffers, sums, pull, inv, ga, stride, along);
  } else {
    add_pairs(args, b, buffers, pull, bank ? weight : nullptr, state, ga, gb, stride, along);
  }
  if (want_scale) {
    *b.dscale = 0;
    for (int64_t i = 0; i < n; ++i) *b.dscale += along[i];
  }
  if (b.dbias != nullptr) {
    for (int64_t i = 0; i < n; ++i) dbias -= double(pull[i]);
    *b.dbias = dbias;
  }
  return 0;
}

// Whether the logits are O(N D) as well.
bool few(int64_t rows, int64_t d) { return rows <= 4 * d; }

// Elements of the logits of all tiles.
int64_t logits(bool self, DType dtype, int64_t rows) {
  return dtype == DType::f64 ? kept_elements<MathF64>(self, rows, rows) : kept_elements<MathF32>(self, rows, rows);
}

// Forward and backward for an incoming gradient of 1.
template <class T>
int at_once(const ContrastiveArgs& args, ContrastiveState state, T* loss, ContrastiveBackwardArgs b) {
  Workspace w;
  T* tiles = nullptr;
  const int64_t rows = args.joined() ? 2 * args.a.n : args.a.n;
  if (few(rows, args.d)) w.plan(&tiles, logits(args.self(), args.dtype, rows));
  if (!w.allocate()) return -1;
  state.tiles = tiles;
  const T one = 1;
  b.dloss = &one;
  const int status = forward(args, state, loss, nullptr);
  return status == 0 ? backward<T>(args, state, b) : status;
}

}  // namespace

int contrastive_forward(const ContrastiveArgs& args, const ContrastiveState& state, void* loss, int64_t* rank) {
  return args.dtype == DType::f64 ? forward(args, state, static_cast<double*>(loss), rank)
                                  : forward(args, state, static_cast<float*>(loss), rank);
}

int contrastive_backward(const ContrastiveArgs& args, const ContrastiveState& state, const ContrastiveBackwardArgs& b) {
  return args.dtype == DType::f64 ? backward<double>(args, state, b) : backward<float>(args, state, b);
}

int contrastive_at_once(const ContrastiveArgs& args, const ContrastiveState& state, void* loss,
                        const ContrastiveBackwardArgs& b) {
  return args.dtype == DType::f64 ? at_once(args, state, static_cast<double*>(loss), b)
                                  : at_once(args, state, static_cast<float*>(loss), b);
}

int64_t kept_tiles(Layout layout, DType dtype, int64_t n, int64_t d) {
  const bool joined = layout == Layout::joint || layout == Layout::decoupled;
  const int64_t rows = joined ? 2 * n : n;
  // Rows that one thread finishes in 10 us are not worth another array.
  if (layout == Layout::bank || !few(rows, d) || rows * rows * d < kSerialWork) return 0;
  const int64_t size = logits(joined || layout == Layout::classes, dtype, rows);
  return size * (dtype == DType::f64 ? 8 : 4) <= kMostKeptBytes ? size : 0;
}

SSLK_END
