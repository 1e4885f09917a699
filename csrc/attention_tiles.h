// What attention's forward and backward share: a register-blocked matrix micro-kernel and the packing of its operands.
//
// C [MR x 2W] (+)= A [MR x K] * B [K x 2W]. B is packed in panels of 2W columns; A is read by broadcasts at strides known
// at compile time, so that one pointer serves all rows. A "unit" of the reduction is one float, or, where the CPU has
// AVX-512-BF16 and the tensors are bf16, a pair of neighbours along the reduction (one 32-bit word), multiplied and
// added to fp32 by vdpbf16ps. Every element of C sums in the order of K, whatever its tile: results do not depend on
// how rows are grouped or shared among threads.
#pragma once

#include "vmath.h"

namespace {

using ast_fast::AttentionArgs;
using ast_fast::AttentionClip;
using ast_fast::BF16;

constexpr int NR = 2 * W;               // columns of a panel
constexpr int MR = W == 16 ? 12 : 6;    // rows of a tile: MR * 2 accumulators fill the registers
constexpr int MAX_WIDTH = 128;
// strides in 32-bit words; the odd number of cache lines keeps rows apart in the first-level cache
constexpr int ROW_STRIDE = MAX_WIDTH + 16;
constexpr float LOG2E = 1.4426950408889634f;

// Rows of a matrix a fixed stride apart, and rows anywhere: operands are packed from either, products added to either.
template <class T>
struct StridedRows {
  T* base;
  int64_t stride;
  AST_INLINE T* operator()(int64_t row) const { return base + row * stride; }
  AST_INLINE StridedRows from(int64_t row, int64_t column) const { return {base + row * stride + column, stride}; }
};
template <class T>
struct ListedRows {
  T* const* rows;
  int64_t column = 0;
  AST_INLINE T* operator()(int64_t row) const { return rows[row] + column; }
  AST_INLINE ListedRows from(int64_t row, int64_t more) const { return {rows + row, column + more}; }
};

struct FloatUnit {
  typedef float Word;
  static constexpr int DEPTH = 1;
  static AST_INLINE vf load_b(const float* b) { return *(const vf*)b; }
  static AST_INLINE vf multiply_add(vf sum, float a, vf b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct PairUnit {
  typedef uint32_t Word;
  static constexpr int DEPTH = 2;
  static AST_INLINE vf load_b(const uint32_t* b) { return (vf) * (const vi*)b; }
  static AST_INLINE vf multiply_add(vf sum, uint32_t a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
};
#endif

// c(r)[column] (+)= sum over k < depth of a[r * RS + k * CS] * b[k][column]; depth counts units. VECTORS 1 leaves out
// the second half of the panel
template <class Unit, int ROWS, int RS, int CS, int VECTORS, class Rows>
AST_INLINE void micro_rows(const typename Unit::Word* a, const typename Unit::Word* b, int64_t depth, Rows c,
                           bool accumulate) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECTORS; ++i) sum[r][i] = vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf values[VECTORS];
    for (int i = 0; i < VECTORS; ++i) values[i] = Unit::load_b(b + i * W);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const typename Unit::Word value = a[r * RS];
      for (int i = 0; i < VECTORS; ++i) sum[r][i] = Unit::multiply_add(sum[r][i], value, values[i]);
    }
    a += CS;
    b += NR;
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
    // what c held is added last: sums of blocks keep smaller rounding errors than one long sum
    for (int i = 0; i < VECTORS; ++i) store(c(r) + i * W, accumulate ? load(c(r) + i * W) + sum[r][i] : sum[r][i]);
}

// tiles at the end of a matrix have fewer rows: the next size up of MR, 2/3 MR, 1/3 MR is used, so that buffers need
// room for a multiple of MR / 3 rows
template <class Unit, int RS, int CS, int VECTORS = 2, class Rows>
void micro(int64_t rows, const typename Unit::Word* a, const typename Unit::Word* b, int64_t depth, Rows c,
           bool accumulate) {
  if (rows > MR / 3 * 2)
    micro_rows<Unit, MR, RS, CS, VECTORS>(a, b, depth, c, accumulate);
  else if (rows > MR / 3)
    micro_rows<Unit, MR / 3 * 2, RS, CS, VECTORS>(a, b, depth, c, accumulate);
  else
    micro_rows<Unit, MR / 3, RS, CS, VECTORS>(a, b, depth, c, accumulate);
}

// W neighbouring words of a row: converted to float, or two bf16 a word taken as they are
template <class Unit, class T>
AST_INLINE vf load_words(const T* row, int64_t word) {
  if constexpr (Unit::DEPTH == 2) {
    return load((const float*)row + word);
  } else {
    return load(row + word);
  }
}

// rows [count, width] -> panels of NR rows, each [width / DEPTH][NR]: B = X^T for a reduction over the width
template <class Unit, class Rows>
void pack_transposed(Rows x, int64_t count, int64_t width, typename Unit::Word* out) {
  const int64_t words = width / Unit::DEPTH;
  for (int64_t first = 0; first < count; first += NR, out += words * NR)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t word = 0; word < words; word += W) {
        vf tile[W];
        for (int i = 0; i < W; ++i) {
          const int64_t row = first + half * W + i;
          tile[i] = row < count ? load_words<Unit>(x(row), word) : vf{};
        }
        transpose(tile);
        for (int i = 0; i < W; ++i) store((float*)out + (word + i) * NR + half * W, tile[i]);
      }
}

// rows [count, width] -> panels of NR columns, each [padded / DEPTH][NR]: B = X for a reduction over the rows;
// rows count .. padded are zero
template <class Unit, class Rows>
void pack_panels(Rows x, int64_t count, int64_t padded, int64_t width, typename Unit::Word* out) {
  const int64_t words = padded / Unit::DEPTH;
  for (int64_t panel = 0; panel < width; panel += NR, out += words * NR)
    for (int64_t word = 0; word < words; ++word) {
      float* target = (float*)out + word * NR;
      for (int64_t part = 0; part < NR; part += W) {
        if constexpr (Unit::DEPTH == 2) {
          const int64_t row = word * 2;
          vu both = {};
          if (row < count) both = (vu)load(x(row) + panel + part) >> 16;
          if (row + 1 < count) both |= (vu)load(x(row + 1) + panel + part);
          store(target + part, (vf)both);
        } else {
          store(target + part, word < count ? load(x(word) + panel + part) : vf{});
        }
      }
    }
}

// rows [count, width] -> rows of ROW_STRIDE words, zero up to `padded`: the A operand
template <class Unit, class Rows>
void pack_rows(Rows x, int64_t count, int64_t padded, int64_t width, typename Unit::Word* out) {
  const int64_t words = width / Unit::DEPTH;
  for (int64_t row = 0; row < padded; ++row)
    for (int64_t word = 0; word < words; word += W)
      store((float*)out + row * ROW_STRIDE + word, row < count ? load_words<Unit>(x(row), word) : vf{});
}

#if defined(__AVX512BF16__)
// round to nearest even; only for intermediate probabilities, because it takes denormals as zero
AST_INLINE vu rounded_bits(vf value) {
  const __m256bh packed = _mm512_cvtneps_pbh((__m512)value);
  return (vu)_mm512_cvtepu16_epi32((__m256i)packed);
}
#endif

// softmax numerators of one row of scores in place (or as bf16 pairs); returns their sum
template <class Unit>
AST_INLINE float exponentials(const float* scores, float* weights, int64_t count, float c, float top) {
  vf sums[2] = {};
  for (int64_t i = 0; i < count; i += 2 * W) {
    const vf p0 = exp2_of(load(scores + i) * c - top), p1 = exp2_of(load(scores + i + W) * c - top);
    sums[0] += p0;
    sums[1] += p1;
    if constexpr (Unit::DEPTH == 1) {
      store(weights + i, p0);
      store(weights + i + W, p1);
    } else {
#if defined(__AVX512BF16__)
      // lanes come out in order: the first operand is the upper half
      _mm512_storeu_si512(weights + i / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0));
#endif
    }
  }
  return horizontal_sum(sums[0] + sums[1]);
}

// One thread's share of a list of work items with costs: those whose running cost starts inside
// [part, part + 1) / parts of the total.
struct Share {
  double low, high, at = 0.0;
  Share(double total, int64_t part, int64_t parts)
      : low(total * (double)part / (double)parts), high(total * (double)(part + 1) / (double)parts) {}
  AST_INLINE bool takes(double cost) {
    const bool mine = at >= low && at < high;
    at += cost;
    return mine;
  }
};

}  // namespace
