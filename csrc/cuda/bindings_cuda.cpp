// SPDX-License-Identifier: Apache-2.0
// sslkernels._cuda: addresses in, errors out, no mathematics. Needs neither torch nor CUDA headers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "launchers.h"

namespace py = pybind11;
namespace cuda = sslkernels::cuda;

namespace {

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void check(const char* op, int error) {
  if (error != 0)
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + ": " +
                             cuda::error_text(error));
}

void check_dtype(const char* op, int dtype) {
  if (dtype < 0 || dtype >= cuda::kDtypes)
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 .. 3, got " + std::to_string(dtype));
}

// One tuple a pair: (target address, source address, elements, target dtype, source dtype).
using Pair = std::tuple<uint64_t, uint64_t, int64_t, int32_t, int32_t>;

py::tuple build_ema_table(const std::vector<Pair>& pairs) {
  std::vector<cuda::EmaTensor> tensors;
  tensors.reserve(pairs.size());
  for (const auto& [dst, src, n, dst_dtype, src_dtype] : pairs) {
    check_dtype("build_ema_table", dst_dtype);
    check_dtype("build_ema_table", src_dtype);
    if (n < 0) throw std::invalid_argument("build_ema_table: elements must be >= 0, got " + std::to_string(n));
    if (dst % cuda::dtype_bytes(dst_dtype) != 0 || src % cuda::dtype_bytes(src_dtype) != 0)
      throw std::invalid_argument("build_ema_table: an address must be a multiple of its element size");
    const auto index = static_cast<uint32_t>(tensors.size());
    tensors.push_back({dst, src, n, dst_dtype, src_dtype, index, 0});
  }
  const cuda::EmaTable table = cuda::build_ema_table(tensors);
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(table.bytes.data()), table.bytes.size()),
                        table.n_chunks, table.chunks_offset);
}

void ema_update(uint64_t tensors, uint64_t chunks, int64_t n_chunks, double decay, uint64_t decay_ptr, int decay_dtype,
                bool stochastic, uint64_t seed, uint32_t step, uint64_t rng_state, int device, uint64_t stream) {
  if (decay_ptr != 0 && decay_dtype != cuda::kFloat32 && decay_dtype != cuda::kFloat64)
    throw std::invalid_argument("ema_update: decay must be float32 or float64 on the device");
  cuda::EmaArgs args = {};
  args.tensors = pointer<const cuda::EmaTensor>(tensors);
  args.chunks = pointer<const cuda::EmaChunk>(chunks);
  args.n_chunks = n_chunks;
  args.decay = decay;
  args.decay_ptr = pointer<const void>(decay_ptr);
  args.decay_dtype = decay_dtype;
  args.seed = seed;
  args.step = step;
  args.rng_state = pointer<uint64_t>(rng_state);
  check("ema_update_", cuda::ema_update(args, stochastic, device, pointer<void>(stream)));
}

void enqueue(uint64_t queue, int queue_dtype, uint64_t keys, int key_dtype, uint64_t queue_labels, uint64_t labels,
             uint64_t queue_ptr, uint64_t fill, int64_t N, int64_t D, int64_t K, int64_t key_stride, bool normalize,
             double eps, int device, uint64_t stream) {
  check_dtype("enqueue_", queue_dtype);
  check_dtype("enqueue_", key_dtype);
  if (N < 0 || D < 0 || K < 1) throw std::invalid_argument("enqueue_: N >= 0, D >= 0 and K >= 1 must hold");
  cuda::EnqueueArgs args = {};
  args.queue = pointer<void>(queue);
  args.keys = pointer<const void>(keys);
  args.queue_labels = pointer<int64_t>(queue_labels);
  args.labels = pointer<const int64_t>(labels);
  args.queue_ptr = pointer<unsigned long long>(queue_ptr);
  args.fill = pointer<int64_t>(fill);
  args.N = N;
  args.D = D;
  args.K = K;
  args.key_stride = key_stride;
  args.eps = eps;
  args.normalize = normalize ? 1 : 0;
  check("enqueue_", cuda::enqueue(args, key_dtype, queue_dtype, device, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "EMA and queue updates in CUDA C++; see docs/cuda.md and sslkernels/backends/cuda.py.";
  m.attr("EMA_CHUNK") = cuda::kEmaChunk;
  m.attr("ARCHS") = py::tuple(py::cast(cuda::architectures()));
  m.attr("RUNTIME_VERSION") = cuda::runtime_version();
  m.def("driver_version", &cuda::driver_version, "The CUDA version that the driver knows, 0 without a driver.");
  m.def("build_ema_table", &build_ema_table, py::arg("pairs"),
        "(bytes of the table, chunks, offset of the chunks in the table)");
  m.def("ema_update", &ema_update, py::arg("tensors"), py::arg("chunks"), py::arg("n_chunks"), py::arg("decay"),
        py::arg("decay_ptr"), py::arg("decay_dtype"), py::arg("stochastic"), py::arg("seed"), py::arg("step"),
        py::arg("rng_state"), py::arg("device"), py::arg("stream"),
        "One launch of the EMA over a table on the device.");
  m.def("enqueue", &enqueue, py::arg("queue"), py::arg("queue_dtype"), py::arg("keys"), py::arg("key_dtype"),
        py::arg("queue_labels"), py::arg("labels"), py::arg("queue_ptr"), py::arg("fill"), py::arg("N"), py::arg("D"),
        py::arg("K"), py::arg("key_stride"), py::arg("normalize"), py::arg("eps"), py::arg("device"), py::arg("stream"),
        "One launch that normalises, casts, wraps and writes a batch of keys.");
}
