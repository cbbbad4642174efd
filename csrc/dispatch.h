// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels use.
#pragma once

#include <string>
#include <vector>

#include "sslkernels.h"

namespace sslk {

std::vector<std::string> available_isas();  // best first, usable on this processor
void set_isa(const std::string& name);      // "auto" or one of available_isas(); throws std::invalid_argument

}  // namespace sslk
