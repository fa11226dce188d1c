// The innermost product: a block of up to BLOCK_ROWS rows times 32 columns, bfloat16 in, float32 out.
//
// Weights, keys and values all lie as pairs of consecutive inputs for 16 columns side by side, which is what AVX-512's
// and AMX's bfloat16 dot products read. `pair_offset` says where the rows' pairs lie; whoever makes rows writes them
// there.
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

// Where pair `pair` of row `row` lies in a block of `num_rows` rows: [pairs / TILE][rows][TILE][2], where AMX, whose
// tiles are loaded whole, always has BLOCK_ROWS rows.
template <int TILE>
inline int64_t pair_offset(int row, int64_t pair, int num_rows) {
#if defined(HEADRACE_HAS_AMX)
  num_rows = BLOCK_ROWS;
#endif
  return ((pair / TILE * num_rows + row) * TILE + pair % TILE) * 2;
}

// What a product fetches from memory while it computes: at every pair of inputs a line of two runs.
struct Run {
  const uint8_t* next = nullptr;
  int64_t bytes_per_pair = 0;
};
enum Reach { NOWHERE, NEAR, FAR };  // NEAR is soon to be read, FAR only to be in the second-level cache
struct Ahead {
  Run first, second;
  Reach reach = NOWHERE;

  void fetch() {
    if (reach == NOWHERE) return;
    if (reach == NEAR)
      prefetch(first.next), prefetch(second.next);
    else
      prefetch_far(first.next), prefetch_far(second.next);
    first.next += first.bytes_per_pair, second.next += second.bytes_per_pair;
  }
};

// Where the columns of a product lie: `starts[chunk * per_chunk + half]` is where 16 columns' pairs of a chunk begin,
// [pairs][16][2], with `pair_stride` elements from one pair to the next.
struct Columns {
  const bf16* const* starts;
  int per_chunk;
  int64_t pair_stride;

  const bf16* start(int chunk, int half) const { return starts[chunk * per_chunk + half]; }
  Columns right() const { return {starts + 2, per_chunk, pair_stride}; }
};

// c [num_rows, 16 * HALVES] (rows `stride` apart) = a times columns, over `num_chunks` chunks of `num_pairs` pairs.
//
// HALVES is 2, or 4, which gives few rows enough sums to work on at once. TILE is the tile size that a was laid out
// with. What `ahead` shows is fetched on the side.
#if defined(HEADRACE_HAS_AMX)

inline thread_local int configured_tile = 0;

// Called by each thread when it is through with a step.
inline void end_products() {
  amx::release();
  configured_tile = 0;
}

template <int TILE, int HALVES>
void tile_product(int num_rows, const bf16* a, int num_chunks, int num_pairs, const Columns& columns, float* c,
                  int64_t stride, Ahead ahead = {}) {
  if constexpr (HALVES == 4) {
    tile_product<TILE, 2>(num_rows, a, num_chunks, num_pairs, columns, c, stride, ahead);
    tile_product<TILE, 2>(num_rows, a, num_chunks, num_pairs, columns.right(), c + 32, stride);
    return;
  }
  // Tiles are loaded and stored whole: rows beyond num_rows are computed for nothing.
  const bool has_lower = num_rows > amx::TILE_ROWS;
  alignas(64) float out[4][amx::TILE_ROWS * 16];
  amx::configure<TILE>(&configured_tile);
  amx::zero();
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    const bf16* left = columns.start(chunk, 0);
    const bf16* right = columns.start(chunk, 1);
    for (int pair = 0; pair < num_pairs; pair += TILE, a += 2 * TILE * BLOCK_ROWS) {
      for (int i = 0; i < TILE; ++i) ahead.fetch();
      const int64_t offset = pair * columns.pair_stride;
      amx::multiply<TILE>(a, has_lower, left + offset, right + offset, columns.pair_stride);
    }
  }
  amx::store(out[0], has_lower);
  for (int m = 0; m < num_rows; ++m)
    for (int half = 0; half < 2; ++half)
      store(c + m * stride + half * 16, load(out[m / amx::TILE_ROWS * 2 + half] + m % amx::TILE_ROWS * 16));
}

#else

inline void end_products() {}

template <int M, int TILE, int HALVES>
void product(const bf16* a, int num_chunks, int num_pairs, const Columns& columns, float* c, int64_t stride,
             Ahead ahead) {
  constexpr int VECTORS = LANES == 16 ? HALVES : 2;  // in a pass: 16 columns are one vector, or two
  const int64_t pair_stride = columns.pair_stride;
  for (int pass = 0; pass < 16 * HALVES; pass += VECTORS * LANES) {
    Vec acc[M][VECTORS] = {};
    const bf16* rows = a;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const bf16* from[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const int column = pass + v * LANES;
        from[v] = columns.start(chunk, column / 16) + column % 16 * 2;
      }
      for (int tile = 0; tile < num_pairs; tile += TILE, rows += 2 * TILE * M)
        for (int pair = 0; pair < TILE; ++pair) {
          Ints columns_of_pair[VECTORS];
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) {
            columns_of_pair[v] = load_as<Ints>(from[v]);
            from[v] += pair_stride;
          }
          ahead.fetch();
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const Ints x = splat_pair(rows + 2 * (TILE * m + pair));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[m][v] = dot_pairs(acc[m][v], x, columns_of_pair[v]);
          }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(c + m * stride + pass + v * LANES, acc[m][v]);
  }
}

// Find the product for so many rows, M or fewer.
template <int M, int TILE, int HALVES>
void product_of(int num_rows, const bf16* a, int num_chunks, int num_pairs, const Columns& columns, float* c,
                int64_t stride, Ahead ahead) {
  if constexpr (M > 1) {
    if (num_rows < M)
      return product_of<M - 1, TILE, HALVES>(num_rows, a, num_chunks, num_pairs, columns, c, stride, ahead);
  }
  product<M, TILE, HALVES>(a, num_chunks, num_pairs, columns, c, stride, ahead);
}

template <int TILE, int HALVES>
void tile_product(int num_rows, const bf16* a, int num_chunks, int num_pairs, const Columns& columns, float* c,
                  int64_t stride, Ahead ahead = {}) {
  constexpr int max_rows = BLOCK_ROWS * 2 / HALVES;  // the registers hold so many sums
  if constexpr (HALVES == 4) {
    if (num_rows > max_rows) {
      tile_product<TILE, 2>(num_rows, a, num_chunks, num_pairs, columns, c, stride, ahead);
      return tile_product<TILE, 2>(num_rows, a, num_chunks, num_pairs, columns.right(), c + 32, stride);
    }
  }
  product_of<max_rows, TILE, HALVES>(num_rows, a, num_chunks, num_pairs, columns, c, stride, ahead);
}

#endif

}  // namespace headrace
