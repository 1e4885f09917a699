// Vectors of W floats by GCC/Clang vector extensions: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON).
//
// Arithmetic uses the plain operators (multiply-add is contracted where the machine has it). Comparisons give integer
// lanes of 0 or -1 for select(). Intrinsics appear only where the compiler has no good pattern.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "api.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define AST_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 2)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int16_t vs_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

using ast_fast::DType;

struct bf16 {
  uint16_t bits;
};

AST_INLINE vf splat(float value) { return vf{} + value; }
AST_INLINE vi splat_int(int32_t value) { return vi{} + value; }
AST_INLINE vf as_float(vi value) { return (vf)value; }
AST_INLINE vi as_int(vf value) { return (vi)value; }
AST_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
AST_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf root;
  for (int i = 0; i < W; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}

// the larger of a constant and x, and the smaller; a NaN in x stays (x86 returns the second operand then)
AST_INLINE vf at_least(vf low, vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)low, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return x < low ? low : x;
#endif
}
AST_INLINE vf at_most(vf high, vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)high, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)high, (__m256)x);
#else
  return x > high ? high : x;
#endif
}

AST_INLINE vf load(const float* p) { return *(const vf_any*)p; }
// (GCC 12 splits the generic conversion of 16 lanes in two, hence the intrinsics)
AST_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector((vh)(*(const vh_any*)p), vu) << 16);
#endif
}
AST_INLINE vf load(const int16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector((vs)(*(const vs_any*)p), vi), vf);
#endif
}
AST_INLINE void store(float* p, vf value) { *(vf_any*)p = value; }

// round to nearest even; a NaN stays one
AST_INLINE vu bf16_bits(vf value) {
  const vu bits = (vu)value;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (vu)((value == value) ? (vi)rounded : (vi)(vu{} + 0x7fc0u));
}
AST_INLINE void store(bf16* p, vf value) {
#if defined(__AVX512BF16__)
  // the conversion instruction would flush denormals, so those rare vectors go the long way
  const int denormals = _mm512_fpclass_ps_mask((__m512)value, 0x20);
  if (__builtin_expect(denormals == 0, 1))
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)value));
  else
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bf16_bits(value)));
#elif defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bf16_bits(value)));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)bf16_bits(value);
  const __m256i packed = _mm256_packus_epi32(wide, wide);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  *(vh_any*)p = __builtin_convertvector(bf16_bits(value), vh);
#endif
}

// the first `count` < W elements; the other lanes read as zero
template <class T>
AST_INLINE vf load_part(const T* p, int64_t count) {
  T whole[W] = {};
  __builtin_memcpy(whole, p, (size_t)count * sizeof(T));
  return load(whole);
}
template <class T>
AST_INLINE void store_part(T* p, vf value, int64_t count) {
  T whole[W];
  store(whole, value);
  __builtin_memcpy(p, whole, (size_t)count * sizeof(T));
}

AST_INLINE float to_float(float value) { return value; }
AST_INLINE float to_float(bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

AST_INLINE float horizontal_sum(vf value) {
  float lanes[W];
  store(lanes, value);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
AST_INLINE float horizontal_max(vf value) {
  float lanes[W];
  store(lanes, value);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// transposes every 4 x 4 block of rows[W]: two rounds of the shuffles that all instruction sets have within 128 bits
AST_INLINE void transpose_blocks(vf* rows) {
  vi low, high, front, back;
  for (int i = 0; i < W; ++i) {
    const int block = i & ~3, place = i & 3;
    low[i] = block + place / 2 + (place & 1 ? W : 0);      // a0 b0 a1 b1
    high[i] = low[i] + 2;                                  // a2 b2 a3 b3
    front[i] = block + (place & 1) + (place & 2 ? W : 0);  // a0 a1 b0 b1
    back[i] = front[i] + 2;                                // a2 a3 b2 b3
  }
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const vf ab_low = __builtin_shuffle(rows[i], rows[i + 1], low);
    const vf ab_high = __builtin_shuffle(rows[i], rows[i + 1], high);
    const vf cd_low = __builtin_shuffle(rows[i + 2], rows[i + 3], low);
    const vf cd_high = __builtin_shuffle(rows[i + 2], rows[i + 3], high);
    rows[i] = __builtin_shuffle(ab_low, cd_low, front);
    rows[i + 1] = __builtin_shuffle(ab_low, cd_low, back);
    rows[i + 2] = __builtin_shuffle(ab_high, cd_high, front);
    rows[i + 3] = __builtin_shuffle(ab_high, cd_high, back);
  }
}

// exchanges blocks of lanes between rows a distance apart
template <int DISTANCE>
AST_INLINE void transpose_round(vf* rows) {
  vi low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = (i & DISTANCE) ? W + i - DISTANCE : i;
    high[i] = (i & DISTANCE) ? W + i : i + DISTANCE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & DISTANCE) continue;
    const vf a = rows[i], b = rows[i + DISTANCE];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + DISTANCE] = __builtin_shuffle(a, b, high);
  }
}

// transposes rows[W] in registers
AST_INLINE void transpose(vf* rows) {
  transpose_blocks(rows);
  if constexpr (W >= 8) transpose_round<4>(rows);
  if constexpr (W >= 16) transpose_round<8>(rows);
}

// 64-byte aligned scratch, freed at the end of its scope; null when memory is short
struct Scratch {
  char* base;
  explicit Scratch(size_t bytes) : base((char*)aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { free(base); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

AST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
AST_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
AST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
