// AMX tiles for `tile_product`: up to 32 rows times 32 columns in four accumulators, as many as its latency wants.
//
// Tiles 0 .. 3 accumulate (rows 0 .. 15 left and right, rows 16 .. 31 left and right), 4 and 5 hold rows, 6 and 7
// columns. With HEADRACE_EMULATE_AMX the same is computed by AVX-512, for tests on CPUs without AMX. Source: Intel 64
// and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include "simd.h"

namespace headrace::amx {

constexpr int TILE_ROWS = 16;

#if !defined(HEADRACE_EMULATE_AMX)

// Set the tiles' sizes for rows of TILE pairs, where this thread has not got them already.
template <int TILE>
inline void configure(int* configured) {
  if (*configured == TILE) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = i == 4 || i == 5 ? TILE * 4 : 64;
    config.rows[i] = i >= 6 ? TILE : TILE_ROWS;
  }
  _tile_loadconfig(&config);
  *configured = TILE;
}

// Leave the tiles to the system, which then need not save them.
inline void release() { _tile_release(); }

inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Accumulate one tile of rows times one of columns on the left and one on the right.
template <int TILE>
inline void multiply(const bf16* rows, bool has_lower, const bf16* left, const bf16* right, int64_t pair_stride) {
  _tile_loadd(4, rows, TILE * 4);
  _tile_loadd(6, left, pair_stride * 2);
  _tile_loadd(7, right, pair_stride * 2);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (!has_lower) return;
  _tile_loadd(5, rows + TILE_ROWS * TILE * 2, TILE * 4);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The accumulators, [4][16 rows][16 columns].
inline void store(float* out, bool has_lower) {
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
  if (!has_lower) return;
  _tile_stored(2, out + 512, 64);
  _tile_stored(3, out + 768, 64);
}

#else

inline thread_local float accumulators[4][TILE_ROWS][16];

template <int TILE>
inline void configure(int* configured) {
  *configured = TILE;
}

inline void release() {}

inline void zero() { __builtin_memset(accumulators, 0, sizeof accumulators); }

template <int TILE>
inline void multiply(const bf16* rows, bool has_lower, const bf16* left, const bf16* right, int64_t pair_stride) {
  for (int i = 0; i < (has_lower ? 4 : 2); ++i)
    for (int m = 0; m < TILE_ROWS; ++m) {
      const bf16* row = rows + (i / 2 * TILE_ROWS + m) * TILE * 2;
      Vec acc = load(accumulators[i][m]);
      for (int pair = 0; pair < TILE; ++pair)
        acc = dot_pairs(acc, splat_pair(row + 2 * pair), load_as<Ints>((i % 2 ? right : left) + pair * pair_stride));
      headrace::store(accumulators[i][m], acc);
    }
}

inline void store(float* out, bool has_lower) {
  __builtin_memcpy(out, accumulators, sizeof accumulators / (has_lower ? 1 : 2));
}

#endif

}  // namespace headrace::amx
