// Kaldi log-mel filterbank, W frames at a time in SIMD lanes: mean removal, pre-emphasis, window, real FFT, sparse mel
// filters, log, normalisation and padding in one pass from int16 or float samples to fp32 or bf16 features.

#include "log_mel_frames.h"

namespace {

using ast_fast::BF16;
using ast_fast::I16;

template <class T, class O>
void group_of_frames(const LogMelArgs& a, int64_t clip, int64_t first, int64_t valid, float* rows, float* mels) {
  const LogMelTables& t = *a.tables;
  const int64_t bins = t.num_mel_bins;
  O* out = (O*)a.out + clip * a.num_frames * bins;
  const int64_t end = smaller(first + W, a.num_frames);
  if (first >= valid) {
    const vf padding = splat(a.shift);
    for (int64_t c = first * bins; c < end * bins; c += W)
      if (c + W <= end * bins)
        store(out + c, padding);
      else
        store_part(out + c, padding, end * bins - c);
    return;
  }
  transform_frames(a, (const T*)a.wave + clip * a.wave_stride, first, valid - 1, rows);
  powers(t, rows, rows);
  const float* weights = t.mel_weights;
  const vf at_floor = splat(t.log_of_floor * a.gain + a.shift);
  for (int64_t m = 0; m < bins; ++m) {
    const vf energy = mel_energy(t, rows, m, weights);
    weights += t.mel_count[m];
    *row_at(mels, m) = select(energy <= t.log_floor, at_floor, log_of(energy) * a.gain + a.shift);
  }
  for (int64_t m = 0; m < bins; m += W) {
    vf tile[W];
    for (int i = 0; i < W; ++i) tile[i] = *row_at(mels, m + i);
    transpose(tile);
    const int64_t count = smaller(W, bins - m);
    for (int64_t frame = first; frame < end; ++frame) {
      const vf value = frame < valid ? tile[frame - first] : splat(a.shift);
      O* target = out + frame * bins + m;
      if (count == W)
        store(target, value);
      else
        store_part(target, value, count);
    }
  }
}

template <class T, class O>
bool forward(const LogMelArgs& a) {
  const LogMelTables& t = *a.tables;
  const int64_t groups = ceil_div(a.num_frames, W);
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const size_t rows_bytes = (size_t)t.n_fft * W * sizeof(float);
    const size_t mels_bytes = (size_t)round_up(t.num_mel_bins, W) * W * sizeof(float);
    Scratch scratch(rows_bytes + mels_bytes);
    float* rows = (float*)scratch.base;
    float* mels = (float*)(scratch.base + rows_bytes);
    if (rows) memset(mels, 0, mels_bytes);
    // dynamic: a core that is busy with other work should not be waited for
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < a.clips * groups; ++task) {
      if (!rows) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const int64_t clip = task / groups, first = task % groups * W;
      const int64_t valid = smaller(frames_of(t, a.lengths[clip]), a.num_frames);
      group_of_frames<T, O>(a, clip, first, valid, rows, mels);
    }
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(log_mel_forward)(const LogMelArgs& a) {
  if (a.wave_type == I16) return a.out_type == BF16 ? forward<int16_t, bf16>(a) : forward<int16_t, float>(a);
  return a.out_type == BF16 ? forward<float, bf16>(a) : forward<float, float>(a);
}

}  // namespace ast_fast
