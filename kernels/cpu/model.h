// The model as Python hands it over, and what it keeps between steps.
//
// Everything a pointer of `ModelConfig`, `Layer` or `Linear` shows is owned by the caller, and outlives the model.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "lora.h"
#include "matmul.h"
#include "sampler.h"
#include "team.h"

namespace headrace {

// All weights are padded as `Linear` says; heads one by one, so that a head of 80 takes three panels of 32.
struct Layer {
  Linear query, key, value, out, gate, up, down;
  const float* input_norm;  // [E]
  const float* post_norm;   // [E], before the feed-forward
  const float* query_norm;  // [D], or null
  const float* key_norm;    // [D], or null
  int64_t window;           // tokens seen, the last of them itself; 0 for all
  uint8_t* cache;           // [N blocks] as KVCache says
};

struct ModelConfig {
  int64_t vocab_size;
  int64_t hidden_size;        // E
  int64_t num_heads;          // H
  int64_t num_kv_heads;       // G
  int64_t head_size;          // D
  int64_t intermediate_size;  // F
  int64_t num_layers;
  int64_t max_tokens;  // most tokens in a step
  int64_t block_size;  // tokens in a block
  int64_t num_threads;
  int64_t is_kv_int8;
  int64_t is_batch_invariant;
  int64_t activation_bits;  // of what is multiplied with quantised weights as integers: 8 or 16
  float rms_norm_eps;
  float rope_scale;
  const float* inv_freq;    // [D / 2]
  const float* final_norm;  // [E]
  Linear embedding, head;
  const Layer* layers;
  int64_t num_adapters;
  const LayerAdapter* adapters;  // [adapters][layers]
};

// All weights in one form: as they were loaded, or as the wide copy of them. Neither copied nor moved: there are
// pointers into it.
struct WeightSet {
  WeightSet(const Layer* layers_begin, int64_t num_layers, const Linear& head_weight)
      : layers(layers_begin, layers_begin + num_layers), head(head_weight) {
    for (const Layer& layer : layers) {
      qkv.insert(qkv.end(), {&layer.query, &layer.key, &layer.value});
      out.push_back(&layer.out);
      gate_up.insert(gate_up.end(), {&layer.gate, &layer.up});
      down.push_back(&layer.down);
    }
  }
  WeightSet(const WeightSet&) = delete;

  const std::vector<Layer> layers;
  const Linear head;
  // All layers' weights that one buffer's rows are made for: it has to serve whatever formats they have.
  std::vector<const Linear*> qkv, out, gate_up, down;
};

// One step's input, for T tokens of B sequences, and its output for R rows.
struct Batch {
  int64_t num_tokens, num_sequences, num_logit_rows;
  const int64_t* token_ids;     // [T]
  const int64_t* query_lens;    // [B]
  const int64_t* context_lens;  // [B], the query tokens included
  const int64_t* block_starts;  // [B], where in `blocks` a sequence's block table begins
  const int32_t* blocks;
  const int64_t* logit_rows;   // [R]
  float* logits;               // [R, vocabulary], or null where nobody wants them
  int64_t* argmax;             // [R], the largest logit's token, the lowest of equal ones, NO_TOKEN without numbers
  const int64_t* adapters;     // [B], from 1 on, 0 for none; or null where no sequence has one
  const uint8_t* argmax_only;  // [R], whether that row's logits are left out; or null where none are
};

// Up to so many rows every member makes the inputs of a product for itself, which costs less than waiting.
constexpr int PRIVATE_ROWS = 8;

// One member's own memory.
struct alignas(64) Workspace {
  explicit Workspace(int padded_head) : attention(padded_head) {}
  ProductSpace product;
  AttentionSpace attention;
  Operand rows;
  std::vector<float> row;           // one row, of E or H * D
  std::vector<bf16> narrow_row;     // the same in bfloat16, for an adapter
  std::vector<float> best;          // [R]: the largest logit seen, and its token; infinity and NO_TOKEN for NaN
  std::vector<int64_t> best_token;  // [R]
  SamplerSpace sampler;
};

class Model {
 public:
  explicit Model(const ModelConfig& model_config);

  // The weights to multiply so many rows with. What is quantised stays so where it is multiplied as integers; else it
  // is better dequantised once and for all.
  const WeightSet& weights_for(int num_rows) const {
    return wide == nullptr || uses_integers(num_rows) ? weights : *wide;
  }
  bool uses_integers(int num_rows) const {
    return HAS_INTEGER_PATH && !config.is_batch_invariant && num_rows <= most_integer_rows(config.activation_bits);
  }

  const ModelConfig config;
  const WeightSet weights;
  std::unique_ptr<const WeightSet> wide;     // null where there is no copy, or not yet
  const std::vector<LayerAdapter> adapters;  // [adapters][layers]
  const int64_t max_rank;                    // of any of them, 0 where there are none
  const int padded_head;                     // Dp
  const KVCache cache;
  std::vector<Workspace> spaces;  // one per member

  // Buffers of a step, for up to max_tokens rows.
  std::vector<float> hidden;   // [T, E]
  std::vector<float> cosines;  // [T, D / 2]
  std::vector<float> sines;    // [T, D / 2]
  std::vector<bf16> queries;   // [T, H, Dp]
  std::vector<float> outputs;  // [T * H, parts, Dp]: attention's results before they are merged
  std::vector<float> maxima;   // [T * H, parts]
  std::vector<float> sums;     // [T * H, parts]
  Operand normed, attended, post_normed, activated, last_normed;
  std::vector<bf16> reduced;      // [T, NUM_TARGETS, max_rank]: what adapters have made of rows so far
  std::vector<bf16> activations;  // [T, F]: `activated` of rows with adapters

  std::vector<double> phase_seconds;  // time of member 0 in each kind of phase, since the model was made

  Team team;  // the last: its threads end before what they use
};

}  // namespace headrace
