// The only door between a kernel and the machine. Compiled by nvcc it is CUDA; compiled by a host C++ compiler it is
// the executor of cuda/simt, which runs the same kernels on the CPU in tests. Kernels include this and other headers of
// cuda/core, and nothing of CUDA's own; every piece of inline PTX is here, beside the host code that stands for it.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "core/dtype.h"
#include "core/tensor.h"

#if defined(__CUDACC__)
#define MEGALODON_NVCC 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#define MEGALODON_NVCC 0
#include <string.h>

#include "simt/simt.h"
#endif

// SHARED(float, sums, [32]); declares `float sums[32]` in shared memory, DYNAMIC_SHARED(float, row); the memory whose
// size the launch gave. A raw __shared__ could not be seen by the executor.
#if MEGALODON_NVCC
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name)                                        \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")
#define GRID_CONSTANT const __grid_constant__
#else
#define SHARED(type, name, ...)            \
  using name##_type = type __VA_ARGS__;    \
  static const char name##_key = 0;        \
  auto& name = *static_cast<name##_type*>( \
      ::megalodon::simt::shared_static(&name##_key, sizeof(name##_type), alignof(name##_type), #name))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::megalodon::simt::shared_dynamic())
#define UNROLL
#define ROLL
#define GRID_CONSTANT const
#endif
#define DEVICE __device__ __forceinline__

namespace megalodon::cuda {

// ---- launching ------------------------------------------------------------------------------------------------------

struct LaunchConfig {
  const char* kernel;  // its name, for messages
  dim3 grid, block;
  int64_t shared_bytes = 0;  // of dynamic shared memory
  void* stream = nullptr;
  unsigned cluster = 1;  // blocks that follow each other along x: core/bulk.cuh
};

#if MEGALODON_NVCC
[[noreturn]] void throw_cuda_error(const char* where, cudaError_t status);  // core/device.cu
#endif

// Whether the current device has the instructions of core/wgmma.cuh, which are those of Hopper alone.
#if MEGALODON_NVCC
bool has_wgmma();  // core/device.cu
#else
inline bool has_wgmma() { return simt::has_wgmma(); }
#endif

// How many multiprocessors it has.
#if MEGALODON_NVCC
int multiprocessors();  // core/device.cu
#else
constexpr int multiprocessors() { return simt::kMultiprocessors; }
#endif

// Runs kernel(args...) on the grid. On the GPU: asynchronously on the stream, nothing allocated, so that it can be
// captured in a graph.
template <class... Parameters, class... Args>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Args... args) {
#if MEGALODON_NVCC
  cudaError_t status = cudaSuccess;
  if (config.shared_bytes > 48 * 1024) {  // more must be asked for
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(config.shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t cuda_config = {};
    cuda_config.gridDim = config.grid;
    cuda_config.blockDim = config.block;
    cuda_config.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
    cuda_config.stream = static_cast<cudaStream_t>(config.stream);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = config.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    cuda_config.attrs = &cluster;
    cuda_config.numAttrs = config.cluster > 1;
    status = cudaLaunchKernelEx(&cuda_config, kernel, static_cast<Parameters>(args)...);
  }
  if (status != cudaSuccess) throw_cuda_error(config.kernel, status);
#else
  simt::run({config.kernel, config.grid, config.block, static_cast<size_t>(config.shared_bytes), config.cluster},
            [=] { kernel(static_cast<Parameters>(args)...); });
#endif
}

// ---- barriers and warp operations -----------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

#if MEGALODON_NVCC
struct Site {  // of a call: only the executor looks at it
  static constexpr __device__ Site here() { return {}; }
};
#else
using simt::Site;
using simt::WarpOp;
#endif

DEVICE void sync_block([[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  __syncthreads();
#else
  simt::block_barrier(site);
#endif
}

DEVICE void sync_warp(unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  __syncwarp(mask);
#else
  simt::warp_meet(mask, WarpOp::kSync, &mask, [](void* const*, uint32_t, uint32_t) {}, site);
#endif
}

// The lane of the calling thread, for blocks of any shape.
DEVICE int lane_index() {
#if MEGALODON_NVCC
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#else
  return static_cast<int>(simt::lane());
#endif
}

template <class T>
DEVICE T shuffle(T value, int source, unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  return __shfl_sync(mask, value, source);
#else
  return simt::shuffle(mask, WarpOp::kShuffle, value, source & 31, site);
#endif
}

template <class T>
DEVICE T shuffle_xor(T value, int bits, unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  return __shfl_xor_sync(mask, value, bits);
#else
  return simt::shuffle(mask, WarpOp::kShuffleXor, value, lane_index() ^ bits, site);
#endif
}

// The value of the lane `distance` below; lanes that have none keep their own.
template <class T>
DEVICE T shuffle_up(T value, int distance, unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  return __shfl_up_sync(mask, value, distance);
#else
  const int source = lane_index() - distance;
  return simt::shuffle(mask, WarpOp::kShuffleUp, value, source < 0 ? lane_index() : source, site);
#endif
}

template <class T>
DEVICE T shuffle_down(T value, int distance, unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  return __shfl_down_sync(mask, value, distance);
#else
  const int source = lane_index() + distance;
  return simt::shuffle(mask, WarpOp::kShuffleDown, value, source > 31 ? lane_index() : source, site);
#endif
}

DEVICE unsigned ballot(bool predicate, unsigned mask = kAllLanes, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  return __ballot_sync(mask, predicate);
#else
  return simt::ballot(mask, predicate, site);
#endif
}

// How many bits are set.
DEVICE int count_bits(uint32_t bits) {
#if MEGALODON_NVCC
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// ---- memory order ---------------------------------------------------------------------------------------------------

// Orders this thread's earlier accesses before its later ones, as seen by the whole GPU.
DEVICE void fence() {
#if MEGALODON_NVCC
  __threadfence();
#else
  simt::on_fence();
  simt::maybe_yield();
#endif
}

// What a loop waits with: other threads' writes before the matching store_release are visible after it. Yields in the
// executor, so that spin loops must use it.
DEVICE uint64_t load_acquire(const uint64_t* address) {
#if MEGALODON_NVCC
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#else
  return simt::load_acquire(address);
#endif
}

DEVICE uint32_t load_acquire(const uint32_t* address) {
#if MEGALODON_NVCC
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return simt::load_acquire(address);
#endif
}

DEVICE void store_release(uint64_t* address, uint64_t value) {
#if MEGALODON_NVCC
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
  simt::store_release(address, value);
#endif
}

DEVICE void store_release(uint32_t* address, uint32_t value) {
#if MEGALODON_NVCC
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
  simt::store_release(address, value);
#endif
}

// Returns the value before. Integers only (a float's sum would depend on the order); orders nothing by itself.
DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
#if MEGALODON_NVCC
  return atomicAdd(address, value);
#else
  // Untraced: the race build may let other threads run at any access that it traces.
  return simt::atomic_update(address, [=](uint32_t before) MEGALODON_SIMT_UNTRACED { return before + value; });
#endif
}

// One store of 8 or 16 bytes, aligned to as many. Written as an assignment the compiler would take it apart wherever it
// knows the words to be computed apart: four stores, each to a quarter of the bytes of every sector.
DEVICE void store_words(void* to, const uint32_t (&words)[2]) {
#if MEGALODON_NVCC
  asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
#else
  *static_cast<uint64_t*>(to) = words[0] | uint64_t{words[1]} << 32;
#endif
}

DEVICE void store_words(void* to, const uint32_t (&words)[4]) {
#if MEGALODON_NVCC
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
#endif
}

DEVICE void store_words(void* to, const uint64_t (&words)[2]) {
#if MEGALODON_NVCC
  asm volatile("st.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(words[0]), "l"(words[1]) : "memory");
#else
  store_words(to, {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32),
                   static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[1] >> 32)});
#endif
}

// ---- asynchronous copies from global to shared memory ---------------------------------------------------------------

// 16 bytes, both ends aligned; zeros where !valid (then nothing is read). Invisible to every thread, this one
// included, before async_wait, and to the other threads before a barrier after it.
DEVICE void async_copy16(void* shared, const void* global, bool valid = true) {
#if MEGALODON_NVCC
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#else
  simt::async_copy(shared, global, 16, valid ? 16 : 0);
#endif
}

DEVICE void async_commit() {
#if MEGALODON_NVCC
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::async_commit();
#endif
}

// Waits until at most kGroupsLeft of the committed groups of this thread are in flight.
template <int kGroupsLeft>
DEVICE void async_wait() {
#if MEGALODON_NVCC
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  simt::async_wait(kGroupsLeft);
#endif
}

// ---- numbers --------------------------------------------------------------------------------------------------------

template <class To, class From>
DEVICE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
#if MEGALODON_NVCC
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
#else
  return __builtin_bit_cast(To, value);
#endif
}

// The value, as one that the compiler cannot foresee: what is computed from it is computed again where it is needed,
// and not kept in registers.
template <class T>
DEVICE T anew(T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
#if MEGALODON_NVCC
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// 2^x, to 2 ulp; subnormal results are 0.
DEVICE float exp2_approximate(float x) {
#if MEGALODON_NVCC
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0 : result;
#endif
}

DEVICE float widen(float value) { return value; }
DEVICE double widen(double value) { return value; }
DEVICE float widen(bf16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
DEVICE float widen(f16 value) {
#if MEGALODON_NVCC
  return __half2float(__ushort_as_half(value.bits));
#else
  // Shifted into place the exponent is too small by 112; a multiplication repairs it, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const bool is_finite = (value.bits & 0x7c00) != 0x7c00;
  const uint32_t scaled = is_finite ? bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f) : magnitude | 0x7f800000u;
  return bits_as<float>(scaled | sign);
#endif
}

// Round to nearest even; NaN stays NaN.
template <class T>
DEVICE T narrow(stat_t<T> value) {
  if constexpr (std::is_same_v<T, bf16>) {
#if MEGALODON_NVCC
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const auto bits = bits_as<uint32_t>(value);
    if (value != value) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40)};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  } else if constexpr (std::is_same_v<T, f16>) {
#if MEGALODON_NVCC
    return f16{__half_as_ushort(__float2half_rn(value))};
#else
    const auto bits = bits_as<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536: infinite
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded result in the low bits
      const uint32_t rounded = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
      return f16{static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1);
    return f16{static_cast<uint16_t>(sign | rounded >> 13)};
#endif
  } else {
    return value;
  }
}

}  // namespace megalodon::cuda
