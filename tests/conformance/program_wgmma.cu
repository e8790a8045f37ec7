// The wrappers of core/wgmma.cuh and core/bulk.cuh in the program of program.cu: sm_90a alone.
#include "core/bulk.cuh"
#include "core/wgmma.cuh"
#include "program.h"

namespace megalodon::cuda {
namespace {

// In: words of the slabs of a (64 rows) and b, 64 deep, as they lie in shared memory, and sums; out: the sums, to which
// the product is added by four instructions.
template <class T, int kRowsOfB, int kTransposedA, int kTransposedB>
struct WgmmaRun {
  static constexpr int kWordsOfA = 64 * 64 / 2, kWordsOfB = kRowsOfB * 64 / 2, kSums = kRowsOfB / 2;
  static constexpr int kLanes = 128, kSharedBytes = (kWordsOfA + kWordsOfB) * 4;
  static constexpr int kInputs = (kWordsOfA + kWordsOfB) / kLanes + kSums, kOutputs = kSums;
  static DEVICE void run(const uint32_t* in, uint32_t* out) {
    DYNAMIC_SHARED(uint32_t, words);
    const int lane = static_cast<int>(threadIdx.x);
    constexpr int kOfA = kWordsOfA / kLanes, kOfB = kWordsOfB / kLanes;
    for (int i = 0; i < kOfA; ++i) words[lane * kOfA + i] = in[i];
    for (int i = 0; i < kOfB; ++i) words[kWordsOfA + lane * kOfB + i] = in[kOfA + i];
    fence_async_proxy();
    sync_block();  // the slabs are there
    float sum[2][kSums / 2];
    UNROLL
    for (int i = 0; i < kSums; ++i) sum[i / (kSums / 2)][i % (kSums / 2)] = bits_as<float>(in[kOfA + kOfB + i]);
    constexpr uint32_t kPattern = 1024, kLeading = 64 * 128;
    uint64_t a = matrix_descriptor(words, kTransposedA ? kLeading : 0, kPattern);
    uint64_t b = matrix_descriptor(words + kWordsOfA, kTransposedB ? kLeading : 0, kPattern);
    wgmma_fence();
    UNROLL
    for (int i = 0; i < 4; ++i) {  // 16 depths: 32 bytes of a line, or 16 lines
      wgmma<T, kTransposedA, kTransposedB>(sum, a, b);
      a += (kTransposedA ? 16 * 128 : 32) / 16, b += (kTransposedB ? 16 * 128 : 32) / 16;
    }
    wgmma_commit();
    wgmma_wait<0>();
    UNROLL
    for (int i = 0; i < kSums; ++i) out[i] = bits_as<uint32_t>(settled(sum[i / (kSums / 2)][i % (kSums / 2)]));
  }
};

template <class T, int kRowsOfB>
void add(const std::string& name) {
  wrappers()[name + ", 0, 0>"] = run<WgmmaRun<T, kRowsOfB, 0, 0>>;
  wrappers()[name + ", 0, 1>"] = run<WgmmaRun<T, kRowsOfB, 0, 1>>;
  wrappers()[name + ", 1, 0>"] = run<WgmmaRun<T, kRowsOfB, 1, 0>>;
  wrappers()[name + ", 1, 1>"] = run<WgmmaRun<T, kRowsOfB, 1, 1>>;
}

// Shared memory after 16 lines of a tensor [40][3][96] have come from (x, y, z) on, to each of the blocks.
constexpr int kBoxLines = 16, kBoxWords = kBoxLines * 32, kBoxLanes = 128;

template <int kBlocks>
__global__ void tensor_copy_kernel(GRID_CONSTANT TensorMap map, int x, int y, int z, uint32_t* out) {
  DYNAMIC_SHARED(uint32_t, words);
  SHARED(Barrier, barrier, [1]);
  const int lane = static_cast<int>(threadIdx.x), rank = static_cast<int>(cluster_rank());
  if (lane == 0) {
    barrier[0].init(1);
    fence_barrier_init();
  }
  sync_cluster();
  if (lane == 0) {
    barrier[0].expect(kBoxWords * 4);
    if constexpr (kBlocks == 1) {
      tensor_copy(words, map, x, y, z, barrier[0]);
    } else {
      tensor_copy(words + rank * kBoxWords / kBlocks, map, x, y, z + rank * kBoxLines / kBlocks, barrier[0],
                  uint16_t{(1 << kBlocks) - 1});
    }
  }
  barrier[0].wait(0);
  constexpr int kOfLane = kBoxWords / kBoxLanes;
  for (int i = 0; i < kOfLane; ++i) out[(lane * kBlocks + rank) * kOfLane + i] = words[lane * kOfLane + i];
  sync_cluster();
}

template <int kX, int kY, int kZ, int kBlocks>
std::vector<uint32_t> run_copy(const std::vector<uint32_t>& in) {
  if (in.size() != 40 * 3 * 96 / 2) throw std::runtime_error("the input is not the tensor");
  const Words given(in), taken(std::vector<uint32_t>(kBoxWords * kBlocks, 0xffffffffu));
  const TensorMap map = tensor_map("conformance", given.data(), {96, 3, 40}, {96, 3 * 96}, kBoxLines / kBlocks);
  launch({"conformance", dim3(kBlocks), dim3(kBoxLanes), kBoxWords * 4, nullptr, kBlocks}, tensor_copy_kernel<kBlocks>,
         map, kX, kY, kZ, taken.data());
  return taken.values();
}

const bool kAdded = [] {
  add<bf16, 128>("wgmma<bf16, 128");
  add<bf16, 256>("wgmma<bf16, 256");
  add<f16, 128>("wgmma<f16, 128");
  add<f16, 256>("wgmma<f16, 256");
  wrappers()["tensor_copy<0, 0, 0, 1>"] = run_copy<0, 0, 0, 1>;
  wrappers()["tensor_copy<32, 1, 7, 1>"] = run_copy<32, 1, 7, 1>;
  wrappers()["tensor_copy<64, 2, 30, 1>"] = run_copy<64, 2, 30, 1>;
  wrappers()["tensor_copy<-8, 1, -3, 1>"] = run_copy<-8, 1, -3, 1>;
  wrappers()["tensor_copy<32, 2, 20, 2>"] = run_copy<32, 2, 20, 2>;
  return true;
}();

}  // namespace
}  // namespace megalodon::cuda
