// What LoRA adapters add to products: up (down x), with weights in bfloat16 and sums in float32.
//
// Each row is computed by itself and always in one order, so that its bits depend on nobody else's; that costs a few
// percent of a step whose rows all have one. Paper: LoRA (Hu et al., 2021).
#pragma once

#include "matmul.h"

namespace headrace {

// The weights of a layer that adapters change.
enum Target { TO_QUERY, TO_KEY, TO_VALUE, TO_OUT, TO_GATE, TO_UP, TO_DOWN, NUM_TARGETS };

// What an adapter adds to one weight; nothing where its rank is 0.
struct LowRank {
  const bf16* down;  // [rank][K]
  const bf16* up;    // [panels][rank][32 columns], columns padded as the weight's, and scaled
  int64_t rank;
  int64_t num_inputs;  // K, a multiple of 32
};

struct LayerAdapter {
  LowRank targets[NUM_TARGETS];
};

// reduced [rank] = down x, for x [K].
inline void reduce(const LowRank& low_rank, const float* x, float* reduced) {
  for (int64_t r = 0; r < low_rank.rank; ++r) {
    const bf16* weights = low_rank.down + r * low_rank.num_inputs;
    Vec even{}, odd{};
    for (int64_t k = 0; k < low_rank.num_inputs; k += 2 * LANES) {
      even = fma(load(x + k), load_bf16(weights + k), even);
      odd = fma(load(x + k + LANES), load_bf16(weights + k + LANES), odd);
    }
    reduced[r] = sum(even + odd);
  }
}

// columns [32] += up reduced, of one panel.
inline void expand(const LowRank& low_rank, int64_t panel, const float* reduced, float* columns) {
  const bf16* weights = low_rank.up + panel * low_rank.rank * PANEL;
  Vec added[PANEL / LANES] = {};
  for (int64_t r = 0; r < low_rank.rank; ++r, weights += PANEL)
    for (int i = 0; i < PANEL / LANES; ++i) added[i] = fma(splat(reduced[r]), load_bf16(weights + i * LANES), added[i]);
  for (int i = 0; i < PANEL / LANES; ++i) store(columns + i * LANES, load(columns + i * LANES) + added[i]);
}

}  // namespace headrace
