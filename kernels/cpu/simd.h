// Vector arithmetic under the few names the kernel needs, for AVX-512 (16 lanes) and AVX2 (8 lanes).
//
// Which one is decided by the compiler's flags: the library is compiled for one family of CPUs at a time. Multiply-adds
// are written out with `fma`, so that a row's bits do not depend on what the compiler contracts where.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>

#if defined(__AMX_BF16__) || defined(HEADRACE_EMULATE_AMX)
#define HEADRACE_HAS_AMX 1
#endif

namespace headrace {

using bf16 = uint16_t;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <class Vector, class T>
inline Vector load_as(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector, class T>
inline void store_as(T* p, Vector v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline void store(float* p, Vec v) { store_as(p, v); }
inline void store_int8(int8_t* p, Ints v) { store_as(p, __builtin_convertvector(v, Bytes)); }
inline Vec splat(float x) { return Vec{} + x; }
inline Ints splat(int32_t x) { return Ints{} + x; }
inline Vec to_float(Ints x) { return __builtin_convertvector(x, Vec); }
inline Ints to_int(Vec x) { return __builtin_convertvector(x, Ints); }
inline Ints bits(Vec x) { return reinterpret_cast<Ints>(x); }
inline Vec from_bits(Ints x) { return reinterpret_cast<Vec>(x); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // NaN where b is

#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float maximum(Vec x) { return _mm512_reduce_max_ps(x); }
inline Vec load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(load_as<__m256i>(p)); }
inline Vec load_int8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p))); }
// A bit per lane; NaN is neither at least nor below anything.
inline uint32_t at_least(Vec x, Vec least) { return _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ); }
inline uint32_t not_below(Vec x, Vec limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ); }
inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float maximum(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline Vec load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(load_as<__m128i>(p)); }
inline Vec load_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline uint32_t at_least(Vec x, Vec least) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ))); }
inline uint32_t not_below(Vec x, Vec limit) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ)));
}
inline Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#endif

// The bits of x rounded to bfloat16, to nearest even, in each lane's upper half; the lower half is not cleared.
inline Ints rounded_bits(Vec x) {
  const Ints raw = bits(x);
  return raw + 0x7fff + ((raw >> 16) & 1);
}

// A bfloat16 pair per lane: `even` in its lower half, `odd` in its upper.
inline Ints pack_pairs(Vec even, Vec odd) {
  const Ints low = rounded_bits(even), high = rounded_bits(odd);
  return ((low >> 16) & 0xffff) | (high & int32_t(0xffff0000));
}

inline void store_bf16(bf16* p, Vec x) {
#if defined(__AVX512BF16__)
  store_as(p, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  const Ints rounded = x == x ? rounded_bits(x) : bits(x);  // adding to NaN's bits may overflow
  store_as(p, __builtin_convertvector((rounded >> 16) & 0xffff, Halves));
#endif
}

inline float from_bf16(bf16 x) {
  const uint32_t raw = uint32_t(x) << 16;
  float value;
  __builtin_memcpy(&value, &raw, 4);
  return value;
}

// acc + a.even * b.even + a.odd * b.odd per lane, of bfloat16 pairs.
inline Vec dot_pairs(Vec acc, Ints a, Ints b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  constexpr int32_t odd = 0xffff0000;
  acc = fma(from_bits(a & odd), from_bits(b & odd), acc);
  return fma(from_bits(a << 16), from_bits(b << 16), acc);
#endif
}

// One bfloat16 pair in every lane.
inline Ints splat_pair(const bf16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return splat(pair);
}

// 2 ** x to about one unit in the last place; exactly 0 below 2 ** -126, -infinity included; NaN of NaN.
inline Vec exp2(Vec x) {
  const Vec clamped = max(splat(-126.0f), x > splat(127.0f) ? splat(127.0f) : x);
  const Vec whole = round(clamped), part = clamped - whole;
  Vec y = splat(1.5403530e-4f);
  y = fma(y, part, splat(1.3333558e-3f));
  y = fma(y, part, splat(9.6181291e-3f));
  y = fma(y, part, splat(5.5504109e-2f));
  y = fma(y, part, splat(2.4022651e-1f));
  y = fma(y, part, splat(6.9314718e-1f));
  y = fma(y, part, splat(1.0f));
  y = from_bits(bits(y) + (to_int(whole) << 23));
  return x < splat(-126.0f) ? splat(0.0f) : y;
}

// The largest magnitude among count values, a multiple of LANES. NaN may pass unseen.
inline float magnitude(const float* x, int count) {
  Vec largest{};
  for (int i = 0; i < count; i += LANES) largest = max(largest, max(load(x + i), -load(x + i)));
  return maximum(largest);
}

constexpr float LOG2_E = 1.44269504f;
constexpr float SMALLEST = 1e-30f;  // what is scaled to integers and is smaller becomes 0: its inverse overflows
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float MINUS_INFINITY = -INFINITE;

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

}  // namespace headrace
