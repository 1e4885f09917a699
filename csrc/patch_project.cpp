// Patch embedding in fp32 without a matrix of patches: blocks of tokens are gathered into cache, multiplied with the
// packed weight, and position table and bias are added as the result is written.

#include "patch_tiles.h"

namespace {

using ast_fast::PatchProjectArgs;

constexpr int64_t TOKENS = 8 * MR;  // tokens of a work item

void block_of_tokens(const PatchProjectArgs& a, int64_t clip, int64_t first, const float* packed, float* patches,
                     float* tile) {
  const int64_t tokens = a.f * a.t, area = a.pf * a.pt, rows = smaller(TOKENS, tokens - first);
  const float* x = a.x + clip * a.x_stride_clip;
  const int64_t pitch = TOKENS * PATCH_STRIDE;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = (first + r) / a.t, j = (first + r) % a.t;
    gather_patch(x + j * a.tstride * a.x_stride_frame + i * a.fstride, a.x_stride_frame, a.pf, a.pt,
                 patches + r * PATCH_STRIDE, pitch);
  }
  const float* table = a.table + (a.prefix + first) * a.width;
  float* y = a.y + (clip * (a.prefix + tokens) + a.prefix + first) * a.width;
  for (int64_t column = 0; column < a.width; column += NR)
    for (int64_t r = 0; r < rows; r += MR) {
      const int64_t count = smaller(MR, rows - r);
      for (int64_t k = 0; k < area; k += DEPTH)
        micro<FloatUnit, PATCH_STRIDE, 1>(count, patches + k / DEPTH * pitch + r * PATCH_STRIDE,
                                          packed + column * area + k * NR, smaller(DEPTH, area - k),
                                          StridedRows<float>{tile, NR}, k > 0);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t c = 0; c < NR; c += W) {
          const int64_t at = (r + n) * a.width + column + c;
          store(y + at, load(tile + n * NR + c) + load(table + at));
        }
    }
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(patch_project)(const PatchProjectArgs& a) {
  const int64_t tokens = a.f * a.t, area = a.pf * a.pt;
  const int64_t blocks = ceil_div(tokens, TOKENS), depths = ceil_div(area, DEPTH);
  Scratch weights((size_t)(a.width * area) * sizeof(float));
  float* packed = (float*)weights.base;
  if (!packed) return false;
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const size_t patch_bytes = (size_t)(depths * TOKENS * PATCH_STRIDE) * sizeof(float);
    Scratch scratch(patch_bytes + MR * NR * sizeof(float));
    float* patches = (float*)scratch.base;
    if (!patches) {
#pragma omp atomic write
      failed = 1;
    } else {
      // rows that only fill up a tile are multiplied too
      memset(patches, 0, patch_bytes);
    }
#pragma omp for schedule(static)
    for (int64_t column = 0; column < a.width; column += NR)
      pack_transposed<FloatUnit>(StridedRows<const float>{a.weight + column * area, area}, NR, area,
                                 packed + column * area);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.clips * blocks; ++task) {
      if (!patches) continue;
      const int64_t clip = task / blocks, first = task % blocks * TOKENS;
      if (first == 0)
        memcpy(a.y + clip * (a.prefix + tokens) * a.width, a.table, (size_t)(a.prefix * a.width) * sizeof(float));
      block_of_tokens(a, clip, first, packed, patches, (float*)(scratch.base + patch_bytes));
    }
  }
  return !failed;
}

}  // namespace ast_fast
