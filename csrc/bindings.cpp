// SPDX-License-Identifier: Apache-2.0
// The Python module sslkernels._C: values in, GIL released, exceptions out; no mathematics.

#include "bindings.h"

#include "dispatch.h"
#include "memory.h"

namespace sslk {
namespace {

struct PeakFlops {
  static constexpr const char* kName = "peak_flops";
  static constexpr const char* kDoc = "Floating-point operations per second that the processor's units can do.";
  bool bf16 = false;
  int n_threads = 1;

  static Fields fields() { return {SSLK_REQUIRED(PeakFlops, bf16, "bf16"), SSLK_THREADS(PeakFlops, n_threads)}; }
  double run() { return kernels().peak_flops(bf16, n_threads); }
};

struct RoundTrip {
  static constexpr const char* kName = "round_trip";
  static constexpr const char* kDoc = "Seconds that a cache line takes from one core to another and back.";
  int exchanges = 0;

  static Fields fields() { return {SSLK_REQUIRED(RoundTrip, exchanges, "exchanges")}; }
  double run() {
    if (exchanges < 1 || exchanges > 1 << 24) throw std::invalid_argument("round_trip: exchanges must be 1 to 2^24");
    return round_trip(exchanges);
  }
};

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels().isa); }

PyObject* has_bf16(PyObject*, PyObject*) { return to_python(kernels().bf16); }

PyObject* has_openmp(PyObject*, PyObject*) {
#ifdef _OPENMP
  return to_python(true);
#else
  return to_python(false);
#endif
}

PyObject* peak_of_workspaces(PyObject*, PyObject*) { return to_python(workspace_peak()); }

PyObject* reset_peak_of_workspaces(PyObject*, PyObject*) {
  reset_workspace_peak();
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* release_kept_workspaces(PyObject*, PyObject*) {
  release_workspaces();
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* fill_all_workspaces(PyObject*, PyObject* with_nan) {
  const int yes = PyObject_IsTrue(with_nan);
  if (yes < 0) return nullptr;
  fill_workspaces(yes != 0);
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* list_isas(PyObject*, PyObject*) {
  return guarded(static_cast<PyObject*>(nullptr), [] {
    Object list = Object::owned(PyList_New(0));
    for (const std::string& name : available_isas()) {
      const Object item = Object::owned(to_python(name));
      if (PyList_Append(list.get(), item.get()) != 0) throw PythonError();
    }
    return list.release();
  });
}

PyObject* choose_isa(PyObject*, PyObject* name) {
  return guarded(static_cast<PyObject*>(nullptr), [&] {
    const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, nullptr) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      raise(PyExc_TypeError, "set_isa: the instruction set must be a string, got %R", name);
    }
    set_isa(text);
    Py_INCREF(Py_None);
    return Py_None;
  });
}

State* state_of(PyObject* module) { return static_cast<State*>(PyModule_GetState(module)); }

int traverse(PyObject* module, visitproc visit, void* arg) {
  State* state = state_of(module);
  if (state == nullptr) return 0;
  for (Sites& sites : state->sites) {
    if (const int stop = sites.traverse(visit, arg)) return stop;
  }
  return 0;
}

int clear(PyObject* module) {
  State* state = state_of(module);
  if (state == nullptr) return 0;
  for (Sites& sites : state->sites) sites.clear();
  return 0;
}

void free_state(void* module) { clear(static_cast<PyObject*>(module)); }

// Functions and types of the module; the same for each of its instances.
const Definition& definition() {
  static const Definition all = [] {
    Definition d;
    d.functions = {
        {"isa", isa, METH_NOARGS, "isa($module, /)\n--\n\nThe instruction set in use."},
        {"available_isas", list_isas, METH_NOARGS,
         "available_isas($module, /)\n--\n\nUsable instruction sets, best first."},
        {"set_isa", choose_isa, METH_O,
         "set_isa($module, name, /)\n--\n\nUse an instruction set: \"auto\" or one of available_isas()."},
        {"has_bf16", has_bf16, METH_NOARGS,
         "has_bf16($module, /)\n--\n\nWhether the instruction set in use multiplies in bfloat16."},
        {"has_openmp", has_openmp, METH_NOARGS,
         "has_openmp($module, /)\n--\n\nWhether calls may use several threads; without OpenMP they use one."},
        {"workspace_peak", peak_of_workspaces, METH_NOARGS,
         "workspace_peak($module, /)\n--\n\nBytes that the workspaces of all threads held at once, at most."},
        {"reset_workspace_peak", reset_peak_of_workspaces, METH_NOARGS,
         "reset_workspace_peak($module, /)\n--\n\nCount workspace_peak() from now on."},
        {"release_workspaces", release_kept_workspaces, METH_NOARGS,
         "release_workspaces($module, /)\n--\n\nReturn to the system what this thread keeps between calls."},
        {"fill_workspaces", fill_all_workspaces, METH_O,
         "fill_workspaces($module, with_nan, /)\n--\n\nWhether workspaces start full of NaN, for tests."},
    };
    add_function<PeakFlops>(d);
    add_function<RoundTrip>(d);
    bind_pairwise(d);
    bind_contrastive(d);
    bind_losses(d);
    bind_autoencoders(d);
    bind_updates(d);
    d.functions.push_back({nullptr, nullptr, 0, nullptr});
    return d;
  }();
  return all;
}

int execute(PyObject* module) {
  return guarded(-1, [&] {
    for (PyType_Spec* spec : definition().types) {
      const Object type = Object::owned(PyType_FromModuleAndSpec(module, spec, nullptr));
      if (PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type.get())) != 0) throw PythonError();
    }
    return 0;
  });
}

}  // namespace
}  // namespace sslk

// In two phases, with all state in the module: subinterpreters that share a GIL each get their own.  No slot says
// that one GIL each would do, nor that none would: the limited API of 3.10 has no word for it.
PyMODINIT_FUNC PyInit__C() {
  return sslk::guarded(static_cast<PyObject*>(nullptr), [] {
    static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(sslk::execute)}, {0, nullptr}};
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT,
        "_C",
        "Compiled CPU kernels of sslkernels; called through sslkernels.backends.cpu.",
        sizeof(sslk::State),
        const_cast<PyMethodDef*>(sslk::definition().functions.data()),
        slots,
        sslk::traverse,
        sslk::clear,
        sslk::free_state,
    };
    return PyModuleDef_Init(&module);
  });
}
