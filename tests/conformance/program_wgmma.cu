// The wrappers of core/wgmma.cuh and core/bulk.cuh in the program of program.cu: sm_90a alone.
#include "core/bulk.cuh"
#include "core/wgmma.cuh"
#include "program.h"

namespace megalodon::cuda {
namespace {

// In: words of the slabs of a (64 rows) and b, 64 deep, as they lie in shared memory, and sums; out: the sums, to which
// the product is added by four instructions, or which it becomes. Of a kInRegisters the words are its operands'.
constexpr int kInRegisters = 2;

template <class T, int kRowsOfB, int kTransposedA, int kTransposedB, bool kAdds>
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
    uint64_t a = matrix_descriptor(words, kTransposedA != 0 ? kLeading : 0, kPattern);
    uint64_t b = matrix_descriptor(words + kWordsOfA, kTransposedB != 0 ? kLeading : 0, kPattern);
    uint32_t registers[4][4];
    UNROLL
    for (int i = 0; i < 16; ++i) registers[i / 4][i % 4] = in[i];
    wgmma_fence();
    UNROLL
    for (int i = 0; i < 4; ++i) {  // 16 depths: 32 bytes of a line, or 16 lines
      if constexpr (kTransposedA == kInRegisters) {
        wgmma<T, kTransposedB>(sum, registers[i], b);
      } else if (i == 0) {
        wgmma<T, kTransposedA, kTransposedB, kAdds>(sum, a, b);
      } else {
        wgmma<T, kTransposedA, kTransposedB>(sum, a, b);
      }
      a += (kTransposedA != 0 ? 16 * 128 : 32) / 16, b += (kTransposedB != 0 ? 16 * 128 : 32) / 16;
    }
    wgmma_commit();
    wgmma_wait<0>();
    UNROLL
    for (int i = 0; i < kSums; ++i) out[i] = bits_as<uint32_t>(settled(sum[i / (kSums / 2)][i % (kSums / 2)]));
  }
};

template <class T, int kRowsOfB, int kTransposedA, int kTransposedB, bool kAdds = true>
void add(const std::string& type) {
  const std::string a = kTransposedA == kInRegisters ? "registers" : std::to_string(kTransposedA);
  wrappers()["wgmma<" + type + ", " + std::to_string(kRowsOfB) + ", " + a + ", " + std::to_string(kTransposedB) + ", " +
             std::to_string(kAdds) + ">"] = run<WgmmaRun<T, kRowsOfB, kTransposedA, kTransposedB, kAdds>>;
}

template <class T, int kRowsOfB>
void add_all(const std::string& type) {
  add<T, kRowsOfB, 0, 0>(type), add<T, kRowsOfB, 0, 1>(type);
  add<T, kRowsOfB, 1, 0>(type), add<T, kRowsOfB, 1, 1>(type);
}

template <class T>
void add_type(const std::string& type) {
  add_all<T, 128>(type), add_all<T, 256>(type);
  add<T, 64, kInRegisters, 0>(type), add<T, 64, kInRegisters, 1>(type);
  add<T, 128, kInRegisters, 0>(type), add<T, 128, kInRegisters, 1>(type);
  add<T, 256, kInRegisters, 0>(type), add<T, 256, kInRegisters, 1>(type);
  add<T, 64, 0, 0>(type), add<T, 80, 0, 0>(type);
  add<T, 64, 0, 0, false>(type), add<T, 80, 0, 0, false>(type), add<T, 128, 0, 0, false>(type);
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
  add_type<bf16>("bf16");
  add_type<f16>("f16");
  wrappers()["tensor_copy<0, 0, 0, 1>"] = run_copy<0, 0, 0, 1>;
  wrappers()["tensor_copy<32, 1, 7, 1>"] = run_copy<32, 1, 7, 1>;
  wrappers()["tensor_copy<64, 2, 30, 1>"] = run_copy<64, 2, 30, 1>;
  wrappers()["tensor_copy<-8, 1, -3, 1>"] = run_copy<-8, 1, -3, 1>;
  wrappers()["tensor_copy<32, 2, 20, 2>"] = run_copy<32, 2, 20, 2>;
  return true;
}();

}  // namespace
}  // namespace megalodon::cuda
