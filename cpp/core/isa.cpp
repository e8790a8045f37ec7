#include "core/isa.h"

#include <cstring>
#include <string>

#include "core/tensor.h"
#include "megalodon.h"

namespace megalodon {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(MEGALODON_X86) && !defined(MEGALODON_SIMT)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa current = best_isa();

}  // namespace

Isa active_isa() noexcept { return current; }

}  // namespace megalodon

extern "C" const char* megalodon_isa(void) { return megalodon::kNames[static_cast<int>(megalodon::current)]; }

extern "C" int megalodon_set_isa(const char* name) {
  using namespace megalodon;
  return guarded([&] {
    const std::string wanted = name == nullptr ? "none" : name;
    const Isa best = best_isa();
    if (wanted == "auto") {
      current = best;
      return;
    }
    for (int i = 0; i <= static_cast<int>(Isa::kAvx512Bf16); ++i) {
      if (wanted != kNames[i]) continue;
      if (i > static_cast<int>(best)) {
        throw Error{MEGALODON_VALUE_ERROR, "set_isa: this CPU (or build) runs at most " +
                                               std::string(kNames[static_cast<int>(best)]) + "; got " + wanted};
      }
      current = static_cast<Isa>(i);
      return;
    }
    throw Error{MEGALODON_VALUE_ERROR,
                "set_isa: name must be auto, portable, avx2, avx512 or avx512_bf16; got " + wanted};
  });
}
