// SPDX-License-Identifier: Apache-2.0
// The rate of float32 multiply-adds of one thread: 16 independent chains of the widest vectors hide
// the latency of 4 cycles on two ports (8 chains would be enough) and touch no memory.
// Compiled with -O3 -march=native by ceilings.py; BYTES is the width of a vector.

typedef float vec __attribute__((vector_size(BYTES)));

float fma_chains(long iterations) {
    vec acc[16];
    vec a, b;
    for (int lane = 0; lane < BYTES / 4; ++lane) {
        a[lane] = 0.999f;
        b[lane] = 0.001f;
    }
    for (int chain = 0; chain < 16; ++chain) acc[chain] = a * (float)chain;
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
        for (int chain = 0; chain < 16; ++chain) {
            acc[chain] = acc[chain] * a + b;
            __asm__ volatile("" : "+v"(acc[chain]));  // no chain is folded into another
        }
    }
    vec sum = acc[0];
    for (int chain = 1; chain < 16; ++chain) sum += acc[chain];
    float total = 0;
    for (int lane = 0; lane < BYTES / 4; ++lane) total += sum[lane];
    return total;
}
