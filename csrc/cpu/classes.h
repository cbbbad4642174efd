// SPDX-License-Identifier: Apache-2.0
// The sums that the positives of SupCon are made of: every row's positives are the others of its class, so that sum_p
// <x_i, x_p> = <x_i, C - x_i> with C the sum of the class.  O(N D), no mask.
#pragma once

#include "rows.h"
#include "workspace.h"

SSLK_BEGIN

// weight[i] = 1 / positives of row i, 0 where there is none.  Returns how many rows have one.
inline int64_t fill_class_weights(const Classes& classes, double* weight) {
  int64_t used = 0;
  for (int64_t c = 0; c < classes.count; ++c) {
    const int64_t first = classes.begin[c], last = classes.begin[c + 1], others = last - first - 1;
    if (others > 0) used += last - first;
    for (int64_t at = first; at < last; ++at) weight[classes.order[at]] = others > 0 ? 1.0 / double(others) : 0.0;
  }
  return used;
}

// sum[0:d] of the rows of a class, or with `weight` of weight[i] * x_i.  `x`: scratch [d].
template <class T>
void sum_class(const Classes& classes, int64_t c, const Source<T>& rows, const T* weight, T* x, double* sum) {
  for (int64_t k = 0; k < rows.d; ++k) sum[k] = 0;
  for (int64_t at = classes.begin[c]; at < classes.begin[c + 1]; ++at) {
    const int64_t i = classes.order[at];
    const T* row = rows.view(i, x);
    const double factor = weight == nullptr ? 1.0 : double(weight[i]);
    for (int64_t k = 0; k < rows.d; ++k) sum[k] += factor * double(row[k]);
  }
}

SSLK_END
