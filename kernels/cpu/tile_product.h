// The innermost product: a block of up to BLOCK_ROWS rows times 32 columns, bfloat16 in, float32 out.
//
// Weights, keys and values all lie as pairs of consecutive inputs for 16 columns side by side, which is what AVX-512's and
// AMX's bfloat16 dot products read. `pair_offset` says where the rows' pairs lie; whoever makes rows writes them there.
#pragma once

#include "simd.h"
#if defined(HEADRACE_HAS_AMX)
#include "amx.h"
#endif

namespace headrace {

#if defined(HEADRACE_HAS_AMX)
constexpr int BLOCK_ROWS = 32;  // 2 x 2 accumulators of the 8 tiles
#elif defined(__AVX512F__)
constexpr int BLOCK_ROWS = 12;  // 12 x 2 accumulators of the 32 registers
#else
constexpr int BLOCK_ROWS = 4;  // 4 x 2 of 16
#endif

// Pairs of the inputs that an AMX tile holds: all 16 of a weight's or key's, or 8, one KV tile of 16 tokens.
constexpr int PAIRS_PER_TILE = 16;

// Where pair `pair` of row `row` lies in a block of `num_rows` rows: [pairs / TILE][rows][TILE][2], where AMX, whose tiles
// are loaded whole, always has BLOCK_ROWS rows.
template <int TILE>
inline int64_t pair_offset(int row, int64_t pair, int num_rows) {
#if defined(HEADRACE_HAS_AMX)
  num_rows = BLOCK_ROWS;
#endif
  return ((pair / TILE * num_rows + row) * TILE + pair % TILE) * 2;
}

// What a product fetches from memory while it computes: two lines at every pair of inputs, from `next` on.
struct Ahead {
  const uint8_t* next = nullptr;
  int64_t bytes_per_pair = 0;
  bool is_near = false;  // soon to be read, or only to be in the second-level cache
};

// c [num_rows, 32] (rows `stride` apart) = a times columns, over `num_chunks` chunks of `num_pairs` pairs.
//
// `columns(chunk, half)` is where 16 columns' pairs of a chunk begin, [num_pairs][16][2], with `pair_stride` elements from
// one pair to the next. TILE is the tile size that a was laid out with. What `ahead` shows is fetched on the side.
#if defined(HEADRACE_HAS_AMX)

inline thread_local int configured_tile = 0;

// Called by each thread when it is through with a step.
inline void end_products() {
  amx::release();
  configured_tile = 0;
}

template <int TILE, class Columns>
void tile_product(int num_rows, const bf16* a, int num_chunks, int num_pairs, Columns columns, int64_t pair_stride,
                  float* c, int64_t stride, Ahead ahead = {}) {
  // Tiles are loaded and stored whole: rows beyond num_rows are computed for nothing.
  const bool has_lower = num_rows > amx::TILE_ROWS;
  alignas(64) float out[4][amx::TILE_ROWS * 16];
  amx::configure<TILE>(&configured_tile);
  amx::zero();
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    const bf16* left = columns(chunk, 0);
    const bf16* right = columns(chunk, 1);
    for (int pair = 0; pair < num_pairs; pair += TILE, a += 2 * TILE * BLOCK_ROWS) {
      if (ahead.next != nullptr)
        for (int i = 0; i < TILE; ++i, ahead.next += ahead.bytes_per_pair)
          prefetch(ahead.next), prefetch(ahead.next + 64);
      amx::multiply<TILE>(a, has_lower, left + pair * pair_stride, right + pair * pair_stride, pair_stride);
    }
  }
  amx::store(out[0], has_lower);
  for (int m = 0; m < num_rows; ++m)
    for (int half = 0; half < 2; ++half)
      store(c + m * stride + half * 16, load(out[m / amx::TILE_ROWS * 2 + half] + m % amx::TILE_ROWS * 16));
}

#else

inline void end_products() {}

enum Fetch { NOTHING, NEAR, FAR };

template <int M, int TILE, Fetch FETCH, class Columns>
void product(const bf16* a, int num_chunks, int num_pairs, Columns columns, int64_t pair_stride, float* c,
             int64_t stride, Ahead ahead) {
  // 32 columns in one pass of 2 x 16 lanes, or two passes of 2 x 8.
  for (int pass = 0; pass < 16 / LANES; ++pass) {
    Vec acc[M][2] = {};
    const bf16* row_pairs = a;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const bf16* left = LANES == 16 ? columns(chunk, 0) : columns(chunk, pass);
      const bf16* right = LANES == 16 ? columns(chunk, 1) : left + 2 * LANES;
      for (int tile = 0; tile < num_pairs; tile += TILE, row_pairs += 2 * TILE * (M - 1))
      for (int pair = 0; pair < TILE; ++pair, row_pairs += 2, left += pair_stride, right += pair_stride) {
        const Ints first = load_as<Ints>(left), second = load_as<Ints>(right);
        if constexpr (FETCH == NEAR) prefetch(ahead.next), prefetch(ahead.next + 64);
        if constexpr (FETCH == FAR) prefetch_far(ahead.next), prefetch_far(ahead.next + 64);
        ahead.next += ahead.bytes_per_pair;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Ints x = splat_pair(row_pairs + 2 * TILE * m);
          acc[m][0] = dot_pairs(acc[m][0], x, first);
          acc[m][1] = dot_pairs(acc[m][1], x, second);
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      store(c + m * stride + pass * 16, acc[m][0]);
      store(c + m * stride + pass * 16 + LANES, acc[m][1]);
    }
  }
}

template <int TILE, class Columns, int M = BLOCK_ROWS>
void tile_product(int num_rows, const bf16* a, int num_chunks, int num_pairs, Columns columns, int64_t pair_stride,
                  float* c, int64_t stride, Ahead ahead = {}) {
  if constexpr (M > 1) {
    if (num_rows < M)
      return tile_product<TILE, Columns, M - 1>(num_rows, a, num_chunks, num_pairs, columns, pair_stride, c, stride,
                                                ahead);
  }
  const auto run = ahead.next == nullptr ? product<M, TILE, NOTHING, Columns>
                   : ahead.is_near       ? product<M, TILE, NEAR, Columns>
                                         : product<M, TILE, FAR, Columns>;
  run(a, num_chunks, num_pairs, columns, pair_stride, c, stride, ahead);
}

#endif

}  // namespace headrace
