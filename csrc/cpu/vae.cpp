// SPDX-License-Identifier: Apache-2.0
// The two terms of a variational autoencoder's loss, a number for each row, in one pass over memory forward and one
// backward:
//
//   reconstruction_i = sum_j of  softplus(r) - x r                       bernoulli, r are logits
//                                (r - x)^2 / 2                           gaussian
//                                ((r - x)^2 exp(-s) + s) / 2             gaussian with log-variances s
//   kl_i             = sum_j w_j (m^2 + exp(v) - 1 - v) / 2              of N(m, exp v) from N(0, 1)
//
// Sums of a block in float32 (float64 for float64), of the blocks of a row in float64.
//
// Plain-torch twin: sslkernels/backends/autoencoders_torch.py.

#include "blocks.h"
#include "kernels.h"
#include "rows.h"

SSLK_BEGIN
namespace {

// log(1 + exp(-|x|)): what softplus adds to max(x, 0).
template <class T>
inline SSLK_INLINE Vec<T> log1p_exp_minus_abs(Vec<T> x) {
  return softplus_v(x < T(0) ? x : -x);
}

// The tables of one call, in the accumulation type.
template <class T>
struct VaeCall {
  const VaeArgs& decoder;
  const VaeLatent& latent;
  ReadBlock<T> read;
  WriteBlock<T> write;
  int n_threads;

  VaeCall(const VaeArgs& args, const VaeLatent& codes)
      : decoder(args), latent(codes), read(reader_of<T>(args.dtype)), write(writer_of<T>(args.dtype)) {
    n_threads = args.reconstruction.n * (args.d + codes.d) < kSerialElements ? 1 : args.n_threads;
  }
};

inline int block_count(int64_t begin, int64_t d) { return int(d - begin < kBlock ? d - begin : kBlock); }

template <class T>
double reconstruction_of_row(const VaeCall<T>& call, int64_t i) {
  constexpr int L = Simd<T>::kLanes;
  const VaeArgs& args = call.decoder;
  alignas(64) T r[kBlock], x[kBlock], s[kBlock];
  double total = 0;
  for (int64_t b = 0; b < args.d; b += kBlock) {
    const int count = block_count(b, args.d);
    call.read(args.reconstruction.data, i * args.reconstruction.stride + b, count, r);
    call.read(args.x.data, i * args.x.stride + b, count, x);
    const bool spread = args.spread.data != nullptr;
    if (spread) call.read(args.spread.data, i * args.spread.stride + b, count, s);
    Vec<T> sum = {};
    for (int k = 0; k < count; k += L) {
      const Vec<T> rv = load<T>(r + k), xv = load<T>(x + k);
      Vec<T> term;
      if (args.likelihood == Likelihood::bernoulli) {
        // For x of 0 and 1 the first two terms are exactly 0 where the logit is right: no cancellation.
        term = (rv > T(0) ? rv : Vec<T>{}) - xv * rv + log1p_exp_minus_abs<T>(rv);
      } else {
        const Vec<T> gap = rv - xv;
        term = gap * gap;
        if (spread) {
          const Vec<T> sv = load<T>(s + k);
          term = term * exp_v<T>(-sv) + sv;
        }
        term = term * T(0.5);
      }
      sum += keep<T>(term, lanes_below<T>(count - k));
    }
    total += double(sum_lanes<T>(sum));
  }
  return total;
}

template <class T>
double kl_of_row(const VaeCall<T>& call, int64_t i) {
  constexpr int L = Simd<T>::kLanes;
  const VaeLatent& codes = call.latent;
  alignas(64) T m[kBlock], v[kBlock];
  double total = 0;
  for (int64_t b = 0; b < codes.d; b += kBlock) {
    const int count = block_count(b, codes.d);
    call.read(codes.mean.data, i * codes.mean.stride + b, count, m);
    call.read(codes.log_variance.data, i * codes.log_variance.stride + b, count, v);
    Vec<T> sum = {};
    for (int k = 0; k < count; k += L) {
      const Vec<T> mv = load<T>(m + k), vv = load<T>(v + k);
      Vec<T> term = T(0.5) * (mv * mv + (expm1_v<T>(vv) - vv));
      if (codes.weights != nullptr) {
        const T* weights = static_cast<const T*>(codes.weights) + b + k;
        for (int l = 0; l < L && k + l < count; ++l) term[l] *= weights[l];
      }
      sum += keep<T>(term, lanes_below<T>(count - k));
    }
    total += double(sum_lanes<T>(sum));
  }
  return total;
}

template <class T>
void vae_forward_of(const VaeCall<T>& call, T* reconstruction, T* kl) {
#pragma omp parallel for num_threads(call.n_threads) schedule(static)
  for (int64_t i = 0; i < call.decoder.reconstruction.n; ++i) {
    reconstruction[i] = T(reconstruction_of_row(call, i));
    kl[i] = T(kl_of_row(call, i));
  }
}

template <class T>
void decoder_gradients(const VaeCall<T>& call, const VaeBackwardArgs& out, int64_t i, T g) {
  constexpr int L = Simd<T>::kLanes;
  const VaeArgs& args = call.decoder;
  alignas(64) T r[kBlock], x[kBlock], s[kBlock];
  for (int64_t b = 0; b < args.d; b += kBlock) {
    const int count = block_count(b, args.d);
    call.read(args.reconstruction.data, i * args.reconstruction.stride + b, count, r);
    call.read(args.x.data, i * args.x.stride + b, count, x);
    const bool spread = args.spread.data != nullptr;
    if (spread) call.read(args.spread.data, i * args.spread.stride + b, count, s);
    for (int k = 0; k < count; k += L) {
      const Vec<T> rv = load<T>(r + k), xv = load<T>(x + k);
      if (args.likelihood == Likelihood::bernoulli) {
        store<T>(r + k, g * (logistic_v(rv) - xv));
        store<T>(x + k, -g * rv);
        continue;
      }
      const Vec<T> gap = rv - xv;
      Vec<T> along = g * gap;
      if (spread) {
        const Vec<T> inverse = exp_v<T>(-load<T>(s + k));
        store<T>(s + k, (T(0.5) * g) * (T(1) - gap * gap * inverse));
        along = along * inverse;
      }
      store<T>(r + k, along);
      store<T>(x + k, -along);
    }
    const int64_t at = i * args.d + b;
    if (out.dreconstruction != nullptr) call.write(r, count, out.dreconstruction, at);
    if (out.dx != nullptr) call.write(x, count, out.dx, at);
    if (out.dspread != nullptr) call.write(s, count, out.dspread, at);
  }
}

template <class T>
void latent_gradients(const VaeCall<T>& call, const VaeBackwardArgs& out, int64_t i, T g) {
  constexpr int L = Simd<T>::kLanes;
  const VaeLatent& codes = call.latent;
  alignas(64) T m[kBlock], v[kBlock], w[kBlock];
  for (int64_t b = 0; b < codes.d; b += kBlock) {
    const int count = block_count(b, codes.d);
    call.read(codes.mean.data, i * codes.mean.stride + b, count, m);
    call.read(codes.log_variance.data, i * codes.log_variance.stride + b, count, v);
    // Codes are few: nothing here may cost what a whole block does.
    const T* weights = static_cast<const T*>(codes.weights);
    if (weights != nullptr) {
      for (int k = 0; k < count; ++k) w[k] = g * weights[b + k];
      for (int k = count; k % L != 0; ++k) w[k] = T(0);
    }
    for (int k = 0; k < count; k += L) {
      const Vec<T> gv = weights != nullptr ? load<T>(w + k) : splat<T>(g);
      store<T>(m + k, gv * load<T>(m + k));
      store<T>(v + k, T(0.5) * gv * expm1_v<T>(load<T>(v + k)));
    }
    const int64_t at = i * codes.d + b;
    if (out.dmean != nullptr) call.write(m, count, out.dmean, at);
    if (out.dlog_variance != nullptr) call.write(v, count, out.dlog_variance, at);
  }
}

template <class T>
void vae_backward_of(const VaeCall<T>& call, const VaeBackwardArgs& out) {
  const T* drec = static_cast<const T*>(out.drec);
  const T* dkl = static_cast<const T*>(out.dkl);
  const bool decoder = out.dreconstruction != nullptr || out.dx != nullptr || out.dspread != nullptr;
  const bool latent = out.dmean != nullptr || out.dlog_variance != nullptr;
#pragma omp parallel for num_threads(call.n_threads) schedule(static)
  for (int64_t i = 0; i < call.decoder.reconstruction.n; ++i) {
    if (decoder) decoder_gradients<T>(call, out, i, drec[i * out.drec_stride]);
    if (latent) latent_gradients<T>(call, out, i, dkl[i * out.dkl_stride]);
  }
}

}  // namespace

int vae_forward(const VaeArgs& args, const VaeLatent& latent, void* reconstruction, void* kl) {
  if (args.dtype == DType::f64) {
    vae_forward_of(VaeCall<double>(args, latent), static_cast<double*>(reconstruction), static_cast<double*>(kl));
  } else {
    vae_forward_of(VaeCall<float>(args, latent), static_cast<float*>(reconstruction), static_cast<float*>(kl));
  }
  return 0;
}

int vae_backward(const VaeArgs& args, const VaeLatent& latent, const VaeBackwardArgs& out) {
  if (args.dtype == DType::f64) {
    vae_backward_of(VaeCall<double>(args, latent), out);
  } else {
    vae_backward_of(VaeCall<float>(args, latent), out);
  }
  return 0;
}

SSLK_END
