// SPDX-License-Identifier: Apache-2.0
// Rows grouped by their label, and the sums that the positives of SupCon are made of: every row's positives are the
// others of its class, so that sum_p <x_i, x_p> = <x_i, C - x_i> with C the sum of the class.  O(N D), no mask.
#pragma once

#include <algorithm>

#include "rows.h"
#include "workspace.h"

SSLK_BEGIN

struct Classes {
  int64_t* order = nullptr;  // [n] rows by label, those of a label in order
  int64_t* begin = nullptr;  // [count + 1] class c is order[begin[c] .. begin[c + 1])
  int64_t* place = nullptr;  // [n] scratch
  int64_t n = 0, count = 0;

  void plan(Workspace& w, int64_t rows) {
    n = rows;
    w.plan(&order, n);
    w.plan(&begin, n + 1);
    w.plan(&place, n);
  }

  void fill(const int64_t* labels) {
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    const auto by_label = [labels](int64_t i, int64_t j) {
      return labels[i] != labels[j] ? labels[i] < labels[j] : i < j;
    };
    if (!count_sort(labels)) std::sort(order, order + n, by_label);
    count = 0;
    for (int64_t at = 0; at < n; ++at) {
      if (at == 0 || labels[order[at]] != labels[order[at - 1]]) begin[count++] = at;
    }
    begin[count] = n;
  }

  int64_t size(int64_t c) const { return begin[c + 1] - begin[c]; }

  // weight[i] = 1 / positives of row i, 0 where there is none.  Returns how many rows have one.
  int64_t fill_weights(double* weight) const {
    int64_t used = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t others = size(c) - 1;
      if (others > 0) used += size(c);
      for (int64_t at = begin[c]; at < begin[c + 1]; ++at) weight[order[at]] = others > 0 ? 1.0 / double(others) : 0.0;
    }
    return used;
  }

 private:
  // Labels are mostly small numbers: then two passes instead of a sort.
  bool count_sort(const int64_t* labels) {
    if (n == 0) return true;
    const int64_t low = *std::min_element(labels, labels + n), high = *std::max_element(labels, labels + n);
    if (uint64_t(high) - uint64_t(low) >= uint64_t(n)) return false;
    int64_t* ends = begin;  // of the labels low, low + 1, ...
    std::fill(ends, ends + n, int64_t(0));
    for (int64_t i = 0; i < n; ++i) ++ends[labels[i] - low];
    for (int64_t l = 0, at = 0; l < n; ++l) {
      const int64_t rows = ends[l];
      ends[l] = at;
      at += rows;
    }
    for (int64_t i = 0; i < n; ++i) place[i] = ends[labels[i] - low]++;
    for (int64_t i = 0; i < n; ++i) order[place[i]] = i;
    return true;
  }
};

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
