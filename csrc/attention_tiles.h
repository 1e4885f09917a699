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

// c(r, column) (+)= sum over k < depth of a[r * RS + k * CS] * b[k][column]; depth counts units
template <class Unit, int ROWS, int RS, int CS>
AST_INLINE void micro_rows(const typename Unit::Word* a, const typename Unit::Word* b, int64_t depth, float* c,
                           int64_t ldc, bool accumulate) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = vf{};
    sum[r][1] = vf{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const vf b0 = Unit::load_b(b), b1 = Unit::load_b(b + W);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const typename Unit::Word value = a[r * RS];
      sum[r][0] = Unit::multiply_add(sum[r][0], value, b0);
      sum[r][1] = Unit::multiply_add(sum[r][1], value, b1);
    }
    a += CS;
    b += NR;
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    // what c held is added last: sums of blocks keep smaller rounding errors than one long sum
    store(c + r * ldc, accumulate ? load(c + r * ldc) + sum[r][0] : sum[r][0]);
    store(c + r * ldc + W, accumulate ? load(c + r * ldc + W) + sum[r][1] : sum[r][1]);
  }
}

// tiles at the end of a matrix have fewer rows: the next size up of MR, 2/3 MR, 1/3 MR is used, so that buffers need
// room for a multiple of MR / 3 rows
template <class Unit, int RS, int CS>
void micro(int64_t rows, const typename Unit::Word* a, const typename Unit::Word* b, int64_t depth, float* c,
           int64_t ldc, bool accumulate) {
  if (rows > MR / 3 * 2)
    micro_rows<Unit, MR, RS, CS>(a, b, depth, c, ldc, accumulate);
  else if (rows > MR / 3)
    micro_rows<Unit, MR / 3 * 2, RS, CS>(a, b, depth, c, ldc, accumulate);
  else
    micro_rows<Unit, MR / 3, RS, CS>(a, b, depth, c, ldc, accumulate);
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
template <class Unit, class T>
void pack_transposed(const T* x, int64_t stride, int64_t count, int64_t width, typename Unit::Word* out) {
  const int64_t words = width / Unit::DEPTH;
  for (int64_t first = 0; first < count; first += NR, out += words * NR)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t word = 0; word < words; word += W) {
        vf tile[W];
        for (int i = 0; i < W; ++i) {
          const int64_t row = first + half * W + i;
          tile[i] = row < count ? load_words<Unit>(x + row * stride, word) : vf{};
        }
        transpose(tile);
        for (int i = 0; i < W; ++i) store((float*)out + (word + i) * NR + half * W, tile[i]);
      }
}

// rows [count, width] -> panels of NR columns, each [padded / DEPTH][NR]: B = X for a reduction over the rows;
// rows count .. padded are zero
template <class Unit, class T>
void pack_panels(const T* x, int64_t stride, int64_t count, int64_t padded, int64_t width,
                 typename Unit::Word* out) {
  const int64_t words = padded / Unit::DEPTH;
  for (int64_t panel = 0; panel < width; panel += NR, out += words * NR)
    for (int64_t word = 0; word < words; ++word) {
      float* target = (float*)out + word * NR;
      for (int64_t part = 0; part < NR; part += W) {
        if constexpr (Unit::DEPTH == 2) {
          const int64_t row = word * 2;
          const T* even = x + row * stride + panel + part;
          vu both = {};
          if (row < count) both = (vu)load(even) >> 16;
          if (row + 1 < count) both |= (vu)load(even + stride);
          store(target + part, (vf)both);
        } else {
          store(target + part, word < count ? load(x + word * stride + panel + part) : vf{});
        }
      }
    }
}

// rows [count, width] -> rows of ROW_STRIDE words, zero up to `padded`: the A operand
template <class Unit, class T>
void pack_rows(const T* x, int64_t stride, int64_t count, int64_t padded, int64_t width, typename Unit::Word* out) {
  const int64_t words = width / Unit::DEPTH;
  for (int64_t row = 0; row < padded; ++row)
    for (int64_t word = 0; word < words; word += W)
      store((float*)out + row * ROW_STRIDE + word, row < count ? load_words<Unit>(x + row * stride, word) : vf{});
}

#if defined(__AVX512BF16__)
// round to nearest even; only for intermediate probabilities, because it takes denormals as zero
AST_INLINE vu rounded_bits(vf value) {
  const __m256bh packed = _mm512_cvtneps_pbh((__m512)value);
  return (vu)_mm512_cvtepu16_epi32((__m256i)packed);
}
#endif

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
