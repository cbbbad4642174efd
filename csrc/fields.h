// SPDX-License-Identifier: Apache-2.0
// Arguments by name: a bound function fills a struct from keyword arguments, by the one table of that struct.
//
// A kernel takes up to 28 addresses, sizes and codes.  By position two of them can change places between Python
// and C++ without a complaint, so every argument is given by name and an unknown, missing or repeated name is a
// TypeError.  Looking names up would cost a microsecond a call.  But the names of a call in Python source are one
// constant tuple, so a function remembers the tuples it has seen and which fields they stand for: a call costs one
// comparison of addresses, and as much for its values as it would by position.
//
// Python keeps such a tuple for at most 15 names; a longer call builds a dict and a new tuple every time, which
// takes 2 us.  So what a loss is and what is asked of it are two calls (bindings.h: Handle).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "object.h"

namespace sslk {

// ---- Values --------------------------------------------------------------------------------------

// What a value must be, thrown where it is something else; `fill` says of which field of which function.
struct Wrong {
  PyObject* type;
  std::string wanted;
};

// The names of an enum's values, in order: a specialisation has `static constexpr const char* all[]`.
template <class Enum>
struct Names;

template <class Enum>
Enum named(PyObject* value) {
  const char* text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, nullptr) : nullptr;
  int code = 0;
  std::string known;
  for (const char* name : Names<Enum>::all) {
    if (text != nullptr && std::strcmp(text, name) == 0) return Enum(code);
    known += (code++ == 0 ? "" : ", ") + std::string(name);
  }
  PyErr_Clear();
  throw Wrong{PyUnicode_Check(value) ? PyExc_ValueError : PyExc_TypeError, "one of " + known};
}

template <class T>
struct IsVector : std::false_type {};
template <class T>
struct IsVector<std::vector<T>> : std::true_type {};

// bool, numbers, enums by name, addresses (None is null), lists of these; a PyObject* as it is, borrowed.
template <class T>
T from_python(PyObject* value) {
  if constexpr (std::is_same_v<T, PyObject*>) {
    return value;
  } else if constexpr (IsVector<T>::value) {
    if (!PyList_Check(value)) throw Wrong{PyExc_TypeError, "a list"};
    T list;
    list.reserve(size_t(PyList_Size(value)));
    for (Py_ssize_t i = 0; i < PyList_Size(value); ++i) {
      list.push_back(from_python<typename T::value_type>(PyList_GetItem(value, i)));
    }
    return list;
  } else if constexpr (std::is_same_v<T, bool>) {
    if (value != Py_True && value != Py_False) throw Wrong{PyExc_TypeError, "True or False"};
    return value == Py_True;
  } else if constexpr (std::is_enum_v<T>) {
    return named<T>(value);
  } else if constexpr (std::is_pointer_v<T>) {
    if (value == Py_None) return nullptr;
    const bool number = PyLong_Check(value) && !PyBool_Check(value);
    const size_t address = number ? PyLong_AsSize_t(value) : size_t(-1);
    if (address == size_t(-1)) throw Wrong{PyExc_TypeError, "an address or None"};
    return reinterpret_cast<T>(address);
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw Wrong{PyExc_TypeError, "a number"};
    return T(number);
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    const uint64_t number = PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : uint64_t(-1);
    if (number == uint64_t(-1) && (PyErr_Occurred() || !PyLong_Check(value))) {
      throw Wrong{PyExc_TypeError, "an integer of 64 bits without a sign"};
    }
    return number;
  } else {
    static_assert(std::is_integral_v<T> && (std::is_signed_v<T> || sizeof(T) < 8));
    const int64_t number = PyLong_AsLongLong(value);
    if ((number == -1 && PyErr_Occurred()) || number < int64_t(std::numeric_limits<T>::min()) ||
        number > int64_t(std::numeric_limits<T>::max())) {
      throw Wrong{PyExc_TypeError, "an integer of " + std::to_string(8 * sizeof(T)) + " bits"};
    }
    return T(number);
  }
}

inline PyObject* to_python(double value) { return PyFloat_FromDouble(value); }
inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), Py_ssize_t(value.size()));
}

// ---- Tables --------------------------------------------------------------------------------------

struct Field {
  const char* name;
  size_t offset;
  void (*set)(void* slot, PyObject* value);
  bool required;  // otherwise the struct's own initial value is the default
};

using Fields = std::vector<Field>;

template <class T>
void set_field(void* slot, PyObject* value) {
  *static_cast<T*>(slot) = from_python<T>(value);
}

// What an address space holds: products of two sizes that pass `require` (bindings.h) have room in 64 bits.
constexpr int64_t kMostElements = int64_t(1) << 47;
constexpr int64_t kMostThreads = 1024;

// A number of elements, rows or bytes, or a stride.
template <class T>
void set_size(void* slot, PyObject* value) {
  const int64_t size = from_python<T>(value);
  if (size < 0 || size > kMostElements) throw Wrong{PyExc_ValueError, "a size: 0 to 2^47"};
  *static_cast<T*>(slot) = size;
}

// Of more threads than any machine has the first ones are enough: results do not depend on how many there are.
template <class T>
void set_threads(void* slot, PyObject* value) {
  const T n = from_python<T>(value);
  if (n < 1) throw Wrong{PyExc_ValueError, "at least 1"};
  *static_cast<T*>(slot) = n < kMostThreads ? n : T(kMostThreads);
}

// A member of a struct, however deep, under a name.
#define SSLK_FIELD(set, Struct, member, name, required)                                                           \
  ::sslk::Field {                                                                                                 \
    name, offsetof(Struct, member), ::sslk::set<std::decay_t<decltype(std::declval<Struct&>().member)>>, required \
  }
#define SSLK_REQUIRED(Struct, member, name) SSLK_FIELD(set_field, Struct, member, name, true)
#define SSLK_OPTIONAL(Struct, member, name) SSLK_FIELD(set_field, Struct, member, name, false)
#define SSLK_SIZE(Struct, member, name) SSLK_FIELD(set_size, Struct, member, name, true)
#define SSLK_OPTIONAL_SIZE(Struct, member, name) SSLK_FIELD(set_size, Struct, member, name, false)
#define SSLK_THREADS(Struct, member) SSLK_FIELD(set_threads, Struct, member, "n_threads", true)

// The table of a struct that lies `offset` bytes inside another one.
inline Fields inside(size_t offset, Fields fields) {
  for (Field& field : fields) field.offset += offset;
  return fields;
}

inline Fields operator+(Fields a, const Fields& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// ---- Calls ---------------------------------------------------------------------------------------

constexpr size_t kMaxFields = 32;

// A tuple of names and the fields they stand for.
struct Site {
  PyObject* names;  // owned, so that no other tuple can have its address
  uint8_t fields[kMaxFields];
};

// The last call sites of one function.  Zero bytes are a valid empty one: they are part of a module's state.
struct Sites {
  static constexpr size_t kKept = 4;
  Site kept[kKept];
  size_t next;

  const Site* find(PyObject* names) const {
    for (const Site& site : kept) {
      if (site.names == names) return &site;
    }
    return nullptr;
  }
  void keep(const Site& site) {
    Py_INCREF(site.names);
    PyObject* old = std::exchange(kept[next], site).names;
    next = (next + 1) % kKept;
    Py_XDECREF(old);
  }
  int traverse(visitproc visit, void* arg) {
    for (Site& site : kept) Py_VISIT(site.names);
    return 0;
  }
  void clear() {
    for (Site& site : kept) Py_CLEAR(site.names);
  }
};

// Which field each name stands for; throws a TypeError for one that is unknown, repeated or missing.
inline Site resolve(const char* function, const Fields& fields, PyObject* names) {
  Site site = {names, {}};
  bool given[kMaxFields] = {};
  const Py_ssize_t n = names == nullptr ? 0 : PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* name = PyTuple_GetItem(names, i);
    const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (text == nullptr) throw PythonError();
    size_t f = 0;
    while (f < fields.size() && std::strcmp(fields[f].name, text) != 0) ++f;
    if (f == fields.size()) raise(PyExc_TypeError, "%s: there is no argument %R", function, name);
    if (given[f]) raise(PyExc_TypeError, "%s: argument %R is given twice", function, name);
    given[f] = true;
    site.fields[i] = uint8_t(f);
  }
  for (size_t f = 0; f < fields.size(); ++f) {
    if (fields[f].required && !given[f]) {
      raise(PyExc_TypeError, "%s: argument '%s' is missing", function, fields[f].name);
    }
  }
  return site;
}

inline void require_positional(const char* function, Py_ssize_t wanted, Py_ssize_t given) {
  if (given == wanted) return;
  raise(PyExc_TypeError, "%s: arguments are given by name and %zd without one, got %zd without", function, wanted,
        given);
}

// Values into the struct.
inline void fill(const char* function, const Fields& fields, const Site& site, PyObject* const* values, void* out) {
  const Py_ssize_t n = site.names == nullptr ? 0 : PyTuple_Size(site.names);
  Py_ssize_t i = 0;
  try {
    for (; i < n; ++i) {
      const Field& field = fields[site.fields[i]];
      field.set(static_cast<char*>(out) + field.offset, values[i]);
    }
  } catch (const Wrong& wrong) {
    PyErr_Clear();
    raise(wrong.type, "%s: %s must be %s, got %R", function, fields[site.fields[i]].name, wrong.wanted.c_str(),
          values[i]);
  }
}

// From the arguments of a call by vectorcall.
inline void fill(const char* function, const Fields& fields, Sites& sites, PyObject* const* values, PyObject* names,
                 void* out) {
  const Site* known = names == nullptr ? nullptr : sites.find(names);
  // By a copy: reading a value may run Python code, which may call this function from somewhere else.
  const Site site = known != nullptr ? *known : resolve(function, fields, names);
  if (known == nullptr && names != nullptr) sites.keep(site);
  fill(function, fields, site, values, out);
}

// From the arguments of a constructor: a tuple, and a dict or null.
inline void fill(const char* function, const Fields& fields, PyObject* args, PyObject* kwargs, void* out) {
  require_positional(function, 0, PyTuple_Size(args));
  Object names;
  std::vector<PyObject*> values;
  if (kwargs != nullptr) {
    names = Object::owned(PyTuple_New(PyDict_Size(kwargs)));
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(kwargs, &position, &key, &value)) {
      Py_INCREF(key);
      PyTuple_SetItem(names.get(), Py_ssize_t(values.size()), key);
      values.push_back(value);
    }
  }
  fill(function, fields, resolve(function, fields, names.get()), values.data(), out);
}

// `function(*, a, b=...)`, as inspect.signature reads it from the first line of a docstring.
inline std::string signature(const char* function, const char* self, const Fields& fields) {
  std::string text = std::string(function) + "(" + self;
  if (!fields.empty()) text += ", *";
  for (const Field& field : fields) text += std::string(", ") + field.name + (field.required ? "" : "=...");
  return text + ")\n--\n\n";
}

}  // namespace sslk
