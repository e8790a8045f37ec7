// Runs the wrappers of matrix instructions on raw registers: what program.cu and program_wgmma.cu share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/portable.cuh"

namespace megalodon::cuda {

// In and out: the registers of all lanes of all cases.
using Run = std::vector<uint32_t> (*)(const std::vector<uint32_t>& in);

// Of every wrapper, by its name.
std::map<std::string, Run>& wrappers();

namespace {

template <class Wrapper>
__global__ void conformance_kernel(const uint32_t* in, uint32_t* out) {
  const int64_t lane = int64_t{blockIdx.x} * Wrapper::kLanes + threadIdx.x;
  Wrapper::run(in + lane * Wrapper::kInputs, out + lane * Wrapper::kOutputs);
}

// Words where a kernel can reach them.
class Words {
 public:
  explicit Words(const std::vector<uint32_t>& values) : size_(values.size()) {
#if MEGALODON_NVCC
    require(cudaMalloc(&data_, size_ * sizeof(uint32_t)));
    require(cudaMemcpy(data_, values.data(), size_ * sizeof(uint32_t), cudaMemcpyHostToDevice));
#else
    data_ = static_cast<uint32_t*>(std::malloc(size_ * sizeof(uint32_t)));
    std::memcpy(data_, values.data(), size_ * sizeof(uint32_t));
#endif
  }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  ~Words() {
#if MEGALODON_NVCC
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }

  uint32_t* data() const { return data_; }

  std::vector<uint32_t> values() const {  // after every kernel has ended
    std::vector<uint32_t> result(size_);
#if MEGALODON_NVCC
    require(cudaMemcpy(result.data(), data_, size_ * sizeof(uint32_t), cudaMemcpyDeviceToHost));
#else
    std::memcpy(result.data(), data_, size_ * sizeof(uint32_t));
#endif
    return result;
  }

 private:
#if MEGALODON_NVCC
  static void require(cudaError_t status) {
    if (status != cudaSuccess) throw_cuda_error("conformance", status);
  }
#endif
  size_t size_;
  uint32_t* data_ = nullptr;
};

template <class Wrapper>
std::vector<uint32_t> run(const std::vector<uint32_t>& in) {
  constexpr size_t kCase = Wrapper::kLanes * Wrapper::kInputs;
  if (in.empty() || in.size() % kCase != 0) throw std::runtime_error("the input is no whole number of cases");
  const size_t cases = in.size() / kCase;
  const Words given(in), taken(std::vector<uint32_t>(cases * Wrapper::kLanes * Wrapper::kOutputs, 0xffffffffu));
  launch({"conformance", dim3(static_cast<unsigned>(cases)), dim3(Wrapper::kLanes), Wrapper::kSharedBytes},
         conformance_kernel<Wrapper>, static_cast<const uint32_t*>(given.data()), taken.data());
  return taken.values();
}

}  // namespace
}  // namespace megalodon::cuda
