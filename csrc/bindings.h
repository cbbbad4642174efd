// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module, one a file.
#pragma once

#include <pybind11/pybind11.h>

namespace sslk {

void bind_losses(pybind11::module_& m);   // bindings_losses.cpp: whole losses
void bind_updates(pybind11::module_& m);  // bindings_updates.cpp: EMA and queue

}  // namespace sslk
