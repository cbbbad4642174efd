// SPDX-License-Identifier: Apache-2.0
// The kernels compare ids as 32-bit integers beside float lanes.  Ids that do not fit are renumbered
// (order kept), which preserves every equality.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "sslkernels.h"

namespace sslk {

class NarrowIds {
 public:
  // Replaces the pointers when an id does not fit; the replacement lives as long as this object.
  void apply(DType dtype, const int64_t** ids_q, int64_t n, const int64_t** ids_k, int64_t m) {
    if (*ids_q == nullptr || dtype == DType::f64) return;
    if (*ids_k == nullptr) m = 0;
    if (fits(*ids_q, n) && fits(*ids_k, m)) return;
    std::vector<int64_t> known(*ids_q, *ids_q + n);
    if (m > 0) known.insert(known.end(), *ids_k, *ids_k + m);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    *ids_q = renumber(known, *ids_q, n, q_);
    if (m > 0) *ids_k = renumber(known, *ids_k, m, k_);
  }

 private:
  static bool fits(const int64_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] < std::numeric_limits<int32_t>::min() || ids[i] > std::numeric_limits<int32_t>::max()) return false;
    }
    return true;
  }
  static const int64_t* renumber(const std::vector<int64_t>& known, const int64_t* ids, int64_t n,
                                 std::vector<int64_t>& out) {
    out.resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) {
      out[size_t(i)] = std::lower_bound(known.begin(), known.end(), ids[i]) - known.begin();
    }
    return out.data();
  }
  std::vector<int64_t> q_, k_;
};

}  // namespace sslk
