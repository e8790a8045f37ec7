// The current device of the calling thread, and CUDA's errors as ours.
#include <cudaTypedefs.h>

#include "core/bulk.cuh"

namespace megalodon {
namespace cuda {

void throw_cuda_error(const char* where, cudaError_t status) {
  std::string text = std::string(where) + ": CUDA: " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    text += "; this build has kernels for the architectures " MEGALODON_CUDA_ARCHITECTURES
            ": rebuild with -DCMAKE_CUDA_ARCHITECTURES set to yours (8.0 or later), or update the driver";
  }
  throw Error{MEGALODON_RUNTIME_ERROR, text};
}

bool has_wgmma() {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) throw_cuda_error("has_wgmma", status);
  return major == 9 && minor == 0;
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) throw_cuda_error("multiprocessors", status);
  return count;
}

// Of the driver as CUDA 12.0 has it.
static void* driver_function(const char* kernel, const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess) throw_cuda_error(kernel, status);
  if (found != cudaDriverEntryPointSuccess) throw_cuda_error(kernel, cudaErrorSymbolNotFound);
  return function;
}

TensorMap tensor_map(const char* kernel, const void* base, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                     int lines) {
  static const auto encode =
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function(kernel, "cuTensorMapEncodeTiled"));
  cuuint64_t extents[3], pitches[2];
  for (int i = 0; i < 3; ++i) extents[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 2; ++i) pitches[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(lines)}, steps[3] = {1, 1, 1};
  CUtensorMap map;
  static_assert(sizeof(TensorMap) == sizeof map);
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), extents, pitches,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error{MEGALODON_RUNTIME_ERROR, std::string(kernel) + ": CUDA: cuTensorMapEncodeTiled: error " +
                                             std::to_string(static_cast<int>(result))};
  }
  TensorMap taken;
  memcpy(&taken, &map, sizeof taken);
  return taken;
}

}  // namespace cuda

DeviceGuard::DeviceGuard(const Checker& checker, int device) : before_(device), device_(device) {
  cudaError_t status = cudaGetDevice(&before_);
  if (status == cudaSuccess && before_ != device_) status = cudaSetDevice(device_);
  if (status != cudaSuccess) cuda::throw_cuda_error(checker.op(), status);
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace megalodon
