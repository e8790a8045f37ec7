// Scans over the lanes of a warp, and values of several doubles that lanes exchange: always in the same order, so that
// results repeat.
#pragma once

#include "core/portable.cuh"

namespace megalodon::cuda {

// Of a struct of doubles.
template <class S>
DEVICE S shuffle_all(const S& value, int source, [[maybe_unused]] Site site = Site::here()) {
  struct Doubles {
    double v[sizeof(S) / sizeof(double)];
  };
  auto doubles = bits_as<Doubles>(value);
  UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(S) / sizeof(double)); ++i) {
    doubles.v[i] = shuffle(doubles.v[i], source, kAllLanes, site);
  }
  return bits_as<S>(doubles);
}

// The values of lanes 0 to this one put together by join(earlier, later), which is associative.
template <class S, class Join>
DEVICE S warp_scan(S value, Join&& join) {
  const int lane = lane_index();
  UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const S earlier = shuffle_all(value, lane >= distance ? lane - distance : lane);
    if (lane >= distance) value = join(earlier, value);
  }
  return value;
}

}  // namespace megalodon::cuda
