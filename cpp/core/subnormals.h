// Arithmetic without subnormal numbers, for recurrences and powers that decay: what decays passes through them, and an
// operation on one takes a hundred times as long on many CPUs. Rounding to nearest even keeps a decaying state there
// for ever (the smallest subnormal times 0.9 is itself), so a pause in the input would slow every later step down.
#pragma once

#include <cstdint>

#if defined(MEGALODON_X86)
#include <xmmintrin.h>
#endif

namespace megalodon::cpu::MEGALODON_ISA {

// While it lives, this thread reads and writes subnormal numbers as zeros: below 1.2e-38 in float, 2.3e-308 in double.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(MEGALODON_X86)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kSubnormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr uint32_t kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;
  uint32_t before_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace megalodon::cpu::MEGALODON_ISA
