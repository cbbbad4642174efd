// SPDX-License-Identifier: Apache-2.0
// The little of Python's C interface that the bindings need, as C++: references, exceptions, the GIL, types.
// Only the limited API of Python 3.10 is used (setup.py defines Py_LIMITED_API), so that one build serves 3.10
// and newer.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <stdexcept>
#include <utility>

namespace sslk {

// Thrown where Python already holds the exception.
struct PythonError {};

// Sets an exception with a message as of PyErr_Format (%s, %zd, %U, %R) and throws.
template <class... Values>
[[noreturn]] void raise(PyObject* type, const char* format, Values... values) {
  PyErr_Format(type, format, values...);
  throw PythonError();
}

// An owned reference.
class Object {
 public:
  Object() = default;
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  // Takes over a new reference; null is the failure of the call that made it.
  static Object owned(PyObject* object) {
    if (object == nullptr) throw PythonError();
    return Object(object);
  }
  static Object shared(PyObject* object) {
    Py_INCREF(object);
    return Object(object);
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  explicit Object(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// Other threads run Python while this object lives.  The destructor may be left by an unwinding: that is how
// Python ends a thread that comes back after the interpreter is gone.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// What `function` returns, or `failed` with a Python exception set.  Nothing else is caught: see WithoutGil.
template <class Result, class Function>
Result guarded(Result failed, const Function& function) {
  try {
    return function();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return failed;
}

// A Python object around a T, which it owns; null until T is made.
template <class T>
struct Instance {
  PyObject_HEAD T* value;
};

template <class T>
T& value_of(PyObject* self) {
  return *reinterpret_cast<Instance<T>*>(self)->value;
}

// tp_new of Instance<T>: `make` returns a new T.
template <class T, class Make>
PyObject* new_instance(PyTypeObject* type, const Make& make) {
  auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  return guarded(static_cast<PyObject*>(nullptr), [&] {
    Object self = Object::owned(allocate(type, 0));
    reinterpret_cast<Instance<T>*>(self.get())->value = make();
    return self.release();
  });
}

// tp_dealloc of Instance<T>.
template <class T>
void delete_instance(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  if ((PyType_GetFlags(type) & Py_TPFLAGS_HAVE_GC) != 0) PyObject_GC_UnTrack(self);
  delete reinterpret_cast<Instance<T>*>(self)->value;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

}  // namespace sslk
