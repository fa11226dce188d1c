// Picking a row's next token: what headrace.kernels.sampling specifies, a row at a time.
//
// Filters keep a prefix of the tokens in order of probability (equal ones by number), and the token is the one at which
// the prefix's cumulative mass exceeds uniform * total. Neither needs the prefix sorted: its bounds are found by
// selection (Hoare's FIND, 1961) on masses. Rows without filters use the order of token numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace headrace {

// The settings of one row. Lists may be empty; tokens in `biased` and `masked` occur once.
struct RowSampling {
  float temperature, top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k;
  uint64_t seed;
  int64_t choice;
  int64_t position;
  const int64_t* token_ids;  // of prompt and output
  int64_t num_token_ids, num_prompt_tokens;
  const int64_t* biased;
  const float* biases;
  int64_t num_biased;
  const int64_t* masked;
  int64_t num_masked;
  const uint32_t* allowed;  // null, or a bit for each token: no other may be drawn
  int64_t is_known;         // whether nothing is to be drawn
};

struct Candidate {
  float weight;
  int32_t token;
  bool operator<(const Candidate& other) const {
    return weight > other.weight || (weight == other.weight && token < other.token);
  }
};

struct SamplerSpace {
  std::vector<Candidate> candidates;
  std::vector<double> sums;  // of SUM_TOKENS weights each
};
constexpr int SUM_TOKENS = 512;
constexpr int64_t NO_TOKEN = -1;

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// A number in [0, 1) that depends on the row's seed, choice and position alone.
inline double uniform(const RowSampling& row) {
  const uint64_t mixed = splitmix64(row.seed) ^ uint64_t(row.choice);
  return double(splitmix64(splitmix64(mixed) ^ uint64_t(row.position)) >> 11) * 0x1p-53;
}

// Rule out each token without its bit.
inline void keep_allowed(const uint32_t* allowed, float* logits, int64_t vocab_size) {
  for (int64_t begin = 0; begin < vocab_size; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    const int64_t end = std::min(begin + 32, vocab_size);
    if (word == 0)  // most are
      std::fill(logits + begin, logits + end, MINUS_INFINITY);
    else if (word != ~uint32_t(0))
      for (int64_t i = begin; i < end; ++i)
        if (!(word >> (i - begin) & 1)) logits[i] = MINUS_INFINITY;
  }
}

// Penalties, bias and masks.
inline void modify(const RowSampling& row, float* logits, int64_t vocab_size) {
  const int64_t* output = row.token_ids + row.num_prompt_tokens;
  const int64_t num_output = row.num_token_ids - row.num_prompt_tokens;
  if (row.repetition_penalty != 1.0f) {
    // A token may occur often and is penalised once: the penalised values are made first, and written after.
    std::vector<float> scores(row.num_token_ids);
    for (int64_t i = 0; i < row.num_token_ids; ++i) {
      const float score = logits[row.token_ids[i]];
      scores[i] = score < 0 ? score * row.repetition_penalty : score / row.repetition_penalty;
    }
    for (int64_t i = 0; i < row.num_token_ids; ++i) logits[row.token_ids[i]] = scores[i];
  }
  if (row.presence_penalty != 0.0f) {
    std::vector<float> scores(num_output);
    for (int64_t i = 0; i < num_output; ++i) scores[i] = logits[output[i]] - row.presence_penalty;
    for (int64_t i = 0; i < num_output; ++i) logits[output[i]] = scores[i];
  }
  if (row.frequency_penalty != 0.0f)
    for (int64_t i = 0; i < num_output; ++i) logits[output[i]] -= row.frequency_penalty;
  for (int64_t i = 0; i < row.num_biased; ++i) logits[row.biased[i]] += row.biases[i];
  for (int64_t i = 0; i < row.num_masked; ++i) logits[row.masked[i]] = MINUS_INFINITY;
  if (row.allowed != nullptr) keep_allowed(row.allowed, logits, vocab_size);
}

// Whether all logits are numbers below infinity.
inline bool are_numbers(const float* logits, int64_t vocab_size) {
  uint32_t others = 0;
  int64_t i = 0;
  for (; i + LANES <= vocab_size; i += LANES) others |= not_below(load(logits + i), splat(INFINITE));
  for (; i < vocab_size; ++i) others |= !(logits[i] < INFINITE);
  return others == 0;
}

inline int64_t argmax(const float* logits, int64_t vocab_size) {
  Vec largest = splat(MINUS_INFINITY);
  int64_t i = 0;
  for (; i + LANES <= vocab_size; i += LANES) largest = max(largest, load(logits + i));
  float top = maximum(largest);
  for (; i < vocab_size; ++i) top = std::max(top, logits[i]);
  for (i = 0; i < vocab_size; ++i)
    if (logits[i] == top) return i;
  return 0;
}

// The weight of each logit is 2 ** (scale * (logit - top)). Sums weights by SUM_TOKENS into space.sums, and lists the
// tokens of weight `floor` or more in space.candidates; returns the sum.
inline double weigh(const float* logits, int64_t vocab_size, float top, float scale, float floor, SamplerSpace& space) {
  space.candidates.clear();
  space.sums.clear();
  double total = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += SUM_TOKENS) {
    const int64_t end = std::min(begin + SUM_TOKENS, vocab_size);
    Vec sums{};
    for (int64_t i = begin; i < end; i += LANES) {
      Vec logit = splat(MINUS_INFINITY);
      if (i + LANES <= end)
        logit = load(logits + i);
      else
        for (int64_t j = i; j < end; ++j) logit[j - i] = logits[j];
      const Vec weight = exp2((logit - top) * scale);
      sums += weight;
      for (uint32_t mask = at_least(weight, splat(floor)); mask != 0; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        if (i + lane < end) space.candidates.push_back({weight[lane], int32_t(i + lane)});
      }
    }
    space.sums.push_back(sum(sums));
    total += space.sums.back();
  }
  return total;
}

// How many of the first `count` candidates, in order, it takes until their mass exceeds (with is_reached: reaches) the
// target; at least 1. Reorders them so that those come first, the last of them in its place.
inline int64_t take_mass(Candidate* candidates, int64_t count, double target, bool is_reached) {
  int64_t begin = 0, end = count;
  double before = 0;
  while (end - begin > 1) {
    const int64_t middle = (begin + end) / 2;
    std::nth_element(candidates + begin, candidates + middle, candidates + end);
    double mass = 0;
    for (int64_t i = begin; i < middle; ++i) mass += candidates[i].weight;
    if (before + mass > target || (is_reached && before + mass == target))
      end = middle;
    else
      before += mass, begin = middle;
  }
  return begin + 1;
}

// A token among those that top-k, top-p and min-p keep.
inline int64_t draw_filtered(const RowSampling& row, const float* logits, int64_t vocab_size, float top, float scale,
                             SamplerSpace& space) {
  // Nearly all mass lies near the top: a floor at 2 ** -12 of the largest, and lower only if that was not enough.
  for (float floor = 0x1p-12f;; floor = floor > 0x1p-20f ? 0x1p-24f : 0.0f) {
    const double total = weigh(logits, vocab_size, top, scale, floor, space);
    Candidate* candidates = space.candidates.data();
    int64_t count = int64_t(space.candidates.size());
    double mass = 0;
    for (const Candidate& candidate : space.candidates) mass += candidate.weight;
    const bool has_top_k = row.top_k > 0, has_enough = has_top_k ? count >= row.top_k : mass >= row.top_p * total;
    // What min-p cuts need not be looked at, unless it counts in the mass of which top-p is a share.
    const bool has_all_that_stay = row.min_p >= floor && !(has_top_k && row.top_p < 1);
    if (!has_enough && !has_all_that_stay && floor > 0) continue;
    if (has_top_k && count > row.top_k) {
      std::nth_element(candidates, candidates + row.top_k - 1, candidates + count);
      count = row.top_k;
    }
    double kept = has_top_k ? 0 : total;
    if (has_top_k)
      for (int64_t i = 0; i < count; ++i) kept += candidates[i].weight;
    if (row.top_p < 1.0f) count = take_mass(candidates, count, row.top_p * kept, true);
    // The largest weight is 1. What min-p keeps is again the first in order.
    if (row.min_p > 0)
      count = std::partition(candidates, candidates + count,
                             [&](const Candidate& candidate) { return candidate.weight >= row.min_p; }) -
              candidates;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += candidates[i].weight;
    return candidates[take_mass(candidates, count, uniform(row) * sum, false) - 1].token;
  }
}

// A token in proportion to its weight, by the order of token numbers.
inline int64_t draw_plain(const RowSampling& row, const float* logits, int64_t vocab_size, float top, float scale,
                          SamplerSpace& space) {
  const double target = uniform(row) * weigh(logits, vocab_size, top, scale, 2.0f, space);
  double before = 0;
  size_t part = 0;
  while (part + 1 < space.sums.size() && before + space.sums[part] <= target) before += space.sums[part++];
  const int64_t begin = int64_t(part) * SUM_TOKENS, end = std::min(begin + SUM_TOKENS, vocab_size);
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    const double weight = exp2(splat((logits[i] - top) * scale))[0];
    if (weight == 0) continue;
    last = i, before += weight;
    if (before > target) break;
  }
  return last;
}

// Draw a row's token from its logits [vocab_size], which are written to where a setting changes them; NO_TOKEN where
// they are no numbers, even if none of these could have been drawn.
inline int64_t draw(const RowSampling& row, float* logits, int64_t vocab_size, SamplerSpace& space) {
  if (!are_numbers(logits, vocab_size)) return NO_TOKEN;
  modify(row, logits, vocab_size);
  const int64_t greedy = argmax(logits, vocab_size);
  const float top = logits[greedy];
  if (!(row.temperature > 0) || !(top > MINUS_INFINITY)) return greedy;
  const float scale = std::min(LOG2_E / row.temperature, 1e30f);  // bounded: 0 * infinity is NaN
  const bool is_filtered = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
  return (is_filtered ? draw_filtered : draw_plain)(row, logits, vocab_size, top, scale, space);
}

}  // namespace headrace
