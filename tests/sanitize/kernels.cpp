// SPDX-License-Identifier: Apache-2.0
// Calls every CPU kernel at sizes around vectors, panels and blocks, from memory that ends where the data ends.
//
//   kernels check      all of them, on one and on four threads; the results must have the same bits
//   kernels count N    one fixed call of kernel N, for a count of instructions (tests/test_speed_guard.py)
//
// Built by tests/sanitize with the sanitizers, and without: memory of C++'s new is where they have their guards.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "classes.h"
#include "sslkernels.h"

using namespace sslk;

namespace {

uint64_t state = 1;
double uniform() {  // (-1, 1)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(int64_t(state)) / 9.3e18;
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType acc_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Elements of a dtype in memory of exactly their size.  At least one byte: null means "not given".
struct Array {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Array(DType type, int64_t n) : dtype(type), count(n), memory(new char[size_t(n * bytes_of(type) + (n == 0))]()) {}
  void* at() { return memory.get(); }
  void fill(double size) {
    for (int64_t i = 0; i < count; ++i) {
      const double x = size * uniform();
      const float f = float(x);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      // float16: exponents of these sizes are in its range; the low digits are cut off.
      const uint16_t half = uint16_t((bits >> 16 & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
      const uint16_t brain = uint16_t(bits >> 16);
      if (dtype == DType::f64) std::memcpy(memory.get() + 8 * i, &x, 8);
      if (dtype == DType::f32) std::memcpy(memory.get() + 4 * i, &f, 4);
      if (dtype == DType::bf16) std::memcpy(memory.get() + 2 * i, &brain, 2);
      if (dtype == DType::f16) std::memcpy(memory.get() + 2 * i, std::fabs(x) < 1e-3 ? "\0\0" : (const char*)&half, 2);
    }
  }
};

struct Results {
  std::vector<std::unique_ptr<Array>> all;
  void* take(DType dtype, int64_t n) {
    all.push_back(std::make_unique<Array>(dtype, n));
    return all.back()->at();
  }
  double* number() { return static_cast<double*>(take(DType::f64, 1)); }
  int64_t* integers(int64_t n) { return static_cast<int64_t*>(take(DType::f64, n)); }
  bool same(const Results& other) const {
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t bytes = all[i]->count * bytes_of(all[i]->dtype);
      if (std::memcmp(all[i]->memory.get(), other.all[i]->memory.get(), size_t(bytes)) != 0) return false;
    }
    return all.size() == other.all.size();
  }
};

Rows rows(Array& x, int64_t n, int64_t d) { return {x.at(), n, d}; }

void must(int status) {
  if (status != 0) std::puts("no memory"), std::exit(2);
}

struct Size {
  int64_t n, m, d;
};

void tile_kernels(DType dtype, Kind kind, bool self, bool ids, double scale, Size s, int threads, Results& out) {
  state = 7;
  const DType acc = acc_of(dtype);
  const int64_t m = self ? s.n : s.m;
  Array q(dtype, s.n * s.d), k(dtype, s.m * s.d), dq(acc, s.n), dk(acc, m), above_q(acc, s.n), above_k(acc, m);
  for (Array* x : {&q, &k, &dq, &dk, &above_q, &above_k}) x->fill(0.7);
  std::vector<int64_t> ids_q(size_t(s.n) + 1), ids_k(size_t(s.m) + 1);
  for (size_t i = 0; i < ids_q.size(); ++i) ids_q[i] = int64_t(i % 7);
  for (size_t i = 0; i < ids_k.size(); ++i) ids_k[i] = int64_t(i % 5);
  PairwiseArgs a;
  a.kind = kind, a.dtype = dtype, a.d = s.d, a.self = self, a.scale = scale, a.n_threads = threads;
  a.q[0] = rows(q, s.n, s.d);
  if (!self) a.k[0] = rows(k, s.m, s.d);
  if (ids) a.ids_q = ids_q.data(), a.ids_k = ids_k.data();
  PairwiseForwardOut f;
  f.row = out.take(acc, s.n);
  f.col = self ? nullptr : out.take(acc, m);
  f.threshold_row = above_q.at(), f.rank_row = out.integers(s.n);
  if (!self) f.threshold_col = above_k.at(), f.rank_col = out.integers(m);
  must(kernels().pairwise_forward(a, f));
  PairwiseBackwardArgs b;
  b.row = f.row, b.col = f.col, b.drow = dq.at();
  if (!self) b.dcol = dk.at();
  b.stride = s.d, b.capacity_q = s.n, b.capacity_k = m;
  b.dq = out.take(acc, s.n * s.d);
  b.dk = self ? nullptr : out.take(acc, m * s.d);
  b.dbias = out.number();
  must(kernels().pairwise_backward(a, b));
  if (kind == Kind::softplus) return;
  if (ids) {
    ExtremesOut e;
    e.bias_k = above_k.at(), e.max_same = out.integers(s.n), e.min_other = out.integers(s.n);
    must(kernels().extremes(a, e));
  }
  if (self) return;
  AttendOut t;
  t.lse = out.take(acc, s.n), t.mean_key = out.take(acc, s.n * s.d);
  t.threshold = above_q.at(), t.rank = out.integers(s.n);
  must(kernels().attend(a, t));
}

void whole_losses(DType dtype, Layout layout, Reduction reduction, double scale, Size s, int threads, Results& out) {
  state = 11;
  const DType acc = acc_of(dtype);
  Array x(dtype, s.n * s.d), y(dtype, s.n * s.d), bank(dtype, s.m * s.d), dloss(acc, 2 * s.n + 1);
  for (Array* each : {&x, &y, &bank, &dloss}) each->fill(0.9);
  ContrastiveArgs a;
  a.layout = layout, a.reduction = reduction, a.dtype = dtype, a.d = s.d, a.scale = scale, a.n_threads = threads;
  a.a = rows(x, s.n, s.d), a.b = rows(y, s.n, s.d);
  if (layout == Layout::bank) a.bank = rows(bank, s.m, s.d);
  if (layout == Layout::sigmoid) a.bias = -2.0;
  if (layout == Layout::decoupled) a.sigma = 0.5;
  std::vector<int64_t> labels(size_t(s.n) + 1);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = int64_t(i % (labels.size() / 2 + 1));
  GroupedRows grouped;
  if (layout == Layout::classes) {
    a.ids_q = labels.data();
    grouped.apply(&a);
    a.ids_q = nullptr;
  }
  ContrastiveState kept;
  kept.lse = out.take(acc, a.rows()), kept.positive = out.take(acc, s.n), kept.inv = out.take(acc, 2 * s.n);
  if (layout == Layout::bank) kept.mean_key = out.take(acc, s.n * s.d);
  const int64_t logits = kernels().kept_tiles(layout, dtype, s.n, s.d);
  std::unique_ptr<Array> tiles;  // holds more than results: padding of whole blocks
  if (logits > 0) tiles = std::make_unique<Array>(acc, logits), kept.tiles = tiles->at();
  must(kernels().contrastive_forward(a, kept, out.take(acc, reduction == Reduction::none ? a.rows() : 1),
                                     out.integers(a.rows())));
  ContrastiveBackwardArgs b;
  b.dloss = dloss.at(), b.dloss_stride = 1;
  b.da = out.take(dtype, s.n * s.d), b.dscale = out.number();
  if (layout != Layout::classes) b.db = out.take(dtype, s.n * s.d);
  if (layout == Layout::sigmoid) b.dbias = out.number();
  must(kernels().contrastive_backward(a, kept, b));
  if (layout == Layout::bank || reduction == Reduction::none) return;
  b.da = out.take(dtype, s.n * s.d), b.dscale = out.number();
  if (layout != Layout::classes) b.db = out.take(dtype, s.n * s.d);
  if (layout == Layout::sigmoid) b.dbias = out.number();
  must(kernels().contrastive_at_once(a, kept, out.take(acc, 1), b));
}

void other_losses(DType dtype, Reduction reduction, Size s, int threads, Results& out) {
  state = 13;
  const DType acc = acc_of(dtype);
  const int64_t m = s.m % 19;
  Array x(dtype, s.n * s.d), y(dtype, s.n * s.d), keys(dtype, s.n * m * s.d), dloss(acc, s.n + 1);
  for (Array* each : {&x, &y, &keys, &dloss}) each->fill(0.9);
  if (dtype != DType::f64) {
    UnitArgs u;
    u.dtype = dtype, u.eps = 1e-12, u.d = s.d, u.x = rows(x, s.n, s.d), u.n_threads = threads;
    float* norm = static_cast<float*>(out.take(DType::f32, s.n));
    must(kernels().unit_forward(u, dtype, out.take(dtype, s.n * s.d), norm));
    must(kernels().unit_backward(u, dtype, rows(y, s.n, s.d), norm, out.take(dtype, s.n * s.d)));
  }
  RegressionArgs r;
  r.reduction = reduction, r.dtype = dtype, r.d = s.d, r.n_threads = threads, r.cosine = s.d % 2 == 1;
  r.prediction = rows(x, s.n, s.d), r.target = rows(y, s.n, s.d);
  void* kept = out.take(acc, 3 * s.n);
  must(kernels().regression_forward(r, kept, out.take(acc, reduction == Reduction::none ? s.n : 1)));
  must(kernels().regression_backward(r, kept, dloss.at(), 1, out.take(dtype, s.n * s.d)));
  PairedArgs p;
  p.reduction = reduction, p.dtype = dtype, p.d = s.d, p.scale = 9, p.n_threads = threads;
  p.query = rows(x, s.n, s.d), p.positive = rows(y, s.n, s.d);
  p.negatives = keys.at(), p.m = m, p.stride_row = m * s.d, p.stride_key = s.d;
  PairedState state{out.take(acc, s.n), out.take(acc, s.n), out.take(acc, 2 * s.n), out.take(acc, s.n * s.d)};
  PairedForwardOut f;
  f.loss = out.take(acc, reduction == Reduction::none ? s.n : 1);
  f.rank = out.integers(s.n), f.similarity = out.number();
  must(kernels().paired_forward(p, state, f));
  PairedBackwardArgs b;
  b.dloss = dloss.at(), b.dloss_stride = 1, b.dscale = out.number();
  b.dquery = out.take(dtype, s.n * s.d), b.dpositive = out.take(dtype, s.n * s.d);
  b.dnegatives = out.take(dtype, s.n * m * s.d);
  must(kernels().paired_backward(p, state, b));
  for (bool cosine : {false, true}) {
    std::vector<int64_t> labels(size_t(s.n) + 1);
    for (size_t i = 0; i < labels.size(); ++i) labels[i] = int64_t(i % (labels.size() / 3 + 1));
    GroupedRows grouped;
    TripletArgs t;
    t.dtype = dtype, t.d = s.d, t.z = rows(x, s.n, s.d), t.cosine = cosine, t.margin = 0.5, t.n_threads = threads;
    t.normalize = cosine || reduction == Reduction::mean;
    t.ids = labels.data(), t.order = grouped.sort(t.ids, s.n);
    TripletState found{out.integers(2 * s.n), out.take(acc, 2 * s.n), out.take(acc, s.n), out.take(acc, 1)};
    must(kernels().triplet_forward(t, found, out.take(acc, 1)));
    must(kernels().triplet_backward(t, found, {dloss.at(), out.take(dtype, s.n * s.d), out.number()}));
  }
}

void updates(DType target, DType source, int64_t n, int threads, Results& out) {
  state = 17;
  std::vector<std::unique_ptr<Array>> sources;
  std::vector<EmaEntry> entries;
  EmaArgs a;
  for (int64_t size : {n, int64_t(1), n / 3 + 1}) {
    sources.push_back(std::make_unique<Array>(source, size));
    sources.back()->fill(0.8);
    EmaEntry e;
    e.target = out.take(target, size);
    out.all.back()->fill(0.8);
    e.source = sources.back()->at(), e.n = size, e.begin = a.n_elements;
    e.target_dtype = target, e.source_dtype = source, e.index = uint32_t(entries.size());
    a.n_elements += size;
    entries.push_back(e);
  }
  a.entries = entries.data(), a.n_entries = int64_t(entries.size()), a.decay = 0.9, a.n_threads = threads;
  a.stochastic_rounding = n % 2 == 1, a.seed = 5, a.step = 3;
  must(kernels().ema_update(a));
  const int64_t size = 37, d = n % 61 + 1, count = n / d;
  Array keys(source, count * d);
  keys.fill(0.6);
  std::vector<int64_t> labels(size_t(count) + 1, 4);
  EnqueueArgs q;
  q.queue = out.take(target, size * d), q.queue_dtype = target, q.size = size, q.dim = d;
  q.ptr = out.integers(1), q.fill = out.integers(1), *q.ptr = 30;
  q.keys = rows(keys, count, d), q.keys_dtype = source, q.n_threads = threads;
  q.queue_labels = out.integers(size), q.labels = labels.data();
  must(kernels().enqueue(q));
}

template <class Call>
void twice(const char* name, Size s, Call call) {
  Results one, four;
  call(1, one);
  call(4, four);
  if (one.same(four)) return;
  std::printf("%s (%ld, %ld, %ld): four threads have other bits than one\n", name, long(s.n), long(s.m), long(s.d));
  std::exit(1);
}

void check() {
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  const Size sizes[] = {{0, 3, 2}, {1, 1, 1}, {5, 2, 3}, {17, 33, 9}, {66, 130, 20}, {131, 64, 33}, {300, 270, 48}};
  for (DType dtype : dtypes) {
    for (Size s : sizes) {
      for (int v = 0; v < 8; ++v) {
        const bool self = v & 1, ids = v & 2;
        const double scale = v & 4 ? 500.0 : 3.0;  // running maxima, one shift
        for (Kind kind : {Kind::lse, Kind::softplus}) {
          twice("tiles", s, [&](int t, Results& r) { tile_kernels(dtype, kind, self, ids, scale, s, t, r); });
        }
      }
      for (Layout layout : {Layout::joint, Layout::cross, Layout::both, Layout::bank, Layout::decoupled,
                            Layout::sigmoid, Layout::classes}) {
        const Reduction reduction = s.n % 2 ? Reduction::none : Reduction::mean;
        twice("whole", s, [&](int t, Results& r) { whole_losses(dtype, layout, reduction, 9.0, s, t, r); });
      }
      const Reduction reduction = s.n % 2 ? Reduction::mean : Reduction::none;
      twice("others", s, [&](int t, Results& r) { other_losses(dtype, reduction, s, t, r); });
    }
    // Two ranges of keys, and more than one thread's share of an average and of a batch of keys.
    const Size bank = {70, 5000, 8};
    twice("bank", bank, [&](int t, Results& r) { tile_kernels(dtype, Kind::lse, false, true, 9.0, bank, t, r); });
    for (DType source : dtypes) {
      for (int64_t n : {1, 70, 65537, 140001}) {
        twice("updates", {n, 0, 0}, [&](int t, Results& r) { updates(dtype, source, n, t, r); });
      }
    }
  }
  std::printf("every kernel of %s, with the same bits on one thread and on four\n", kernels().isa);
}

void count(int which) {
  Results out;
  if (which == 0) whole_losses(DType::f32, Layout::joint, Reduction::mean, 10.0, {256, 0, 64}, 1, out);
  if (which == 1) tile_kernels(DType::f32, Kind::lse, false, false, 300.0, {128, 2048, 64}, 1, out);
  if (which == 2) updates(DType::f32, DType::f32, 100000, 1, out);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "count") == 0) {
    count(std::atoi(argv[2]));
  } else {
    check();
  }
  return 0;
}
