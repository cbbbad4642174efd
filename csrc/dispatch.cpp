// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, at import: the best one that was compiled and that the processor has.

#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace sslk {

#define SSLK_DECLARE(isa) \
  namespace isa {         \
  const Kernels& table(); \
  }

SSLK_DECLARE(baseline)
#ifdef SSLK_HAVE_AVX2
SSLK_DECLARE(avx2)
#endif
#ifdef SSLK_HAVE_AVX512
SSLK_DECLARE(avx512)
#endif
#ifdef SSLK_HAVE_AVX512_BF16
SSLK_DECLARE(avx512_bf16)
#endif

namespace {

struct Candidate {
  const char* name;
  bool usable;
  const Kernels& (*table)();
};

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  (void)avx512;
#ifdef SSLK_HAVE_AVX512_BF16
  list.push_back({"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), avx512_bf16::table});
#endif
#ifdef SSLK_HAVE_AVX512
  list.push_back({"avx512", avx512, avx512::table});
#endif
#ifdef SSLK_HAVE_AVX2
  list.push_back({"avx2", avx2, avx2::table});
#endif
#endif
  list.push_back({"baseline", true, baseline::table});
  return list;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.usable) names.push_back(c.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Candidate& c : candidates()) {
    if (!c.usable) continue;
    if (name == c.name || name == "auto") {
      current.store(&c.table());
      return;
    }
    known += known.empty() ? c.name : std::string(", ") + c.name;
  }
  throw std::invalid_argument("set_isa: the instruction set must be auto or one of " + known +
                              " on this processor, got '" + name + "'");
}

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_relaxed);
  if (table == nullptr) {
    set_isa("auto");
    table = current.load();
  }
  return *table;
}

}  // namespace sslk
