// The CEMA forward pass for a few steps (decoding), where the coefficients and the state cost more than the recurrence.
//
// Lanes are the wavelets of one channel, as they lie in memory: a vector of the state holds (re, im) pairs, and so do
// the tables, so that h <- a x + q h is  h <- A x + Q1 h + Q2 swap(h)  with  A = (a, 0), Q1 = (re q, re q),
// Q2 = (-im q, im q), and y = sum of (re g, -im g) h. The tables of a channel are made once, in float64, and serve all
// sequences. For a float32 state q is a sum of two float32 numbers, so that its rounding cannot add up over
// many calls; that of the state, once a step, is what a state in float32 has anyway.
#pragma once

#include "core/parallel.h"
#include "core/subnormals.h"
#include "ops/cema_tiles.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int64_t kShortSteps = 32;
constexpr int64_t kShortWavelets = 64;

// The tables of tiles cost as much as about 32 steps here; a step here costs 4 times as much as in a whole tile.
static inline bool is_short(const CemaForward& args) {
  const int64_t L = args.sequences.length;
  return args.N <= kShortWavelets && L <= kShortSteps && (L <= 4 || args.sequences.tokens() <= kShortSteps);
}

typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<float> join(HalfFloats low, HalfFloats high) {
#if defined(__AVX512F__)
  const __m512 first = _mm512_castps256_ps512(reinterpret_cast<__m256>(low));
  return reinterpret_cast<Vec<float>>(_mm512_insertf32x8(first, reinterpret_cast<__m256>(high), 1));
#elif defined(__AVX2__)
  const __m256 first = _mm256_castps128_ps256(reinterpret_cast<__m128>(low));
  return reinterpret_cast<Vec<float>>(_mm256_insertf128_ps(first, reinterpret_cast<__m128>(high), 1));
#else
  Vec<float> both;
  std::memcpy(&both, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&both) + sizeof low, &high, sizeof high);
  return both;
#endif
}

// (re_0, im_0, re_1, im_1, ..) as A.
template <class A>
inline void store_pairs(A* p, Double re, Double im) {
  constexpr int64_t W = kLanes<A>;
  VecIndex<A> turn;
  if constexpr (std::is_same_v<A, double>) {
    for (int64_t i = 0; i < W; ++i) turn[i] = i / 2 + i % 2 * W;
    store(p, __builtin_shuffle(re, im, turn));
    store(p + W, __builtin_shuffle(re, im, turn + W / 2));
  } else {
    for (int64_t i = 0; i < W; ++i) turn[i] = static_cast<int32_t>(i / 2 + i % 2 * kDoubles);
    const Vec<float> both = join(__builtin_convertvector(re, HalfFloats), __builtin_convertvector(im, HalfFloats));
    store(p, __builtin_shuffle(both, turn));
  }
}

// Of one channel: rows of `stride` entries, of which those of a vector beyond 2 N are zeros.
template <class A>
struct ShortTable {
  static constexpr bool kSplit = std::is_same_v<A, float>;
  static constexpr int64_t kRows = kSplit ? 6 : 4;
  enum : int64_t { kInput = 0, kOutput = 1, kQ1 = 2, kQ2 = 3, kQ1Rest = 4, kQ2Rest = 5 };

  static int64_t stride(int64_t N) { return round_up(2 * N, 2 * kDoubles); }

  static void make(const Parameters<A>& p, int64_t d, A scale, const Sigmoid<Double>& frequency, A* table) {
    const int64_t length = stride(p.N);
    Double n;
    for (int64_t l = 0; l < kDoubles; ++l) n[l] = static_cast<double>(l + 1);
    for (int64_t i = 0; 2 * i < length; i += kDoubles, n += static_cast<double>(kDoubles)) {
      const int64_t left = p.N > i ? p.N - i : 0;
      const auto w = Wavelet<Double>::at(load_some(p.alpha + d * p.N + i, left), load_some(p.delta + d * p.N + i, left),
                                         frequency, n, p.N);
      const auto real = n <= static_cast<double>(p.N);
      const Double re = real ? w.q_re() : Double{}, im = real ? w.q_im() : Double{};
      A* at = table + 2 * i;
      store_pairs(at + kInput * length, real ? w.a() : Double{}, Double{});
      store_pairs(at + kQ1 * length, re, re);
      store_pairs(at + kQ2 * length, -im, im);
      if constexpr (kSplit) {
        const auto rest = [](Double v) {
          return v - __builtin_convertvector(__builtin_convertvector(v, HalfFloats), Double);
        };
        store_pairs(at + kQ1Rest * length, rest(re), rest(re));
        store_pairs(at + kQ2Rest * length, rest(-im), rest(im));
      }
    }
    Vec<A> sign;
    for (int64_t l = 0; l < kLanes<A>; ++l) sign[l] = l % 2 == 0 ? scale : -scale;
    for (int64_t i = 0; i < 2 * p.N; i += kLanes<A>) {
      store(table + kOutput * length + i, sign * load(p.gamma + 2 * d * p.N + i, 2 * p.N - i));
    }
  }
};

// One sequence, kLanes channels, as many as there are: h0 (nullptr: zeros) to h, x to y, whose steps are D
// elements apart. `next` is the next row's h0, fetched meanwhile (nullptr: none).
template <bool kPast, class T, class A = stat_t<T>>
void short_row(const A* tables, int64_t N, int64_t L, int64_t D, int64_t lanes, Vec<A> omega, const A* h0, A* h,
               const T* x, T* y, const A* next) {
  constexpr int64_t W = kLanes<A>;
  using Table = ShortTable<A>;
  const int64_t length = Table::stride(N);
  VecIndex<A> other;
  for (int64_t i = 0; i < W; ++i) other[i] = i ^ 1;
  Vec<A> input[kShortSteps], sums[kShortSteps][W];
  for (int64_t t = 0; t < L; ++t) {
    input[t] = load(x + t * D, lanes);
    for (int64_t l = lanes; l < W; ++l) sums[t][l] = Vec<A>{};
  }
  for (int64_t l = 0; l < lanes; ++l, tables += Table::kRows * length) {
    Vec<A> sum = {};  // of a single step
    for (int64_t i = 0; i < 2 * N; i += W) {
      const int64_t at = l * 2 * N + i, left = 2 * N - i;
      if (next != nullptr) __builtin_prefetch(next + at);
      const auto entry = [&](int64_t row) { return load(tables + row * length + i); };
      const Vec<A> g = entry(Table::kOutput);
      const auto step = [&](Vec<A> state, A x_t) {
        const Vec<A> swapped = __builtin_shuffle(state, other);
        Vec<A> small = entry(Table::kInput) * x_t;
        if constexpr (Table::kSplit) {
          small = entry(Table::kQ1Rest) * state + (entry(Table::kQ2Rest) * swapped + small);
        }
        return entry(Table::kQ1) * state + (entry(Table::kQ2) * swapped + small);
      };
      Vec<A> state = h0 == nullptr ? Vec<A>{} : load(h0 + at, left);
      if (L == 1) {
        state = step(state, input[0][l]);
        sum = g * state + sum;
      } else {
        for (int64_t t = 0; t < L; ++t) {
          state = step(state, input[t][l]);
          sums[t][l] = i == 0 ? g * state : g * state + sums[t][l];
        }
      }
      if constexpr (kPast) {
        put<true>(h + at, state);
      } else {
        store(h + at, state, left);
      }
    }
    if (L == 1) sums[0][l] = sum;
  }
  for (int64_t t = 0; t < L; ++t) store(y + t * D, omega * input[t] + sum_each<A>(sums[t]), lanes);
}

template <class T>
void forward_short(const CemaForward& args) {
  using A = stat_t<T>;
  using Table = ShortTable<A>;
  constexpr int64_t W = kLanes<A>;
  const Parameters<A> parameters = Parameters<A>::of(args);
  const auto* omega = static_cast<const A*>(args.omega);
  const auto* h0 = static_cast<const A*>(args.h0);
  auto* h = static_cast<A*>(args.h);
  const Sequences& sequences = args.sequences;
  const int64_t N = args.N, D = args.D, state = D * N * 2;
  const bool past = 2 * N % W == 0 && goes_past_caches(sequences.count * state, 2 * N, h);
  const A scale = static_cast<A>(gamma_scale(N));
  const int64_t table = Table::kRows * Table::stride(N);
  // Channels a thread makes the tables of before it goes over the sequences: their states are one piece of memory per
  // row.
  constexpr int64_t kRoom = 2 * W * ShortTable<A>::kRows * 2 * kShortWavelets;
  const int64_t most = kRoom / table / W * W;
  const int64_t per_vector = W * N * (16 + sequences.count + sequences.tokens());
  parallel_for(ceil_div(D, W), 1 + 16384 / per_vector, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    alignas(64) A tables[kRoom];
    const int64_t stop = end * W < D ? end * W : D;
    for (int64_t first = begin * W; first < stop; first += most) {
      const int64_t last = stop - first < most ? stop : first + most;
      for (int64_t d = first; d < last; d += kDoubles) {
        const Sigmoid<Double> frequency = parameters.frequency(d);
        for (int64_t l = 0; l < kDoubles && d + l < last; ++l) {
          Table::make(parameters, d + l, scale, {splat(frequency.value[l]), splat(frequency.rest[l])},
                      tables + (d + l - first) * table);
        }
      }
      for (int64_t s = 0; s < sequences.count; ++s) {
        const int64_t start = sequences.begin(s), steps = sequences.end(s) - start;
        for (int64_t d = first; d < last; d += W) {
          const int64_t lanes = last - d < W ? last - d : W, at = s * state + d * N * 2, row = start * D + d;
          const A* from = h0 == nullptr ? nullptr : h0 + at;
          const A* next = from == nullptr || s + 1 == sequences.count ? nullptr : from + state;
          const auto go = [&](auto kPast) {
            short_row<kPast.value>(tables + (d - first) * table, N, steps, D, lanes, load(omega + d, lanes), from,
                                   h + at, static_cast<const T*>(args.x) + row, static_cast<T*>(args.y) + row, next);
          };
          if (past) {
            go(std::true_type{});
          } else {
            go(std::false_type{});
          }
        }
      }
    }
    finish_puts();
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
