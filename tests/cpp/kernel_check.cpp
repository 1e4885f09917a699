// Calls every kernel of one instruction set without Python and compares with plain loops in double precision.
// Built by the tests for machines and sanitizers that Python cannot easily run under; exit status 1 on any error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"
#include "log_mel_tables.h"

using namespace ast_fast;

namespace {

int failures = 0;

void expect(const char* what, double error, double limit) {
  const bool ok = error <= limit;
  std::printf("%-24s %.2e %s\n", what, error, ok ? "ok" : "TOO LARGE");
  failures += !ok;
}

std::vector<float> random_values(size_t count) {
  static unsigned long long state = 88172645463325252ull;
  std::vector<float> values(count);
  for (float& value : values) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    value = (float)((double)(state >> 11) / 9007199254740992.0) * 2.0f - 1.0f;
  }
  return values;
}

std::vector<uint16_t> as_bf16(std::vector<float>& values) {
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    halves[i] = (uint16_t)(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&values[i], &bits, 4);
  }
  return halves;
}
float from_bf16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void check_layer_norm(int threads) {
  const int64_t rows = 37, cols = 67, chunks = 2;
  auto x = random_values(rows * cols), w = random_values(cols), b = random_values(cols), dy = random_values(rows * cols);
  std::vector<float> y(rows * cols), mean(rows), rstd(rows), dx(rows * cols), partial(chunks * 2 * cols), dw(cols), db(cols);
  LayerNormArgs a{};
  a.x = x.data(), a.weight = w.data(), a.bias = b.data(), a.y = y.data(), a.mean = mean.data(), a.rstd = rstd.data();
  a.rows = rows, a.cols = cols, a.x_stride = cols, a.eps = 1e-6, a.threads = threads;
  AST_KERNEL(layer_norm_forward)(a);
  LayerNormGradArgs g{};
  g.dy = dy.data(), g.x = x.data(), g.weight = w.data(), g.mean = mean.data(), g.rstd = rstd.data(), g.dx = dx.data();
  g.partial = partial.data(), g.dweight = dw.data(), g.dbias = db.data(), g.rows = rows, g.cols = cols;
  g.dy_stride = g.x_stride = cols, g.chunks = chunks, g.threads = threads;
  AST_KERNEL(layer_norm_backward)(g);
  double forward = 0, backward = 0, bias = 0;
  std::vector<double> sums(cols);
  for (int64_t r = 0; r < rows; ++r) {
    double m = 0, v = 0, mg = 0, mgh = 0;
    for (int64_t c = 0; c < cols; ++c) m += x[r * cols + c] / (double)cols;
    for (int64_t c = 0; c < cols; ++c) v += std::pow(x[r * cols + c] - m, 2) / (double)cols;
    const double s = 1 / std::sqrt(v + 1e-6);
    for (int64_t c = 0; c < cols; ++c) {
      const double hat = (x[r * cols + c] - m) * s, gw = (double)dy[r * cols + c] * w[c];
      forward = std::fmax(forward, std::fabs(hat * w[c] + b[c] - y[r * cols + c]));
      mg += gw / (double)cols, mgh += gw * hat / (double)cols, sums[c] += dy[r * cols + c];
    }
    for (int64_t c = 0; c < cols; ++c) {
      const double hat = (x[r * cols + c] - m) * s, gw = (double)dy[r * cols + c] * w[c];
      backward = std::fmax(backward, std::fabs((gw - mg - hat * mgh) * s - dx[r * cols + c]));
    }
  }
  for (int64_t c = 0; c < cols; ++c) bias = std::fmax(bias, std::fabs(sums[c] - db[c]));
  expect("layer_norm y", forward, 2e-6);
  expect("layer_norm dx", backward, 5e-6);
  expect("layer_norm dbias", bias, 1e-5);
}

void check_gelu(int threads) {
  const int64_t rows = 11, cols = 53;
  auto h = random_values(rows * cols), dg = random_values(rows * cols);
  for (float& value : h) value *= 6.0f;
  std::vector<float> g(rows * cols), dh(rows * cols), partial(cols), sums(cols);
  GeluArgs a{};
  a.h = h.data(), a.dg = dg.data(), a.g = g.data(), a.dh = dh.data(), a.partial = partial.data(), a.dbias = sums.data();
  a.rows = rows, a.cols = cols, a.h_stride = a.dg_stride = cols, a.chunks = 1, a.threads = threads;
  AST_KERNEL(gelu_forward)(a);
  double forward = 0, backward = 0;
  for (int64_t i = 0; i < rows * cols; ++i)
    forward = std::fmax(forward, std::fabs(h[i] * 0.5 * std::erfc(-h[i] * std::sqrt(0.5)) - g[i]));
  AST_KERNEL(gelu_backward)(a);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const double slope = 0.5 * std::erfc(-h[i] * std::sqrt(0.5)) + h[i] * std::exp(-0.5 * h[i] * h[i]) * 0.3989422804014327;
    backward = std::fmax(backward, std::fabs(slope * dg[i] - dh[i]));
  }
  expect("gelu", forward, 2e-6);
  expect("gelu gradient", backward, 2e-6);
}

void check_patches(int threads) {
  const int64_t clips = 2, frames = 23, bins = 19;
  auto x = random_values(clips * frames * bins);
  PatchArgs a{};
  a.clips = clips, a.frames = frames, a.bins = bins, a.x_stride_clip = frames * bins, a.x_stride_frame = bins;
  a.pf = 5, a.pt = 4, a.fstride = 3, a.tstride = 2, a.prefix = 1, a.threads = threads;
  a.f = (bins - a.pf) / a.fstride + 1, a.t = (frames - a.pt) / a.tstride + 1;
  const int64_t area = a.pf * a.pt, tokens = a.prefix + a.f * a.t;
  std::vector<float> columns(clips * tokens * area), dx(x.size());
  a.x = x.data(), a.columns = columns.data(), a.dx = dx.data();
  AST_KERNEL(patch_gather)(a);
  double error = 0, product = 0, adjoint = 0;
  for (int64_t b = 0; b < clips; ++b)
    for (int64_t i = 0; i < a.f; ++i)
      for (int64_t j = 0; j < a.t; ++j)
        for (int64_t k = 0; k < area; ++k) {
          const int64_t s = j * a.tstride + k / a.pf, n = i * a.fstride + k % a.pf;
          const float value = columns[(b * tokens + a.prefix + i * a.t + j) * area + k];
          error = std::fmax(error, std::fabs((double)value - x[(b * frames + s) * bins + n]));
          product += (double)value * value;
        }
  AST_KERNEL(patch_scatter)(a);
  for (size_t i = 0; i < x.size(); ++i) adjoint += (double)dx[i] * x[i];
  expect("patches", error, 0.0);
  expect("patches, adjoint", std::fabs(adjoint - product) / product, 1e-6);
}

// Pairs of a mask with gaps: the last query sees nothing, the last key is seen by nobody.
bool sees(int64_t query, int64_t key) { return query < 100 && key < 202 && (query * 7 + key * 3) % 5 < 2; }

// Rectangles of one side: pass 0 has the even tokens of the other side as columns, pass 1 the odd ones.
struct Side {
  std::vector<int32_t> rows, columns;
  std::vector<int64_t> table;
  std::vector<uint8_t> seen;

  Side(int64_t num_rows, int64_t num_columns, bool by_key) {
    for (int64_t pass : {0, 1})
      for (int64_t first = 0; first < num_rows; first += 37) {
        const int64_t last = std::min(num_rows, first + 37), count = (num_columns + 1 - pass) / 2;
        const int64_t entry[] = {(int64_t)rows.size(), last - first, (int64_t)columns.size(), count,
                                 (int64_t)seen.size(), pass};
        table.insert(table.end(), entry, entry + 6);
        for (int64_t r = first; r < last; ++r) rows.push_back((int32_t)r);
        for (int64_t c = 0; c < count; ++c) columns.push_back((int32_t)(2 * c + pass));
        for (int64_t r = first; r < last; ++r)
          for (int64_t c = 0; c < count; ++c)
            seen.push_back(by_key ? sees(2 * c + pass, r) : sees(r, 2 * c + pass));
      }
  }
  RectangleList list() const {
    return {rows.data(), columns.data(), table.data(), seen.data(), (int64_t)table.size() / 6, (int64_t)seen.size()};
  }
};

void check_attention(int threads, bool half, bool masked, int64_t heads) {
  const int64_t tq = 101, tk = 203, width = 64, row = heads * width;
  auto q = random_values(tq * row), k = random_values(tk * row), v = random_values(tk * row), d_o = random_values(tq * row);
  for (float& value : q) value *= 3.0f;
  std::vector<uint16_t> hq, hk, hv, hdo;
  if (half) hq = as_bf16(q), hk = as_bf16(k), hv = as_bf16(v), hdo = as_bf16(d_o);
  std::vector<float> o(tq * row), lse(heads * 128), dq(tq * row), dk(tk * row), dv(tk * row);
  AttentionClip clip{};
  clip.tq = tq, clip.tk = clip.tk_padded = tk;
  AttentionArgs a{};
  a.q = half ? (void*)hq.data() : q.data(), a.k = half ? (void*)hk.data() : k.data();
  a.v = half ? (void*)hv.data() : v.data(), a.d_o = half ? (void*)hdo.data() : d_o.data();
  a.o = o.data(), a.lse = lse.data(), a.dq = dq.data(), a.dk = dk.data(), a.dv = dv.data(), a.clips = &clip;
  a.q_row = a.k_row = a.v_row = a.o_row = a.do_row = a.dq_row = a.dk_row = a.dv_row = row;
  a.q_head = a.k_head = a.v_head = a.o_head = a.do_head = a.dq_head = a.dk_head = a.dv_head = width;
  a.lse_head = 128, a.num_clips = 1, a.heads = heads, a.width = width, a.max_tq = tq, a.max_tk = tk;
  a.scale = 0.125f, a.type = half ? BF16 : F32, a.threads = threads;
  if (masked) {
    const Side by_query(tq, tk, false), by_key(tk, tq, true);
    const MaskedAttentionArgs m = {a, by_query.list(), by_key.list()};
    AST_KERNEL(attention_masked_forward)(m);
    AST_KERNEL(attention_masked_backward)(m);
  } else {
    AST_KERNEL(attention_forward)(a);
    AST_KERNEL(attention_backward)(a);
  }
  const auto read = [&](const std::vector<float>& values, int64_t at) {
    return half ? (double)from_bf16(((const uint16_t*)values.data())[at]) : (double)values[at];
  };
  double eo = 0, el = 0, eq = 0, ek = 0, ev = 0;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> rk(tk * width), rv(tk * width);
    for (int64_t i = 0; i < tq; ++i) {
      std::vector<double> p(tk), dp(tk), out(width), rq(width);
      double sum = 0, delta = 0;
      for (int64_t j = 0; j < tk; ++j) {
        double s = 0;
        for (int64_t d = 0; d < width; ++d) s += (double)q[i * row + h * width + d] * k[j * row + h * width + d];
        sum += p[j] = masked && !sees(i, j) ? 0.0 : std::exp(s * 0.125);
      }
      for (int64_t j = 0; j < tk; ++j) {
        if (sum > 0) p[j] /= sum;
        for (int64_t d = 0; d < width; ++d) {
          out[d] += p[j] * v[j * row + h * width + d];
          dp[j] += (double)d_o[i * row + h * width + d] * v[j * row + h * width + d];
        }
        delta += p[j] * dp[j];
      }
      for (int64_t j = 0; j < tk; ++j)
        for (int64_t d = 0; d < width; ++d) {
          const double ds = p[j] * (dp[j] - delta) * 0.125;
          rq[d] += ds * k[j * row + h * width + d];
          rk[j * width + d] += ds * q[i * row + h * width + d];
          rv[j * width + d] += p[j] * d_o[i * row + h * width + d];
        }
      const double exact = sum > 0 ? std::log(sum) : INFINITY;
      if (exact != lse[h * 128 + i]) el = std::fmax(el, std::fabs(exact - lse[h * 128 + i]));
      for (int64_t d = 0; d < width; ++d) {
        eo = std::fmax(eo, std::fabs(out[d] - read(o, i * row + h * width + d)));
        eq = std::fmax(eq, std::fabs(rq[d] - read(dq, i * row + h * width + d)));
      }
    }
    for (int64_t j = 0; j < tk; ++j)
      for (int64_t d = 0; d < width; ++d) {
        ek = std::fmax(ek, std::fabs(rk[j * width + d] - read(dk, j * row + h * width + d)));
        ev = std::fmax(ev, std::fabs(rv[j * width + d] - read(dv, j * row + h * width + d)));
      }
  }
  const double limit = half ? 2e-2 : 1e-5;
  std::printf("%s%s, %d heads\n", masked ? "masked" : "dense", half ? " bf16" : "", (int)heads);
  expect("attention o", eo, limit);
  expect("attention lse", el, 1e-5);
  expect("attention dq", eq, limit);
  expect("attention dk", ek, limit);
  expect("attention dv", ev, limit);
}

void check_log_mel(int threads, int64_t n_fft, bool magnitude) {
  const int64_t window = 27, hop = 10, bins = 5, samples = 400, half = n_fft / 2;
  std::vector<double> shape(window), filters(bins * (half + 1));
  for (int64_t n = 0; n < window; ++n) shape[n] = 0.5 - 0.5 * std::cos(6.283185307179586 * (double)n / (double)(window - 1));
  for (int64_t m = 0; m + 1 < bins; ++m)  // the last filter stays empty
    for (int64_t i = 1; i < 5; ++i) filters[m * (half + 1) + m * 3 + i] = 0.3 * (double)i;
  const LogMelTablesOwner owner(shape.data(), filters.data(), window, hop, n_fft, bins, 0.97, true, 1e-7, magnitude,
                                0.0);
  const auto wave = random_values(samples);
  const int64_t frames = 1 + (samples - window) / hop;
  std::vector<float> out(frames * bins), dy(frames * bins, 1.0f), dwave(samples);
  LogMelArgs a{};
  a.tables = &owner.tables, a.wave = wave.data(), a.lengths = &samples, a.out = out.data(), a.clips = 1;
  a.samples = a.wave_stride = samples, a.num_frames = frames, a.scale = 1, a.gain = 1, a.threads = threads;
  AST_KERNEL(log_mel_forward)(a);
  const auto exact = [&](const std::vector<double>& signal, double* worst) {
    double total = 0;
    for (int64_t s = 0; s < frames; ++s) {
      double mean = 0;
      for (int64_t n = 0; n < window; ++n) mean += signal[s * hop + n] / (double)window;
      std::vector<double> power(half + 1);
      for (int64_t k = 0; k <= half; ++k) {
        double re = 0, im = 0;
        for (int64_t n = 0; n < window; ++n) {
          const double now = signal[s * hop + n] - mean, before = signal[s * hop + (n ? n - 1 : 0)] - mean;
          const double value = (now - (double)0.97f * before) * shape[n];
          re += value * std::cos(6.283185307179586 * (double)(k * n) / (double)n_fft);
          im += value * std::sin(6.283185307179586 * (double)(k * n) / (double)n_fft);
        }
        power[k] = magnitude ? std::sqrt(re * re + im * im) : re * re + im * im;
      }
      for (int64_t m = 0; m < bins; ++m) {
        double energy = 0;
        for (int64_t k = 0; k <= half; ++k) energy += power[k] * filters[m * (half + 1) + k];
        const double value = std::log(energy > 1e-7 ? energy : 1e-7);
        total += value;
        if (worst) *worst = std::fmax(*worst, std::fabs(value - out[s * bins + m]));
      }
    }
    return total;
  };
  std::vector<double> signal(wave.begin(), wave.end());
  double worst = 0, slope = 0;
  exact(signal, &worst);
  expect("log_mel", worst, 1e-4);
  a.out = dy.data(), a.dwave = dwave.data();
  AST_KERNEL(log_mel_backward)(a);
  for (int64_t n : {0, 1, 150, 151, 399}) {
    auto up = signal, down = signal;
    up[n] += 1e-5, down[n] -= 1e-5;
    const double numeric = (exact(up, nullptr) - exact(down, nullptr)) / 2e-5;
    slope = std::fmax(slope, std::fabs(numeric - dwave[n]) / (1 + std::fabs(numeric)));
  }
  expect("log_mel gradient", slope, 1e-3);
}

}  // namespace

int main() {
  for (int threads : {1, 2}) {
    check_layer_norm(threads);
    check_gelu(threads);
    check_patches(threads);
    for (bool half : {false, true}) {
      check_attention(threads, half, false, 2);
      // few heads are shared by all threads, many are an item each
      check_attention(threads, half, true, 2);
      check_attention(threads, half, true, 8);
    }
    check_log_mel(threads, 32, false);
    check_log_mel(threads, 60, true);
  }
  return failures ? 1 : 0;
}
