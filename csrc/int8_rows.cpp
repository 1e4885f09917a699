// What stands between the int8 matrix products of a transformer block, row by row in cache: a product is brought back
// to scale, biased, added to the residual stream, normalised or passed through GELU, and quantised for the next one.
//
// A row q of unsigned bytes stands for (q - zero) * scale, the scale chosen so that the row's smallest and largest
// value just fit: every token has its own, and none depends on its neighbours or on the number of threads.
// A row that holds NaN gets scale NaN, so that what is computed of it is NaN too.

#include "vmath.h"

namespace {

using ast_fast::BF16;
using ast_fast::Int8RowsArgs;

constexpr float TINY = 1e-30f;  // scales stay away from denormals, where their reciprocal would overflow

// lanes at or beyond `count` read as zero
template <class T>
AST_INLINE vf get(const T* p, int64_t count) {
  return count >= W ? load(p) : load_part(p, count);
}
template <class T>
AST_INLINE void put(T* p, vf value, int64_t count) {
  if (count >= W)
    store(p, value);
  else
    store_part(p, value, count);
}

AST_INLINE vf lanes_below(int64_t count) {
  vi index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return select(index < (int32_t)smaller(count, W), splat(1.0f), splat(0.0f));
}

// integers from 0 to 255 to bytes
AST_INLINE void store_bytes(uint8_t* p, vi value, int64_t count) {
#if defined(__AVX512F__)
  if (count >= W) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)value));
    return;
  }
#endif
  for (int64_t i = 0; i < smaller(count, W); ++i) p[i] = (uint8_t)value[i];
}

AST_INLINE vf gelu(vf x) {
  // bytes follow: the short form is fine enough
  const Normal normal = normal_of(x, (const bf16*)nullptr);
  return at_least(splat(0.0f), x) - normal.size * normal.tail;
}

// scratch[cols] = x, brought back to scale and biased
template <class X>
AST_INLINE void fetch(const Int8RowsArgs& a, int64_t row, float* values) {
  const X* x = (const X*)a.x + row * a.x_stride;
  if (!a.x_scale) {
    for (int64_t c = 0; c < a.cols; c += W) store(values + c, get(x + c, a.cols - c));
    return;
  }
  const vf scale = splat(a.x_scale[row]);
  for (int64_t c = 0; c < a.cols; c += W)
    store(values + c, get(x + c, a.cols - c) * scale + get(a.bias + c, a.cols - c));
}

template <class R>
AST_INLINE void add_residual(const Int8RowsArgs& a, int64_t row, float* values) {
  const R* residual = (const R*)a.residual + row * a.residual_stride;
  R* total = (R*)a.total + row * a.cols;
  for (int64_t c = 0; c < a.cols; c += W) {
    const int64_t n = a.cols - c;
    put(total + c, load(values + c) + get(residual + c, n), n);
    store(values + c, get(total + c, n));  // as it was rounded
  }
}

AST_INLINE void normalise(const Int8RowsArgs& a, float* values) {
  vf sums[2] = {};
  for (int64_t c = 0, i = 0; c < a.cols; c += W, ++i) sums[i & 1] += load(values + c);
  const float mean = horizontal_sum(sums[0] + sums[1]) / (float)a.cols;
  sums[0] = sums[1] = vf{};
  for (int64_t c = 0, i = 0; c < a.cols; c += W, ++i) {
    vf d = load(values + c) - mean;
    if (a.cols - c < W) d *= lanes_below(a.cols - c);
    sums[i & 1] += d * d;
  }
  const float rstd = 1.0f / __builtin_sqrtf(horizontal_sum(sums[0] + sums[1]) / (float)a.cols + (float)a.eps);
  for (int64_t c = 0; c < a.cols; c += W)
    store(values + c, (load(values + c) - mean) * rstd * get(a.weight + c, a.cols - c) + get(a.shift + c, a.cols - c));
}

AST_INLINE void quantise(const Int8RowsArgs& a, int64_t row, const float* values) {
  vf low = {}, high = {}, all = {};  // zero is always in range
  for (int64_t c = 0; c < a.cols; c += W) {
    vf v = load(values + c);
    if (a.cols - c < W) v = select(lanes_below(a.cols - c) > 0.5f, v, vf{});
    low = at_most(low, v), high = at_least(high, v);
    all += v * 0.0f;  // 0, or NaN where something is not finite
  }
  const float up = horizontal_max(high) / (float)(255 - a.zero), down = horizontal_max(-low) / (float)a.zero;
  float scale = up > down ? up : down;
  scale = scale > TINY ? scale : TINY;
  const float finite = horizontal_sum(all);
  a.q_scale[row] = finite == finite ? scale : __builtin_nanf("");
  const vf inverse = splat(1.0f / scale);
  uint8_t* q = (uint8_t*)a.out + row * a.cols;
  for (int64_t c = 0; c < a.cols; c += W) {
    const vf level = nearest(load(values + c) * inverse) + (float)a.zero;
    // NaN goes to the lower end, by the order of the operands
    const vf bounded = select(level > 0.0f, level, vf{});
    store_bytes(q + c, __builtin_convertvector(select(bounded < 255.0f, bounded, splat(255.0f)), vi), a.cols - c);
  }
}

template <class X, class R>
bool rows_of(const Int8RowsArgs& a) {
  bool enough = true;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Scratch scratch((size_t)round_up(a.cols, W) * sizeof(float));
    float* values = (float*)scratch.base;
    if (!values) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) {
      if (!values) continue;
      fetch<X>(a, row, values);
      if (a.residual) add_residual<R>(a, row, values);
      if (a.weight) normalise(a, values);
      if (a.gelu)
        for (int64_t c = 0; c < a.cols; c += W) store(values + c, gelu(load(values + c)));
      if (a.q_scale) {
        quantise(a, row, values);
      } else {
        R* y = (R*)a.out + row * a.cols;
        for (int64_t c = 0; c < a.cols; c += W) put(y + c, load(values + c), a.cols - c);
      }
    }
  }
  return enough;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(int8_rows)(const Int8RowsArgs& a) {
  if (a.x_type == BF16) return a.residual_type == BF16 ? rows_of<bf16, bf16>(a) : rows_of<bf16, float>(a);
  return a.residual_type == BF16 ? rows_of<float, bf16>(a) : rows_of<float, float>(a);
}

}  // namespace ast_fast
