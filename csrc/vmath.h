// exp2, log and the normal distribution on vectors of floats, branch-free.
//
// Errors (held by tests/cpp): exp2 2e-7 relative, log about 1 ulp, the normal tail 1e-7 where it matters and, through
// the steepness of the exponential, up to 1e-5 relative where it is below 1e-30. NaN in gives NaN out.
#pragma once

#include "simd.h"

namespace {

// splits y into its nearest integer and the rest in [-0.5, 0.5]; |y| < 2^22
AST_INLINE vf nearest(vf y) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (y + magic) - magic;
}

// p * 2^n where n is the whole part of y; 0 where 2^y would be denormal
AST_INLINE vf scaled(vf p, vf n, vf y) {
#if defined(__AVX512F__)
  // "not less than" is true of NaN, which then comes through
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const vf power = as_float((__builtin_convertvector(n, vi) + 127) << 23);
  return select(y < -126.0f, splat(0.0f), p * power);
#endif
}

// 2^y; within 2e-7 of it relatively, 0 where that would be denormal, 2^127 beyond it
AST_INLINE vf exp2_of(vf y) {
  const vf bounded = at_most(splat(127.0f), at_least(splat(-127.0f), y));
  const vf n = nearest(bounded), f = bounded - n;
  vf p = splat(0.0013276466634124517f);
  p = p * f + 0.009675540961325169f;
  p = p * f + 0.05550713464617729f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0f;
  return scaled(p, n, y);
}

// natural logarithm of normal positive numbers (and of inf); 0 and less are the caller's to exclude.
// x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh(s) for s = (m - 1) / (m + 1), as 2 s = f - s f with
// f = m - 1 exact; the even rest is a polynomial of s^2 to 8e-10 relative, and ln 2 is split in two.
AST_INLINE vf log_of(vf x) {
  const vi bits = as_int(x);
  const vi shifted = bits - 0x3f3504f3;  // bits of sqrt(1/2)
  const vf m = as_float(bits - (shifted & (int32_t)0xff800000));
  const vf e = __builtin_convertvector(shifted >> 23, vf);
  const vf f = m - 1.0f, s = f / (m + 1.0f), z = s * s;
  const vf r = (z * 0.29871863235384943f + 0.3997753693713825f) * z + 0.6666677641555486f;
  const vf value = f - (s * (f - z * r) + e * 2.12194440e-4f) + e * 0.693359375f;
  // inf and NaN have the largest exponent field and pass through
  return select((bits & 0x7f800000) == 0x7f800000, x, value);
}

// 1 / x of normal numbers well inside the range: within 2 ulp, or 6e-5 where that is enough
template <bool FINE = true>
AST_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)x);
  return FINE ? guess + guess * (1.0f - x * guess) : guess;
#else
  return 1.0f / x;
#endif
}

struct Normal {
  vf size;     // |x|, at most 15: nothing of the tail is left in fp32 beyond
  vf tail;     // Phi(-|x|), the normal distribution's smaller tail
  vf density;  // exp(-x^2 / 2), without the 1 / sqrt(2 pi)
};

// One exponential and one division serve the tail and the density: Phi(-t) = exp(-t^2 / 2) * Q(t), where
// Q(t) = erfcx(t / sqrt 2) / 2 is smooth and is a polynomial of (t - 3) / (t + 3) to 1.1e-8 relative.
AST_INLINE Normal normal_of(vf x, const float*) {
  const vf t = at_most(splat(15.0f), as_float(as_int(x) & 0x7fffffff));
  const vf s = 1.0f - 6.0f * reciprocal(t + 3.0f);
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
  const vf density = exp2_of(t * t * -0.7213475204444817f);
  return {t, density * q, density};
}

// The same for results that are rounded to bf16 (4e-3): 2.5e-4 relative, with half the terms.
AST_INLINE Normal normal_of(vf x, const bf16*) {
  const vf t = at_most(splat(15.0f), as_float(as_int(x) & 0x7fffffff));
  const vf s = 1.0f - 8.0f * reciprocal<false>(t + 4.0f);
  vf q = splat(-0.007768203970044851f);
  q = q * s + 0.0311574786901474f;
  q = q * s - 0.07195662707090378f;
  q = q * s + 0.12434409558773041f;
  q = q * s - 0.17037606239318848f;
  q = q * s + 0.09441067278385162f;
  const vf y = t * t * -0.7213475204444817f;
  const vf n = nearest(y), f = y - n;
  vf p = splat(0.0551716685295105f);
  p = p * f + 0.2426111400127411f;
  p = p * f + 0.6932609677314758f;
  p = p * f + 0.9999280571937561f;
  const vf density = scaled(p, n, y);
  return {t, density * q, density};
}

}  // namespace
