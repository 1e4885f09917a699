// Patches of a spectrogram as the rows of a matrix, ready for the projection's GEMM, and the adjoint.
//
// A row holds one token's patch with TIME as the slower axis, so that each of its pt runs of pf bins is one copy of
// contiguous memory; the caller permutes the (small) weight to match. The first `prefix` rows of every clip, the
// class tokens', are zero: the GEMM can then write a clip's whole token matrix.

#include "simd.h"

namespace {

using ast_fast::BF16;
using ast_fast::PatchArgs;

template <class T>
void gather(const PatchArgs& a) {
  const int64_t tokens = a.f * a.t, width = a.pt * a.pf;
  T* columns = (T*)a.columns;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t task = 0; task < a.clips * a.f; ++task) {
    const int64_t clip = task / a.f, i = task % a.f;
    T* rows = columns + clip * (tokens + a.prefix) * width;
    if (i == 0) memset(rows, 0, (size_t)(a.prefix * width) * sizeof(T));
    rows += (a.prefix + i * a.t) * width;
    const T* bins = (const T*)a.x + clip * a.x_stride_clip + i * a.fstride;
    for (int64_t j = 0; j < a.t; ++j)
      for (int64_t k = 0; k < a.pt; ++k, rows += a.pf) {
        const T* run = bins + (j * a.tstride + k) * a.x_stride_frame;
        if (a.pf == 16)
          memcpy(rows, run, 16 * sizeof(T));
        else
          memcpy(rows, run, (size_t)a.pf * sizeof(T));
      }
  }
}

AST_INLINE void put(float* p, float value) { *p = value; }
AST_INLINE void put(bf16* p, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  p->bits = value == value ? (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : (uint16_t)0x7fc0;
}

// every frame gathers from the patches that cover it, in order, in fp32
template <class T>
bool scatter(const PatchArgs& a) {
  const int64_t tokens = a.f * a.t, width = a.pt * a.pf;
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Scratch scratch((size_t)a.bins * sizeof(float));
    float* sums = (float*)scratch.base;
    if (!sums) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.clips * a.frames; ++task) {
      if (!sums) continue;
      const int64_t clip = task / a.frames, s = task % a.frames;
      const T* rows = (const T*)a.columns + (clip * (tokens + a.prefix) + a.prefix) * width;
      memset(sums, 0, (size_t)a.bins * sizeof(float));
      const int64_t before = s - a.pt + 1;
      for (int64_t j = before > 0 ? ceil_div(before, a.tstride) : 0; j < a.t && j * a.tstride <= s; ++j)
        for (int64_t i = 0; i < a.f; ++i) {
          const T* run = rows + (i * a.t + j) * width + (s - j * a.tstride) * a.pf;
          float* target = sums + i * a.fstride;
          for (int64_t n = 0; n < a.pf; ++n) target[n] += to_float(run[n]);
        }
      T* dx = (T*)a.dx + task * a.bins;
      for (int64_t n = 0; n < a.bins; ++n) put(dx + n, sums[n]);
    }
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(patch_gather)(const PatchArgs& a) {
  a.type == BF16 ? gather<bf16>(a) : gather<float>(a);
  return true;
}

extern "C" bool AST_KERNEL(patch_scatter)(const PatchArgs& a) {
  return a.type == BF16 ? scatter<bf16>(a) : scatter<float>(a);
}

}  // namespace ast_fast
