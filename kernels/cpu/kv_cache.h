// The paged KV cache: tiles of 16 tokens, laid out as the products of attention read them.
//
// A block of a block table is one or several tiles in a row; in each, every key/value head has a record:
//   keys   [Dp / 2 pairs][16 tokens][2]      as the columns of scores = queries x keys
//   values [8 pairs of tokens][Dp][2]        as the columns of output = probabilities x values
// in bfloat16, or in int8 followed by the 16 keys' and the 16 values' scales, float32. Dp is the head size D in whole
// panels of 32; what lies beyond D, and beyond the tokens written, is zero.
#pragma once

#include <cmath>
#include <cstring>

#include "simd.h"

namespace headrace {

constexpr int TILE_TOKENS = 16;

struct KVCache {
  int num_heads;        // G
  int padded_head;      // Dp
  int tiles_per_block;  // block size / 16
  bool is_int8;

  int values_offset() const { return TILE_TOKENS * padded_head * (is_int8 ? 1 : 2); }
  int scales_offset() const { return 2 * values_offset(); }
  int record_bytes() const { return scales_offset() + (is_int8 ? 2 * TILE_TOKENS * 4 : 0); }

  int tile_bytes() const { return num_heads * record_bytes(); }

  // Where in a layer's memory tile `tile` of a sequence with these blocks begins.
  int64_t tile_offset(const int32_t* blocks, int64_t tile) const {
    const int64_t index = int64_t(blocks[tile / tiles_per_block]) * tiles_per_block + tile % tiles_per_block;
    return index * tile_bytes();
  }

  // The record of a head in a tile.
  uint8_t* record(uint8_t* layer, const int32_t* blocks, int64_t tile, int head) const {
    return layer + tile_offset(blocks, tile) + head * record_bytes();
  }

  // Fetch the lines that `write` will touch: the whole of the keys, and a row of the values.
  void fetch(const uint8_t* record, int slot) const {
    const int row_bytes = values_offset() / (TILE_TOKENS / 2);
    for (int i = 0; i < values_offset(); i += 64) prefetch_to_write(record + i);
    for (int i = 0; i < row_bytes; i += 64) prefetch_to_write(record + values_offset() + slot / 2 * row_bytes + i);
    if (is_int8) prefetch_to_write(record + scales_offset()), prefetch_to_write(record + scales_offset() + 64);
  }

  // Store one token's key and value [Dp]. The first token of a tile clears what the tile held before: attention reads
  // whole tiles, and no weight times infinity is not zero.
  void write(uint8_t* record, int slot, const float* key, const float* value) const {
    if (slot == 0) std::memset(record, 0, record_bytes());
    if (is_int8) {
      int8_t* keys = reinterpret_cast<int8_t*>(record);
      int8_t* values = keys + values_offset();
      float* scales = reinterpret_cast<float*>(record + scales_offset());
      float inverse = set_scale(key, scales + slot);
      for (int d = 0; d < padded_head; ++d)
        keys[(d / 2 * TILE_TOKENS + slot) * 2 + d % 2] = int8_t(std::lrintf(key[d] * inverse));
      inverse = set_scale(value, scales + TILE_TOKENS + slot);
      for (int d = 0; d < padded_head; ++d)
        values[(slot / 2 * padded_head + d) * 2 + slot % 2] = int8_t(std::lrintf(value[d] * inverse));
      return;
    }
    bf16* keys = reinterpret_cast<bf16*>(record);
    bf16* values = keys + TILE_TOKENS * padded_head + slot / 2 * padded_head * 2 + slot % 2;
    alignas(64) bf16 narrow[LANES];
    for (int d = 0; d < padded_head; d += LANES) {
      store_bf16(narrow, load(key + d));
      for (int i = 0; i < LANES; i += 2) std::memcpy(keys + ((d + i) / 2 * TILE_TOKENS + slot) * 2, narrow + i, 4);
      store_bf16(narrow, load(value + d));
      for (int i = 0; i < LANES; ++i) values[(d + i) * 2] = narrow[i];
    }
  }

 private:
  // The scale that maps x [Dp] to +-127, NaN where x has NaN or infinity, which integers lose; returns its inverse.
  float set_scale(const float* x, float* scale) const {
    const float limit = magnitude(x, padded_head);
    Vec zeros{};
    for (int d = 0; d < padded_head; d += LANES) zeros = fma(load(x + d), Vec{}, zeros);
    *scale = limit / 127.0f + sum(zeros);
    return limit > SMALLEST ? 127.0f / limit : 0.0f;
  }
};

}  // namespace headrace
