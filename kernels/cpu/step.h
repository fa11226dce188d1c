// One step: the whole forward pass over a packed batch, phase by phase. README.md has the picture.
#pragma once

#include <chrono>
#include <initializer_list>
#include <utility>

#include "model.h"

namespace headrace {

enum Phase { EMBED, NORM, QKV, ATTENTION, OUT, GATE_UP, DOWN, HEAD, NUM_PHASE_KINDS };

class Step final : public Job {
 public:
  Step(Model& model, const Batch& batch);
  void run(int member) noexcept override;
  // Merge what the members found; after `run(0)`.
  void finish();

 private:
  // Where a row of the packed batch is in its sequence.
  struct Place {
    int sequence;
    int position;
  };
  // Rows first .. first + num_rows of a sequence's (token, head of the group) pairs.
  struct RowBlock {
    int sequence;
    int first;
    int num_rows;
  };
  struct Walk;  // a member's way through the phases

  // Have a member fetch what it will attend to in this layer, or nothing, during the products to come.
  void fetch_soon(const Layer* layer, int member);

  void embed(int row);
  void project_head(const Layer& layer, int unit, const Operand& x, Workspace& space);
  void attend(const Layer& layer, int unit, Workspace& space);
  void normalise(const float* weight, int from, Operand& to, int row, Workspace& space);
  void merge_heads(Operand& to, int row, Workspace& space);
  void add_panel(const Layer& layer, Target target, int panel, const Operand& x, Workspace& space);
  void activate(const Layer& layer, int unit, const Operand& x, Workspace& space);
  void pick(int panel, const Operand& x, Workspace& space);

  // What a row's adapter adds to a weight of a layer, null where that is nothing.
  const LowRank* low_rank(const Layer& layer, Target target, int row) const;
  bf16* reduced(Target target, int row) const;
  void reduce(const Layer& layer, std::initializer_list<Target> targets, int row, Workspace& space) const;
  void expand(const Layer& layer, Target target, int row, int first_panel, int num_panels, float* columns) const;

  void rotate(float* head, int row) const;
  int num_attention_units() const;
  Query query_of(const Layer& layer, int unit) const;
  std::pair<int, int> segments_of(const Query& query, int unit) const;
  // Let an operand take `num_rows` rows for these weights.
  template <class List>
  void begin(Operand& operand, int num_rows, const List& weights) const;

  Model& model_;
  const ModelConfig& config_;
  const Batch batch_;
  const int num_tokens_, num_logit_rows_, group_;  // T, R, H / G
  const WeightSet& weights_;                       // for T rows
  const Linear& head_;                             // for R rows
  std::vector<Place> places_;                      // [T]
  std::vector<int> first_rows_;                    // [B], each sequence's first row in the batch
  std::vector<RowBlock> row_blocks_;
  std::vector<int64_t> tile_offsets_;  // where in a layer's cache the tiles are that the rows attend to
  int num_parts_ = 1;                  // pieces that each row's attention is computed in
  const bool has_adapters_;            // whether any sequence has one
  Phases phases_;
};

}  // namespace headrace
