// SPDX-License-Identifier: Apache-2.0
// Included before every file (setup.py), so that the module runs wherever torch does.
//
// glibc 2.29 gave exp, log and their like a version that does not set errno.  A compiler binds to the newest
// version that it sees, and the module would then ask for glibc 2.29, where torch's own wheels (manylinux_2_28)
// ask for 2.28.  The older version computes the same bits.  glibc 2.34 moved threads into libc, as new versions.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
#include <features.h>
#if defined(__GLIBC__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver exp2, exp2@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver log2, log2@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
#endif
#endif
