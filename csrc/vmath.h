// exp, log and the normal distribution on vectors of floats, branch-free.
//
// Measured over all of their range (tests/cpp/test_vector_math.py): exp2 within 2e-7 relative, log within 1 ulp,
// the normal tail within 5e-7 relative down to where it underflows. NaN in gives NaN out; denormal results of exp2 become 0.
#pragma once

#include "simd.h"

namespace {

// splits y into its nearest integer and the rest in [-0.5, 0.5]; |y| < 2^22
AST_INLINE vf nearest(vf y) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (y + magic) - magic;
}

// p * 2^n for integral n in [-126, 127]; a NaN in p stays
AST_INLINE vf times_power_of_two(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * as_float((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

AST_INLINE vf exp2_of(vf y) {
  const vi tiny = y < -126.0f;
  y = select(tiny, splat(-126.0f), y);
  y = select(y > 127.0f, splat(127.0f), y);
  const vf n = nearest(y), f = y - n;
  vf p = splat(0.0013276466634124517f);
  p = p * f + 0.009675540961325169f;
  p = p * f + 0.05550713464617729f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0f;
  return select(tiny, splat(0.0f), times_power_of_two(p, n));
}

// e^x for x <= 88, with the reduction done in two parts so that large |x| keep their accuracy
AST_INLINE vf exp_of(vf x) {
  const vi tiny = x < -87.3f;
  x = select(tiny, splat(-87.3f), x);
  const vf n = nearest(x * 1.44269504088896341f);
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return select(tiny, splat(0.0f), times_power_of_two(p, n));
}

// natural logarithm of normal positive numbers (and of inf); 0 and less are the caller's to exclude
AST_INLINE vf log_of(vf x) {
  const vi bits = as_int(x);
  const vi shifted = bits - 0x3f3504f3;  // bits of sqrt(1/2)
  const vi exponent = shifted >> 23;
  const vf m = as_float(bits - (exponent << 23));  // in [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(exponent, vf);
  const vf f = m - 1.0f, z = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z - e * 2.12194440e-4f - z * 0.5f;
  const vf value = f + p + e * 0.693359375f;
  // inf and NaN have the largest exponent field and pass through
  return select((bits & 0x7f800000) == 0x7f800000, x, value);
}

struct Normal {
  vf tail;     // Phi(-|x|), the normal distribution's smaller tail
  vf density;  // exp(-x^2 / 2), without the 1 / sqrt(2 pi)
};

// One exponential and one division serve the tail and the density: Phi(-t) = exp(-t^2 / 2) * Q(t), where
// Q(t) = erfcx(t / sqrt 2) / 2 is smooth and is a polynomial of (t - 3) / (t + 3) to 1.1e-8 relative.
AST_INLINE Normal normal_of(vf x) {
  vf t = x < 0.0f ? -x : x;
  t = select(t > 15.0f, splat(15.0f), t);
  const vf s = (t - 3.0f) / (t + 3.0f);
  vf q = splat(5.267678352538496e-05f);
  q = q * s + 0.00011450474266894162f;
  q = q * s - 0.00033854643697850406f;
  q = q * s - 0.0009828225011005998f;
  q = q * s + 0.0029042139649391174f;
  q = q * s + 0.0061318110674619675f;
  q = q * s - 0.04621323570609093f;
  q = q * s + 0.12322505563497543f;
  q = q * s - 0.20640261471271515f;
  q = q * s + 0.12151394784450531f;
  // t * t is split so that its rounding error, multiplied by the exponential's steepness, does not show
  const vf high = as_float(as_int(t) & (int32_t)0xfffff000);
  const vf low = (t - high) * (t + high);
  const vf density = exp_of(high * high * -0.5f) * exp_of(low * -0.5f);
  return {density * q, density};
}

}  // namespace
