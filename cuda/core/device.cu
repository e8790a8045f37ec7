// The current device of the calling thread, and CUDA's errors as ours.
#include "core/portable.cuh"

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
