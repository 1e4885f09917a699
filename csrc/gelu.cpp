// Exact (erf) GELU and its gradient, with the column sums that are the bias gradient.
//
// gelu(x) = x * Phi(x). For x < 0 the tail Phi(-|x|) is used as it is, so small results keep their relative accuracy.
// +inf gives inf, -inf gives 0, NaN gives NaN.

#include "vmath.h"

namespace {

using ast_fast::BF16;
using ast_fast::ColumnSumArgs;
using ast_fast::GeluArgs;

// max(x, 0) - |x| Phi(-|x|)
AST_INLINE vf gelu_of(vf x, const Normal& normal) {
  return at_least(splat(0.0f), x) - normal.size * normal.tail;
}

// Phi(x) + x phi(x), by symmetry from the side where Phi is small
AST_INLINE vf slope_of(vf x, const Normal& normal) {
  const vf lower = normal.tail - normal.size * 0.3989422804014327f * normal.density;
  return select(x < 0.0f, lower, 1.0f - lower);
}

template <class T>
void forward(const GeluArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* h = (const T*)a.h + row * a.h_stride;
    T* g = (T*)a.g + row * a.cols;
    int64_t c = 0;
    for (; c + W <= a.cols; c += W) {
      const vf x = load(h + c);
      store(g + c, gelu_of(x, normal_of(x, (const T*)nullptr)));
    }
    if (c < a.cols) {
      const vf x = load_part(h + c, a.cols - c);
      store_part(g + c, gelu_of(x, normal_of(x, (const T*)nullptr)), a.cols - c);
    }
  }
}

AST_INLINE vf rounded_as(vf value, const float*) { return value; }
AST_INLINE vf rounded_as(vf value, const bf16*) { return (vf)(bf16_bits(value) << 16); }

template <class T>
void backward(const GeluArgs& a) {
  const int64_t per_chunk = ceil_div(a.rows, a.chunks);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    float* sums = a.partial + chunk * a.cols;
    memset(sums, 0, (size_t)a.cols * sizeof(float));
    const int64_t end = smaller(a.rows, (chunk + 1) * per_chunk);
    for (int64_t row = chunk * per_chunk; row < end; ++row) {
      const T* h = (const T*)a.h + row * a.h_stride;
      const T* dg = (const T*)a.dg + row * a.dg_stride;
      T* dh = (T*)a.dh + row * a.cols;
      T* g = (T*)a.g + row * a.cols;
      int64_t c = 0;
      for (; c + W <= a.cols; c += W) {
        const vf x = load(h + c);
        const Normal normal = normal_of(x, (const T*)nullptr);
        // the bias gradient sums what is stored, as a separate sum of dh would
        const vf grad = rounded_as(load(dg + c) * slope_of(x, normal), (const T*)nullptr);
        store(sums + c, load(sums + c) + grad);
        store(dh + c, grad);
        store(g + c, gelu_of(x, normal));
      }
      if (c < a.cols) {
        const int64_t n = a.cols - c;
        const vf x = load_part(h + c, n);
        const Normal normal = normal_of(x, (const T*)nullptr);
        const vf grad = rounded_as(load_part(dg + c, n) * slope_of(x, normal), (const T*)nullptr);
        store_part(sums + c, load_part(sums + c, n) + grad, n);
        store_part(dh + c, grad, n);
        store_part(g + c, gelu_of(x, normal), n);
      }
    }
  }
}

template <class T>
void column_sum(const ColumnSumArgs& a) {
  const int64_t per_chunk = ceil_div(a.rows, a.chunks);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    float* sums = a.partial + chunk * a.cols;
    memset(sums, 0, (size_t)a.cols * sizeof(float));
    const int64_t end = smaller(a.rows, (chunk + 1) * per_chunk);
    for (int64_t row = chunk * per_chunk; row < end; ++row) {
      const T* x = (const T*)a.x + row * a.stride;
      int64_t c = 0;
      for (; c + W <= a.cols; c += W) store(sums + c, load(sums + c) + load(x + c));
      for (; c < a.cols; ++c) sums[c] += to_float(x[c]);
    }
  }
}

void add_chunks(const float* partial, float* sums, int64_t chunks, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) {
    float total = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * cols + c];
    sums[c] = total;
  }
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(gelu_forward)(const GeluArgs& a) {
  a.type == BF16 ? forward<bf16>(a) : forward<float>(a);
  return true;
}

extern "C" bool AST_KERNEL(gelu_backward)(const GeluArgs& a) {
  a.type == BF16 ? backward<bf16>(a) : backward<float>(a);
  add_chunks(a.partial, a.dbias, a.chunks, a.cols);
  return true;
}

extern "C" bool AST_KERNEL(column_sum)(const ColumnSumArgs& a) {
  a.type == BF16 ? column_sum<bf16>(a) : column_sum<float>(a);
  add_chunks(a.partial, a.sums, a.chunks, a.cols);
  return true;
}

}  // namespace ast_fast
