// SPDX-License-Identifier: Apache-2.0
// InfoNCE with negatives of its own for every query: [N, M, D], each key used by one query only.
//
// There is no product of matrices in it: the work is to read the keys, so each is read once in forward (dot
// product and norm together, online log-sum-exp, weighted mean of the keys) and once more in backward, and
// only when the keys get a gradient.  The head is that of contrastive.cpp:
//
//   loss_i = log(1 + exp(lse_i - s_i)),  lse_i over the negatives,  s_i = scale * <q_i, p_i>
//   w_i = dloss_i / (1 + exp(s_i - lse_i))
//   dq_i = scale * w_i * (mean_key_i - p_i),  dp_i = -scale * w_i * q_i,  dk_im = scale * w_i * a_im * q_i
//
// with a_im the softmax over the negatives and mean_key_i = sum_m a_im k_im.  Rows are divided by their
// norm, not multiplied with an inverse, so that a row of one feature becomes exactly 1 and its gradient
// exactly 0.  One thread does a whole row: the bits do not depend on their number.
//
// Plain-torch twin: sslkernels/reference.py (info_nce_loss, negative_mode="paired").

#include "../openmp.h"
#include "kernels.h"
#include "narrow.h"
#include "rows.h"
#include "workspace.h"

SSLK_BEGIN
namespace {

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

double logistic(double x) { return x > 0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }

// A key of 16-bit numbers, widened into `out`; other keys (null function) are read in place.
using Widen = void (*)(const void* key, int64_t d, float* out);

template <class In>
void widen_key(const void* key, int64_t d, float* out) {
  const In* from = static_cast<const In*>(key);
  for (int64_t c = 0; c < d; c += kBlock) widen_block(from + c, int(min64(d - c, kBlock)), out + c);
}

inline const float* in_place_or_wide(Widen widen, const char* key, int64_t d, float* out) {
  if (widen == nullptr) return reinterpret_cast<const float*>(key);
  widen(key, d, out);
  return out;
}
inline const double* in_place_or_wide(Widen, const char* key, int64_t, double*) {
  return reinterpret_cast<const double*>(key);
}

// The keys of one query, L at a time: rows to read, and per lane norm, cosine and logit.
template <class T>
class Group {
 public:
  static constexpr int L = Simd<T>::kLanes;
  const T* row[L];
  alignas(kVecBytes) T norm[L], cosine[L];
  Vec<T> logit;     // scale * cosine
  IVec<T> allowed;  // all ones: a negative; zero: excluded by its id, or not there at all
  int count = 0;

  // `wide` [L, d]: where 16-bit keys are widened to.
  Group(const PairedArgs& args, T* wide) : args_(args), wide_(wide) {
    if (args.dtype == DType::bf16) widen_ = widen_key<bf16>;
    if (args.dtype == DType::f16) widen_ = widen_key<f16>;
    key_bytes_ = args.dtype == DType::f64 ? 8 : widen_ == nullptr ? 4 : 2;
  }

  // Keys `first`, `first` + 1, ... of query i, whose (normalised) row is q.
  void read(int64_t i, int64_t first, const T* q) {
    const int64_t d = args_.d, left = args_.m - first;
    count = int(min64(left, L));
    const char* keys = static_cast<const char*>(args_.negatives) + i * args_.stride_row * key_bytes_;
    for (int l = 0; l < count; ++l) {
      row[l] = in_place_or_wide(widen_, keys + (first + l) * args_.stride_key * key_bytes_, d, wide_ + l * d);
      T square, product;
      dots(row[l], q, &square, &product);
      const double length = args_.normalize ? std::sqrt(double(square)) : 1.0;
      norm[l] = T(length < kNormEps ? kNormEps : length);  // a NaN norm stays NaN
      cosine[l] = product / norm[l];
    }
    for (int l = count; l < L; ++l) norm[l] = T(1), cosine[l] = T(0);
    logit = load<T>(cosine) * T(args_.scale);
    allowed = lanes_below<T>(count);
    if (args_.ids_q == nullptr) return;
    const int64_t* ids = args_.ids_k + i * args_.m + first;
    for (int l = 0; l < count; ++l) {
      if (ids[l] == args_.ids_q[i]) allowed[l] = 0;
    }
  }

 private:
  // |k|^2 and <k, q> in one pass.
  void dots(const T* k, const T* q, T* square, T* product) const {
    Vec<T> kk = {}, kq = {};
    int64_t c = 0;
    for (; c + L <= args_.d; c += L) {
      const Vec<T> x = load<T>(k + c);
      kk += x * x;
      kq += x * load<T>(q + c);
    }
    T tail_kk = sum_lanes<T>(kk), tail_kq = sum_lanes<T>(kq);
    for (; c < args_.d; ++c) tail_kk += k[c] * k[c], tail_kq += k[c] * q[c];
    *square = tail_kk;
    *product = tail_kq;
  }

  const PairedArgs& args_;
  T* wide_;
  Widen widen_ = nullptr;
  int64_t key_bytes_ = 0;
};

// What one query collects over its keys.
template <class T>
struct RowResult {
  T lse;
  int64_t above = 0, allowed = 0;  // negatives above the positive; negatives
  double similarity = 0;           // sum of cosines of the negatives
};

// Log-sum-exp over the keys of query i, and mean = sum of softmax * key.
template <class T>
RowResult<T> collect(const PairedArgs& args, int64_t i, const T* q, T positive, T* wide, T* mean) {
  constexpr int L = Simd<T>::kLanes;
  const int64_t d = args.d;
  RowResult<T> r;
  Group<T> group(args, wide);
  T top = T(-HUGE_VAL);
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) mean[c] = T(0);
  for (int64_t first = 0; first < args.m; first += L) {
    group.read(i, first, q);
    T higher = top;
    for (int l = 0; l < L; ++l) {
      if (group.allowed[l] == 0) continue;
      ++r.allowed;
      r.similarity += double(group.cosine[l]);
      if (group.logit[l] > positive * T(args.scale)) ++r.above;
      if (group.logit[l] > higher) higher = group.logit[l];
    }
    if (higher > top) {
      if (sum != 0) {
        const T factor = exp2_v(splat<T>((top - higher) * T(kLog2E)))[0];
        sum *= double(factor);
        for (int64_t c = 0; c < d; ++c) mean[c] *= factor;
      }
      top = higher;
    }
    // Before the first allowed key there is no maximum to subtract; everything is masked out then.
    const T base = top > T(-HUGE_VAL) ? top : T(0);
    const Vec<T> weight = keep<T>(exp2_v((group.logit - base) * T(kLog2E)), group.allowed);
    sum += double(sum_lanes<T>(weight));
    const Vec<T> share = weight / load<T>(group.norm);
    for (int l = 0; l < group.count; ++l) {
      // A masked key is skipped, not multiplied by 0: it may hold inf or NaN.
      if (group.allowed[l] == 0) continue;
      const T s = share[l];
      const T* k = group.row[l];
      for (int64_t c = 0; c < d; ++c) mean[c] += s * k[c];
    }
  }
  r.lse = r.allowed > 0 ? T(double(top > T(-HUGE_VAL) ? top : T(0)) + std::log(sum)) : T(-HUGE_VAL);
  if (r.allowed > 0) {
    const T inverse = T(1.0 / sum);
    for (int64_t c = 0; c < d; ++c) mean[c] *= inverse;
  }
  return r;
}

template <class T>
Source<T> source(const PairedArgs& args, const Rows& rows) {
  const Rows part[2] = {rows, Rows{}};
  return make_source<T>(args.dtype, part, nullptr, args.d);
}

// Reads row i into x and divides it by `norm`.
template <class T>
void read_unit(const Source<T>& from, const PairedArgs& args, int64_t i, T norm, T* x) {
  from.row(i, x);
  for (int64_t c = 0; args.normalize && c < args.d; ++c) x[c] /= norm;
}

int row_threads(const PairedArgs& args) {
  return args.query.n * (args.m + 2) * args.d < kSerialElements ? 1 : args.n_threads;
}

template <class T>
int forward(const PairedArgs& args, const PairedState& state, const PairedForwardOut& out) {
  constexpr int L = Simd<T>::kLanes;
  const int64_t n = args.query.n, d = args.d, per_thread = (2 + L) * d;
  const int n_threads = row_threads(args);
  PerThread<T> buffers;
  T* row_loss = nullptr;
  double* similarity = nullptr;
  int64_t* allowed = nullptr;
  Workspace w;
  w.plan(&buffers, per_thread, n_threads);
  w.plan(&row_loss, n);
  w.plan(&similarity, n);
  w.plan(&allowed, n);
  if (!w.allocate()) return -1;
  const Source<T> queries = source<T>(args, args.query), positives = source<T>(args, args.positive);
  T *lse = static_cast<T*>(state.lse), *positive = static_cast<T*>(state.positive);
  T *norms = static_cast<T*>(state.norms), *mean_key = static_cast<T*>(state.mean_key);
#pragma omp parallel num_threads(n_threads)
  {
    T* q = buffers.mine();
    T *p = q + d, *wide = p + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      queries.row(i, q);
      positives.row(i, p);
      norms[i] = args.normalize ? clamped_norm(q, d) : T(1);
      norms[n + i] = args.normalize ? clamped_norm(p, d) : T(1);
      for (int64_t c = 0; args.normalize && c < d; ++c) q[c] /= norms[i], p[c] /= norms[n + i];
      positive[i] = dot(q, p, d);
      const RowResult<T> r = collect<T>(args, i, q, positive[i], wide, mean_key + i * d);
      lse[i] = r.lse;
      row_loss[i] = T(softplus(double(r.lse) - args.scale * double(positive[i])));
      out.rank[i] = r.above;
      similarity[i] = r.similarity;
      allowed[i] = r.allowed;
    }
  }
  double sum = 0, total = 0, count = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(row_loss[i]), total += similarity[i], count += double(allowed[i]);
  *out.similarity = count > 0 ? total / count : 0.0;
  if (args.reduction == Reduction::none) {
    if (n > 0) std::memcpy(out.loss, row_loss, size_t(n) * sizeof(T));
    return 0;
  }
  *static_cast<T*>(out.loss) = T(args.reduction == Reduction::mean && n > 0 ? sum / double(n) : sum);
  return 0;
}

// d(x / norm), x_hat = x / norm: g = (g - x_hat <x_hat, g>) / norm; below the eps the norm is a constant.
template <class T>
void finish_row(const PairedArgs& args, const T* x_hat, T norm, T* g) {
  if (!args.normalize) return;
  const T along = norm > T(kNormEps) ? dot(x_hat, g, args.d) : T(0);
  for (int64_t c = 0; c < args.d; ++c) g[c] = (g[c] - x_hat[c] * along) / norm;
}

// The gradients of the keys of query i; `g` [d] is scratch.
template <class T>
void keys_backward(const PairedArgs& args, int64_t i, const T* q, T lse, T weight, T* wide, T* g, void* dnegatives) {
  constexpr int L = Simd<T>::kLanes;
  const int64_t d = args.d;
  Group<T> group(args, wide);
  for (int64_t first = 0; first < args.m; first += L) {
    group.read(i, first, q);
    const Vec<T> share = keep<T>(exp2_v((group.logit - lse) * T(kLog2E)) * (weight * T(args.scale)), group.allowed);
    for (int l = 0; l < group.count; ++l) {
      const T s = group.allowed[l] != 0 ? share[l] / group.norm[l] : T(0);
      const T* k = group.row[l];
      if (group.allowed[l] == 0) {
        for (int64_t c = 0; c < d; ++c) g[c] = T(0);
      } else if (args.normalize) {
        const T along = group.norm[l] > T(kNormEps) ? group.cosine[l] : T(0), norm = group.norm[l];
        for (int64_t c = 0; c < d; ++c) g[c] = s * (q[c] - along * (k[c] / norm));
      } else {
        for (int64_t c = 0; c < d; ++c) g[c] = s * q[c];
      }
      write_row<T>(args.dtype, g, d, dnegatives, ((i * args.m) + first + l) * d);
    }
  }
}

template <class T>
int backward(const PairedArgs& args, const PairedState& state, const PairedBackwardArgs& b) {
  constexpr int L = Simd<T>::kLanes;
  const int64_t n = args.query.n, d = args.d, per_thread = (4 + L) * d;
  const int n_threads = row_threads(args);
  PerThread<T> buffers;
  double* along = nullptr;
  Workspace w;
  w.plan(&buffers, per_thread, n_threads);
  w.plan(&along, n);
  if (!w.allocate()) return -1;
  const Source<T> queries = source<T>(args, args.query), positives = source<T>(args, args.positive);
  const T *lse = static_cast<const T*>(state.lse), *positive = static_cast<const T*>(state.positive);
  const T *norms = static_cast<const T*>(state.norms), *mean_key = static_cast<const T*>(state.mean_key);
  const T* dloss = static_cast<const T*>(b.dloss);
  const double mean = args.reduction == Reduction::mean ? 1.0 / double(max64(n, 1)) : 1.0;
#pragma omp parallel num_threads(n_threads)
  {
    T* q = buffers.mine();
    T *p = q + d, *g = p + d, *gap = g + d, *wide = gap + d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      read_unit(queries, args, i, norms[i], q);
      read_unit(positives, args, i, norms[n + i], p);
      const double incoming = double(dloss[args.reduction == Reduction::none ? i * b.dloss_stride : 0]) * mean;
      const T weight = T(incoming * logistic(double(lse[i]) - args.scale * double(positive[i])));
      const T scaled = weight * T(args.scale);
      for (int64_t c = 0; c < d; ++c) gap[c] = mean_key[i * d + c] - p[c];
      along[i] = double(weight) * double(dot(q, gap, d));
      if (b.dquery != nullptr) {
        for (int64_t c = 0; c < d; ++c) g[c] = scaled * gap[c];
        finish_row(args, q, norms[i], g);
        write_row<T>(args.dtype, g, d, b.dquery, i * d);
      }
      if (b.dpositive != nullptr) {
        for (int64_t c = 0; c < d; ++c) g[c] = -scaled * q[c];
        finish_row(args, p, norms[n + i], g);
        write_row<T>(args.dtype, g, d, b.dpositive, i * d);
      }
      if (b.dnegatives != nullptr) keys_backward<T>(args, i, q, lse[i], weight, wide, g, b.dnegatives);
    }
  }
  if (b.dscale != nullptr) {
    *b.dscale = 0;
    for (int64_t i = 0; i < n; ++i) *b.dscale += along[i];
  }
  return 0;
}

}  // namespace

int paired_forward(const PairedArgs& args, const PairedState& state, const PairedForwardOut& out) {
  return args.dtype == DType::f64 ? forward<double>(args, state, out) : forward<float>(args, state, out);
}

int paired_backward(const PairedArgs& args, const PairedState& state, const PairedBackwardArgs& b) {
  return args.dtype == DType::f64 ? backward<double>(args, state, b) : backward<float>(args, state, b);
}

SSLK_END
