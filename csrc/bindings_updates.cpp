// SPDX-License-Identifier: Apache-2.0
// EMA and queue in the Python module sslkernels._C; called through sslkernels.backends.updates_cpu.
//
// A small model is updated in a few microseconds, of which passing its tensors through Python would be
// the most.  So a plan keeps addresses and sizes, and the two watches below tell, in one call each,
// whether they are still true.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "sslkernels.h"

namespace py = pybind11;

namespace sslk {
namespace {

using Table = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

void require_columns(const Table& table, int columns, const char* what) {
  if (table.ndim() != 2 || table.shape(1) != columns) {
    throw std::invalid_argument(std::string(what) + ": the table must have shape [n, " + std::to_string(columns) + "]");
  }
}

DType dtype_of(int64_t code) {
  if (code < 0 || code > int(DType::f16)) throw std::invalid_argument("unknown dtype code");
  return DType(code);
}

// Pairs of tensors by address; the caller keeps the memory alive.
class EmaPlan {
 public:
  // [n, 5]: address of target, address of source, elements, dtype of target, dtype of source
  explicit EmaPlan(const Table& table) {
    require_columns(table, 5, "EmaPlan");
    const auto rows = table.unchecked<2>();
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
      EmaEntry entry;
      entry.target = reinterpret_cast<void*>(rows(i, 0));
      entry.source = reinterpret_cast<const void*>(rows(i, 1));
      entry.n = rows(i, 2);
      entry.begin = n_elements_;
      entry.target_dtype = dtype_of(rows(i, 3));
      entry.source_dtype = dtype_of(rows(i, 4));
      entry.index = uint32_t(i);
      if (entry.n <= 0) continue;
      n_elements_ += entry.n;
      entries_.push_back(entry);
    }
  }

  void run(double decay, bool stochastic_rounding, uint64_t seed, uint64_t step, int n_threads) const {
    py::gil_scoped_release release;
    EmaArgs args;
    args.entries = entries_.data();
    args.n_entries = int64_t(entries_.size());
    args.n_elements = n_elements_;
    args.decay = decay;
    args.stochastic_rounding = stochastic_rounding;
    args.seed = seed;
    args.step = uint32_t(step);
    args.n_threads = n_threads;
    kernels().ema_update(args);
  }

 private:
  std::vector<EmaEntry> entries_;
  int64_t n_elements_ = 0;
};

// [n, 3]: address of target, address of source, bytes
void copy_all(const Table& table) {
  require_columns(table, 3, "copy_all");
  const auto rows = table.unchecked<2>();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    if (rows(i, 2) > 0) {
      // memmove: a buffer may be its own source.
      std::memmove(reinterpret_cast<void*>(rows(i, 0)), reinterpret_cast<const void*>(rows(i, 1)), size_t(rows(i, 2)));
    }
  }
}

// Functions of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), found in the torch
// that is loaded.  A handle is the address of an at::Tensor, which is one pointer to its TensorImpl.
struct TensorInterface {
  using Handle = void**;
  int32_t (*data_ptr)(Handle, void**);
  int32_t (*numel)(Handle, int64_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*strides)(Handle, int64_t**);
};

// What an update relies on.  Sizes follow from it where strides are those of a dense tensor.
struct Layout {
  static constexpr int64_t kMaxDim = 6;
  void* data = nullptr;
  int64_t numel = 0;
  int32_t dtype = 0;
  int64_t dim = 0;
  int64_t strides[kMaxDim] = {};

  bool operator==(const Layout& other) const {
    if (data != other.data || numel != other.numel || dtype != other.dtype || dim != other.dim) return false;
    for (int64_t i = 0; i < dim; ++i) {
      if (strides[i] != other.strides[i]) return false;
    }
    return true;
  }
};

// Tensors that must still be the same objects with the same memory and layout.  Holds weak references:
// it keeps no tensor alive, an object at the address of a dead one is not taken for it, and torch
// refuses to exchange the insides of a tensor that has one (swap_tensors), so that an implementation
// asked here belongs to a living tensor.
class TensorWatch {
 public:
  // `functions` are the addresses of the members of TensorInterface.
  TensorWatch(const py::list& tensors, const std::vector<uintptr_t>& functions) {
    if (functions.size() != 5) throw std::invalid_argument("TensorWatch: 5 functions are needed");
    torch_.data_ptr = reinterpret_cast<decltype(torch_.data_ptr)>(functions[0]);
    torch_.numel = reinterpret_cast<decltype(torch_.numel)>(functions[1]);
    torch_.dtype = reinterpret_cast<decltype(torch_.dtype)>(functions[2]);
    torch_.dim = reinterpret_cast<decltype(torch_.dim)>(functions[3]);
    torch_.strides = reinterpret_cast<decltype(torch_.strides)>(functions[4]);
    for (py::handle tensor : tensors) {
      Seen seen{py::weakref(tensor), reinterpret_cast<void*>(py::cast<uintptr_t>(tensor.attr("_cdata"))), {}};
      if (!ask(seen.impl, seen.layout)) throw std::runtime_error("TensorWatch: a tensor has no memory");
      if (uintptr_t(seen.layout.data) != py::cast<uintptr_t>(tensor.attr("data_ptr")())) {
        throw std::runtime_error("TensorWatch: torch's C interface disagrees with data_ptr()");
      }
      seen_.push_back(std::move(seen));
    }
  }

  // Whether a + b are the tensors of the constructor, unchanged.
  bool unchanged(const py::list& a, const py::list& b) const {
    const size_t n_a = a.size(), n_b = b.size();
    if (n_a + n_b != seen_.size()) return false;
    Layout now;
    for (size_t i = 0; i < seen_.size(); ++i) {
      PyObject* tensor =
          i < n_a ? PyList_GET_ITEM(a.ptr(), py::ssize_t(i)) : PyList_GET_ITEM(b.ptr(), py::ssize_t(i - n_a));
      if (!refers_to(seen_[i].reference.ptr(), tensor) || !ask(seen_[i].impl, now) || !(now == seen_[i].layout)) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Seen {
    py::weakref reference;
    void* impl;
    Layout layout;
  };

  bool ask(void* impl, Layout& out) const {
    int64_t* strides = nullptr;
    if (torch_.data_ptr(&impl, &out.data) != 0 || torch_.numel(&impl, &out.numel) != 0 ||
        torch_.dtype(&impl, &out.dtype) != 0 || torch_.dim(&impl, &out.dim) != 0 ||
        torch_.strides(&impl, &strides) != 0 || out.dim > Layout::kMaxDim) {
      return false;
    }
    for (int64_t i = 0; i < out.dim; ++i) out.strides[i] = strides[i];
    return true;
  }

  static bool refers_to(PyObject* reference, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* target = nullptr;
    if (PyWeakref_GetRef(reference, &target) < 0) throw py::error_already_set();
    Py_XDECREF(target);
    return target == object;
#else
    return PyWeakref_GET_OBJECT(reference) == object;
#endif
  }

  TensorInterface torch_ = {};
  std::vector<Seen> seen_;
};

// Dicts whose entries must still be the same objects: the parameters, buffers and submodules of a model.
class SlotWatch {
 public:
  explicit SlotWatch(const py::list& dicts) {
    for (py::handle item : dicts) {
      const auto dict = py::cast<py::dict>(item);
      Seen seen;
      seen.dict = dict;
      for (const auto& entry : dict) {
        seen.keys.push_back(py::reinterpret_borrow<py::object>(entry.first));
        seen.values.push_back(py::reinterpret_borrow<py::object>(entry.second));
      }
      seen_.push_back(std::move(seen));
    }
  }

  bool unchanged() const {
    for (const Seen& seen : seen_) {
      if (size_t(PyDict_GET_SIZE(seen.dict.ptr())) != seen.keys.size()) return false;
      for (size_t i = 0; i < seen.keys.size(); ++i) {
        PyObject* value = PyDict_GetItemWithError(seen.dict.ptr(), seen.keys[i].ptr());
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (value != seen.values[i].ptr()) return false;
      }
    }
    return true;
  }

 private:
  struct Seen {
    py::dict dict;
    std::vector<py::object> keys, values;
  };
  std::vector<Seen> seen_;
};

void enqueue(uintptr_t queue, int queue_dtype, int64_t size, int64_t dim, uintptr_t ptr, uintptr_t fill, uintptr_t keys,
             int keys_dtype, int64_t n, int64_t stride, bool normalize, uintptr_t queue_labels, uintptr_t labels,
             int n_threads) {
  py::gil_scoped_release release;
  EnqueueArgs args;
  args.queue = reinterpret_cast<void*>(queue);
  args.queue_dtype = dtype_of(queue_dtype);
  args.size = size;
  args.dim = dim;
  args.ptr = reinterpret_cast<int64_t*>(ptr);
  args.fill = reinterpret_cast<int64_t*>(fill);
  args.keys = {reinterpret_cast<const void*>(keys), n, stride};
  args.keys_dtype = dtype_of(keys_dtype);
  args.normalize = normalize;
  args.queue_labels = reinterpret_cast<int64_t*>(queue_labels);
  args.labels = reinterpret_cast<const int64_t*>(labels);
  args.n_threads = n_threads;
  kernels().enqueue(args);
}

}  // namespace

void bind_updates(py::module_& m) {
  py::class_<EmaPlan>(m, "EmaPlan").def(py::init<const Table&>()).def("run", &EmaPlan::run);
  m.def("copy_all", &copy_all);
  py::class_<TensorWatch>(m, "TensorWatch")
      .def(py::init<const py::list&, const std::vector<uintptr_t>&>())
      .def("unchanged", &TensorWatch::unchanged);
  py::class_<SlotWatch>(m, "SlotWatch").def(py::init<const py::list&>()).def("unchanged", &SlotWatch::unchanged);
  m.def("enqueue", &enqueue);
}

}  // namespace sslk
