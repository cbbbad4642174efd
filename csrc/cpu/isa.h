// SPDX-License-Identifier: Apache-2.0
// Names the instruction set that this translation unit is compiled for.
//
// Every kernel file is compiled once per instruction set, with the flags listed in setup.py and
// -DSSLK_ISA_NS=<name>.  All of its code lives in the namespace sslk::<name>, so that no inline
// function of an AVX-512 unit can be picked by the linker for the baseline (which would be SIGILL).
// For the same reason kernel files use nothing of the standard library that becomes code: only <cstdint>,
// <cmath>, <cstring>, and std::integer_sequence, which is a type.
#pragma once

#ifndef SSLK_ISA_NS
#error "compile kernel files through setup.py, which defines SSLK_ISA_NS"
#endif

#define SSLK_BEGIN \
  namespace sslk { \
  namespace SSLK_ISA_NS {
#define SSLK_END \
  }              \
  }
