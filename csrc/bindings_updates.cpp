// SPDX-License-Identifier: Apache-2.0
// EMA and queue in the Python module sslkernels._C; called through sslkernels.backends.updates_cpu.
//
// A small model is updated in a few microseconds, of which passing its tensors through Python would be
// the most.  So a plan keeps addresses and sizes, and the two watches below tell, in one call each,
// whether they are still true.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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
    throw std::invalid_argument(std::string(what) + ": the table must have shape [n, " +
                                std::to_string(columns) + "]");
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
      std::memmove(reinterpret_cast<void*>(rows(i, 0)), reinterpret_cast<const void*>(rows(i, 1)),
                   size_t(rows(i, 2)));
    }
  }
}

// Tensors that must still be the same objects at the same addresses.  Holds weak references, so that
// it keeps no tensor alive and an object at the address of a dead one is not taken for it.
class AddressWatch {
 public:
  // `data_ptr` and `numel` are the methods of torch.Tensor.
  AddressWatch(const py::list& tensors, py::object data_ptr, py::object numel)
      : data_ptr_(std::move(data_ptr)), numel_(std::move(numel)) {
    for (py::handle tensor : tensors) {
      seen_.push_back({py::weakref(tensor), ask(data_ptr_, tensor.ptr()), ask(numel_, tensor.ptr())});
    }
  }

  bool unchanged(const py::list& a, const py::list& b) const {
    const size_t n_a = a.size(), n_b = b.size();
    if (n_a + n_b != seen_.size()) return false;
    for (size_t i = 0; i < seen_.size(); ++i) {
      PyObject* tensor = i < n_a ? PyList_GET_ITEM(a.ptr(), py::ssize_t(i))
                                 : PyList_GET_ITEM(b.ptr(), py::ssize_t(i - n_a));
      if (!refers_to(seen_[i].reference.ptr(), tensor) ||
          ask(data_ptr_, tensor) != seen_[i].address || ask(numel_, tensor) != seen_[i].numel) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Seen {
    py::weakref reference;
    unsigned long long address;
    unsigned long long numel;
  };

  static unsigned long long ask(const py::object& method, PyObject* tensor) {
    PyObject* answer = PyObject_CallOneArg(method.ptr(), tensor);
    if (answer == nullptr) throw py::error_already_set();
    const unsigned long long value = PyLong_AsUnsignedLongLong(answer);
    Py_DECREF(answer);
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
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

  py::object data_ptr_, numel_;
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

void enqueue(uintptr_t queue, int queue_dtype, int64_t size, int64_t dim, uintptr_t ptr, uintptr_t fill,
             uintptr_t keys, int keys_dtype, int64_t n, int64_t stride, bool normalize, uintptr_t queue_labels,
             uintptr_t labels, int n_threads) {
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
  py::class_<AddressWatch>(m, "AddressWatch")
      .def(py::init<const py::list&, py::object, py::object>())
      .def("unchanged", &AddressWatch::unchanged);
  py::class_<SlotWatch>(m, "SlotWatch")
      .def(py::init<const py::list&>())
      .def("unchanged", &SlotWatch::unchanged);
  m.def("enqueue", &enqueue);
}

}  // namespace sslk
