// SPDX-License-Identifier: Apache-2.0
// Variational and feature reconstruction losses in the Python module sslkernels._C; called through
// sslkernels.backends.autoencoders_cpu.

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace sslk {

template <>
struct Handle<VaeArgs> {
  static constexpr const char* kName = "vae";
};

namespace {

// ---- Variational loss ------------------------------------------------------------------------------

struct Vae {
  static constexpr const char* kName = Handle<VaeArgs>::kName;
  static constexpr const char* kDoc = "A decoder's output and what it should be.";
  VaeArgs args;

  static Fields fields() {
    using Call = Vae;
    return {
        SSLK_REQUIRED(Call, args.likelihood, "likelihood"),
        SSLK_REQUIRED(Call, args.dtype, "dtype"),
        SSLK_SIZE(Call, args.d, "d"),
        SSLK_SIZE(Call, args.reconstruction.n, "n"),
        SSLK_REQUIRED(Call, args.reconstruction.data, "reconstruction"),
        SSLK_SIZE(Call, args.reconstruction.stride, "reconstruction_stride"),
        SSLK_REQUIRED(Call, args.x.data, "x"),
        SSLK_SIZE(Call, args.x.stride, "x_stride"),
        SSLK_REQUIRED(Call, args.spread.data, "spread"),
        SSLK_SIZE(Call, args.spread.stride, "spread_stride"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  VaeArgs run() {
    const int64_t n = args.x.n = args.spread.n = args.reconstruction.n;
    require(kName, {{"reconstruction", args.reconstruction.data, n, args.d, args.reconstruction.stride},
                    {"x", args.x.data, n, args.d, args.x.stride}});
    if (args.spread.data != nullptr) require(kName, {{"spread", args.spread.data, n, args.spread.stride}});
    args.reconstruction.stride = stride_of(args.reconstruction.stride, args.d);
    args.x.stride = stride_of(args.x.stride, args.d);
    args.spread.stride = stride_of(args.spread.stride, args.spread.data != nullptr ? args.d : 0);
    return args;
  }
};

Fields latent_fields() {
  return {
      SSLK_SIZE(VaeLatent, d, "z"),
      SSLK_REQUIRED(VaeLatent, mean.data, "mean"),
      SSLK_SIZE(VaeLatent, mean.stride, "mean_stride"),
      SSLK_REQUIRED(VaeLatent, log_variance.data, "log_variance"),
      SSLK_SIZE(VaeLatent, log_variance.stride, "log_variance_stride"),
      SSLK_REQUIRED(VaeLatent, weights, "weights"),
  };
}

void require_latent(const char* function, int64_t n, VaeLatent* codes) {
  require(function, {{"mean", codes->mean.data, n, codes->d, codes->mean.stride},
                     {"log_variance", codes->log_variance.data, n, codes->d, codes->log_variance.stride}});
  codes->mean.stride = stride_of(codes->mean.stride, codes->d);
  codes->log_variance.stride = stride_of(codes->log_variance.stride, codes->d);
}

struct VaeForward {
  using Args = VaeArgs;
  static constexpr const char* kName = "vae_forward";
  static constexpr const char* kDoc = "Reconstruction and KL of every row.";
  const Args* args = nullptr;
  VaeLatent latent;
  void* reconstruction = nullptr;
  void* kl = nullptr;

  static Fields fields() {
    using Call = VaeForward;
    return inside(offsetof(Call, latent), latent_fields()) +
           Fields{SSLK_REQUIRED(Call, reconstruction, "reconstruction"), SSLK_REQUIRED(Call, kl, "kl")};
  }
  void run() {
    const int64_t n = args->reconstruction.n;
    require_latent(kName, n, &latent);
    require(kName, {{"reconstruction", reconstruction, n}, {"kl", kl, n}});
    check(kernels().vae_forward(*args, latent, reconstruction, kl));
  }
};

struct VaeBackward {
  using Args = VaeArgs;
  static constexpr const char* kName = "vae_backward";
  static constexpr const char* kDoc = "The gradients that are wanted.";
  const Args* args = nullptr;
  VaeLatent latent;
  VaeBackwardArgs out;

  static Fields fields() {
    using Call = VaeBackward;
    return inside(offsetof(Call, latent), latent_fields()) +
           Fields{
               SSLK_REQUIRED(Call, out.drec, "drec"),   SSLK_SIZE(Call, out.drec_stride, "row_stride"),
               SSLK_REQUIRED(Call, out.dkl, "dkl"),     SSLK_REQUIRED(Call, out.dreconstruction, "dreconstruction"),
               SSLK_REQUIRED(Call, out.dx, "dx"),       SSLK_REQUIRED(Call, out.dspread, "dspread"),
               SSLK_REQUIRED(Call, out.dmean, "dmean"), SSLK_REQUIRED(Call, out.dlog_variance, "dlog_variance"),
           };
  }
  void run() {
    out.dkl_stride = out.drec_stride;
    const int64_t n = args->reconstruction.n;
    require_latent(kName, n, &latent);
    require(kName, {{"drec", out.drec, n}, {"dkl", out.dkl, n}});
    if (out.dspread != nullptr) require(kName, {{"spread", args->spread.data, n, args->d}});
    check(kernels().vae_backward(*args, latent, out));
  }
};

// ---- Noise -----------------------------------------------------------------------------------------

struct Reparameterize {
  static constexpr const char* kName = "reparameterize";
  static constexpr const char* kDoc = "Forward with `mean`, or the gradient of the log-variance with `dz`.";
  NoiseArgs args;
  const int64_t* seed = nullptr;

  static Fields fields() {
    using Call = Reparameterize;
    return {
        SSLK_REQUIRED(Call, args.dtype, "dtype"), SSLK_SIZE(Call, args.n, "n"),
        SSLK_REQUIRED(Call, args.mean, "mean"),   SSLK_REQUIRED(Call, args.log_variance, "log_variance"),
        SSLK_REQUIRED(Call, args.dz, "dz"),       SSLK_REQUIRED(Call, args.out, "out"),
        SSLK_REQUIRED(Call, seed, "seed"),        SSLK_THREADS(Call, args.n_threads),
    };
  }
  void run() {
    const bool forward = args.mean != nullptr;
    require(kName, {{"log_variance", args.log_variance, args.n},
                    {forward ? "mean" : "dz", forward ? args.mean : args.dz, args.n},
                    {"out", args.out, args.n},
                    {"seed", seed, 1}});
    args.seed = uint64_t(*seed);
    check(kernels().reparameterize(args));
  }
};

// ---- Features --------------------------------------------------------------------------------------

struct FeatureFields {
  std::vector<const uint8_t*> features;  // addresses
  std::vector<const uint8_t*> targets;   // addresses
  std::vector<int64_t> sizes;            // elements of a sample
  std::vector<DType> dtypes;
  std::vector<DType> target_dtypes;
  FeatureArgs args;
  std::vector<FeatureEntry> entries;

  static Fields fields() {
    using Call = FeatureFields;
    return {
        SSLK_REQUIRED(Call, features, "features"),
        SSLK_REQUIRED(Call, targets, "targets"),
        SSLK_REQUIRED(Call, sizes, "sizes"),
        SSLK_REQUIRED(Call, dtypes, "dtypes"),
        SSLK_REQUIRED(Call, target_dtypes, "target_dtypes"),
        SSLK_SIZE(Call, args.n, "n"),
        SSLK_REQUIRED(Call, args.smooth, "smooth"),
        SSLK_REQUIRED(Call, args.beta, "beta"),
        SSLK_REQUIRED(Call, args.wide, "wide"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  // With gradients: where those of the features go; empty: none.
  const FeatureArgs& gathered(const char* op, const std::vector<uint8_t*>& gradients) {
    const size_t n = features.size();
    if (targets.size() != n || sizes.size() != n || dtypes.size() != n || target_dtypes.size() != n ||
        (!gradients.empty() && gradients.size() != n)) {
      throw std::invalid_argument(std::string(op) + ": the lists must have the same length");
    }
    for (size_t l = 0; l < n; ++l) {
      if (sizes[l] < 0 || sizes[l] > kMostElements) {
        throw std::invalid_argument(std::string(op) + ": sizes must be from 0 to 2^47");
      }
      require(op, {{"a feature", features[l], args.n, sizes[l]}, {"a target", targets[l], args.n, sizes[l]}});
    }
    entries.resize(n);
    for (size_t l = 0; l < n; ++l) {
      entries[l] = {features[l], targets[l], gradients.empty() ? nullptr : gradients[l],
                    sizes[l],    dtypes[l],  target_dtypes[l]};
    }
    args.entries = entries.data();
    args.n_entries = int64_t(n);
    return args;
  }
};

struct FeaturesForward {
  static constexpr const char* kName = "features_forward";
  static constexpr const char* kDoc = "Mean distance of every sample in every map.";
  FeatureFields maps;
  void* out = nullptr;

  static Fields fields() {
    using Call = FeaturesForward;
    return inside(offsetof(Call, maps), FeatureFields::fields()) + Fields{SSLK_REQUIRED(Call, out, "out")};
  }
  void run() {
    require(kName, {{"out", out, maps.args.n, int64_t(maps.features.size())}});
    check(kernels().features_forward(maps.gathered(kName, {}), out));
  }
};

struct FeaturesBackward {
  static constexpr const char* kName = "features_backward";
  static constexpr const char* kDoc = "Gradients of the features.";
  FeatureFields maps;
  const void* dout = nullptr;
  std::vector<uint8_t*> gradients;  // addresses; null where not wanted

  static Fields fields() {
    using Call = FeaturesBackward;
    return inside(offsetof(Call, maps), FeatureFields::fields()) +
           Fields{SSLK_REQUIRED(Call, dout, "dout"), SSLK_REQUIRED(Call, gradients, "gradients")};
  }
  void run() {
    require(kName, {{"dout", dout, maps.args.n, int64_t(maps.features.size())}});
    check(kernels().features_backward(maps.gathered(kName, gradients), dout));
  }
};

}  // namespace

void bind_autoencoders(Definition& definition) {
  add_function<Vae>(definition);
  add_function<VaeForward>(definition);
  add_function<VaeBackward>(definition);
  add_function<Reparameterize>(definition);
  add_function<FeaturesForward>(definition);
  add_function<FeaturesBackward>(definition);
}

}  // namespace sslk
