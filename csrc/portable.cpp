// SPDX-License-Identifier: Apache-2.0
// The libstdc++ half of portable.h: what a newer libstdc++ has, and the oldest that torch allows lacks.

#include <new>

#if defined(__GLIBCXX__) && defined(__linux__)
// Called by containers that are asked for more elements than memory can hold.  Version GLIBCXX_3.4.29 of
// libstdc++ (GCC 11) exports it; this definition takes its place in the module alone.
extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void sslk_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");

void sslk_throw_bad_array_new_length() { throw std::bad_alloc(); }
#endif
