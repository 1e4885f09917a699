// Patches in cache, as the fp32 matrix products of the patch embedding read them.
#pragma once

#include "attention_tiles.h"

namespace {

constexpr int64_t DEPTH = 256;  // elements of a patch that lie together
constexpr int PATCH_STRIDE = DEPTH + 16;

// one patch, time the slower axis, into rows of DEPTH elements that lie `pitch` apart
inline void gather_patch(const float* corner, int64_t stride_frame, int64_t pf, int64_t pt, float* out, int64_t pitch) {
  int64_t at = 0;
  for (int64_t k = 0; k < pt; ++k) {
    const float* run = corner + k * stride_frame;
    for (int64_t done = 0; done < pf;) {
      const int64_t count = smaller(pf - done, DEPTH - at % DEPTH);
      memcpy(out + at / DEPTH * pitch + at % DEPTH, run + done, (size_t)count * sizeof(float));
      done += count, at += count;
    }
  }
}

}  // namespace
