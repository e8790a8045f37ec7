// conformance WRAPPER < registers > registers: runs one wrapper of core/mma.cuh on raw registers, on the GPU (nvcc) or
// in the executor (g++). In: 32-bit words, case after case, each 32 lanes with the wrapper's input registers; out: as
// many cases of 32 lanes with its output registers. What is right is in vectors.json; check.py compares. Not yet run on
// a GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/mma.cuh"

namespace megalodon::cuda {
namespace {

struct alignas(16) Row {  // of a matrix of 16-bit numbers
  uint32_t v[4];
};

// In: which row this lane points at; row number `lane` of shared memory. Out: what it took of the four matrices.
template <bool kTransposed>
struct LoadMatrices {
  static constexpr int kInputs = 5, kOutputs = 4;
  static DEVICE void run(const uint32_t* in, uint32_t* out) {
    SHARED(Row, rows, [32]);
    for (int i = 0; i < 4; ++i) rows[threadIdx.x].v[i] = in[1 + i];
    sync_warp();  // every row is there
    uint32_t taken[4];
    load_matrices<kTransposed>(taken, &rows[in[0] % 32]);
    for (int i = 0; i < 4; ++i) out[i] = taken[i];
  }
};

// In: a[4], b[2], c[4]. Out: c[4].
template <class T>
struct Mma {
  static constexpr int kInputs = 10, kOutputs = 4;
  static DEVICE void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = bits_as<float>(in[6 + i]);
    mma<T>(c[0], c[1], c[2], c[3], a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = bits_as<uint32_t>(c[i]);
  }
};

template <class Wrapper>
__global__ void conformance_kernel(const uint32_t* in, uint32_t* out) {
  const int64_t lane = int64_t{blockIdx.x} * 32 + threadIdx.x;
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
  constexpr size_t kCase = 32 * Wrapper::kInputs;
  if (in.empty() || in.size() % kCase != 0) throw std::runtime_error("the input is no whole number of cases");
  const size_t cases = in.size() / kCase;
  const Words given(in), taken(std::vector<uint32_t>(cases * 32 * Wrapper::kOutputs, 0xffffffffu));
  launch({"conformance", dim3(static_cast<unsigned>(cases)), dim3(32)}, conformance_kernel<Wrapper>,
         static_cast<const uint32_t*>(given.data()), taken.data());
  return taken.values();
}

std::vector<uint32_t> run(const std::string& wrapper, const std::vector<uint32_t>& in) {
  if (wrapper == "load_matrices<false>") return run<LoadMatrices<false>>(in);
  if (wrapper == "load_matrices<true>") return run<LoadMatrices<true>>(in);
  if (wrapper == "mma<bf16>") return run<Mma<bf16>>(in);
  if (wrapper == "mma<f16>") return run<Mma<f16>>(in);
#if MEGALODON_NVCC
  // What throw_cuda_error says of an error of this number, which takes no GPU.
  if (wrapper.rfind("error:", 0) == 0) {
    throw_cuda_error("conformance", static_cast<cudaError_t>(std::stoi(wrapper.substr(6))));
  }
#endif
  throw std::runtime_error("no wrapper " + wrapper);
}

}  // namespace
}  // namespace megalodon::cuda

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s WRAPPER < registers > registers\n", argv[0]), 64;
  std::vector<uint32_t> in;
  uint32_t word;
  while (std::fread(&word, sizeof word, 1, stdin) == 1) in.push_back(word);
  try {
    const std::vector<uint32_t> out = megalodon::cuda::run(argv[1], in);
    return std::fwrite(out.data(), sizeof word, out.size(), stdout) == out.size() ? 0 : 1;
  } catch (const megalodon::Error& error) {
    std::fprintf(stderr, "%s\n", error.message.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
