// Real FFT of W frames at a time, one frame a SIMD lane: no shuffles, every twiddle is a broadcast.
//
// A real signal of n samples is read as n / 2 complex numbers z_j = x_2j + i x_2j+1 stored in digit-reversed order
// (`order`, so the caller's scatter costs nothing), transformed in place by decimation in time (one radix-2 stage
// when log2 of the power of two in it is odd, then radix 4, then 5 and 3), and split into the spectrum of x. Rows are
// W floats; real part of entry j in row 2j, imaginary part in row 2j + 1.
// Twiddles, stage after stage for sub-transform sizes m > 1 and radix r: for k < m the cos, sin of 2 pi q k / rm for
// q = 1 .. r - 1.
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

// y of a stage, multiplied by cos - i sin
AST_INLINE void twiddled(const vf* y, const float* w, vf* re, vf* im) {
  *re = y[0] * w[0] + y[1] * w[1];
  *im = y[1] * w[0] - y[0] * w[1];
}

// a - i b and a + i b
AST_INLINE void conjugate_pair(vf ar, vf ai, vf br, vf bi, vf* minus, vf* plus) {
  minus[0] = ar + bi;
  minus[1] = ai - br;
  plus[0] = ar - bi;
  plus[1] = ai + br;
}

AST_INLINE void radix3(float* rows, int64_t at, int64_t m, const float* w) {
  vf* y0 = row_at(rows, 2 * at);
  vf* y1 = row_at(rows, 2 * (at + m));
  vf* y2 = row_at(rows, 2 * (at + 2 * m));
  vf r1, i1, r2, i2;
  twiddled(y1, w, &r1, &i1);
  twiddled(y2, w + 2, &r2, &i2);
  const float turn = 0.866025403784438647f;  // sin(2 pi / 3)
  const vf sr = r1 + r2, si = i1 + i2, dr = (r1 - r2) * turn, di = (i1 - i2) * turn;
  const vf ar = y0[0] - sr * 0.5f, ai = y0[1] - si * 0.5f;
  y0[0] += sr;
  y0[1] += si;
  conjugate_pair(ar, ai, dr, di, y1, y2);
}

AST_INLINE void radix5(float* rows, int64_t at, int64_t m, const float* w) {
  vf* y[5];
  for (int q = 0; q < 5; ++q) y[q] = row_at(rows, 2 * (at + q * m));
  vf r1, i1, r2, i2, r3, i3, r4, i4;
  twiddled(y[1], w, &r1, &i1);
  twiddled(y[2], w + 2, &r2, &i2);
  twiddled(y[3], w + 4, &r3, &i3);
  twiddled(y[4], w + 6, &r4, &i4);
  // cos and sin of 2 pi / 5 and of twice that
  const float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
  const float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
  const vf pr = r1 + r4, pi = i1 + i4, qr = r2 + r3, qi = i2 + i3;
  const vf er = r1 - r4, ei = i1 - i4, fr = r2 - r3, fi = i2 - i3;
  const vf x0 = y[0][0], z0 = y[0][1];
  y[0][0] = x0 + (pr + qr);
  y[0][1] = z0 + (pi + qi);
  conjugate_pair(x0 + pr * c1 + qr * c2, z0 + pi * c1 + qi * c2, er * s1 + fr * s2, ei * s1 + fi * s2, y[1], y[4]);
  conjugate_pair(x0 + pr * c2 + qr * c1, z0 + pi * c2 + qi * c1, er * s2 - fr * s1, ei * s2 - fi * s1, y[2], y[3]);
}

// the first stage where nothing of the last quarter of the input is stored: it is zero
AST_INLINE void radix4_of_three(float* rows, int64_t at) {
  vf* a = row_at(rows, 2 * at);
  const vf ar = a[0], ai = a[1], br = a[2], bi = a[3], cr = a[4], ci = a[5];
  const vf sr = ar + cr, si = ai + ci, tr = ar - cr, ti = ai - ci;
  a[0] = sr + br;
  a[1] = si + bi;
  a[2] = tr + bi;
  a[3] = ti - br;
  a[4] = sr - br;
  a[5] = si - bi;
  a[6] = tr - bi;
  a[7] = ti + br;
}

// whether the power of two in `count` has an odd logarithm: the first stage is then of radix 2
AST_INLINE bool starts_in_radix2(int64_t count) { return __builtin_ctzll((unsigned long long)count) & 1; }

// How many of `count` inputs, of which `filled` are not zero, complex_fft reads in their natural order: of what lies
// in the last quarter the first stage needs no zeros.
AST_INLINE int64_t entries_read(int64_t count, int64_t filled) {
  if (count % 4 != 0 || starts_in_radix2(count)) return count;
  return filled > count / 4 * 3 ? filled : count / 4 * 3;
}

// z in digit-reversed order (`order`) becomes its transform in natural order; `count` is 2^a 3^b 5^c, a at least 1 (or
// 1). Inputs from entries_read(count, filled) on are not read.
void complex_fft(float* rows, int64_t count, const float* twiddles, const int32_t* order, int64_t filled) {
  int64_t m = 1;
  const int64_t even = count & -count;
  if (starts_in_radix2(count)) {
    for (int64_t at = 0; at < count; at += 2) {
      vf* a = row_at(rows, 2 * at);
      const vf ar = a[0], ai = a[1], br = a[2], bi = a[3];
      a[0] = ar + br;
      a[1] = ai + bi;
      a[2] = ar - br;
      a[3] = ai - bi;
    }
    m = 2;
  } else if (even >= 4) {
    const int64_t quarter = count / 4, whole = filled > 3 * quarter ? filled - 3 * quarter : 0;
    for (int64_t j = 0; j < whole; ++j) radix4(rows, order[j], 1, nullptr);
    for (int64_t j = whole; j < quarter; ++j) radix4_of_three(rows, order[j]);
    m = 4;
  }
  for (; m < even; m *= 4) {
    for (int64_t k = 0; k < m; ++k, twiddles += 6)
      for (int64_t at = k; at < count; at += 4 * m) radix4(rows, at, m, twiddles);
  }
  for (; count / m % 5 == 0; m *= 5) {
    for (int64_t k = 0; k < m; ++k, twiddles += 8)
      for (int64_t at = k; at < count; at += 5 * m) radix5(rows, at, m, twiddles);
  }
  for (; m < count; m *= 3) {
    for (int64_t k = 0; k < m; ++k, twiddles += 4)
      for (int64_t at = k; at < count; at += 3 * m) radix3(rows, at, m, twiddles);
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
