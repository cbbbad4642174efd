// SPDX-License-Identifier: Apache-2.0
// Rows grouped by their label, for layout classes (Layout in sslkernels.h) and for hard mining.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "sslkernels.h"

namespace sslk {

class GroupedRows {
 public:
  // The rows by ascending label; lives as long as this object.
  const int64_t* sort(const int64_t* labels, int64_t n) {
    order_.resize(size_t(n));
    if (!count_sort(labels, n)) {
      std::iota(order_.begin(), order_.end(), int64_t(0));
      std::stable_sort(order_.begin(), order_.end(), [=](int64_t i, int64_t j) { return labels[i] < labels[j]; });
    }
    return order_.data();
  }

  // Groups the rows and writes where they are; the arrays live as long as this object.
  void apply(ContrastiveArgs* args) {
    const int64_t n = args->a.n, *const labels = args->ids_q;
    sort(labels, n);
    begin_.clear();
    for (int64_t at = 0; at < n; ++at) {
      if (at == 0 || labels[order_[size_t(at)]] != labels[order_[size_t(at - 1)]]) begin_.push_back(at);
    }
    args->classes.count = int64_t(begin_.size());
    begin_.push_back(n);
    args->classes.order = order_.data();
    args->classes.begin = begin_.data();
  }

 private:
  // Labels are mostly small numbers: then two passes instead of a sort.
  bool count_sort(const int64_t* labels, int64_t n) {
    if (n == 0) return true;
    const int64_t low = *std::min_element(labels, labels + n), high = *std::max_element(labels, labels + n);
    const uint64_t range = uint64_t(high) - uint64_t(low);
    if (range >= 4 * uint64_t(n)) return false;
    begin_.assign(size_t(range) + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++begin_[size_t(labels[i] - low)];
    int64_t at = 0;
    for (int64_t& rows : begin_) at += std::exchange(rows, at);
    for (int64_t i = 0; i < n; ++i) order_[size_t(begin_[size_t(labels[i] - low)]++)] = i;
    return true;
  }

  std::vector<int64_t> order_, begin_;
};

}  // namespace sslk
