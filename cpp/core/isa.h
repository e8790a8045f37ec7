// Instruction sets. Every cpp/ops/{op}.cpp is compiled once per instruction set, with MEGALODON_ISA naming the
// namespace its kernels live in; the one to run is chosen at each call by active_isa().
//
// Only the portable compilation defines MEGALODON_ENTRY and with it the checks and the C functions. What the wider
// compilations define must live in namespace MEGALODON_ISA or be `static` or inline. Of an inline function outside that
// namespace the linker keeps one copy, the first: the portable objects are linked first, so it is one that any CPU runs
// (tests/test_build.py reads the instructions).
#pragma once

#include <cstdint>

namespace megalodon {

// kAvx512Bf16: as kAvx512, but for the kernels of bf16 that are compiled once more, in namespace avx512_bf16.
enum class Isa : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

Isa active_isa() noexcept;

}  // namespace megalodon

// Declares the kernel megalodon::cpu::NAME(const ARGS&) in every instruction set, and the function that chooses.
#define MEGALODON_DECLARE_KERNEL(ISA, NAME, ARGS) \
  namespace megalodon::cpu::ISA {                 \
  void NAME(const ARGS&);                         \
  }
#if defined(MEGALODON_X86) && !defined(MEGALODON_SIMT)
#define MEGALODON_CHOOSE_KERNEL(NAME, ARGS, ON_AVX512_BF16) \
  MEGALODON_DECLARE_KERNEL(portable, NAME, ARGS)            \
  MEGALODON_DECLARE_KERNEL(avx2, NAME, ARGS)                \
  MEGALODON_DECLARE_KERNEL(avx512, NAME, ARGS)              \
  namespace megalodon::cpu {                                \
  static inline void NAME(const ARGS& args) {               \
    switch (active_isa()) {                                 \
      case Isa::kAvx512Bf16:                                \
        ON_AVX512_BF16;                                     \
        [[fallthrough]];                                    \
      case Isa::kAvx512:                                    \
        return avx512::NAME(args);                          \
      case Isa::kAvx2:                                      \
        return avx2::NAME(args);                            \
      default:                                              \
        return portable::NAME(args);                        \
    }                                                       \
  }                                                         \
  }
#define MEGALODON_CPU_KERNEL(NAME, ARGS) MEGALODON_CHOOSE_KERNEL(NAME, ARGS, )
#define MEGALODON_CPU_KERNEL_BF16(NAME, ARGS)       \
  MEGALODON_DECLARE_KERNEL(avx512_bf16, NAME, ARGS) \
  MEGALODON_CHOOSE_KERNEL(NAME, ARGS, if (args.dtype == DType::kBfloat16) return avx512_bf16::NAME(args))
#else
#define MEGALODON_CPU_KERNEL(NAME, ARGS)                                     \
  MEGALODON_DECLARE_KERNEL(portable, NAME, ARGS)                             \
  namespace megalodon::cpu {                                                 \
  static inline void NAME(const ARGS& args) { return portable::NAME(args); } \
  }
#define MEGALODON_CPU_KERNEL_BF16 MEGALODON_CPU_KERNEL
#endif

// Declares the launcher megalodon::cuda::NAME(const ARGS&, stream). It is weak: where cuda/ops does not define it, or
// was not built, its address is null.
#define MEGALODON_CUDA_KERNEL(NAME, ARGS)                          \
  namespace megalodon::cuda {                                      \
  __attribute__((weak)) void NAME(const ARGS& args, void* stream); \
  }

// The kernel of an op in both wings; and of one that is in the list of those for avx512_bf16 (CMakeLists.txt).
#define MEGALODON_KERNEL(NAME, ARGS) \
  MEGALODON_CPU_KERNEL(NAME, ARGS)   \
  MEGALODON_CUDA_KERNEL(NAME, ARGS)
#define MEGALODON_KERNEL_BF16(NAME, ARGS) \
  MEGALODON_CPU_KERNEL_BF16(NAME, ARGS)   \
  MEGALODON_CUDA_KERNEL(NAME, ARGS)
