// Real FFT of W frames at a time, one frame a SIMD lane: no shuffles, every twiddle is a broadcast.
//
// A real signal of n samples is read as n / 2 complex numbers z_j = x_2j + i x_2j+1 stored in digit-reversed order
// (`order`, so the caller's scatter costs nothing), transformed in place by decimation in time (one radix-2 stage
// when log2 is odd, then radix 4), and split into the spectrum of x. Rows are W floats; real part of entry j in row
// 2j, imaginary part in row 2j + 1.
// Twiddles, stage after stage for sub-transform sizes m > 1: for k < m the cos, sin of 2 pi q k / 4m for q = 1, 2, 3.
#pragma once

#include "simd.h"

namespace {

AST_INLINE vf* row_at(float* rows, int64_t index) { return (vf*)(rows + index * W); }

AST_INLINE void radix4(float* rows, int64_t at, int64_t m, const float* w) {
  vf* a = row_at(rows, 2 * at);
  vf* b = row_at(rows, 2 * (at + m));
  vf* c = row_at(rows, 2 * (at + 2 * m));
  vf* d = row_at(rows, 2 * (at + 3 * m));
  const vf ar = a[0], ai = a[1];
  vf br = b[0], bi = b[1], cr = c[0], ci = c[1], dr = d[0], di = d[1];
  if (w) {
    // multiply by cos - i sin
    vf t = br * w[0] + bi * w[1];
    bi = bi * w[0] - br * w[1];
    br = t;
    t = cr * w[2] + ci * w[3];
    ci = ci * w[2] - cr * w[3];
    cr = t;
    t = dr * w[4] + di * w[5];
    di = di * w[4] - dr * w[5];
    dr = t;
  }
  const vf sr = ar + cr, si = ai + ci, tr = ar - cr, ti = ai - ci;
  const vf ur = br + dr, ui = bi + di, vr = br - dr, vi_ = bi - di;
  a[0] = sr + ur;
  a[1] = si + ui;
  b[0] = tr + vi_;
  b[1] = ti - vr;
  c[0] = sr - ur;
  c[1] = si - ui;
  d[0] = tr - vi_;
  d[1] = ti + vr;
}

// z in digit-reversed order becomes its transform in natural order
void complex_fft(float* rows, int64_t count, const float* twiddles) {
  int64_t m = 1;
  if (__builtin_ctzll((unsigned long long)count) & 1) {
    for (int64_t at = 0; at < count; at += 2) {
      vf* a = row_at(rows, 2 * at);
      const vf ar = a[0], ai = a[1], br = a[2], bi = a[3];
      a[0] = ar + br;
      a[1] = ai + bi;
      a[2] = ar - br;
      a[3] = ai - bi;
    }
    m = 2;
  } else if (count >= 4) {
    for (int64_t at = 0; at < count; at += 4) radix4(rows, at, 1, nullptr);
    m = 4;
  }
  for (; m < count; m *= 4) {
    for (int64_t k = 0; k < m; ++k, twiddles += 6)
      for (int64_t at = k; at < count; at += 4 * m) radix4(rows, at, m, twiddles);
  }
}

struct Complex {
  vf re, im;
};

// From the transform of z to entries k and n/2 - k of the spectrum of x, for 0 < k < n/4; z is of a signal that was
// halved beforehand, which saves the factor 1/2 here. `w` holds cos, sin of 2 pi k / n.
AST_INLINE void split_pair(const vf* zk, const vf* zm, const float* w, Complex* xk, Complex* xm) {
  const vf er = zk[0] + zm[0], ei = zk[1] - zm[1];
  const vf odd_re = zk[1] + zm[1], odd_im = zm[0] - zk[0];
  const vf tr = odd_re * w[0] + odd_im * w[1];
  const vf ti = odd_im * w[0] - odd_re * w[1];
  *xk = {er + tr, ei + ti};
  *xm = {er - tr, ti - ei};
}

}  // namespace
