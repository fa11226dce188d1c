// Products of activations with fixed weights: T rows of K inputs times panels of 32 output columns.
//
// Every format and every width of the batch ends in `multiply`, which hands a row's 32 columns (or several panels of
// them) to an epilogue. The order of the additions over K is the same for every number of rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "simd.h"
#include "tile_product.h"

namespace headrace {

constexpr int PANEL = 32;  // columns in a panel
constexpr int GROUP = 32;  // inputs that share a scale in a quantised weight, and in a quantised activation

enum Format : int64_t { BF16 = 0, Q4_0 = 1, Q4_1 = 2, Q8_0 = 3 };

// A weight [columns, K], columns padded with zeros to whole panels.
//
// BF16: [panels][K / 2][32 columns][2 inputs].
// Quantised: [panels * 2 halves][K / 32] records of 16 columns x 32 inputs as in the GGUF, whose bytes are reordered to
// [16 columns][4 inputs], then the 16 columns' scales and, for Q4_1, minima, both fp16. A byte of a 4-bit format holds
// input i in its lower half, input i + 16 in its upper. Q8_0 is stored as unsigned, 128 added.
struct Linear {
  const uint8_t* data;
  const float* bias;  // [columns padded], or null
  int64_t format;
  int64_t num_inputs;
  int64_t num_panels;
};

inline bool is_quantised(const Linear& weight) { return weight.format != BF16; }
constexpr int quants_bytes(int64_t format) { return format == Q8_0 ? 512 : 256; }
constexpr int record_bytes(int64_t format) { return quants_bytes(format) + (format == Q4_1 ? 64 : 32); }
// A quant stands for scale * (quant - offset), in Q4_1 for scale * quant + minimum.
constexpr int offset_of(int64_t format) { return format == Q8_0 ? 128 : format == Q4_0 ? 8 : 0; }

// Whether quants can be multiplied with quants (needs the byte dot product of AVX-512 VNNI).
#if defined(__AVX512VNNI__)
constexpr bool HAS_INTEGER_PATH = true;
#else
constexpr bool HAS_INTEGER_PATH = false;
#endif

// Up to so many rows that is faster than the product of dequantised panels. With 8 bits only AMX's tiles should beat it
// (it has not been measured on them).
constexpr int most_integer_rows(int64_t activation_bits) {
#if defined(HEADRACE_HAS_AMX)
  return 16;
#else
  return activation_bits == 8 ? std::numeric_limits<int>::max() : 16;
#endif
}

// A block's rows as quants, or some of them: [K / 32][num_rows][32] bytes, of each group its scale and its scaled sum.
struct Quants {
  const int8_t* high;
  const int8_t* low;
  const float* scales;
  const float* sums;
  int num_rows;  // of the whole block: from one group to the next

  Quants from(int row) const { return {high + row * GROUP, low + row * GROUP, scales + row, sums + row, num_rows}; }
};

// Activations [T, K] as the products read them: as bfloat16 tiles, as quants, or both.
//
// As quants a group of 32 is scaled to integers: of 8 bits, or of 16, each split into 256 * high + low, which is finer
// than bfloat16.
class Operand {
 public:
  void reserve(int max_rows, int num_inputs, int64_t activation_bits) {
    activation_bits_ = activation_bits;
    tiles_.assign(padded_size(max_rows, num_inputs), 0);
    if (!HAS_INTEGER_PATH) return;
    const size_t size = padded_size(std::min(max_rows, most_integer_rows(activation_bits)), num_inputs);
    high_.assign(size, 0);
    low_.assign(activation_bits == 16 ? size : 0, 0);
    scales_.assign(size / GROUP, 0);
    sums_.assign(size / GROUP, 0);
  }

  // Begin to fill `num_rows` rows of `num_inputs`.
  void begin(int num_rows, int num_inputs, bool has_tiles, bool has_quants) {
    num_rows_ = num_rows, num_inputs_ = num_inputs, has_tiles_ = has_tiles, has_quants_ = has_quants;
  }

  // Set inputs k .. k + 32 of a row; k is a multiple of 32.
  void set(int row, int k, const float* x) {
    if (has_tiles_) {
      const int block = row / BLOCK_ROWS;
      bf16* pairs = tiles_.data() + block_offset(block) +
                    pair_offset<PAIRS_PER_TILE>(row % BLOCK_ROWS, k / 2, rows_in_block(block));
      for (int i = 0; i < GROUP; i += LANES) store_bf16(pairs + i, load(x + i));
    }
    if (has_quants_) set_quants(row, k, x);
  }

  int num_rows() const { return num_rows_; }
  int num_inputs() const { return num_inputs_; }
  // Whether it is multiplied with this weight as integers.
  bool uses_integers(const Linear& weight) const { return has_quants_ && is_quantised(weight); }
  int num_blocks() const { return (num_rows_ + BLOCK_ROWS - 1) / BLOCK_ROWS; }
  int rows_in_block(int block) const { return std::min(BLOCK_ROWS, num_rows_ - block * BLOCK_ROWS); }
  const bf16* block(int block) const { return tiles_.data() + block_offset(block); }

  Quants quants(int block) const {
    const size_t offset = block_offset(block), group = offset / GROUP;
    const std::vector<int8_t>& low = activation_bits_ == 16 ? low_ : high_;  // which nobody reads
    return {high_.data() + offset, low.data() + offset, scales_.data() + group, sums_.data() + group,
            rows_in_block(block)};
  }
  int64_t activation_bits() const { return activation_bits_; }

 private:
  static size_t padded_size(int num_rows, int num_inputs) {
    return size_t(num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS * num_inputs;
  }
  size_t block_offset(int block) const { return size_t(block) * BLOCK_ROWS * num_inputs_; }

  void set_quants(int row, int k, const float* x) {
    // 32512 = 127 * 256: the largest whose high part is a signed byte however it is rounded.
    const float largest = activation_bits_ == 8 ? 127.0f : 32512.0f, limit = magnitude(x, GROUP);
    const Vec inverse = splat(limit > SMALLEST ? largest / limit : 0.0f);
    const int block = row / BLOCK_ROWS;
    const size_t group =
        block_offset(block) / GROUP + size_t(k / GROUP) * rows_in_block(block) + size_t(row % BLOCK_ROWS);
    Vec total{};
    for (int i = 0; i < GROUP; i += LANES) {
      const Vec rounded = round(load(x + i) * inverse);
      const Ints quant = to_int(rounded);
      total += rounded;
      if (activation_bits_ == 8) {
        store_int8(high_.data() + group * GROUP + i, quant);
      } else {
        const Ints high = (quant + 128) >> 8;
        store_int8(high_.data() + group * GROUP + i, high);
        store_int8(low_.data() + group * GROUP + i, quant - 256 * high);
      }
    }
    const float scale = limit * (activation_bits_ == 8 ? 1 / 127.0f : 1 / 32512.0f);
    scales_[group] = scale;
    sums_[group] = scale * sum(total);  // NaN where x has NaN or infinity, which the quants lose
  }

  int num_rows_ = 0, num_inputs_ = 0;
  bool has_tiles_ = false, has_quants_ = false;
  int64_t activation_bits_ = 8;
  std::vector<bf16> tiles_;         // [T / BLOCK_ROWS] blocks, each in the order of `pair_offset`
  std::vector<int8_t> high_, low_;  // [T / BLOCK_ROWS] blocks, each as `Quants` says
  std::vector<float> scales_, sums_;
};

inline int64_t panel_bytes(const Linear& weight) {
  if (!is_quantised(weight)) return int64_t(PANEL) * 2 * weight.num_inputs;
  return 2 * (weight.num_inputs / GROUP) * record_bytes(weight.format);
}

// Fetch the beginning of the panels that a member will start with, of `num_members` that share them.
inline void fetch_start(const Linear& weight, int member, int num_members) {
  const uint8_t* start = weight.data + weight.num_panels * member / num_members * panel_bytes(weight);
  for (int64_t i = 0; i < std::min<int64_t>(panel_bytes(weight), 16384); i += 64) prefetch_far(start + i);
}

// One panel's column as it is stored, for reading single rows of an embedding: out [K] of float32.
inline void read_column(const Linear& weight, int64_t column, float* out) {
  const int64_t num_inputs = weight.num_inputs;
  if (!is_quantised(weight)) {
    const bf16* panel = reinterpret_cast<const bf16*>(weight.data) + column / PANEL * PANEL * num_inputs;
    for (int64_t k = 0; k < num_inputs; ++k) out[k] = from_bf16(panel[(k / 2 * PANEL + column % PANEL) * 2 + k % 2]);
    return;
  }
  const int bytes = record_bytes(weight.format), lane = int(column % 16);
  const uint8_t* record = weight.data + column / 16 * (num_inputs / GROUP) * bytes;
  for (int64_t k = 0; k < num_inputs; k += GROUP, record += bytes) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(record + quants_bytes(weight.format));
    const float scale = _cvtsh_ss(scales[lane]);
    const float minimum = weight.format == Q4_1 ? _cvtsh_ss(scales[16 + lane]) : 0.0f;
    for (int i = 0; i < GROUP; ++i) {
      const int stored = weight.format == Q8_0 ? i : i % 16;
      const int byte = record[(stored / 4 * 16 + lane) * 4 + stored % 4];
      const int quant = weight.format == Q8_0 ? byte : i < 16 ? byte & 15 : byte >> 4;
      out[k + i] = scale * float(quant - offset_of(weight.format)) + minimum;
    }
  }
}

// Dequantise a panel into the BF16 layout, [K / 2][32][2].
inline void dequantise(const Linear& weight, int64_t panel, bf16* out) {
  const int64_t format = weight.format, num_groups = weight.num_inputs / GROUP;
  const int bytes = record_bytes(format);
  const Ints offset = splat(offset_of(format));
  for (int half = 0; half < 2; ++half) {
    const uint8_t* record = weight.data + (panel * 2 + half) * num_groups * bytes;
    for (int64_t group = 0; group < num_groups; ++group, record += bytes) {
      prefetch(record + 2048), prefetch(record + 2112), prefetch(record + 2176), prefetch(record + 2240);
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(record + quants_bytes(format));
      for (int lane = 0; lane < 16; lane += LANES) {
        const Vec scale = load_fp16(scales + lane);
        const Vec minimum = format == Q4_1 ? load_fp16(scales + 16 + lane) : Vec{};
        bf16* columns = out + group * GROUP * PANEL + (half * 16 + lane) * 2;
        for (int quad = 0; quad < quants_bytes(format) / 64; ++quad) {
          const Ints quants = load_as<Ints>(record + quad * 64 + lane * 4);
          const auto put = [&](int k, int shift, int32_t mask) {  // inputs k and k + 1
            const Vec even = fma(to_float(((quants >> shift) & mask) - offset), scale, minimum);
            const Vec odd = fma(to_float(((quants >> (shift + 8)) & mask) - offset), scale, minimum);
            store_as(columns + k * PANEL, pack_pairs(even, odd));
          };
          if (format == Q8_0) {
            put(quad * 4, 0, 255), put(quad * 4 + 2, 16, 255);
          } else {
            put(quad * 4, 0, 15), put(quad * 4 + 2, 16, 15);
            put(quad * 4 + 16, 4, 15), put(quad * 4 + 18, 20, 15);
          }
        }
      }
    }
  }
}

#if defined(__AVX512VNNI__)
inline Ints splat_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return splat(quad);
}

inline Ints dot_quads(Ints acc, Ints unsigned_quads, Ints signed_quads) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc),
                                                    reinterpret_cast<__m512i>(unsigned_quads),
                                                    reinterpret_cast<__m512i>(signed_quads)));
}

constexpr int INTEGERS_AHEAD = 6144;  // bytes; half of it takes 10 % longer at 1 to 8 rows

// M rows times 16 columns (half a panel) of a quantised weight: c[m * stride .. + 16]. Integers inside a group.
template <int M, int64_t FORMAT, int BITS>
void integer_product(const Linear& weight, int64_t half, Quants x, float* c, int stride, Ahead& ahead) {
  const int num_groups = int(weight.num_inputs / GROUP);
  constexpr int num_loads = FORMAT == Q8_0 ? 8 : 4, bytes = record_bytes(FORMAT);
  const uint8_t* record = weight.data + half * num_groups * bytes;
  Vec acc[M] = {};
  for (int group = 0; group < num_groups; ++group, record += bytes) {
    if (ahead.reach == NOWHERE)
      for (int line = 0; line < bytes; line += 64) prefetch(record + INTEGERS_AHEAD + line);
    Ints high[M] = {}, low[M] = {};
    const auto dot = [&](Ints quants, int k) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        high[m] = dot_quads(high[m], quants, splat_quad(x.high + m * GROUP + k));
        if constexpr (BITS == 16) low[m] = dot_quads(low[m], quants, splat_quad(x.low + m * GROUP + k));
      }
    };
#pragma GCC unroll 8
    for (int i = 0; i < num_loads; ++i) {
      const Ints bytes_of_16 = load_as<Ints>(record + i * 64);
      for (int line = 0; line < 8 / num_loads; ++line) ahead.fetch();  // as often as a product of pairs
      if constexpr (FORMAT == Q8_0) {
        dot(bytes_of_16, 4 * i);
      } else {
        dot(bytes_of_16 & 0x0f0f0f0f, 4 * i);
        dot((bytes_of_16 >> 4) & 0x0f0f0f0f, 4 * i + 16);
      }
    }
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(record + num_loads * 64);
    const Vec scale = load_fp16(factors);
    const Vec minimum = FORMAT == Q4_1 ? load_fp16(factors + 16) : scale * float(-offset_of(FORMAT));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Ints total = BITS == 16 ? (high[m] << 8) + low[m] : high[m];
      acc[m] = fma(to_float(total), scale * x.scales[m], acc[m]);
      acc[m] = fma(minimum, splat(x.sums[m]), acc[m]);
    }
    x.high += x.num_rows * GROUP, x.scales += x.num_rows, x.sums += x.num_rows;
    if constexpr (BITS == 16) x.low += x.num_rows * GROUP;
  }
  for (int m = 0; m < M; ++m) store(c + m * stride, acc[m]);
}

// Rows at once: 12 x 2 accumulators of the 32 registers, or 8 x 3.
template <int BITS>
constexpr int MOST_ROWS = BITS == 8 ? 12 : 8;

template <int64_t FORMAT, int BITS, int M = MOST_ROWS<BITS>>
void integer_product_of(int num_rows, const Linear& weight, int64_t half, const Quants& x, float* c, int stride,
                        Ahead& ahead) {
  if constexpr (M > 1) {
    if (num_rows < M) return integer_product_of<FORMAT, BITS, M - 1>(num_rows, weight, half, x, c, stride, ahead);
  }
  integer_product<M, FORMAT, BITS>(weight, half, x, c, stride, ahead);
}

// A block of num_rows rows times a panel of a quantised weight: c[m * stride .. + 32]. What `ahead` shows is fetched on
// the side, or, where it shows nothing, the panel itself.
template <int BITS>
void multiply_quants(int num_rows, const Linear& weight, int64_t panel, const Quants& x, float* c, int stride,
                     Ahead ahead) {
  const auto product = weight.format == Q4_1   ? integer_product_of<Q4_1, BITS>
                       : weight.format == Q4_0 ? integer_product_of<Q4_0, BITS>
                                               : integer_product_of<Q8_0, BITS>;
  for (int done = 0; done < num_rows; done += MOST_ROWS<BITS>, ahead = {})
    for (int64_t half = 0; half < 2; ++half)
      product(std::min(MOST_ROWS<BITS>, num_rows - done), weight, panel * 2 + half, x.from(done),
              c + done * stride + half * 16, stride, ahead);
}
#else
template <int BITS>
void multiply_quants(int, const Linear&, int64_t, const Quants&, float*, int, Ahead) {}  // never called
#endif

// A panel of a weight; a unit of work has one or several. The next unit's panel in its place is `step` further.
struct Panel {
  const Linear* weight;
  int64_t index;
  int step;
};
constexpr int MAX_PANELS = 16;  // in one unit: a key and a value head of 256

// Pieces of memory that a member will read after its products, which leave the memory idle when rows are many.
struct FetchList {
  const uint8_t* base = nullptr;
  const int64_t* offsets = nullptr;  // of the pieces
  int64_t num_pieces = 0;
  int64_t piece_bytes = 0;

  const uint8_t* take() {
    if (num_pieces == 0) return nullptr;
    --num_pieces;
    return base + *offsets++;
  }
};

// What a member needs for its own use while it multiplies.
struct ProductSpace {
  FetchList soon;
  std::vector<bf16> dequantised;  // [panels][K][32]
  alignas(64) float columns[BLOCK_ROWS * MAX_PANELS * PANEL];
};

constexpr int FETCH_DISTANCE = 2048;  // bytes per row, as more rows take longer over a pair of inputs

// What to fetch during the product of a block of rows. A single block reads its panel from memory, and fetches a little
// ahead of itself (as quants where the records are); with several, or where the panel was dequantised, each fetches its
// share of the next unit's, and something of `soon`.
inline Ahead fetch_ahead(const Panel& panel, const Operand& x, int block, FetchList& soon) {
  if (x.num_blocks() == 1 && x.uses_integers(*panel.weight)) return {};
  const int64_t num_bytes = panel_bytes(*panel.weight), num_pairs = x.num_inputs() / 2;
  const uint8_t* data = panel.weight->data + panel.index * num_bytes;
  if (x.num_blocks() == 1 && !is_quantised(*panel.weight)) {
    const uint8_t* next = data + FETCH_DISTANCE * std::min(x.num_rows(), 4);
    return {{next, num_bytes / num_pairs}, {next + 64, num_bytes / num_pairs}, NEAR};
  }
  const int64_t share = num_bytes / x.num_blocks();
  const Run weights = {data + panel.step * num_bytes + block * share, (share + num_pairs - 1) / num_pairs};
  const uint8_t* piece = soon.take();
  const Run other = piece == nullptr ? weights : Run{piece, (soon.piece_bytes + num_pairs - 1) / num_pairs};
  return {weights, other, FAR};
}

// Multiply all rows of x with some panels; `epilogue(row, columns)` gets each row's 32 * num_panels results, its own to
// overwrite.
template <class Epilogue>
void multiply(const Panel* panels, int num_panels, const Operand& x, ProductSpace& space, Epilogue epilogue) {
  const int num_inputs = x.num_inputs(), stride = num_panels * PANEL;
  const bf16* weights[MAX_PANELS];
  for (int p = 0; p < num_panels; ++p) {
    const Linear& weight = *panels[p].weight;
    if (x.uses_integers(weight)) continue;
    if (!is_quantised(weight)) {
      weights[p] = reinterpret_cast<const bf16*>(weight.data) + panels[p].index * PANEL * num_inputs;
    } else {
      const size_t size = size_t(PANEL) * num_inputs;
      if (space.dequantised.size() < size * num_panels) space.dequantised.resize(size * num_panels);
      dequantise(weight, panels[p].index, space.dequantised.data() + p * size);
      weights[p] = space.dequantised.data() + p * size;
    }
  }
  for (int block = 0; block < x.num_blocks(); ++block) {
    const int num_rows = x.rows_in_block(block);
    for (int p = 0; p < num_panels; ++p) {
      const Linear& weight = *panels[p].weight;
      float* c = space.columns + p * PANEL;
      const Ahead ahead = fetch_ahead(panels[p], x, block, space.soon);
      if (x.uses_integers(weight)) {
        const auto product = x.activation_bits() == 8 ? multiply_quants<8> : multiply_quants<16>;
        product(num_rows, weight, panels[p].index, x.quants(block), c, stride, ahead);
      } else {
        const bf16* halves[2] = {weights[p], weights[p] + PANEL};
        tile_product<PAIRS_PER_TILE, 2>(num_rows, x.block(block), 1, num_inputs / 2, {halves, 2, 2 * PANEL}, c, stride,
                                        ahead);
      }
    }
    for (int m = 0; m < num_rows; ++m) {
      float* columns = space.columns + m * stride;
      for (int p = 0; p < num_panels; ++p) {
        const float* bias = panels[p].weight->bias;
        if (bias == nullptr) continue;
        for (int i = 0; i < PANEL; i += LANES)
          store(columns + p * PANEL + i, load(columns + p * PANEL + i) + load(bias + panels[p].index * PANEL + i));
      }
      epilogue(block * BLOCK_ROWS + m, columns);
    }
  }
}

}  // namespace headrace
