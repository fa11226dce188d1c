#include "step.h"

#include <cmath>
#include <optional>

namespace headrace {

namespace {

int padded(int64_t size) { return int((size + PANEL - 1) / PANEL * PANEL); }

KVCache make_cache(const ModelConfig& config) {
  return {int(config.num_kv_heads), padded(config.head_size), int(config.block_size / TILE_TOKENS),
          config.is_kv_int8 != 0};
}

int64_t largest_rank(const std::vector<LayerAdapter>& adapters) {
  int64_t largest = 0;
  for (const LayerAdapter& adapter : adapters)
    for (const LowRank& low_rank : adapter.targets) largest = std::max(largest, low_rank.rank);
  return largest;
}

// As much of the cache as may wait in the third-level cache, all members together.
constexpr int64_t SOON_BYTES = 12 << 20;

// out [size] = x / root mean square of x * weight; out may be x.
void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
  Vec squares{};
  for (int i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  const float inverse = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
  for (int i = 0; i < size; i += LANES) store(out + i, load(x + i) * inverse * load(weight + i));
}

Vec silu(Vec x) { return x / (1.0f + exp2(x * -LOG2_E)); }

}  // namespace

Model::Model(const ModelConfig& model_config)
    : config(model_config),
      weights(config.layers, config.num_layers, config.head),
      adapters(config.adapters, config.adapters + config.num_adapters * config.num_layers),
      max_rank(largest_rank(adapters)),
      padded_head(padded(config.head_size)),
      cache(make_cache(config)),
      spaces(size_t(config.num_threads), Workspace(padded_head)),
      phase_seconds(NUM_PHASE_KINDS),
      team(int(config.num_threads)) {
  const int max_tokens = int(config.max_tokens), hidden_size = int(config.hidden_size);
  const int attended_size = int(config.num_heads * config.head_size);
  const int largest = std::max({hidden_size, attended_size, int(config.intermediate_size)});
  hidden.resize(size_t(max_tokens) * hidden_size);
  cosines.resize(size_t(max_tokens) * config.head_size / 2);
  sines.resize(cosines.size());
  queries.resize(size_t(max_tokens) * config.num_heads * padded_head);
  normed.reserve(max_tokens, hidden_size, config.activation_bits);
  attended.reserve(max_tokens, attended_size, config.activation_bits);
  post_normed.reserve(max_tokens, hidden_size, config.activation_bits);
  activated.reserve(max_tokens, int(config.intermediate_size), config.activation_bits);
  last_normed.reserve(max_tokens, hidden_size, config.activation_bits);
  if (max_rank > 0) {
    reduced.resize(size_t(max_tokens) * NUM_TARGETS * max_rank);
    activations.resize(size_t(max_tokens) * config.intermediate_size);
  }
  for (Workspace& space : spaces) {
    space.rows.reserve(PRIVATE_ROWS, largest, config.activation_bits);
    space.row.resize(largest);
    space.narrow_row.resize(largest);
  }
}

using Weights = std::initializer_list<const Linear*>;

template <class List>
void Step::begin(Operand& operand, int num_rows, const List& weights) const {
  bool has_tiles = false, has_quants = false;
  for (const Linear* weight : weights) {
    (model_.uses_integers(num_rows) && is_quantised(*weight) ? has_quants : has_tiles) = true;
  }
  operand.begin(num_rows, int((*weights.begin())->num_inputs), has_tiles, has_quants);
}

// A member's way through the phases. Each phase's inputs are made first: by each member for itself where rows are few
// and none has an adapter, once it has a unit to do; else by all together, in a phase of their own.
struct Step::Walk {
  Step& step;
  const int member;
  Workspace& space;
  int phase = 0;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();

  // Share units; whoever has none left fetches the weights that the next phase begins with.
  template <class Unit>
  void share(Phase kind, int num_units, Weights upcoming, Unit unit) {
    const int num_members = step.model_.team.size();
    step.phases_.share(phase++, member, num_units, unit, [&] {
      for (const Linear* weight : upcoming) fetch_start(*weight, member, num_members);
    });
    if (member != 0) return;
    const auto now = std::chrono::steady_clock::now();
    step.model_.phase_seconds[kind] += std::chrono::duration<double>(now - last).count();
    last = now;
  }

  // Share units that read `num_rows` rows of an operand for `weights`, which `make(operand, row)` makes.
  template <class Make, class Unit>
  void share(Phase kind, int num_units, int num_rows, Operand& shared, Weights weights, Weights upcoming, Make make,
             Unit unit) {
    if (num_rows > PRIVATE_ROWS || step.has_adapters_) {
      // A block of rows is one member's: its rows lie close together. With adapters there is more to do for each. How
      // many there are is the step's to say, not the operand's, which may be the next step's already when a member
      // comes late.
      const int size = step.has_adapters_ ? 1 : BLOCK_ROWS;
      share(NORM, (num_rows + size - 1) / size, weights, [&](int i) {
        for (int row = i * size; row < std::min((i + 1) * size, num_rows); ++row) make(shared, row);
      });
      share(kind, num_units, upcoming, [&](int i) { unit(i, shared); });
      return;
    }
    bool is_made = false;
    share(kind, num_units, upcoming, [&](int i) {
      if (!is_made) {
        step.begin(space.rows, num_rows, weights);
        for (int row = 0; row < num_rows; ++row) make(space.rows, row);
        is_made = true;
      }
      unit(i, space.rows);
    });
  }
};

Step::Step(Model& model, const Batch& batch)
    : model_(model),
      config_(model.config),
      batch_(batch),
      num_tokens_(int(batch.num_tokens)),
      num_logit_rows_(int(batch.num_logit_rows)),
      weights_(model.weights_for(num_tokens_)),
      head_(model.weights_for(num_logit_rows_).head),
      group_(int(config_.num_heads / config_.num_kv_heads)),
      has_adapters_(batch.adapters != nullptr),
      phases_(int((has_adapters_ ? 9 : 8) * config_.num_layers + 3), model.team.size()) {
  int most_segments = 1;
  for (int b = 0; b < batch.num_sequences; ++b) {
    const int query_len = int(batch.query_lens[b]), context_len = int(batch.context_lens[b]);
    first_rows_.push_back(int(places_.size()));
    for (int i = 0; i < query_len; ++i) places_.push_back({b, context_len - query_len + i});
    for (int first = 0; first < query_len * group_; first += BLOCK_ROWS)
      row_blocks_.push_back({b, first, std::min(BLOCK_ROWS, query_len * group_ - first)});
    most_segments = std::max(most_segments, (context_len + SEGMENT - 1) / SEGMENT);
  }
  const bool is_windowed =
      std::all_of(weights_.layers.begin(), weights_.layers.end(), [](const Layer& l) { return l.window > 0; });
  if (num_tokens_ > BLOCK_ROWS && !is_windowed)
    for (int b = 0; b < batch.num_sequences; ++b)
      for (int tile = 0; tile * TILE_TOKENS < batch.context_lens[b]; ++tile)
        tile_offsets_.push_back(model.cache.tile_offset(batch.blocks + batch.block_starts[b], tile));
  // With few rows a context is shared among the members, segment by segment.
  if (int64_t(row_blocks_.size()) * config_.num_kv_heads < 4 * model.team.size()) num_parts_ = most_segments;
  const size_t num_results = size_t(num_tokens_) * config_.num_heads * num_parts_;
  if (model.sums.size() < num_results) {
    model.outputs.resize(num_results * model.padded_head);
    model.maxima.resize(num_results);
    model.sums.resize(num_results);
  }
  begin(model.normed, num_tokens_, weights_.qkv);
  begin(model.attended, num_tokens_, weights_.out);
  begin(model.post_normed, num_tokens_, weights_.gate_up);
  begin(model.activated, num_tokens_, weights_.down);
  begin(model.last_normed, num_logit_rows_, Weights{&head_});
  for (Workspace& space : model.spaces) {
    space.best.assign(num_logit_rows_, MINUS_INFINITY);
    space.best_token.assign(num_logit_rows_, 0);
  }
}

void Step::run(int member) noexcept {
  Walk walk{*this, member, model_.spaces[member]};
  Workspace& space = walk.space;
  const int num_heads = int(config_.num_heads), num_kv_heads = int(config_.num_kv_heads);

  walk.share(EMBED, num_tokens_, {}, [&](int row) { embed(row); });
  fetch_soon(&weights_.layers.front(), member);
  for (const Layer& layer : weights_.layers) {
    const Layer* next = &layer == &weights_.layers.back() ? nullptr : &layer + 1;
    walk.share(
        QKV, num_kv_heads + num_heads, num_tokens_, model_.normed, {&layer.query, &layer.key, &layer.value}, {},
        [&](Operand& to, int row) {
          normalise(layer.input_norm, row, to, row, space);
          reduce(layer, {TO_QUERY, TO_KEY, TO_VALUE}, row, space);
        },
        [&](int unit, const Operand& x) { project_head(layer, unit, x, space); });
    walk.share(ATTENTION, num_attention_units(), {&layer.out}, [&](int unit) { attend(layer, unit, space); });
    fetch_soon(next, member);
    walk.share(
        OUT, int(layer.out.num_panels), num_tokens_, model_.attended, {&layer.out}, {&layer.gate, &layer.up},
        [&](Operand& to, int row) {
          merge_heads(to, row, space);
          reduce(layer, {TO_OUT}, row, space);
        },
        [&](int panel, const Operand& x) { add_panel(layer, TO_OUT, panel, x, space); });
    walk.share(
        GATE_UP, int(layer.gate.num_panels), num_tokens_, model_.post_normed, {&layer.gate, &layer.up}, {&layer.down},
        [&](Operand& to, int row) {
          normalise(layer.post_norm, row, to, row, space);
          reduce(layer, {TO_GATE, TO_UP}, row, space);
        },
        [&](int panel, const Operand& x) { activate(layer, panel, x, space); });
    if (has_adapters_)
      walk.share(DOWN, num_tokens_, {}, [&](int row) {
        if (const LowRank* found = low_rank(layer, TO_DOWN, row))
          headrace::reduce(*found, model_.activations.data() + row * config_.intermediate_size, reduced(TO_DOWN, row));
      });
    walk.share(DOWN, int(layer.down.num_panels), {next == nullptr ? &head_ : &next->query},
               [&](int panel) { add_panel(layer, TO_DOWN, panel, model_.activated, space); });
  }
  if (num_logit_rows_ > 0)
    walk.share(
        HEAD, int(head_.num_panels), num_logit_rows_, model_.last_normed, {&head_}, {},
        [&](Operand& to, int row) { normalise(config_.final_norm, int(batch_.logit_rows[row]), to, row, space); },
        [&](int panel, const Operand& x) { pick(panel, x, space); });
  end_products();
}

void Step::fetch_soon(const Layer* layer, int member) {
  FetchList& soon = model_.spaces[member].product.soon;
  soon = {};
  if (layer == nullptr || layer->window > 0) return;
  // The tiles in order are about the units in order, of which each member begins with its own range.
  const int64_t num_members = model_.team.size(), num_tiles = int64_t(tile_offsets_.size());
  const int64_t begin = num_tiles * member / num_members, end = num_tiles * (member + 1) / num_members;
  const int64_t most = SOON_BYTES / num_members / model_.cache.tile_bytes();
  soon = {layer->cache, tile_offsets_.data() + begin, std::min(end - begin, most), model_.cache.tile_bytes()};
}

// hidden[row] = embedding of its token; the row's angles for RoPE.
void Step::embed(int row) {
  const int half = int(config_.head_size / 2);
  read_column(config_.embedding, batch_.token_ids[row], model_.hidden.data() + row * config_.hidden_size);
  const float position = float(places_[row].position);
  for (int i = 0; i < half; ++i) {
    const float angle = position * config_.inv_freq[i];
    model_.cosines[size_t(row) * half + i] = std::cos(angle) * config_.rope_scale;
    model_.sines[size_t(row) * half + i] = std::sin(angle) * config_.rope_scale;
  }
}

// Row `row` of an operand = RMS norm of hidden[from].
void Step::normalise(const float* weight, int from, Operand& to, int row, Workspace& space) {
  const int size = int(config_.hidden_size);
  rms_norm(model_.hidden.data() + int64_t(from) * size, weight, size, config_.rms_norm_eps, space.row.data());
  for (int k = 0; k < size; k += GROUP) to.set(row, k, space.row.data() + k);
}

// Units 0 .. G: a key/value head of all rows, into the cache; then H query heads, scaled for attention.
void Step::project_head(const Layer& layer, int unit, const Operand& x, Workspace& space) {
  const int num_kv_heads = int(config_.num_kv_heads), padded_head = model_.padded_head;
  const int num_panels = padded_head / PANEL, head_size = int(config_.head_size);
  Panel panels[MAX_PANELS];
  if (unit < num_kv_heads) {
    for (int p = 0; p < num_panels; ++p) {
      panels[p] = {&layer.key, unit * num_panels + p, num_panels};
      panels[num_panels + p] = {&layer.value, unit * num_panels + p, num_panels};
    }
    const auto record_of = [&](int row) {
      const auto [sequence, position] = places_[row];
      const int32_t* blocks = batch_.blocks + batch_.block_starts[sequence];
      return model_.cache.record(layer.cache, blocks, position / TILE_TOKENS, unit);
    };
    // Every sequence's last tile is elsewhere in memory: all are asked for before the first is needed.
    for (int row = 0; row < num_tokens_; ++row)
      if (row == 0 || record_of(row) != record_of(row - 1))
        model_.cache.fetch(record_of(row), places_[row].position % TILE_TOKENS);
    multiply(panels, 2 * num_panels, x, space.product, [&](int row, float* key_value) {
      expand(layer, TO_KEY, row, unit * num_panels, num_panels, key_value);
      expand(layer, TO_VALUE, row, unit * num_panels, num_panels, key_value + padded_head);
      if (layer.key_norm != nullptr) rms_norm(key_value, layer.key_norm, head_size, config_.rms_norm_eps, key_value);
      rotate(key_value, row);
      model_.cache.write(record_of(row), places_[row].position % TILE_TOKENS, key_value, key_value + padded_head);
    });
    return;
  }
  const int head = unit - num_kv_heads;
  const float scale = LOG2_E / std::sqrt(float(head_size));
  for (int p = 0; p < num_panels; ++p) panels[p] = {&layer.query, head * num_panels + p, num_panels};
  multiply(panels, num_panels, x, space.product, [&](int row, float* query) {
    expand(layer, TO_QUERY, row, head * num_panels, num_panels, query);
    if (layer.query_norm != nullptr) rms_norm(query, layer.query_norm, head_size, config_.rms_norm_eps, query);
    rotate(query, row);
    bf16* to = model_.queries.data() + (int64_t(row) * config_.num_heads + head) * padded_head;
    for (int d = 0; d < padded_head; d += LANES) store_bf16(to + d, load(query + d) * scale);
  });
}

// RoPE: dimension i pairs with i + D / 2.
void Step::rotate(float* head, int row) const {
  const int half = int(config_.head_size / 2);
  const float* cosines = model_.cosines.data() + size_t(row) * half;
  const float* sines = model_.sines.data() + size_t(row) * half;
  for (int i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cosines[i] - second * sines[i];
    head[i + half] = second * cosines[i] + first * sines[i];
  }
}

Query Step::query_of(const Layer& layer, int unit) const {
  const RowBlock& block = row_blocks_[unit / num_parts_ / config_.num_kv_heads];
  const int position = places_[first_rows_[block.sequence]].position;
  Query query;
  query.blocks = batch_.blocks + batch_.block_starts[block.sequence];
  query.head = unit / num_parts_ % int(config_.num_kv_heads);
  query.num_rows = block.num_rows;
  for (int m = 0; m < block.num_rows; ++m) {
    query.end[m] = position + (block.first + m) / group_ + 1;
    query.begin[m] = layer.window > 0 ? std::max(0, query.end[m] - int(layer.window)) : 0;
  }
  return query;
}

// Segments first .. second of the sequence are this unit's: none where its part lies outside of what its rows see.
std::pair<int, int> Step::segments_of(const Query& query, int unit) const {
  const int begin = query.first_token() / SEGMENT, end = query.last_token() / SEGMENT + 1, part = unit % num_parts_;
  if (num_parts_ == 1) return {begin, end};
  return {std::max(begin, part), std::min(end, part + 1)};
}

int Step::num_attention_units() const { return int(row_blocks_.size()) * int(config_.num_kv_heads) * num_parts_; }

// A block of rows and a key/value head: all segments, or with several parts one of them.
void Step::attend(const Layer& layer, int unit, Workspace& space) {
  const int part = unit % num_parts_, kv_head = unit / num_parts_ % int(config_.num_kv_heads);
  const RowBlock& block = row_blocks_[unit / num_parts_ / config_.num_kv_heads];
  const int padded_head = model_.padded_head, num_rows = block.num_rows;
  const Query query = query_of(layer, unit);
  const auto [begin, end] = segments_of(query, unit);

  Partial results[BLOCK_ROWS];
  for (int m = 0; m < num_rows; ++m) {
    const int row = first_rows_[block.sequence] + (block.first + m) / group_;
    const int head = kv_head * group_ + (block.first + m) % group_;
    const int64_t index = (int64_t(row) * config_.num_heads + head) * num_parts_ + part;
    results[m] = {MINUS_INFINITY, 0.0f, model_.outputs.data() + index * padded_head};
    const bf16* from = model_.queries.data() + (int64_t(row) * config_.num_heads + head) * padded_head;
    for (int d = 0; d < padded_head; d += 2 * PAIRS_PER_TILE)
      std::copy_n(from + d, 2 * PAIRS_PER_TILE,
                  space.attention.queries.data() + pair_offset<PAIRS_PER_TILE>(m, d / 2, num_rows));
  }
  for (int segment = begin; segment < end; ++segment) {
    // What comes next: this unit's next segment, or the next unit's first, which is mostly this member's too.
    std::optional<SegmentTiles> next;
    if (segment + 1 < end) {
      next.emplace(model_.cache, layer.cache, query, segment + 1);
    } else if (unit + 1 < num_attention_units()) {
      const Query other = query_of(layer, unit + 1);
      next.emplace(model_.cache, layer.cache, other, segments_of(other, unit + 1).first);
    }
    Partial found[BLOCK_ROWS];
    attend_segment(model_.cache, {model_.cache, layer.cache, query, segment}, next ? &*next : nullptr, query,
                   space.attention, found);
    for (int m = 0; m < num_rows; ++m) merge(results[m], found[m], padded_head);
  }
  for (int m = 0; m < num_rows; ++m) {
    const int64_t index = (results[m].output - model_.outputs.data()) / padded_head;
    model_.maxima[index] = results[m].maximum;
    model_.sums[index] = results[m].sum;
  }
}

// Row `row` of an operand = attention's result, heads side by side [H * D].
void Step::merge_heads(Operand& to, int row, Workspace& space) {
  const int head_size = int(config_.head_size), num_heads = int(config_.num_heads);
  for (int head = 0; head < num_heads; ++head) {
    const int64_t index = (int64_t(row) * num_heads + head) * num_parts_;
    const auto partial = [&](int part) -> Partial {
      return {model_.maxima[index + part], model_.sums[index + part],
              model_.outputs.data() + (index + part) * model_.padded_head};
    };
    std::copy_n(partial(0).output, model_.padded_head, space.attention.outputs.data());
    Partial all = {partial(0).maximum, partial(0).sum, space.attention.outputs.data()};
    for (int part = 1; part < num_parts_; ++part) merge(all, partial(part), model_.padded_head);
    for (int d = 0; d < head_size; ++d) space.row[head * head_size + d] = all.output[d] / all.sum;
  }
  for (int k = 0; k < num_heads * head_size; k += GROUP) to.set(row, k, space.row.data() + k);
}

// hidden += 32 columns of a product, of the weight that is this target of adapters.
void Step::add_panel(const Layer& layer, Target target, int panel, const Operand& x, Workspace& space) {
  const Panel panels[1] = {{target == TO_OUT ? &layer.out : &layer.down, panel, 1}};
  multiply(panels, 1, x, space.product, [&](int row, float* columns) {
    expand(layer, target, row, panel, 1, columns);
    float* hidden = model_.hidden.data() + row * config_.hidden_size + panel * PANEL;
    for (int i = 0; i < PANEL; i += LANES) store(hidden + i, load(hidden + i) + load(columns + i));
  });
}

// 32 inputs of the down projection: silu(gate) * up.
void Step::activate(const Layer& layer, int unit, const Operand& x, Workspace& space) {
  const Panel panels[2] = {{&layer.gate, unit, 1}, {&layer.up, unit, 1}};
  multiply(panels, 2, x, space.product, [&](int row, float* columns) {
    expand(layer, TO_GATE, row, unit, 1, columns);
    expand(layer, TO_UP, row, unit, 1, columns + PANEL);
    for (int i = 0; i < PANEL; i += LANES) store(columns + i, silu(load(columns + i)) * load(columns + PANEL + i));
    model_.activated.set(row, unit * PANEL, columns);
    if (low_rank(layer, TO_DOWN, row) == nullptr) return;
    bf16* narrow = model_.activations.data() + row * config_.intermediate_size + unit * PANEL;
    for (int i = 0; i < PANEL; i += LANES) store_bf16(narrow + i, load(columns + i));
  });
}

const LowRank* Step::low_rank(const Layer& layer, Target target, int row) const {
  const int64_t adapter = has_adapters_ ? batch_.adapters[places_[row].sequence] : 0;
  if (adapter == 0) return nullptr;
  const int64_t index = (adapter - 1) * config_.num_layers + (&layer - weights_.layers.data());
  const LowRank& found = model_.adapters[index].targets[target];
  return found.rank > 0 ? &found : nullptr;
}

bf16* Step::reduced(Target target, int row) const {
  return model_.reduced.data() + (int64_t(row) * NUM_TARGETS + target) * model_.max_rank;
}

// Begin what a row's adapter adds to weights of one input, which is in space.row.
void Step::reduce(const Layer& layer, std::initializer_list<Target> targets, int row, Workspace& space) const {
  bool is_narrow = false;
  for (Target target : targets) {
    const LowRank* found = low_rank(layer, target, row);
    if (found == nullptr) continue;
    for (int64_t k = 0; !is_narrow && k < found->num_inputs; k += LANES)
      store_bf16(space.narrow_row.data() + k, load(space.row.data() + k));
    is_narrow = true;
    headrace::reduce(*found, space.narrow_row.data(), reduced(target, row));
  }
}

// Add it to a row's columns in panels of the weight.
void Step::expand(const Layer& layer, Target target, int row, int first_panel, int num_panels, float* columns) const {
  const LowRank* found = low_rank(layer, target, row);
  for (int p = 0; found != nullptr && p < num_panels; ++p)
    headrace::expand(*found, first_panel + p, reduced(target, row), columns + p * PANEL);
}

// 32 logits of every sampled row: the largest so far, and all of them where they are wanted.
void Step::pick(int panel, const Operand& x, Workspace& space) {
  const int first = panel * PANEL, count = std::min(PANEL, int(config_.vocab_size) - first);
  const Panel panels[1] = {{&head_, panel, 1}};
  multiply(panels, 1, x, space.product, [&](int row, float* columns) {
    std::fill(columns + count, columns + PANEL, MINUS_INFINITY);
    if (batch_.logits != nullptr && (batch_.argmax_only == nullptr || !batch_.argmax_only[row]))
      std::copy_n(columns, count, batch_.logits + row * config_.vocab_size + first);
    if (!are_numbers(columns, PANEL)) {
      space.best[row] = INFINITE, space.best_token[row] = NO_TOKEN;  // which no other logit outdoes
      return;
    }
    Vec largest = load(columns);
    for (int i = LANES; i < PANEL; i += LANES) largest = max(largest, load(columns + i));
    const float top = maximum(largest);
    if (top < space.best[row] || (top == space.best[row] && space.best_token[row] < first)) return;
    for (int i = 0; i < count; ++i)
      if (columns[i] == top) {
        space.best[row] = top, space.best_token[row] = first + i;
        break;
      }
  });
}

void Step::finish() {
  for (int row = 0; row < num_logit_rows_; ++row) {
    const Workspace* best = &model_.spaces[0];
    for (const Workspace& space : model_.spaces)
      if (space.best[row] > best->best[row] ||
          (space.best[row] == best->best[row] && space.best_token[row] < best->best_token[row]))
        best = &space;
    batch_.argmax[row] = best->best_token[row];
  }
}

}  // namespace headrace
