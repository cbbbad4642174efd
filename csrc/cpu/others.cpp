// SPDX-License-Identifier: Apache-2.0
// The kernels that are quick to compile, in one translation unit: the headers of the intrinsics take longer than
// each of them, and are read once an instruction set this way.

#include "contrastive.cpp"
#include "ema.cpp"
#include "extremes.cpp"
#include "features.cpp"
#include "noise.cpp"
#include "paired.cpp"
#include "queue.cpp"
#include "regression.cpp"
#include "triplet.cpp"
#include "unit.cpp"
#include "vae.cpp"
