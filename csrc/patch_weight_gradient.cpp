// Weight gradient of the patch embedding in fp32: dW^T = P^T dY over all tokens, P gathered block by block.
//
// Blocks of tokens follow one another and the threads share the columns and rows of the result, so that every element
// is summed in the same order whatever the number of threads.

#include "patch_tiles.h"

namespace {

using ast_fast::PatchWeightGradientArgs;

constexpr int64_t TOKENS = 128;  // of a block: a panel of dY takes a third of a first-level cache

void gather_token(const PatchWeightGradientArgs& a, int64_t token, float* patch, int64_t pitch) {
  const int64_t per_clip = a.f * a.t, clip = token / per_clip, place = token % per_clip;
  const float* corner = a.x + clip * a.x_stride_clip + place % a.t * a.tstride * a.x_stride_frame +
                        place / a.t * a.fstride;
  gather_patch(corner, a.x_stride_frame, a.pf, a.pt, patch, pitch);
}

void pack_token(const PatchWeightGradientArgs& a, int64_t token, float* packed) {
  const int64_t per_clip = a.f * a.t, clip = token / per_clip, place = token % per_clip;
  const float* row = a.dy + (clip * (a.prefix + per_clip) + a.prefix + place) * a.width;
  for (int64_t column = 0; column < a.width; column += NR)
    for (int64_t part = 0; part < NR; part += W)
      store(packed + column * TOKENS + part, load(row + column + part));
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(patch_weight_gradient)(const PatchWeightGradientArgs& a) {
  const int64_t tokens = a.clips * a.f * a.t, area = a.pf * a.pt, pitch = TOKENS * PATCH_STRIDE;
  const int64_t depths = ceil_div(area, DEPTH), panels = a.width / NR, groups = ceil_div(DEPTH, MR);
  Scratch scratch((size_t)(depths * pitch + a.width * TOKENS) * sizeof(float));
  float* patches = (float*)scratch.base;
  if (!patches) return false;
  // rows that only fill up a tile are multiplied too
  memset(patches, 0, (size_t)(depths * pitch) * sizeof(float));
  float* packed = patches + depths * pitch;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int64_t first = 0; first < tokens; first += TOKENS) {
    const int64_t count = smaller(TOKENS, tokens - first);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) {
      gather_token(a, first + k, patches + k * PATCH_STRIDE, pitch);
      pack_token(a, first + k, packed + k * NR);
    }
#pragma omp for schedule(static) collapse(2)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t group = 0; group < depths * groups; ++group) {
        const int64_t depth = group / groups, row = group % groups * MR;
        const int64_t rows = smaller(smaller(MR, DEPTH - row), area - depth * DEPTH - row);
        if (rows <= 0) continue;
        float tile[MR * NR];
        float* out = a.dweight + (panel * area + depth * DEPTH + row) * NR;
        micro<FloatUnit, 1, PATCH_STRIDE>(rows, patches + depth * pitch + row, packed + panel * TOKENS * NR, count,
                                          StridedRows<float>{tile, NR}, false);
        for (int64_t at = 0; at < rows * NR; at += W)
          store(out + at, first ? load(out + at) + load(tile + at) : load(tile + at));
      }
  }
  return true;
}

}  // namespace ast_fast
