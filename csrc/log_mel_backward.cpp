// Gradient of log-mel with respect to the waveform: the exact adjoint of the forward pass, whose spectra are computed
// again rather than kept. W frames at a time; frame gradients go to a buffer of their own and every sample then sums
// the frames that cover it in order, so the result does not depend on the number of threads.
//
// With P_k = |X_k|^2 and g_k = dL/dP_k, dL/dx_n = sum over k of 2 g_k Re(X_k e^{i theta k n}): an inverse real FFT of
// Y_k = g_k X_k. It runs on the forward transform by swapping real and imaginary parts.

#include "log_mel_frames.h"

namespace {

// dL/d(windowed frame) of the W frames in `rows` (their transform on entry), left in `spectrum` with sample n of entry
// n/2 at row n ^ 1: the swap that turns the forward transform into the inverse one
void inverse_of_weighted(const LogMelTables& t, const float* rows, const float* bin_grads, float* spectrum) {
  const int64_t half = t.n_fft / 2;
  const vf* z = (const vf*)rows;
  const vf* g = (const vf*)bin_grads;
  const auto put = [&](int64_t k, vf re, vf im) {
    vf* target = row_at(spectrum, 2 * t.order[k]);
    target[0] = im;
    target[1] = re;
  };
  // halved input: X_0 and X_half carry a factor 2, as do their terms, which stand alone in the sum
  const vf y0 = (z[0] + z[1]) * g[0] * 4.0f, yh = (z[0] - z[1]) * g[half] * 4.0f;
  put(0, y0 + yh, y0 - yh);
  for (int64_t k = 1; 2 * k < half; ++k) {
    Complex xk, xm;
    const float* w = t.split + 2 * k;
    split_pair(z + 2 * k, z + 2 * (half - k), w, &xk, &xm);
    const vf ar = xk.re * g[k], ai = xk.im * g[k];
    const vf br = xm.re * g[half - k], bi = -(xm.im * g[half - k]);  // the conjugate
    const vf er = ar + br, ei = ai + bi, dr = ar - br, di = ai - bi;
    const vf odd_re = dr * w[0] - di * w[1], odd_im = di * w[0] + dr * w[1];
    put(k, er - odd_im, ei + odd_re);
    put(half - k, er + odd_im, odd_re - ei);
  }
  if (half >= 2) {
    // X at n/4 is the conjugate of z there, times 2 for the halved input; it pairs with itself
    const vf yr = z[half] * g[half / 2] * 2.0f, yi = -(z[half + 1] * g[half / 2] * 2.0f);
    put(half / 2, yr * 2.0f, yi * -2.0f);
  }
  complex_fft(spectrum, half, t.twiddles, t.order, half);
}

// gradients of frames first .. of one clip -> frame_grads [frames, window rounded up to W]
void group_of_frames(const LogMelArgs& a, int64_t clip, int64_t first, int64_t valid, float* rows, float* power,
                     float* frame_grads) {
  const LogMelTables& t = *a.tables;
  const int64_t bins = t.num_mel_bins, half = t.n_fft / 2, window = t.window_samples;
  const float* dy = (const float*)a.out + clip * a.num_frames * bins;
  const int64_t pitch = round_up(window, W);
  transform_frames(a, (const float*)a.wave + clip * a.wave_stride, first, valid - 1, rows);
  powers(t, rows, power);

  // bin gradients follow the powers in the same scratch, one row a bin
  float* bin_grads = power + t.n_fft * W;
  memset(bin_grads, 0, (size_t)(half + 1) * W * sizeof(float));
  const float* weights = t.mel_weights;
  for (int64_t m = 0; m < bins; ++m) {
    const vf energy = mel_energy(t, power, m, weights);
    float upstream[W];
    for (int i = 0; i < W; ++i) upstream[i] = first + i < valid ? dy[(first + i) * bins + m] : 0.0f;
    const vf grad = select(energy <= t.log_floor, vf{}, load(upstream) * a.gain / energy);
    for (int64_t i = 0; i < t.mel_count[m]; ++i) *row_at(bin_grads, t.mel_start[m] + i) += grad * weights[i];
    weights += t.mel_count[m];
  }
  if (t.magnitude)
    for (int64_t k = 0; k <= half; ++k) {
      const vf size = *row_at(power, power_row(k, half));
      vf* grad = row_at(bin_grads, k);
      *grad = select(size <= 0.0f, vf{}, *grad * 0.5f / size);
    }
  inverse_of_weighted(t, rows, bin_grads, power);

  // adjoint of window, pre-emphasis and mean removal, from the last sample to the first; results overwrite `rows`
  vf after = {}, sum = {};
  for (int64_t n = window - 1; n >= 0; --n) {
    // the table's window is halved for the transform
    const vf value = *row_at(power, n ^ 1) * (2.0f * t.window[n]);
    vf grad = value - after * t.preemphasis;
    if (n == 0) grad -= value * t.preemphasis;
    after = value;
    sum += grad;
    *row_at(rows, n) = grad;
  }
  const vf mean = t.remove_dc ? sum * (1.0f / (float)window) : vf{};
  for (int64_t n = 0; n < window; n += W) {
    vf tile[W];
    for (int i = 0; i < W; ++i) tile[i] = n + i < window ? *row_at(rows, n + i) - mean : vf{};
    transpose(tile);
    for (int i = 0; i < W && first + i < valid; ++i) store(frame_grads + (first + i) * pitch + n, tile[i]);
  }
}

// samples begin .. end of one clip gather from the frames that cover them
void overlap_add(const LogMelTables& t, const float* frame_grads, int64_t valid, int64_t begin, int64_t end,
                 float* dwave) {
  const int64_t pitch = round_up(t.window_samples, W);
  const int64_t before = begin - t.window_samples + 1;
  int64_t frame = before > 0 ? ceil_div(before, t.hop_samples) : 0;
  for (; frame < valid && frame * t.hop_samples < end; ++frame) {
    const int64_t start = frame * t.hop_samples;
    const int64_t from = start > begin ? start : begin, to = smaller(end, start + t.window_samples);
    const float* grads = frame_grads + frame * pitch - start;
    for (int64_t n = from; n < to; ++n) dwave[n] += grads[n];
  }
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(log_mel_backward)(const LogMelArgs& a) {
  const LogMelTables& t = *a.tables;
  const int64_t pitch = round_up(t.window_samples, W);
  const int64_t block = 4096;
  int64_t most = 0;
  for (int64_t clip = 0; clip < a.clips; ++clip) {
    const int64_t valid = smaller(frames_of(t, a.lengths[clip]), a.num_frames);
    most = valid > most ? valid : most;
  }
  if (most == 0) return true;
  Scratch frame_grads((size_t)(most * pitch) * sizeof(float));
  if (!frame_grads.base) return false;
  float* grads = (float*)frame_grads.base;
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const size_t rows_bytes = (size_t)t.n_fft * W * sizeof(float);
    Scratch scratch(rows_bytes * 3 + 2 * W * sizeof(float));
    float* rows = (float*)scratch.base;
    float* power = (float*)(scratch.base + rows_bytes);
    if (!rows) {
#pragma omp atomic write
      failed = 1;
    }
    for (int64_t clip = 0; clip < a.clips; ++clip) {
      const int64_t valid = smaller(frames_of(t, a.lengths[clip]), a.num_frames);
      const int64_t groups = ceil_div(valid, W);
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups; ++group)
        if (rows) group_of_frames(a, clip, group * W, valid, rows, power, grads);
      const int64_t covered = valid ? (valid - 1) * t.hop_samples + t.window_samples : 0;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < ceil_div(covered, block); ++part)
        overlap_add(t, grads, valid, part * block, smaller(covered, (part + 1) * block),
                    a.dwave + clip * a.samples);
    }
  }
  return !failed;
}

}  // namespace ast_fast
