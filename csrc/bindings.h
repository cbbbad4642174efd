// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module, one a file: bindings.cpp gathers them.
//
// A bound function is a struct: its members are filled by name (fields.h), then `run` is called without the GIL.
// Addresses are data_ptr() integers, None for null; strides are in elements.  sslkernels/backends/cpu.py and
// updates_cpu.py are the callers; they and the ops above them have checked shapes and dtypes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "fields.h"
#include "fork.h"
#include "sslkernels.h"

namespace sslk {

template <>
struct Names<DType> {
  static constexpr const char* all[] = {"float32", "float64", "bfloat16", "float16"};
};
template <>
struct Names<Kind> {
  static constexpr const char* all[] = {"lse", "softplus"};
};
template <>
struct Names<Layout> {
  static constexpr const char* all[] = {"joint", "cross", "both", "bank", "decoupled", "sigmoid", "classes"};
};
template <>
struct Names<Reduction> {
  static constexpr const char* all[] = {"none", "mean", "sum"};
};

template <>
struct Names<Likelihood> {
  static constexpr const char* all[] = {"bernoulli", "gaussian"};
};

// The status of a kernel: 0, or memory could not be had.
inline void check(int status) {
  if (status != 0) throw std::bad_alloc();
}

// ---- What can be checked of arguments -------------------------------------------------------------
//
// Whether an address is that of as much memory as is said can't be seen here.  Everything else is: an array that has
// elements has an address, and its size is that of something that memory can hold.

struct Array {
  const char* name;
  const void* address;
  int64_t rows;
  int64_t columns = 1;
  int64_t stride = 0;  // elements between rows, where it is not `columns`
};

// Throws for the first array that can't be what it is said to be.
inline void require(const char* function, std::initializer_list<Array> arrays) {
  for (const Array& array : arrays) {
    int64_t elements = 0, span = 0;
    if (__builtin_mul_overflow(array.rows, array.columns, &elements) || elements > kMostElements ||
        __builtin_mul_overflow(array.rows, array.stride, &span) || span > kMostElements) {
      throw std::invalid_argument(std::string(function) + ": " + array.name + " is larger than memory can be");
    }
    if (elements > 0 && array.address == nullptr) {
      throw std::invalid_argument(std::string(function) + ": " + array.name + " has no address");
    }
  }
}

// The stride of rows of so many elements.  Of none it is 0: their address may be null, to which nothing is added.
inline int64_t stride_of(int64_t stride, int64_t columns) { return columns > 0 ? stride : 0; }

// A number on the device, [1] acc or null.
inline double read_scalar(const void* address, DType dtype) {
  if (address == nullptr) return 0.0;
  return dtype == DType::f64 ? *static_cast<const double*>(address) : double(*static_cast<const float*>(address));
}

inline void write_scalar(void* address, DType dtype, double value) {
  if (dtype == DType::f64) {
    *static_cast<double*>(address) = value;
  } else {
    *static_cast<float*>(address) = float(value);
  }
}

// ---- The module ----------------------------------------------------------------------------------

constexpr int kMaxFunctions = 32;

// State of one instance of the module.
struct State {
  Sites sites[kMaxFunctions];
};

// Functions and types, gathered before the module is made.
struct Definition {
  std::vector<PyMethodDef> functions;
  std::vector<PyType_Spec*> types;

  // The next free Sites of State, for a function with this table.
  int take_sites(const Fields& fields) {
    if (n_sites_ == kMaxFunctions) throw std::length_error("kMaxFunctions of csrc/bindings.h is too small");
    if (fields.size() > kMaxFields) throw std::length_error("kMaxFields of csrc/fields.h is too small");
    return n_sites_++;
  }

 private:
  int n_sites_ = 0;
};

// ---- Functions -----------------------------------------------------------------------------------

// The table of a Call, its call sites and its documentation.
template <class Call>
struct Bound {
  static inline int index = -1;
  static inline std::string doc;
  static const Fields& fields() {
    static const Fields table = Call::fields();
    return table;
  }
};

// The arguments of a kernel that describe its input, as a value of Python: what `tiles(...)` returns is given to
// `attend(tiles, ...)`.  A specialisation has kName, the name of the function that makes it.
template <class Args>
struct Handle;

template <class Args>
PyObject* to_handle(const Args& args) {
  auto copy = std::make_unique<Args>(args);
  const auto destroy = [](PyObject* handle) {
    delete static_cast<Args*>(PyCapsule_GetPointer(handle, Handle<Args>::kName));
  };
  PyObject* handle = PyCapsule_New(copy.get(), Handle<Args>::kName, destroy);
  if (handle != nullptr) copy.release();
  return handle;
}

template <class Args>
const Args* from_handle(const char* function, PyObject* handle) {
  const void* args = PyCapsule_GetPointer(handle, Handle<Args>::kName);
  if (args != nullptr) return static_cast<const Args*>(args);
  PyErr_Clear();
  raise(PyExc_TypeError, "%s: the first argument must be what %s() returns, got %R", function, Handle<Args>::kName,
        handle);
}

// Fills `call` and runs it without the GIL.
template <class Call>
PyObject* run_call(Call& call, State* state, PyObject* const* values, PyObject* names) {
  fill(Call::kName, Bound<Call>::fields(), state->sites[Bound<Call>::index], values, names, &call);
  using Result = decltype(call.run());
  if constexpr (std::is_void_v<Result>) {
    {
      WithoutGil released;
      with_threads([&] { call.run(); });
    }
    Py_INCREF(Py_None);
    return Py_None;
  } else if constexpr (std::is_class_v<Result>) {
    return to_handle(call.run());  // only gathered: not worth giving up the GIL
  } else {
    return to_python([&] {
      WithoutGil released;
      return with_threads([&] { return call.run(); });
    }());
  }
}

template <class Call, class = void>
struct TakesHandle : std::false_type {};
template <class Call>
struct TakesHandle<Call, std::void_t<typename Call::Args>> : std::true_type {};

template <class Call>
PyObject* function_entry(PyObject* module, PyObject* const* values, Py_ssize_t n_values, PyObject* names) {
  return guarded(static_cast<PyObject*>(nullptr), [&] {
    Call call;
    constexpr Py_ssize_t n_handles = TakesHandle<Call>::value ? 1 : 0;
    require_positional(Call::kName, n_handles, n_values);
    if constexpr (TakesHandle<Call>::value) call.args = from_handle<typename Call::Args>(Call::kName, values[0]);
    return run_call(call, static_cast<State*>(PyModule_GetState(module)), values + n_handles, names);
  });
}

// A method of Instance<Call::Self>: the call knows what it is called on as `self`.
template <class Call>
PyObject* method_entry(PyObject* self, PyObject* const* values, Py_ssize_t n_values, PyObject* names) {
  return guarded(static_cast<PyObject*>(nullptr), [&] {
    Call call;
    require_positional(Call::kName, 0, n_values);
    call.self = &value_of<typename Call::Self>(self);
    return run_call(call, static_cast<State*>(PyType_GetModuleState(Py_TYPE(self))), values, names);
  });
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

template <class Call>
PyMethodDef bound(Definition& definition, FastCall entry, const char* self) {
  if (Bound<Call>::index < 0) {
    Bound<Call>::index = definition.take_sites(Bound<Call>::fields());
    Bound<Call>::doc = signature(Call::kName, self, Bound<Call>::fields()) + Call::kDoc;
  }
  // By way of a function without arguments: compilers warn of other casts between types of functions.
  return {Call::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry)),
          METH_FASTCALL | METH_KEYWORDS, Bound<Call>::doc.c_str()};
}

template <class Call>
void add_function(Definition& definition) {
  std::string self = "$module, ";
  if constexpr (TakesHandle<Call>::value) self += std::string(Handle<typename Call::Args>::kName) + ", ";
  definition.functions.push_back(bound<Call>(definition, function_entry<Call>, (self + "/").c_str()));
}

// Values of a loss.
inline int64_t values_of_loss(Reduction reduction, int64_t n) { return reduction == Reduction::none ? n : 1; }

void bind_pairwise(Definition& definition);      // bindings_pairwise.cpp: the tile engine
void bind_contrastive(Definition& definition);   // bindings_contrastive.cpp: whole contrastive losses
void bind_losses(Definition& definition);        // bindings_losses.cpp: other whole losses
void bind_autoencoders(Definition& definition);  // bindings_autoencoders.cpp: variational and feature losses
void bind_updates(Definition& definition);       // bindings_updates.cpp: EMA and queue

}  // namespace sslk
