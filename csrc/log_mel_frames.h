// The half of log-mel that forward and backward share: W frames from the waveform to the half-size transform, and
// the mel energies from the powers.
#pragma once

#include "fft.h"
#include "vmath.h"

namespace {

using ast_fast::LogMelArgs;
using ast_fast::LogMelTables;

AST_INLINE int64_t frames_of(const LogMelTables& t, int64_t length) {
  return length < t.window_samples ? 0 : 1 + (length - t.window_samples) / t.hop_samples;
}

// Samples n .. n + W - 1 of W frames, less their mean, pre-emphasised and windowed, to where the transform wants them.
// Takes and returns the sample before the next one. WHOLE: none lies behind the window (a tile whose loads are known
// at compile time stays in registers).
template <bool WHOLE, class T>
AST_INLINE vf window_tile(const LogMelArgs& a, const T* const* lane, int64_t n, vf mean, vf before, float* rows) {
  const LogMelTables& t = *a.tables;
  vf tile[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) tile[i] = WHOLE ? load(lane[i] + n) : load_part(lane[i] + n, t.window_samples - n);
  transpose(tile);
  if (n == 0) before = tile[0] * a.scale - mean;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const vf centred = tile[i] * a.scale - mean;
    const vf value = (centred - before * t.preemphasis) * t.window[n + i];
    before = centred;
    if (WHOLE || n + i < t.window_samples) *row_at(rows, 2 * t.order[(n + i) >> 1] + (i & 1)) = value;
  }
  return before;
}

// Frames first .. first + W - 1, lanes past `last` repeating it (their results are dropped).
// Leaves the transform of the halved, windowed frames in `rows` (n_fft rows).
template <class T>
void transform_frames(const LogMelArgs& a, const T* wave, int64_t first, int64_t last, float* rows) {
  const LogMelTables& t = *a.tables;
  const int64_t window = t.window_samples, whole = window / W * W;
  const T* lane[W];
  for (int i = 0; i < W; ++i) lane[i] = wave + smaller(first + i, last) * t.hop_samples;

  vf mean = {};
  if (t.remove_dc) {
    vf sums[W];
    for (int i = 0; i < W; ++i) {
      vf s0 = {}, s1 = {};
      int64_t n = 0;
      for (; n + 2 * W <= window; n += 2 * W) {
        s0 += load(lane[i] + n);
        s1 += load(lane[i] + n + W);
      }
      for (; n + W <= window; n += W) s0 += load(lane[i] + n);
      if (n < window) s1 += load_part(lane[i] + n, window - n);
      sums[i] = s0 + s1;
    }
    transpose(sums);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    mean = sums[0] * (a.scale / (float)window);
  }

  vf before = {};
  for (int64_t n = 0; n < whole; n += W) before = window_tile<true>(a, lane, n, mean, before, rows);
  if (whole < window) window_tile<false>(a, lane, whole, mean, before, rows);
  const int64_t half = t.n_fft / 2, filled = (window + 1) / 2;
  for (int64_t n = window; n < 2 * entries_read(half, filled); ++n) *row_at(rows, 2 * t.order[n >> 1] + (n & 1)) = vf{};
  complex_fft(rows, half, t.twiddles, t.order, filled);
}

// |spectrum|^2: entry k of the transform makes place for power k in row 2k; the last one (n_fft / 2) goes to row 1
AST_INLINE void powers(const LogMelTables& t, const float* from, float* to) {
  const int64_t half = t.n_fft / 2;
  const vf* z = (const vf*)from;
  const vf dc = (z[0] + z[1]) * 2.0f, nyquist = (z[0] - z[1]) * 2.0f;
  vf* p = (vf*)to;
  for (int64_t k = 1; 2 * k < half; ++k) {
    Complex xk, xm;
    split_pair(z + 2 * k, z + 2 * (half - k), t.split + 2 * k, &xk, &xm);
    p[2 * k] = xk.re * xk.re + xk.im * xk.im;
    p[2 * (half - k)] = xm.re * xm.re + xm.im * xm.im;
  }
  if (half >= 2) p[half] = (z[half] * z[half] + z[half + 1] * z[half + 1]) * 4.0f;
  p[0] = dc * dc;
  p[1] = nyquist * nyquist;
  if (t.magnitude) {
    for (int64_t k = 0; k < half; ++k) p[2 * k] = square_root(p[2 * k]);
    p[1] = square_root(p[1]);
  }
}

AST_INLINE int64_t power_row(int64_t bin, int64_t half) { return bin == half ? 1 : 2 * bin; }

// of one filter, with the offset
AST_INLINE vf mel_energy(const LogMelTables& t, const float* power, int64_t mel, const float* weights) {
  const int64_t half = t.n_fft / 2, start = t.mel_start[mel], count = t.mel_count[mel];
  vf sum = {};
  if (start + count <= half) {
    const vf* p = (const vf*)(power + 2 * start * W);
    for (int64_t i = 0; i < count; ++i) sum += p[2 * i] * weights[i];
  } else {
    for (int64_t i = 0; i < count; ++i) sum += *(const vf*)(power + power_row(start + i, half) * W) * weights[i];
  }
  return sum + t.log_offset;
}

}  // namespace
