// SPDX-License-Identifier: Apache-2.0
// The wrong calls of bindings.py, chosen by libFuzzer: bindings.py reads calls from its bytes, and it keeps bytes that
// reach a new branch of the module, which is part of this program (fuzz.py builds and runs it).

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

PyMODINIT_FUNC PyInit__C();

namespace {

PyObject* call = nullptr;

[[noreturn]] void fail() {
  PyErr_Print();
  std::abort();  // libFuzzer writes the bytes to a file
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  PyImport_AppendInittab("_C", PyInit__C);
  Py_InitializeEx(0);  // PYTHONPATH says where bindings.py is
  PyObject* main = PyImport_AddModule("__main__");
  const char* code = "import _C, bindings\ncall = bindings.Caller(_C, vast=False, slow=False).from_bytes\n";
  PyObject* names = main != nullptr ? PyModule_GetDict(main) : nullptr;
  if (names == nullptr || PyRun_String(code, Py_file_input, names, names) == nullptr) fail();
  call = PyDict_GetItemString(names, "call");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  PyObject* result = PyObject_CallFunction(call, "y#", reinterpret_cast<const char*>(data), Py_ssize_t(size));
  if (result == nullptr) fail();
  Py_DECREF(result);
  return 0;
}
