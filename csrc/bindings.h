// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module, one a file; csrc/module.cpp compiles them together.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

namespace sslk {

// A pointer from its address; 0 is null.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The status of a kernel: 0, or memory could not be had.
inline void check(int status) {
  if (status != 0) throw std::bad_alloc();
}

void bind_losses(pybind11::module_& m);   // bindings_losses.cpp: whole losses
void bind_updates(pybind11::module_& m);  // bindings_updates.cpp: EMA and queue

}  // namespace sslk
