// SPDX-License-Identifier: Apache-2.0
// All bindings in one translation unit: pybind11's headers take five seconds to compile, as long as all that
// is bound with them, so they are compiled once.

#include "bindings.cpp"
#include "bindings_losses.cpp"
#include "bindings_updates.cpp"
