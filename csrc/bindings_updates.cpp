// SPDX-License-Identifier: Apache-2.0
// EMA and queue in the Python module sslkernels._C; called through sslkernels.backends.updates_cpu.
//
// A small model is updated in a few microseconds, of which passing its tensors through Python would be
// the most.  So a plan keeps addresses and sizes, and the two watches below tell, in one call each,
// whether they are still true.

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace sslk {
namespace {

template <class... Columns>
void require_same_length(const char* op, size_t n, const Columns&... columns) {
  if (((columns.size() != n) || ...)) {
    throw std::invalid_argument(std::string(op) + ": the lists must have the same length");
  }
}

// ---- Plans ---------------------------------------------------------------------------------------

// Pairs of tensors by address; the caller keeps the memory alive.
class EmaPlan {
 public:
  static constexpr const char* kName = "EmaPlan";
  // A column of the list of pairs each.
  struct Columns {
    std::vector<uint8_t*> targets;        // addresses
    std::vector<const uint8_t*> sources;  // addresses
    std::vector<int64_t> sizes;           // elements
    std::vector<DType> target_dtypes;
    std::vector<DType> source_dtypes;
    std::vector<int64_t> indices;  // of which tensor this is a part; empty: of one each
    std::vector<int64_t> firsts;   // where in it the part begins

    static Fields fields() {
      return {
          SSLK_REQUIRED(Columns, targets, "targets"),
          SSLK_REQUIRED(Columns, sources, "sources"),
          SSLK_REQUIRED(Columns, sizes, "sizes"),
          SSLK_REQUIRED(Columns, target_dtypes, "target_dtypes"),
          SSLK_REQUIRED(Columns, source_dtypes, "source_dtypes"),
          SSLK_OPTIONAL(Columns, indices, "indices"),
          SSLK_OPTIONAL(Columns, firsts, "firsts"),
      };
    }
  };

  explicit EmaPlan(const Columns& pairs) {
    require_same_length(kName, pairs.sizes.size(), pairs.targets, pairs.sources, pairs.target_dtypes,
                        pairs.source_dtypes);
    const bool parts = !pairs.indices.empty();
    require_same_length(kName, parts ? pairs.sizes.size() : 0, pairs.indices, pairs.firsts);
    for (size_t i = 0; i < pairs.sizes.size(); ++i) {
      EmaEntry entry;
      entry.target = pairs.targets[i];
      entry.source = pairs.sources[i];
      entry.n = pairs.sizes[i];
      entry.begin = n_elements_;
      entry.target_dtype = pairs.target_dtypes[i];
      entry.source_dtype = pairs.source_dtypes[i];
      entry.index = uint32_t(parts ? pairs.indices[i] : int64_t(i));
      entry.first = parts ? pairs.firsts[i] : 0;
      if (entry.first < 0 || entry.first > kMostElements) {
        throw std::invalid_argument("EmaPlan: firsts must be from 0 to 2^47");
      }
      if (entry.n <= 0) continue;
      require(kName, {{"a target", entry.target, entry.n}, {"a source", entry.source, entry.n}});
      if (n_elements_ > kMostElements) throw std::invalid_argument("EmaPlan: more elements than memory can hold");
      n_elements_ += entry.n;
      entries_.push_back(entry);
    }
  }

  struct Run {
    using Self = EmaPlan;
    static constexpr const char* kName = "run";
    static constexpr const char* kDoc = "target = decay * target + (1 - decay) * source.";
    const EmaPlan* self = nullptr;
    EmaArgs args;
    uint64_t step = 0;  // its lower 32 bits count

    static Fields fields() {
      return {
          SSLK_REQUIRED(Run, args.decay, "decay"), SSLK_REQUIRED(Run, args.stochastic_rounding, "stochastic_rounding"),
          SSLK_REQUIRED(Run, args.seed, "seed"),   SSLK_REQUIRED(Run, step, "step"),
          SSLK_THREADS(Run, args.n_threads),
      };
    }
    void run() {
      args.entries = self->entries_.data();
      args.n_entries = int64_t(self->entries_.size());
      args.n_elements = self->n_elements_;
      args.step = uint32_t(step);
      check(kernels().ema_update(args));
    }
  };

 private:
  std::vector<EmaEntry> entries_;
  int64_t n_elements_ = 0;
};

// Memory to be copied; the caller keeps it alive.
class CopyPlan {
 public:
  static constexpr const char* kName = "CopyPlan";
  struct Columns {
    std::vector<uint8_t*> targets;        // addresses
    std::vector<const uint8_t*> sources;  // addresses
    std::vector<int64_t> bytes;

    static Fields fields() {
      return {
          SSLK_REQUIRED(Columns, targets, "targets"),
          SSLK_REQUIRED(Columns, sources, "sources"),
          SSLK_REQUIRED(Columns, bytes, "bytes"),
      };
    }
  };

  explicit CopyPlan(const Columns& pairs) : pairs_(pairs) {
    require_same_length(kName, pairs.bytes.size(), pairs.targets, pairs.sources);
    for (size_t i = 0; i < pairs.bytes.size(); ++i) {
      if (pairs.bytes[i] <= 0) continue;
      require(kName, {{"a target", pairs.targets[i], pairs.bytes[i]}, {"a source", pairs.sources[i], pairs.bytes[i]}});
    }
  }

  struct Run {
    using Self = CopyPlan;
    static constexpr const char* kName = "run";
    static constexpr const char* kDoc = "target = source.";
    const CopyPlan* self = nullptr;

    static Fields fields() { return {}; }
    void run() {
      const Columns& pairs = self->pairs_;
      for (size_t i = 0; i < pairs.bytes.size(); ++i) {
        // memmove: a buffer may be its own source.
        if (pairs.bytes[i] > 0) std::memmove(pairs.targets[i], pairs.sources[i], size_t(pairs.bytes[i]));
      }
    }
  };

 private:
  Columns pairs_;
};

// ---- Watches -------------------------------------------------------------------------------------

// Functions of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), found in the torch
// that is loaded.  A handle is the address of an at::Tensor, which is one pointer to its TensorImpl.
struct TensorInterface {
  using Handle = void**;
  int32_t (*data_ptr)(Handle, void**) = nullptr;
  int32_t (*numel)(Handle, int64_t*) = nullptr;
  int32_t (*dtype)(Handle, int32_t*) = nullptr;
  int32_t (*dim)(Handle, int64_t*) = nullptr;
  int32_t (*strides)(Handle, int64_t**) = nullptr;
};

// What an update relies on.  Sizes follow from it where strides are those of a dense tensor.
struct TensorLayout {
  static constexpr int64_t kMaxDim = 6;
  void* data = nullptr;
  int64_t numel = 0;
  int32_t dtype = 0;
  int64_t dim = 0;
  int64_t strides[kMaxDim] = {};

  bool operator==(const TensorLayout& other) const {
    if (data != other.data || numel != other.numel || dtype != other.dtype || dim != other.dim) return false;
    for (int64_t i = 0; i < dim; ++i) {
      if (strides[i] != other.strides[i]) return false;
    }
    return true;
  }
};

uint64_t integer_of(const Object& object) {
  const uint64_t value = PyLong_AsUnsignedLongLong(object.get());
  if (value == uint64_t(-1) && PyErr_Occurred()) throw PythonError();
  return value;
}

// The object of a weak reference, for a comparison only; None when it is gone.
PyObject* referent(PyObject* reference) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // the one that returns a new reference is of Python 3.13
  return PyWeakref_GetObject(reference);
#pragma GCC diagnostic pop
}

// Tensors that must still be the same objects with the same memory and layout.  Holds weak references:
// it keeps no tensor alive, an object at the address of a dead one is not taken for it, and torch
// refuses to exchange the insides of a tensor that has one (swap_tensors), so that an implementation
// asked here belongs to a living tensor.
class TensorWatch {
 public:
  static constexpr const char* kName = "TensorWatch";
  struct Columns {
    std::vector<PyObject*> tensors;
    TensorInterface torch;

    static Fields fields() {
      return {
          SSLK_REQUIRED(Columns, tensors, "tensors"),   SSLK_REQUIRED(Columns, torch.data_ptr, "data_ptr"),
          SSLK_REQUIRED(Columns, torch.numel, "numel"), SSLK_REQUIRED(Columns, torch.dtype, "dtype"),
          SSLK_REQUIRED(Columns, torch.dim, "dim"),     SSLK_REQUIRED(Columns, torch.strides, "strides"),
      };
    }
  };

  explicit TensorWatch(const Columns& given) : torch_(given.torch) {
    if (torch_.data_ptr == nullptr || torch_.numel == nullptr || torch_.dtype == nullptr || torch_.dim == nullptr ||
        torch_.strides == nullptr) {
      throw std::invalid_argument("TensorWatch: a function has no address");
    }
    for (PyObject* tensor : given.tensors) {
      Seen seen;
      seen.reference = Object::owned(PyWeakref_NewRef(tensor, nullptr));
      const Object impl = Object::owned(PyObject_GetAttrString(tensor, "_cdata"));
      seen.impl = reinterpret_cast<void*>(integer_of(impl));
      if (!ask(seen.impl, seen.layout)) throw std::runtime_error("TensorWatch: a tensor has no memory");
      const Object address = Object::owned(PyObject_CallMethod(tensor, "data_ptr", nullptr));
      if (reinterpret_cast<void*>(integer_of(address)) != seen.layout.data) {
        throw std::runtime_error("TensorWatch: torch's C interface disagrees with data_ptr()");
      }
      seen_.push_back(std::move(seen));
    }
  }

  // Whether a + b are the tensors of the constructor, unchanged.
  bool unchanged(PyObject* a, PyObject* b) const {
    const Py_ssize_t n_a = PyList_Size(a), n_b = PyList_Size(b);
    if (n_a < 0 || n_b < 0) throw PythonError();
    if (size_t(n_a + n_b) != seen_.size()) return false;
    TensorLayout now;
    for (Py_ssize_t i = 0; i < n_a + n_b; ++i) {
      const Seen& seen = seen_[size_t(i)];
      PyObject* tensor = i < n_a ? PyList_GetItem(a, i) : PyList_GetItem(b, i - n_a);
      if (referent(seen.reference.get()) != tensor || !ask(seen.impl, now) || !(now == seen.layout)) return false;
    }
    return true;
  }

 private:
  struct Seen {
    Object reference;
    void* impl = nullptr;
    TensorLayout layout;
  };

  bool ask(void* impl, TensorLayout& out) const {
    int64_t* strides = nullptr;
    if (torch_.data_ptr(&impl, &out.data) != 0 || torch_.numel(&impl, &out.numel) != 0 ||
        torch_.dtype(&impl, &out.dtype) != 0 || torch_.dim(&impl, &out.dim) != 0 ||
        torch_.strides(&impl, &strides) != 0 || out.dim > TensorLayout::kMaxDim) {
      return false;
    }
    for (int64_t i = 0; i < out.dim; ++i) out.strides[i] = strides[i];
    return true;
  }

  TensorInterface torch_;
  std::vector<Seen> seen_;
};

// Dicts whose entries must still be the same objects: the parameters, buffers and submodules of a model.
class SlotWatch {
 public:
  static constexpr const char* kName = "SlotWatch";
  struct Columns {
    std::vector<PyObject*> dicts;

    static Fields fields() { return {SSLK_REQUIRED(Columns, dicts, "dicts")}; }
  };

  explicit SlotWatch(const Columns& given) {
    for (PyObject* dict : given.dicts) {
      if (!PyDict_Check(dict)) raise(PyExc_TypeError, "SlotWatch: dicts must be a list of dicts, got %R in it", dict);
      Seen seen;
      seen.dict = Object::shared(dict);
      PyObject *key = nullptr, *value = nullptr;
      Py_ssize_t position = 0;
      while (PyDict_Next(dict, &position, &key, &value)) {
        seen.keys.push_back(Object::shared(key));
        seen.values.push_back(Object::shared(value));
      }
      seen_.push_back(std::move(seen));
    }
  }

  bool unchanged() const {
    for (const Seen& seen : seen_) {
      if (size_t(PyDict_Size(seen.dict.get())) != seen.keys.size()) return false;
      for (size_t i = 0; i < seen.keys.size(); ++i) {
        PyObject* value = PyDict_GetItemWithError(seen.dict.get(), seen.keys[i].get());
        if (value == nullptr && PyErr_Occurred()) throw PythonError();
        if (value != seen.values[i].get()) return false;
      }
    }
    return true;
  }

  // A model that holds its EMA is held by the EMA's watch: garbage that the collector must find.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (reinterpret_cast<Instance<SlotWatch>*>(self)->value == nullptr) return 0;
    for (const Seen& seen : value_of<SlotWatch>(self).seen_) {
      Py_VISIT(seen.dict.get());
      for (const Object& key : seen.keys) Py_VISIT(key.get());
      for (const Object& value : seen.values) Py_VISIT(value.get());
    }
    return 0;
  }
  static int clear(PyObject* self) {
    if (reinterpret_cast<Instance<SlotWatch>*>(self)->value == nullptr) return 0;
    const std::vector<Seen> dropped = std::move(value_of<SlotWatch>(self).seen_);
    return 0;
  }

 private:
  struct Seen {
    Object dict;
    std::vector<Object> keys, values;
  };
  std::vector<Seen> seen_;
};

// ---- Types ---------------------------------------------------------------------------------------

// tp_new: the columns by name, then a T of them.
template <class T>
PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  return new_instance<T>(type, [&] {
    typename T::Columns columns;
    fill(T::kName, Bound<typename T::Columns>::fields(), args, kwargs, &columns);
    return new T(columns);
  });
}

PyObject* tensors_unchanged(PyObject* self, PyObject* args) {
  return guarded(static_cast<PyObject*>(nullptr), [&] {
    PyObject *a = nullptr, *b = nullptr;
    if (PyArg_UnpackTuple(args, "unchanged", 2, 2, &a, &b) == 0) throw PythonError();
    return to_python(value_of<TensorWatch>(self).unchanged(a, b));
  });
}

PyObject* slots_unchanged(PyObject* self, PyObject*) {
  return guarded(static_cast<PyObject*>(nullptr), [&] { return to_python(value_of<SlotWatch>(self).unchanged()); });
}

// Adds the type sslkernels._C.NAME, which can't be inherited from.  `name` is the whole name.
template <class T>
void add_type(Definition& definition, const char* name, PyMethodDef method, bool collected = false) {
  static PyMethodDef methods[] = {method, {nullptr, nullptr, 0, nullptr}};
  static std::vector<PyType_Slot> slots = {
      {Py_tp_new, reinterpret_cast<void*>(make<T>)},
      {Py_tp_dealloc, reinterpret_cast<void*>(delete_instance<T>)},
      {Py_tp_methods, methods},
  };
  if constexpr (std::is_same_v<T, SlotWatch>) {
    slots.push_back({Py_tp_traverse, reinterpret_cast<void*>(SlotWatch::traverse)});
    slots.push_back({Py_tp_clear, reinterpret_cast<void*>(SlotWatch::clear)});
  }
  slots.push_back({0, nullptr});
  static PyType_Spec spec = {name, int(sizeof(Instance<T>)), 0,
                             unsigned(Py_TPFLAGS_DEFAULT | (collected ? Py_TPFLAGS_HAVE_GC : 0)), slots.data()};
  definition.types.push_back(&spec);
}

// ---- Queue ---------------------------------------------------------------------------------------

struct Enqueue {
  static constexpr const char* kName = "enqueue";
  static constexpr const char* kDoc = "Normalise, cast and write a batch of keys, and advance the pointer.";
  EnqueueArgs args;

  static Fields fields() {
    using Call = Enqueue;
    return {
        SSLK_REQUIRED(Call, args.queue, "queue"),
        SSLK_REQUIRED(Call, args.queue_dtype, "queue_dtype"),
        SSLK_SIZE(Call, args.size, "size"),
        SSLK_SIZE(Call, args.dim, "dim"),
        SSLK_REQUIRED(Call, args.ptr, "ptr"),
        SSLK_REQUIRED(Call, args.fill, "fill"),
        SSLK_REQUIRED(Call, args.keys.data, "keys"),
        SSLK_REQUIRED(Call, args.keys_dtype, "keys_dtype"),
        SSLK_SIZE(Call, args.keys.n, "n"),
        SSLK_SIZE(Call, args.keys.stride, "keys_stride"),
        SSLK_REQUIRED(Call, args.normalize, "normalize"),
        SSLK_REQUIRED(Call, args.queue_labels, "queue_labels"),
        SSLK_REQUIRED(Call, args.labels, "labels"),
        SSLK_THREADS(Call, args.n_threads),
    };
  }
  void run() {
    const int64_t n = args.keys.n;
    if (args.size == 0) throw std::invalid_argument("enqueue: size must be at least 1");
    require(kName, {{"queue", args.queue, args.size, args.dim},
                    {"ptr", args.ptr, 1},
                    {"fill", args.fill, 1},
                    {"keys", args.keys.data, n, args.dim, args.keys.stride}});
    if (args.queue_labels != nullptr) require(kName, {{"labels", args.labels, n}});
    args.keys.stride = stride_of(args.keys.stride, args.dim);
    check(kernels().enqueue(args));
  }
};

}  // namespace

void bind_updates(Definition& definition) {
  add_type<EmaPlan>(definition, "sslkernels._C.EmaPlan",
                    bound<EmaPlan::Run>(definition, method_entry<EmaPlan::Run>, "$self, /"));
  add_type<CopyPlan>(definition, "sslkernels._C.CopyPlan",
                     bound<CopyPlan::Run>(definition, method_entry<CopyPlan::Run>, "$self, /"));
  add_type<TensorWatch>(definition, "sslkernels._C.TensorWatch",
                        {"unchanged", tensors_unchanged, METH_VARARGS,
                         "unchanged($self, a, b, /)\n--\n\nWhether a + b are these tensors, in the same memory."});
  add_type<SlotWatch>(definition, "sslkernels._C.SlotWatch",
                      {"unchanged", slots_unchanged, METH_NOARGS,
                       "unchanged($self, /)\n--\n\nWhether no dict got, lost or replaced an entry."},
                      true);
  add_function<Enqueue>(definition);
}

}  // namespace sslk
