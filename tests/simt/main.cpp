// simt_tests KERNEL BUG SCHEDULE...: runs one kernel of kernels.h under each schedule and prints a line for each,
// "correct", "wrong" (the numbers) or what the executor reported. tests/simt/test_simt.py reads them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

using megalodon::cuda::Bug;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> numbers(int count) {  // small integers: every sum is exact in any order
  std::vector<float> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<float>((i * 7 + i / 5) % 11 - 5);
  return values;
}

bool row_sum(Bug bug) {
  const int rows = 9, columns = 300;
  const std::vector<float> x = numbers(rows * columns);
  std::vector<float> sums(rows, kNan), scaled(rows * columns, kNan);
  megalodon::cuda::row_sum(bug, x.data(), sums.data(), scaled.data(), rows, columns);
  bool right = true;
  for (int r = 0; r < rows; ++r) {
    float sum = 0;
    for (int i = 0; i < columns; ++i) sum += x[r * columns + i];
    right &= sums[r] == sum;
    for (int i = 0; i < columns; ++i) right &= scaled[r * columns + i] == x[r * columns + i] * sum;
  }
  return right;
}

bool scan(Bug bug) {
  const int length = 2500, tiles = (length + 127) / 128;
  std::vector<uint32_t> x(length), y(length, ~0u);
  for (int i = 0; i < length; ++i) x[i] = static_cast<uint32_t>(i * 37 % 101);
  std::vector<uint64_t> states(tiles);
  uint32_t ticket = 0;
  megalodon::cuda::scan(bug, x.data(), y.data(), states.data(), &ticket, length);
  bool right = true;
  uint32_t sum = 0;
  for (int i = 0; i < length; ++i) right &= y[i] == (sum += x[i]);
  return right;
}

bool pipeline(Bug bug) {
  const int tile = 512, tiles = 5;
  std::vector<float> storage = numbers(tile * tiles + 4), y(tile * tiles, kNan);
  const auto offset = (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16 / sizeof(float);
  const float* x = storage.data() + offset;
  megalodon::cuda::pipeline(bug, x, y.data(), tiles);
  bool right = true;
  for (int i = 0; i < tile * tiles; ++i) right &= y[i] == x[i / tile * tile + tile - 1 - i % tile];
  return right;
}

bool reverse(Bug bug) {
  const std::vector<float> x = numbers(128);
  std::vector<float> y(128, kNan);
  megalodon::cuda::reverse(bug, x.data(), y.data());
  bool right = true;
  for (int i = 0; i < 128; ++i) right &= y[i] == x[i ^ 31];
  return right;
}

bool last_block(Bug bug) {
  const int blocks = 12;
  const std::vector<float> x = numbers(blocks * 32);
  std::vector<float> partial(blocks, kNan);
  uint32_t done = 0;
  float sum = kNan, wanted = 0;
  megalodon::cuda::last_block(bug, x.data(), partial.data(), &done, &sum, blocks);
  for (const float value : x) wanted += value;
  return sum == wanted;
}

bool waits(Bug bug) {
  const std::vector<float> x = numbers(64);
  std::vector<float> y(64, kNan);
  megalodon::cuda::waits(bug, x.data(), y.data());
  return y == x;
}

// The layouts as the PTX ISA draws them, written out once more.
bool load_matrices(Bug) {
  std::vector<uint16_t> matrices(256);
  for (int i = 0; i < 256; ++i) matrices[i] = static_cast<uint16_t>(i * 257 + 3);
  std::vector<uint32_t> taken(256);
  megalodon::cuda::load_matrices(matrices.data(), taken.data());
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const uint16_t* matrix = &matrices[m * 64];
      const int row = lane >> 2, pair = (lane & 3) * 2;
      right &= taken[lane * 4 + m] == (matrix[row * 8 + pair] | uint32_t{matrix[row * 8 + pair + 1]} << 16);
      right &= taken[128 + lane * 4 + m] == (matrix[pair * 8 + row] | uint32_t{matrix[(pair + 1) * 8 + row]} << 16);
    }
  }
  return right;
}

bool matrix_product(Bug bug) {
  const std::vector<float> a = numbers(256), b = numbers(128);
  std::vector<float> products(1024, kNan);
  megalodon::cuda::matrix_product(bug, a.data(), b.data(), products.data());
  bool right = true;
  for (int i = 0; i < 1024; ++i) {
    float sum = 0;
    for (int d = 0; d < 16; ++d) sum += a[i % 128 / 8 * 16 + d] * b[d * 8 + i % 8];
    right &= products[i] == sum;
  }
  return right;
}

bool warpgroup_product(Bug bug) {
  const std::vector<float> a = numbers(64 * 128), b = numbers(128 * 128);
  std::vector<float> product(64 * 128, kNan);
  megalodon::cuda::warpgroup_product(bug, a.data(), b.data(), product.data());
  bool right = true;
  for (int i = 0; i < 64 * 128; ++i) {
    float sum = 0;
    for (int d = 0; d < 128; ++d) sum += a[i / 128 * 128 + d] * b[i % 128 * 128 + d];
    right &= product[i] == sum;
  }
  return right;
}

bool chained_products(Bug bug) {
  std::vector<float> a = numbers(64 * 64), b = numbers(128 * 64);
  for (int i = 0; i < 64 * 64; ++i) a[i] = a[i] * (i % 16 == i / 64 % 16);  // so that bf16 holds the first sums
  std::vector<float> product(64 * 64, kNan);
  megalodon::cuda::chained_products(bug, a.data(), b.data(), product.data());
  bool right = true;
  for (int i = 0; i < 64 * 64; ++i) {
    float whole = 0;
    for (int n = 0; n < 128; ++n) {
      float sum = 0;
      for (int d = 0; d < 64; ++d) sum += a[i / 64 * 64 + d] * b[n * 64 + d];
      whole += sum * b[n * 64 + i % 64];
    }
    right &= product[i] == whole;
  }
  return right;
}

bool tensor_tiles(Bug bug) {
  const int tiles = 9;
  std::vector<uint16_t> storage(tiles * 512 + 8);
  auto* x = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
  for (int i = 0; i < tiles * 512; ++i) x[i] = static_cast<uint16_t>(i * 31 % 8191);
  std::vector<uint32_t> sums(1024, ~0u);
  megalodon::cuda::tensor_tiles(bug, x, sums.data(), tiles);
  bool right = true;
  for (int i = 0; i < 1024; ++i) {
    uint32_t sum = 0;
    for (int tile = 0; tile < tiles; ++tile) sum += x[tile * 512 + i % 512];
    right &= sums[i] == sum;
  }
  return right;
}

bool several_readers(Bug bug) {
  const int turns = 2;
  const std::vector<float> x = numbers(turns * 32);
  std::vector<float> sums(96, kNan);
  megalodon::cuda::several_readers(bug, x.data(), sums.data(), turns);
  bool right = true;
  for (int i = 0; i < 96; ++i) {
    float sum = 0;
    for (int turn = 0; turn < turns; ++turn) {
      for (int n = i < 32 ? 2 : 0; n < 4; ++n) sum += x[(n == 3 ? turn : 0) * 32 + i % 32 / 4 * 4 + n];
    }
    right &= sums[i] == sum;
  }
  return right;
}

bool mixed_readers(Bug bug) {
  const std::vector<float> a = numbers(64 * 64), b = numbers(64 * 64);
  std::vector<float> product(64 * 64, kNan), sums(64, kNan);
  megalodon::cuda::mixed_readers(bug, a.data(), b.data(), product.data(), sums.data());
  bool right = true;
  for (int i = 0; i < 64 * 64; ++i) {
    float sum = 0;
    for (int d = 0; d < 64; ++d) sum += a[i / 64 * 64 + d] * b[i % 64 * 64 + d];
    right &= product[i] == sum;
  }
  for (int i = 0; i < 64; ++i) {
    float sum = 0;
    for (int d = 0; d < 64; ++d) sum += b[i % 32 * 64 + d];
    right &= sums[i] == sum;
  }
  return right;
}

const std::map<std::string, std::function<bool(Bug)>> kKernels = {{"row_sum", row_sum},
                                                                  {"scan", scan},
                                                                  {"pipeline", pipeline},
                                                                  {"reverse", reverse},
                                                                  {"last_block", last_block},
                                                                  {"waits", waits},
                                                                  {"load_matrices", load_matrices},
                                                                  {"matrix_product", matrix_product},
                                                                  {"warpgroup_product", warpgroup_product},
                                                                  {"chained_products", chained_products},
                                                                  {"tensor_tiles", tensor_tiles},
                                                                  {"several_readers", several_readers},
                                                                  {"mixed_readers", mixed_readers}};

const std::map<std::string, Bug> kBugs = {{"none", Bug::kNone},
                                          {"missing_mask", Bug::kMissingMask},
                                          {"shared_out_of_bounds", Bug::kSharedOutOfBounds},
                                          {"missing_barrier", Bug::kMissingBarrier},
                                          {"divergent_barrier", Bug::kDivergentBarrier},
                                          {"divergent_shuffle", Bug::kDivergentShuffle},
                                          {"overlapping_outputs", Bug::kOverlappingOutputs},
                                          {"block_order", Bug::kBlockOrder},
                                          {"missing_async_wait", Bug::kMissingAsyncWait},
                                          {"missing_sync_warp", Bug::kMissingSyncWarp},
                                          {"missing_fence", Bug::kMissingFence},
                                          {"deadlock", Bug::kDeadlock},
                                          {"wrong_mask", Bug::kWrongMask},
                                          {"swapped_fragments", Bug::kSwappedFragments},
                                          {"divergent_matrix", Bug::kDivergentMatrix},
                                          {"mismatched_operations", Bug::kMismatchedOperations},
                                          {"global_out_of_bounds", Bug::kGlobalOutOfBounds},
                                          {"missing_release", Bug::kMissingRelease},
                                          {"short_async_wait", Bug::kShortAsyncWait},
                                          {"missing_proxy_fence", Bug::kMissingProxyFence},
                                          {"missing_wgmma_fence", Bug::kMissingWgmmaFence},
                                          {"missing_wgmma_wait", Bug::kMissingWgmmaWait},
                                          {"early_sums", Bug::kEarlySums},
                                          {"overwritten_operand", Bug::kOverwrittenOperand},
                                          {"old_sums", Bug::kOldSums},
                                          {"missing_full_wait", Bug::kMissingFullWait},
                                          {"missing_free_wait", Bug::kMissingFreeWait},
                                          {"early_release", Bug::kEarlyRelease},
                                          {"early_last_release", Bug::kEarlyLastRelease},
                                          {"missing_cluster_sync", Bug::kMissingClusterSync},
                                          {"missing_barrier_fence", Bug::kMissingBarrierFence},
                                          {"early_exit", Bug::kEarlyExit},
                                          {"few_bytes", Bug::kFewBytes},
                                          {"many_bytes", Bug::kManyBytes},
                                          {"many_arrivals", Bug::kManyArrivals},
                                          {"unwaited_copy", Bug::kUnwaitedCopy}};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: %s KERNEL BUG SCHEDULE...\n", argv[0]), 64;
  const auto& kernel = kKernels.at(argv[1]);
  const Bug bug = kBugs.at(argv[2]);
  for (int i = 3; i < argc; ++i) {
    setenv("MEGALODON_SIMT_SCHEDULE", argv[i], 1);
    std::string outcome;
    try {
      outcome = kernel(bug) ? "correct" : "wrong";
    } catch (const std::runtime_error& error) {
      outcome = error.what();
    }
    for (char& c : outcome) c = c == '\n' ? ' ' : c;
    std::printf("%s\n", outcome.c_str());
    std::fflush(stdout);
  }
  return 0;
}
