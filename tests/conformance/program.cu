// conformance WRAPPER < registers > registers: runs one wrapper of core/mma.cuh, wgmma.cuh or bulk.cuh on raw
// registers, on the GPU (nvcc) or in the executor (g++). In: 32-bit words, case after case, each of all lanes with the
// wrapper's input registers; out: as many cases with its output registers. What is right check.py knows. conformance
// --list: the names of those that run here. Not yet run on a GPU.
#include "core/mma.cuh"
#include "program.h"

namespace megalodon::cuda {
namespace {

struct alignas(16) Row {  // of a matrix of 16-bit numbers
  uint32_t v[4];
};

// In: which row this lane points at; row number `lane` of shared memory. Out: what it took of the four matrices.
template <bool kTransposed>
struct LoadMatrices {
  static constexpr int kLanes = 32, kSharedBytes = 0, kInputs = 5, kOutputs = 4;
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
  static constexpr int kLanes = 32, kSharedBytes = 0, kInputs = 10, kOutputs = 4;
  static DEVICE void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = bits_as<float>(in[6 + i]);
    mma<T>(c[0], c[1], c[2], c[3], a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = bits_as<uint32_t>(c[i]);
  }
};

const bool kAdded = [] {
  wrappers()["load_matrices<false>"] = run<LoadMatrices<false>>;
  wrappers()["load_matrices<true>"] = run<LoadMatrices<true>>;
  wrappers()["mma<bf16>"] = run<Mma<bf16>>;
  wrappers()["mma<f16>"] = run<Mma<f16>>;
  return true;
}();

std::vector<uint32_t> answer(const std::string& wrapper, const std::vector<uint32_t>& in) {
  const auto found = wrappers().find(wrapper);
  if (found != wrappers().end()) return found->second(in);
#if MEGALODON_NVCC
  // What throw_cuda_error says of an error of this number, which takes no GPU.
  if (wrapper.rfind("error:", 0) == 0) {
    throw_cuda_error("conformance", static_cast<cudaError_t>(std::stoi(wrapper.substr(6))));
  }
#endif
  throw std::runtime_error("no wrapper " + wrapper);
}

}  // namespace

std::map<std::string, Run>& wrappers() {
  static std::map<std::string, Run>* all = nullptr;  // without the lock of a variable that is made at its first use
  if (all == nullptr) all = new std::map<std::string, Run>;
  return *all;
}

}  // namespace megalodon::cuda

int main(int argc, char** argv) {
  using namespace megalodon::cuda;
  if (argc != 2) return std::fprintf(stderr, "usage: %s WRAPPER|--list < registers > registers\n", argv[0]), 64;
  try {
    if (std::string(argv[1]) == "--list") {
      for (const auto& [name, run] : wrappers()) {
        const bool is_hoppers = name.rfind("wgmma", 0) == 0 || name.rfind("tensor_copy", 0) == 0;
        if (!is_hoppers || has_wgmma()) std::printf("%s\n", name.c_str());
      }
      return 0;
    }
    std::vector<uint32_t> in;
    uint32_t word;
    while (std::fread(&word, sizeof word, 1, stdin) == 1) in.push_back(word);
    const std::vector<uint32_t> out = answer(argv[1], in);
    return std::fwrite(out.data(), sizeof word, out.size(), stdout) == out.size() ? 0 : 1;
  } catch (const megalodon::Error& error) {
    std::fprintf(stderr, "%s\n", error.message.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
