// What Python calls, through ctypes: plain C, no exceptions, no Python objects.
#include <chrono>

#include "step.h"

using namespace headrace;

namespace {

// Seconds on the clock of Python's time.monotonic().
double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Draws every row's token, rows shared among the members.
class Sampling final : public Job {
 public:
  Sampling(Model& model, const RowSampling* rows, int num_rows, float* logits, int64_t* token_ids)
      : model_(model),
        rows_(rows),
        num_rows_(num_rows),
        logits_(logits),
        token_ids_(token_ids),
        phases_(1, model.team.size()) {}

  void run(int member) noexcept override {
    const int64_t vocab_size = model_.config.vocab_size;
    phases_.share(
        0, member, num_rows_,
        [&](int i) {
          if (!rows_[i].is_known)
            token_ids_[i] = draw(rows_[i], logits_ + i * vocab_size, vocab_size, model_.spaces[member].sampler);
        },
        [] {});
  }

 private:
  Model& model_;
  const RowSampling* rows_;
  const int num_rows_;
  float* logits_;
  int64_t* token_ids_;
  Phases phases_;
};

}  // namespace

extern "C" {

// Null where memory or threads do not suffice.
Model* headrace_create(const ModelConfig* config) {
  try {
    return new Model(*config);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void headrace_destroy(Model* model) { delete model; }

// Run one step. Returns 0, or 1 where memory does not suffice. times[0] and times[1] are set to when it began and
// ended.
int headrace_step(Model* model, const Batch* batch, double* times) {
  try {
    times[0] = monotonic_s();
    const auto step = std::make_shared<Step>(*model, *batch);
    model->team.run(step);
    step->finish();
    times[1] = monotonic_s();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Draw the tokens of num_rows rows of logits [num_rows, vocabulary], which are written to. Returns as above, and moves
// the step's end, times[1].
int headrace_sample(Model* model, const RowSampling* rows, int64_t num_rows, float* logits, int64_t* token_ids,
                    double* times) {
  try {
    model->team.run(std::make_shared<Sampling>(*model, rows, int(num_rows), logits, token_ids));
    times[1] = monotonic_s();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Up to how many rows quantised weights are multiplied as integers.
int64_t headrace_most_integer_rows(int64_t activation_bits) {
  return HAS_INTEGER_PATH ? most_integer_rows(activation_bits) : 0;
}

// Dequantise num_panels panels of a weight from `first` on into the bfloat16 layout.
void headrace_dequantise(const Linear* weight, int64_t first, int64_t num_panels, uint16_t* out) {
  for (int64_t i = 0; i < num_panels; ++i)
    dequantise(*weight, first + i, reinterpret_cast<bf16*>(out) + i * PANEL * weight->num_inputs);
}

// Use a copy of all weights, in bfloat16, for steps of many rows. Returns as headrace_step.
int headrace_use_wide(Model* model, const Layer* layers, const Linear* head) {
  try {
    model->wide = std::make_unique<const WeightSet>(layers, model->config.num_layers, *head);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Seconds that the calling thread spent in each kind of phase (enum Phase), in all steps so far.
void headrace_profile(const Model* model, double* seconds) {
  std::copy(model->phase_seconds.begin(), model->phase_seconds.end(), seconds);
}
}
