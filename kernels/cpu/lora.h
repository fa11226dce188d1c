// What LoRA adapters add to products: up (down x), in bfloat16 with sums in float32.
//
// Each row is computed by itself and always in one order, so that its bits depend on nobody else's. Paper: LoRA (Hu et
// al., 2021).
#pragma once

#include "matmul.h"

namespace headrace {

// The weights of a layer that adapters change.
enum Target { TO_QUERY, TO_KEY, TO_VALUE, TO_OUT, TO_GATE, TO_UP, TO_DOWN, NUM_TARGETS };

constexpr int RANK_UNIT = 16;  // ranks are padded to multiples of it, with zeros

// What an adapter adds to one weight; nothing where its rank is 0.
struct LowRank {
  const bf16* down;  // [rank][K]
  const bf16* up;    // as a weight [columns, rank] is laid out (struct Linear), and scaled
  int64_t rank;
  int64_t num_inputs;  // K, a multiple of 32
};

struct LayerAdapter {
  LowRank targets[NUM_TARGETS];
};

// reduced [rank] = down x, for x [K].
inline void reduce(const LowRank& low_rank, const bf16* x, bf16* reduced) {
  constexpr int at_once = 8;
  float sums[RANK_UNIT];
  for (int64_t r = 0; r < low_rank.rank; r += at_once) {
    const bf16* weights = low_rank.down + r * low_rank.num_inputs;
    Vec acc[at_once] = {};
    for (int64_t k = 0; k < low_rank.num_inputs; k += 2 * LANES) {
      const Ints pairs = load_as<Ints>(x + k);
#pragma GCC unroll 8
      for (int i = 0; i < at_once; ++i)
        acc[i] = dot_pairs(acc[i], pairs, load_as<Ints>(weights + i * low_rank.num_inputs + k));
    }
    const int64_t first = r % RANK_UNIT;
    for (int i = 0; i < at_once; ++i) sums[first + i] = sum(acc[i]);
    if (first + at_once < RANK_UNIT) continue;
    for (int i = 0; i < RANK_UNIT; i += LANES) store_bf16(reduced + r - first + i, load(sums + i));
  }
}

// columns [32] += up reduced, of one panel.
inline void expand(const LowRank& low_rank, int64_t panel, const bf16* reduced, float* columns) {
  constexpr int num_vectors = PANEL / LANES;
  const bf16* weights = low_rank.up + panel * low_rank.rank * PANEL;
  Vec even[num_vectors] = {}, odd[num_vectors] = {};
  for (int64_t r = 0; r < low_rank.rank; r += 4, reduced += 4, weights += 4 * PANEL) {
    const Ints first = splat_pair(reduced), second = splat_pair(reduced + 2);
#pragma GCC unroll 4
    for (int i = 0; i < num_vectors; ++i) {
      even[i] = dot_pairs(even[i], first, load_as<Ints>(weights + 2 * i * LANES));
      odd[i] = dot_pairs(odd[i], second, load_as<Ints>(weights + 2 * (PANEL + i * LANES)));
    }
  }
  for (int i = 0; i < num_vectors; ++i) store(columns + i * LANES, load(columns + i * LANES) + (even[i] + odd[i]));
}

}  // namespace headrace
