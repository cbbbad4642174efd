// SPDX-License-Identifier: Apache-2.0
// Runs every CPU kernel on numbers made by a counter and prints what comes out, one line a result: the same program
// for two processors must print the same numbers to rounding (tests/test_cross.py).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "classes.h"
#include "sslkernels.h"

namespace sslk {
namespace baseline {
const Kernels& table();
}
}  // namespace sslk

using namespace sslk;

namespace {

const Kernels& k = baseline::table();

// Pseudo-random numbers in [-1, 1), the same everywhere.
double number(uint64_t i, uint64_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed * 0xBF58476D1CE4E5B9ull + 1;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return double(int64_t((x ^ (x >> 31)) >> 12)) / double(int64_t(1) << 51) - 1.0;
}

// A matrix in one of the four dtypes.
struct Matrix {
  std::vector<char> bytes;
  Rows rows;

  Matrix(DType dtype, int64_t n, int64_t d, uint64_t seed) {
    const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    bytes.resize(size_t(n * d * size));
    for (int64_t i = 0; i < n * d; ++i) {
      const double x = number(uint64_t(i), seed);
      char* at = bytes.data() + i * size;
      const float f = float(x);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      // Halves are cut, not rounded: all that matters is that they are the same.
      if (dtype == DType::f64) std::memcpy(at, &x, 8);
      if (dtype == DType::f32) std::memcpy(at, &f, 4);
      const uint16_t brain = uint16_t(bits >> 16), exponent = uint16_t(((bits >> 23) & 255) > 112 ? 1 : 0);
      const uint16_t half = uint16_t(((bits >> 16) & 0x8000) |
                                     (exponent ? ((((bits >> 23) & 255) - 112) << 10) | ((bits >> 13) & 0x3FF) : 0));
      if (dtype == DType::bf16) std::memcpy(at, &brain, 2);
      if (dtype == DType::f16) std::memcpy(at, &half, 2);
    }
    rows = {bytes.data(), n, d};
  }
};

// Room for acc numbers, and for results in the dtype of the inputs.
struct Numbers {
  DType dtype;
  std::vector<double> memory;
  Numbers(DType kind, int64_t n) : dtype(kind), memory(size_t(n), 0.0) {}
  void* at() { return memory.data(); }
  double get(int64_t i) const {
    if (dtype == DType::f64) return memory[size_t(i)];
    if (dtype == DType::f32) {
      float x;
      std::memcpy(&x, reinterpret_cast<const char*>(memory.data()) + 4 * i, 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, reinterpret_cast<const char*>(memory.data()) + 2 * i, 2);
    if (dtype == DType::bf16) {
      const uint32_t bits = uint32_t(x) << 16;
      float wide;
      std::memcpy(&wide, &bits, 4);
      return wide;
    }
    const int e = (x >> 10) & 31, m = x & 1023;
    const double size = e == 0 ? std::ldexp(double(m), -24) : std::ldexp(1024.0 + m, e - 25);
    return x & 0x8000 ? -size : size;
  }
};

DType acc(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void show(const char* what, const Numbers& x, int64_t n) {
  std::printf("%s", what);
  for (int64_t i = 0; i < n; ++i) std::printf(" %.9g", x.get(i));
  std::printf("\n");
}

void show(const char* what, const std::vector<int64_t>& x) {
  std::printf("%s", what);
  for (int64_t v : x) std::printf(" %lld", static_cast<long long>(v));
  std::printf("\n");
}

void contrastive(DType dtype, Layout layout, int64_t n, int64_t d, double scale) {
  Matrix a(dtype, n, d, 1), b(dtype, n, d, 2), bank(dtype, 2 * n + 3, d, 3);
  ContrastiveArgs args;
  args.layout = layout;
  args.reduction = Reduction::none;
  args.dtype = dtype;
  args.d = d;
  args.a = a.rows;
  args.b = b.rows;
  args.scale = scale;
  args.n_threads = 2;
  if (layout == Layout::bank) args.bank = bank.rows;
  if (layout == Layout::sigmoid) args.bias = -1.5;
  if (layout == Layout::decoupled) args.sigma = 0.5;
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < n; ++i) labels.push_back(i % (2 * n / 3 + 2));
  GroupedRows grouped;
  if (layout == Layout::classes) {
    args.ids_q = labels.data();
    grouped.apply(&args);
    args.ids_q = nullptr;
  }
  const int64_t rows = args.rows();
  const DType wide = acc(dtype);
  Numbers lse(wide, rows), positive(wide, n), inv(wide, 2 * n), mean_key(wide, n * d), loss(wide, 2 * n);
  ContrastiveState state;
  state.lse = lse.at(), state.positive = positive.at(), state.inv = inv.at(), state.mean_key = mean_key.at();
  std::vector<int64_t> rank(size_t(2 * n), 0);
  const bool ranked = layout <= Layout::bank;
  if (k.contrastive_forward(args, state, loss.at(), ranked ? rank.data() : nullptr) != 0) std::printf("no memory\n");
  std::printf("contrastive dtype %d layout %d n %lld d %lld scale %g\n", int(dtype), int(layout),
              static_cast<long long>(n), static_cast<long long>(d), scale);
  show("loss", loss, layout == Layout::joint || layout == Layout::decoupled ? 2 * n : n);
  if (ranked) show("rank", rank);
  Numbers dloss(wide, 2 * n), da(dtype, n * d), db(dtype, n * d);
  for (int64_t i = 0; i < 2 * n; ++i) {
    const double x = 1.0 + 0.25 * number(uint64_t(i), 4);
    const float f = float(x);
    if (wide == DType::f64) std::memcpy(static_cast<char*>(dloss.at()) + 8 * i, &x, 8);
    if (wide == DType::f32) std::memcpy(static_cast<char*>(dloss.at()) + 4 * i, &f, 4);
  }
  double dscale = 0, dbias = 0;
  ContrastiveBackwardArgs out;
  out.dloss = dloss.at(), out.dloss_stride = 1, out.da = da.at(), out.dscale = &dscale;
  if (layout != Layout::classes) out.db = db.at();
  if (layout == Layout::sigmoid) out.dbias = &dbias;
  if (k.contrastive_backward(args, state, out) != 0) std::printf("no memory\n");
  show("da", da, n * d);
  if (layout != Layout::classes) show("db", db, n * d);
  std::printf("dscale %.9g\ndbias %.9g\n", dscale, dbias);
  if (layout == Layout::bank) return;
  args.reduction = Reduction::mean;
  if (k.contrastive_at_once(args, state, loss.at(), out) != 0) std::printf("no memory\n");
  show("mean", loss, 1);
  show("da", da, n * d);
}

void extremes(DType dtype, int64_t n, int64_t d) {
  Matrix z(dtype, n, d, 5);
  std::vector<int64_t> ids, same(static_cast<size_t>(n)), other(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) ids.push_back(i % 7);
  PairwiseArgs args;
  args.dtype = dtype, args.d = d, args.self = true, args.q[0] = z.rows, args.ids_q = ids.data(), args.scale = -1.0;
  args.n_threads = 2;
  ExtremesOut out;
  out.max_same = same.data(), out.min_other = other.data();
  k.extremes(args, out);
  show("max_same", same);
  show("min_other", other);
}

void unit(DType dtype, int64_t n, int64_t d) {
  if (dtype == DType::f64) return;
  Matrix x(dtype, n, d, 8), dunit(DType::f32, n, d, 9);
  UnitArgs args;
  args.dtype = dtype, args.eps = 1e-12, args.d = d, args.x = x.rows;
  Numbers rows(DType::f32, n * d), norm(DType::f32, n), gradient(dtype, n * d);
  k.unit_forward(args, DType::f32, rows.at(), static_cast<float*>(norm.at()));
  k.unit_backward(args, DType::f32, dunit.rows, static_cast<const float*>(norm.at()), gradient.at());
  show("unit", rows, n * d);
  show("norm", norm, n);
  show("dx of unit", gradient, n * d);
}

void regression(DType dtype, int64_t n, int64_t d) {
  Matrix p(dtype, n, d, 6), t(dtype, n, d, 7);
  RegressionArgs args;
  args.reduction = Reduction::none, args.dtype = dtype, args.d = d, args.prediction = p.rows, args.target = t.rows;
  const DType wide = acc(dtype);
  Numbers state(wide, 3 * n), loss(wide, n), gradient(dtype, n * d), one(wide, n);
  const double x = 1.0;
  const float f = 1.0f;
  std::memcpy(one.at(), wide == DType::f64 ? static_cast<const void*>(&x) : &f, wide == DType::f64 ? 8 : 4);
  k.regression_forward(args, state.at(), loss.at());
  k.regression_backward(args, state.at(), one.at(), 0, gradient.at());
  show("regression", loss, n);
  show("gradient", gradient, n * d);
}

void updates(DType dtype, int64_t n) {
  Matrix target(dtype, 1, n, 8), source(dtype, 1, n, 9);
  EmaEntry entry;
  entry.target = target.bytes.data(), entry.source = source.bytes.data(), entry.n = n;
  entry.target_dtype = entry.source_dtype = dtype;
  for (const bool stochastic : {false, true}) {
    EmaArgs args;
    args.entries = &entry, args.n_entries = 1, args.n_elements = n, args.decay = 0.75, args.seed = 3, args.step = 2;
    args.stochastic_rounding = stochastic && dtype >= DType::bf16;
    k.ema_update(args);
    Numbers shown(dtype, n);
    std::memcpy(shown.at(), target.bytes.data(), target.bytes.size());
    show("ema", shown, n);
  }
  Matrix queue(dtype, 11, n, 10), keys(dtype, 6, n, 11);
  int64_t pointer = 8, fill = 9;
  EnqueueArgs args;
  args.queue = queue.bytes.data(), args.queue_dtype = dtype, args.size = 11, args.dim = n, args.ptr = &pointer;
  args.fill = &fill, args.keys = keys.rows, args.keys_dtype = dtype;
  k.enqueue(args);
  Numbers shown(dtype, 11 * n);
  std::memcpy(shown.at(), queue.bytes.data(), queue.bytes.size());
  show("queue", shown, 11 * n);
  std::printf("pointer %lld fill %lld\n", static_cast<long long>(pointer), static_cast<long long>(fill));
}

}  // namespace

int main() {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    for (int layout = 0; layout <= int(Layout::classes); ++layout) {
      for (const double scale : {5.0, 100.0}) {
        contrastive(dtype, Layout(layout), 3, 5, scale);
        contrastive(dtype, Layout(layout), 41, 33, scale);
      }
    }
    extremes(dtype, 45, 19);
    unit(dtype, 9, 13);
    regression(dtype, 9, 13);
    updates(dtype, 21);
  }
  return 0;
}
