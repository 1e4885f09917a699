// What masked attention's forward and backward share: rectangles of tokens, their hidden pairs, and who does which.
#pragma once

#include "attention_tiles.h"

namespace {

using ast_fast::MaskedAttentionArgs;
using ast_fast::RectangleList;

struct Rectangle {
  const int32_t *rows, *columns;  // tokens
  int64_t num_rows, num_columns;
  const uint8_t* seen;            // [num_rows, num_columns], or null: every pair
  int64_t pass;
};

AST_INLINE Rectangle rectangle_at(const RectangleList& list, int64_t index) {
  const int64_t* entry = list.table + index * 6;
  return {list.rows + entry[0], list.columns + entry[2], entry[1], entry[3],
          entry[4] < 0 ? nullptr : list.seen + entry[4], entry[5]};
}

// products of a rectangle, with what it costs to fetch its tokens
AST_INLINE double cost_of(const Rectangle& r) {
  return (double)(r.num_rows + 16) * (double)(r.num_columns + 16);
}

AST_INLINE int64_t end_of_pass(const RectangleList& list, int64_t first) {
  const int64_t pass = rectangle_at(list, first).pass;
  int64_t last = first;
  while (last < list.count && rectangle_at(list, last).pass == pass) ++last;
  return last;
}

// calls run(item, rectangle) for one thread's share of rectangles `first` .. `last` of every item
template <class Run>
AST_INLINE void each_of_share(const RectangleList& list, int64_t first, int64_t last, int64_t items, int64_t part,
                              int64_t parts, Run run) {
  double total = 0.0;
  for (int64_t index = first; index < last; ++index) total += cost_of(rectangle_at(list, index));
  Share share(total * (double)items, part, parts);
  for (int64_t item = 0; item < items; ++item)
    for (int64_t index = first; index < last; ++index) {
      const Rectangle rectangle = rectangle_at(list, index);
      if (share.takes(cost_of(rectangle))) run(item, rectangle);
    }
}

// asks for the rows of some tokens: rectangles jump about in memory, where no hardware looks ahead
template <class T>
AST_INLINE void fetch_ahead(StridedRows<const T> x, const int32_t* tokens, int64_t count, int64_t width) {
  for (int64_t i = 0; i < smaller(count, 256); ++i) {
    const char* row = (const char*)x(tokens[i]);
    for (int64_t byte = 0; byte < width * (int64_t)sizeof(T); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// W bytes as lanes, 0 or not
AST_INLINE vi lanes_of(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = bytes[i];
  return lanes;
#endif
}

// Makes the scores of hidden pairs -inf. They are replaced, not lowered: a NaN there must not stay. `end` is where the
// bytes of all rectangles end; whole vectors before it may be read past a row.
AST_INLINE void hide_pairs(float* scores, int64_t count, const uint8_t* seen, const uint8_t* end) {
  for (int64_t i = 0; i < count; i += W) {
    uint8_t last[W] = {};
    const uint8_t* bytes = seen + i;
    if (__builtin_expect(bytes + W > end, 0)) {
      memcpy(last, bytes, (size_t)(end - bytes));
      bytes = last;
    }
    store(scores + i, select(lanes_of(bytes) != 0, load(scores + i), splat(-__builtin_inff())));
  }
}

}  // namespace
