// LayerNorm, residual + LayerNorm, and their gradients. One row is read twice from cache; statistics are fp32 and the
// variance is taken about the mean. Weight gradients are summed over fixed chunks of rows, then over the chunks in
// order, so they do not depend on the number of threads.

#include "simd.h"

namespace {

using ast_fast::BF16;
using ast_fast::F32;
using ast_fast::LayerNormArgs;
using ast_fast::LayerNormGradArgs;

// four accumulators: shorter chains of additions, and smaller rounding errors
template <class Term>
AST_INLINE float row_sum(int64_t cols, Term term) {
  vf sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= cols; c += 4 * W)
    for (int i = 0; i < 4; ++i) sums[i] += term(c + i * W, W);
  for (; c + W <= cols; c += W) sums[0] += term(c, W);
  if (c < cols) sums[1] += term(c, cols - c);
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
AST_INLINE vf get(const T* p, int64_t count) {
  return count == W ? load(p) : load_part(p, count);
}
template <class T>
AST_INLINE void put(T* p, vf value, int64_t count) {
  if (count == W)
    store(p, value);
  else
    store_part(p, value, count);
}

AST_INLINE vf lanes_below(int64_t count) {
  float mask[W];
  for (int i = 0; i < W; ++i) mask[i] = i < count ? 1.0f : 0.0f;
  return load(mask);
}

template <class X, class R, class Y>
void forward_row(const LayerNormArgs& a, int64_t row) {
  const X* x = (const X*)a.x + row * a.x_stride;
  const int64_t cols = a.cols;
  Y* y = (Y*)a.y + row * cols;
  const auto normalise = [&](const auto* values) {
    const float mean = row_sum(cols, [&](int64_t c, int64_t n) { return get(values + c, n); }) / (float)cols;
    const float square = row_sum(cols, [&](int64_t c, int64_t n) {
      vf d = get(values + c, n) - mean;
      if (n < W) d *= lanes_below(n);
      return d * d;
    });
    const float rstd = 1.0f / __builtin_sqrtf(square / (float)cols + (float)a.eps);
    a.mean[row] = mean;
    a.rstd[row] = rstd;
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      // the statistics of the next row would wait for memory
      __builtin_prefetch(x + a.x_stride + c);
      if (a.residual) __builtin_prefetch((const R*)a.residual + (row + 1) * a.residual_stride + c);
      store(y + c, (load(values + c) - mean) * rstd * load(a.weight + c) + load(a.bias + c));
    }
    if (c < cols) {
      const int64_t n = cols - c;
      put(y + c, (get(values + c, n) - mean) * rstd * get(a.weight + c, n) + get(a.bias + c, n), n);
    }
  };
  if (a.residual) {
    const R* residual = (const R*)a.residual + row * a.residual_stride;
    R* total = (R*)a.total + row * cols;
    for (int64_t c = 0; c < cols; c += W) {
      const int64_t n = smaller(W, cols - c);
      put(total + c, get(x + c, n) + get(residual + c, n), n);
    }
    normalise(total);
  } else {
    normalise(x);
  }
}

template <class X, class R, class Y>
void forward(const LayerNormArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) forward_row<X, R, Y>(a, row);
}

template <class X, class R>
void forward_to(const LayerNormArgs& a) {
  if (a.y_type == BF16)
    forward<X, R, bf16>(a);
  else
    forward<X, R, float>(a);
}

// M rows at once: the sums for the weight gradients are read and written once for all of them
template <int M, class D, class X>
AST_INLINE void backward_rows(const LayerNormGradArgs& a, int64_t row, float* dweight, float* dbias) {
  const int64_t cols = a.cols;
  const D* dy = (const D*)a.dy + row * a.dy_stride;
  const X* x = (const X*)a.x + row * a.x_stride;
  X* dx = (X*)a.dx + row * cols;
  const float* weight = a.weight;
  const int64_t dy_stride = a.dy_stride, x_stride = a.x_stride;
  float mean[M], rstd[M];
  for (int m = 0; m < M; ++m) mean[m] = a.mean[row + m], rstd[m] = a.rstd[row + m];
  const auto hat = [&](int m, int64_t at, int64_t n) { return (get(x + m * x_stride + at, n) - mean[m]) * rstd[m]; };
  vf along[M] = {}, across[M] = {};
  const auto visit = [&](int64_t at, int64_t n) {
    const vf w = get(weight + at, n);
    vf dw = get(dweight + at, n), db = get(dbias + at, n);
    for (int m = 0; m < M; ++m) {
      const vf g = get(dy + m * dy_stride + at, n);
      vf h = hat(m, at, n);
      if (n < W) h *= lanes_below(n);
      const vf gw = g * w;
      along[m] += gw;
      across[m] += gw * h;
      dw += g * h;
      db += g;
    }
    put(dweight + at, dw, n);
    put(dbias + at, db, n);
  };
  int64_t c = 0;
  for (; c + W <= cols; c += W) {
    // the sums of the next rows would wait for memory; half of it now, so that memory is never idle
    for (int m = 0; m < M; ++m) __builtin_prefetch(x + (m + M) * x_stride + c);
    visit(c, W);
  }
  if (c < cols) visit(c, cols - c);
  for (int m = 0; m < M; ++m) {
    const float mean_g = horizontal_sum(along[m]) / (float)cols;
    const float mean_gh = horizontal_sum(across[m]) / (float)cols;
    const auto finish = [&](int64_t at, int64_t n) {
      const vf gw = get(dy + m * dy_stride + at, n) * get(weight + at, n);
      vf grad = (gw - mean_g - hat(m, at, n) * mean_gh) * rstd[m];
      if (a.dtotal) {
        const int64_t place = (row + m) * a.dtotal_stride + at;
        grad += a.dtotal_type == BF16 ? get((const bf16*)a.dtotal + place, n) : get((const float*)a.dtotal + place, n);
      }
      put(dx + m * cols + at, grad, n);
    };
    for (c = 0; c + W <= cols; c += W) {
      __builtin_prefetch(dy + (m + M) * dy_stride + c);
      finish(c, W);
    }
    if (c < cols) finish(c, cols - c);
  }
}

template <class D, class X>
void backward(const LayerNormGradArgs& a) {
  const int64_t per_chunk = ceil_div(a.rows, a.chunks);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    float* dweight = a.partial + chunk * 2 * a.cols;
    memset(dweight, 0, (size_t)a.cols * 2 * sizeof(float));
    const int64_t end = smaller(a.rows, (chunk + 1) * per_chunk);
    int64_t row = chunk * per_chunk;
    for (; row + 2 <= end; row += 2) backward_rows<2, D, X>(a, row, dweight, dweight + a.cols);
    for (; row < end; ++row) backward_rows<1, D, X>(a, row, dweight, dweight + a.cols);
  }
  for (int64_t c = 0; c < a.cols; ++c) {
    float dw = 0.0f, db = 0.0f;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      dw += a.partial[chunk * 2 * a.cols + c];
      db += a.partial[chunk * 2 * a.cols + a.cols + c];
    }
    a.dweight[c] = dw;
    a.dbias[c] = db;
  }
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(layer_norm_forward)(const LayerNormArgs& a) {
  if (a.x_type == BF16 && a.residual_type == BF16)
    forward_to<bf16, bf16>(a);
  else if (a.x_type == BF16)
    forward_to<bf16, float>(a);
  else if (a.residual_type == BF16)
    forward_to<float, bf16>(a);
  else
    forward_to<float, float>(a);
  return true;
}

extern "C" bool AST_KERNEL(layer_norm_backward)(const LayerNormGradArgs& a) {
  if (a.dy_type == BF16 && a.x_type == BF16)
    backward<bf16, bf16>(a);
  else if (a.dy_type == BF16)
    backward<bf16, float>(a);
  else if (a.x_type == BF16)
    backward<float, bf16>(a);
  else
    backward<float, float>(a);
  return true;
}

}  // namespace ast_fast
