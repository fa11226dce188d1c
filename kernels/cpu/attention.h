// Causal attention of a block of rows over one sequence's keys and values, a fixed segment of tokens at a time.
//
// A row is a query token with one of the query heads that share a key/value head. The context is cut at multiples of
// SEGMENT tokens, each segment's softmax is complete in itself, and the segments' results are merged in order, as in
// FlashDecoding (Dao et al., 2023); so a row's bits depend neither on who computes a segment nor on the rows beside it.
#pragma once

#include <algorithm>
#include <vector>

#include "kv_cache.h"
#include "tile_product.h"

namespace headrace {

constexpr int SEGMENT = 256;
constexpr int SEGMENT_TILES = SEGMENT / TILE_TOKENS;

// A row's softmax over some tokens: the largest score (in powers of two), the sum of the weights, their sum of values.
struct Partial {
  float maximum;
  float sum;
  float* output;  // [Dp], not yet divided by the sum
};

// Merge a later segment's result into an earlier one's. A segment that a row sees nothing of changes nothing.
inline void merge(Partial& into, const Partial& next, int padded_head) {
  if (next.sum == 0) return;
  if (into.sum == 0) {
    into.maximum = next.maximum, into.sum = next.sum;
    std::copy_n(next.output, padded_head, into.output);
    return;
  }
  const float highest = std::max(into.maximum, next.maximum);
  const Vec keep = exp2(splat(into.maximum - highest)), add = exp2(splat(next.maximum - highest));
  for (int d = 0; d < padded_head; d += LANES)
    store(into.output + d, fma(load(into.output + d), keep, load(next.output + d) * add));
  into.sum = into.sum * keep[0] + next.sum * add[0];
  into.maximum = highest;
}

// What a member needs for its own use in attention.
struct AttentionSpace {
  explicit AttentionSpace(int padded_head)
      : queries(size_t(BLOCK_ROWS) * padded_head),
        weights(size_t(BLOCK_ROWS) * SEGMENT),
        scores(size_t(BLOCK_ROWS) * SEGMENT),
        outputs(size_t(BLOCK_ROWS) * padded_head),
        keys(size_t(4) * TILE_TOKENS * padded_head),
        values(size_t(SEGMENT) * padded_head) {}

  std::vector<bf16> queries, weights;  // blocks of rows, as the products read them
  std::vector<float> scores;           // [rows][SEGMENT]
  std::vector<float> outputs;          // [rows][Dp]
  std::vector<bf16> keys, values;      // of an int8 cache: four tiles' keys, a segment's values
};

// A block of rows that attend to one key/value head of one sequence.
struct Query {
  const int32_t* blocks;  // the sequence's block table
  int head;               // the key/value head
  int num_rows;
  int begin[BLOCK_ROWS], end[BLOCK_ROWS];  // each row sees tokens begin .. end
  int first_token() const { return *std::min_element(begin, begin + num_rows); }
  int last_token() const { return *std::max_element(end, end + num_rows) - 1; }
};

inline void widen(const int8_t* from, bf16* to, int count) {
  for (int i = 0; i < count; i += LANES) store_bf16(to + i, load_int8(from + i));
}

// The tiles of a segment that some row of a query sees.
struct SegmentTiles {
  SegmentTiles(const KVCache& cache, uint8_t* layer, const Query& query, int segment)
      : first(std::max(query.first_token(), segment * SEGMENT) / TILE_TOKENS),
        count(std::min(query.last_token(), segment * SEGMENT + SEGMENT - 1) / TILE_TOKENS - first + 1) {
    for (int i = 0; i < count; ++i) records[i] = cache.record(layer, query.blocks, first + i, query.head);
  }
  int first, count;
  const uint8_t* records[SEGMENT_TILES];
};

// Fetches the next tiles, little by little, while others are worked on.
class Fetcher {
 public:
  Fetcher(const KVCache& cache, const SegmentTiles* tiles)
      : num_lines_(cache.record_bytes() / 64), tiles_(tiles), num_tiles_(tiles == nullptr ? 0 : tiles->count) {}

  // A whole record, for a product of so many pairs to fetch.
  Ahead run(int num_pairs) {
    if (tile_ >= num_tiles_) return {};
    const uint8_t* record = tiles_->records[tile_++];
    const int64_t half = num_lines_ / 2 * 64, bytes_per_pair = (half + num_pairs - 1) / num_pairs;
    return {{record, bytes_per_pair}, {record + half, bytes_per_pair}, FAR};
  }

  void lines(int count) {
    for (; count > 0 && tile_ < num_tiles_; --count) {
      prefetch_far(tiles_->records[tile_] + line_ * 64);
      if (++line_ == num_lines_) line_ = 0, ++tile_;
    }
  }

 private:
  int num_lines_;
  const SegmentTiles* tiles_;
  int num_tiles_, tile_ = 0, line_ = 0;
};

// Attend to the tokens of some tiles. space.queries holds the rows, scaled by log2(e) / sqrt(D); `results` gets a
// Partial per row, whose outputs lie in space.outputs. `next`, where there are any, are the tiles that will be attended
// to next.
inline void attend_segment(const KVCache& cache, const SegmentTiles& tiles, const SegmentTiles* next,
                           const Query& query, AttentionSpace& space, Partial* results) {
  const int num_rows = query.num_rows, padded_head = cache.padded_head;
  const int first = tiles.first, num_tiles = tiles.count, num_tokens = num_tiles * TILE_TOKENS;
  const int half_bytes = cache.values_offset();
  const uint8_t* const* records = tiles.records;

  // Scores, four tiles of keys at a time (behind the last one, the last again).
  Fetcher fetcher(cache, next);
  for (int i = 0; i < num_tiles; i += 4) {
    const bf16* tiles_of_keys[4];
    for (int j = 0; j < 4; ++j) {
      const uint8_t* record = records[std::min(i + j, num_tiles - 1)];
      tiles_of_keys[j] = reinterpret_cast<const bf16*>(record);
      if (!cache.is_int8) continue;
      bf16* wide = space.keys.data() + j * TILE_TOKENS * padded_head;
      widen(reinterpret_cast<const int8_t*>(record), wide, TILE_TOKENS * padded_head);
      tiles_of_keys[j] = wide;
    }
    tile_product<PAIRS_PER_TILE, 4>(num_rows, space.queries.data(), 1, padded_head / 2,
                                    {tiles_of_keys, 4, 2 * TILE_TOKENS}, space.scores.data() + i * TILE_TOKENS, SEGMENT,
                                    fetcher.run(padded_head / 2));
  }

  // Softmax of each row; the weights become the rows of the product with the values.
  const Ints lane = [] {
    Ints v{};
    for (int i = 0; i < LANES; ++i) v[i] = i;
    return v;
  }();
  for (int m = 0; m < num_rows; ++m) {
    float* scores = space.scores.data() + m * SEGMENT;
    const int begin = query.begin[m] - first * TILE_TOKENS, end = query.end[m] - first * TILE_TOKENS;
    Vec highest = splat(MINUS_INFINITY);
    for (int t = 0; t < num_tokens; t += LANES) {
      Vec score = load(scores + t);
      if (cache.is_int8)
        score *=
            load(reinterpret_cast<const float*>(records[t / TILE_TOKENS] + cache.scales_offset()) + t % TILE_TOKENS);
      const Ints token = lane + t;
      score = ((token >= begin) & (token < end)) ? score : splat(MINUS_INFINITY);
      store(scores + t, score);
      highest = max(highest, score);
    }
    const float top = maximum(highest);
    Vec total{};
    for (int t = 0; t < num_tokens; t += LANES) {
      fetcher.lines(16);
      Vec weight{};
      if (top != MINUS_INFINITY) weight = exp2(load(scores + t) - top);  // NaN where the score is, or `top`
      total += weight;
      if (cache.is_int8)
        weight *= load(reinterpret_cast<const float*>(records[t / TILE_TOKENS] + cache.scales_offset()) + TILE_TOKENS +
                       t % TILE_TOKENS);
      store_bf16(space.weights.data() + pair_offset<TILE_TOKENS / 2>(m, t / 2, num_rows), weight);
    }
    results[m] = {top, sum(total), space.outputs.data() + m * padded_head};
  }

  // Weights x values, 64 of the head's dimensions at a time, and the last 32.
  if (cache.is_int8)
    for (int i = 0; i < num_tiles; ++i)
      widen(reinterpret_cast<const int8_t*>(records[i] + half_bytes),
            space.values.data() + i * TILE_TOKENS * padded_head, TILE_TOKENS * padded_head);
  for (int d = 0; d < padded_head; d += 64) {
    const bool is_whole = d + 64 <= padded_head;
    const bf16* values[SEGMENT_TILES * 4];
    for (int i = 0; i < num_tiles; ++i) {
      const bf16* tile = cache.is_int8 ? space.values.data() + i * TILE_TOKENS * padded_head
                                       : reinterpret_cast<const bf16*>(records[i] + half_bytes);
      for (int half = 0; half < (is_whole ? 4 : 2); ++half) values[i * 4 + half] = tile + (d + half * 16) * 2;
    }
    const auto product = is_whole ? tile_product<TILE_TOKENS / 2, 4> : tile_product<TILE_TOKENS / 2, 2>;
    product(num_rows, space.weights.data(), num_tiles, TILE_TOKENS / 2, {values, 4, 2 * padded_head},
            space.outputs.data() + d, padded_head, {});
  }
}

}  // namespace headrace
