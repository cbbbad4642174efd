// SPDX-License-Identifier: Apache-2.0
// Random words that depend on nothing but a key and a counter: Philox4x32-10 of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011.  sslkernels/backends/rounding.py is the plain twin.
#pragma once

#include <cstdint>

#include "isa.h"

SSLK_BEGIN

// c becomes the four words of this counter.
inline __attribute__((always_inline)) void philox(uint32_t k0, uint32_t k1, uint32_t (&c)[4]) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u;
    const uint64_t product1 = uint64_t(c[2]) * 0xCD9E8D57u;
    c[0] = uint32_t(product1 >> 32) ^ c[1] ^ k0;
    c[1] = uint32_t(product1);
    c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
    c[3] = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

SSLK_END
