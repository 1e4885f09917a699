// One block of attention's gradients: KEYS keys by some queries, each score computed once. P = exp(q k^T scale - lse),
// dP = dO V^T, dS = P (dP - rowsum(dO O)) scale, dV += P^T dO, dK += dS^T Q, dQ += dS K.
#pragma once

#include "attention_tiles.h"

namespace {

constexpr int64_t KEYS = 192;  // multiples of both MR and NR
constexpr int SCORE_STRIDE = KEYS + 16;

// Operands and results of a block's keys. Word stands for float or a pair of bf16.
template <class Word>
struct KeyBlock {
  Word *keys_t, *values_t;              // K^T, V^T panels
  Word* keys;                           // K panels, `panel` words apart
  int64_t panel;
  float *scores, *grads;                // [queries][SCORE_STRIDE]
  Word *weights_q, *grads_q, *grads_k;  // P and dS for sums over queries, dS for the sum over keys
};

// Operands of its queries
template <class Word>
struct QueryBlock {
  Word *rows, *grad_rows;      // [queries][ROW_STRIDE]: Q and dO as A operands
  Word *panels, *grad_panels;  // Q and dO as B operands, `panel` words apart
  int64_t panel;
  float *lse, *delta;          // base-2 log-sum-exp, rowsum(dO O)
};

// P and dS of one pair of query rows, from scores and dP, in the layouts that the three products read
template <class Unit>
AST_INLINE void probabilities(float* scores, float* grads, int64_t row, int64_t count, const float* lse,
                              const float* delta, float scale,
                              [[maybe_unused]] const KeyBlock<typename Unit::Word>& mem) {
  const float c = scale * LOG2E;
  float* s0 = scores + row * SCORE_STRIDE;
  float* s1 = s0 + SCORE_STRIDE;
  float* g0 = grads + row * SCORE_STRIDE;
  float* g1 = g0 + SCORE_STRIDE;
  for (int64_t key = 0; key < count; key += W) {
    const vf p0 = exp2_of(load(s0 + key) * c - lse[0]), p1 = exp2_of(load(s1 + key) * c - lse[1]);
    const vf d0 = p0 * (load(g0 + key) - delta[0]) * scale, d1 = p1 * (load(g1 + key) - delta[1]) * scale;
    if constexpr (Unit::DEPTH == 1) {
      store(s0 + key, p0);
      store(s1 + key, p1);
      store(g0 + key, d0);
      store(g1 + key, d1);
    } else {
#if defined(__AVX512BF16__)
      const vu low = rounded_bits(d0), high = rounded_bits(d1);
      store((float*)mem.weights_q + row / 2 * SCORE_STRIDE + key, (vf)(rounded_bits(p0) | (rounded_bits(p1) << 16)));
      store((float*)mem.grads_q + row / 2 * SCORE_STRIDE + key, (vf)(low | (high << 16)));
      uint16_t* rows = (uint16_t*)mem.grads_k + row * SCORE_STRIDE + key;
      _mm256_storeu_si256((__m256i*)rows, _mm512_cvtepi32_epi16((__m512i)low));
      _mm256_storeu_si256((__m256i*)(rows + SCORE_STRIDE), _mm512_cvtepi32_epi16((__m512i)high));
#endif
    }
  }
}

struct AllSeen {
  AST_INLINE void operator()(float*, float*, int64_t, int64_t) const {}
};

// `rows` queries (an even number, zeros behind the last) by `count` keys. `hide` gets a row of scores and one of dP, its
// number and `count`. FOR_QUERIES and FOR_KEYS say which of the gradients are wanted.
template <class Unit, bool FOR_QUERIES, bool FOR_KEYS, class Hide, class Rows>
AST_INLINE void block_of_scores(int64_t width, float scale, int64_t rows, int64_t count,
                                const QueryBlock<typename Unit::Word>& queries,
                                const KeyBlock<typename Unit::Word>& mem, Hide hide, Rows dq, Rows dk, Rows dv) {
  typedef typename Unit::Word Word;
  const int64_t words = width / Unit::DEPTH, whole = round_up(count, W);
  for (int64_t key = 0; key < whole; key += NR)
    for (int64_t r = 0; r < rows; r += MR) {
      const Word *keys_t = mem.keys_t + key / NR * words * NR, *values_t = mem.values_t + key / NR * words * NR;
      const Word *q = queries.rows + r * ROW_STRIDE, *d_o = queries.grad_rows + r * ROW_STRIDE;
      const StridedRows<float> scores = {mem.scores + r * SCORE_STRIDE + key, SCORE_STRIDE};
      const StridedRows<float> grads = {mem.grads + r * SCORE_STRIDE + key, SCORE_STRIDE};
      if (whole - key > W) {
        micro<Unit, ROW_STRIDE, 1>(rows - r, q, keys_t, words, scores, false);
        micro<Unit, ROW_STRIDE, 1>(rows - r, d_o, values_t, words, grads, false);
      } else {
        micro<Unit, ROW_STRIDE, 1, 1>(rows - r, q, keys_t, words, scores, false);
        micro<Unit, ROW_STRIDE, 1, 1>(rows - r, d_o, values_t, words, grads, false);
      }
    }
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = mem.scores + r * SCORE_STRIDE;
    hide(scores, mem.grads + r * SCORE_STRIDE, r, count);
    for (int64_t key = count; key < whole; ++key) scores[key] = -__builtin_inff();
  }
  for (int64_t r = 0; r < rows; r += 2)
    probabilities<Unit>(mem.scores, mem.grads, r, whole, queries.lse + r, queries.delta + r, scale, mem);

  const Word* weights_q = Unit::DEPTH == 1 ? (const Word*)mem.scores : mem.weights_q;
  const Word* grads_q = Unit::DEPTH == 1 ? (const Word*)mem.grads : mem.grads_q;
  const Word* grads_k = Unit::DEPTH == 1 ? (const Word*)mem.grads : mem.grads_k;
  constexpr int GRADS_K_STRIDE = SCORE_STRIDE / Unit::DEPTH;
  const int64_t query_words = rows / Unit::DEPTH, key_words = ceil_div(count, Unit::DEPTH);
  for (int64_t d = 0; d < width; d += NR) {
    // sums over queries: A is P^T or dS^T, words of the score rows, one column a key
    for (int64_t key = 0; FOR_KEYS && key < count; key += MR) {
      micro<Unit, 1, SCORE_STRIDE>(count - key, weights_q + key, queries.grad_panels + d / NR * queries.panel,
                                   query_words, dv.from(key, d), true);
      micro<Unit, 1, SCORE_STRIDE>(count - key, grads_q + key, queries.panels + d / NR * queries.panel, query_words,
                                   dk.from(key, d), true);
    }
    const Word* keys = mem.keys + d / NR * mem.panel;
    for (int64_t r = 0; FOR_QUERIES && r < rows; r += MR)
      micro<Unit, GRADS_K_STRIDE, 1>(rows - r, grads_k + r * GRADS_K_STRIDE, keys, key_words, dq.from(r, d), true);
  }
}

template <class T>
AST_INLINE void write_row(T* out, const float* values, int64_t width) {
  for (int64_t d = 0; d < width; d += W) store(out + d, load(values + d));
}

// the float32 product of two rows
template <class T>
AST_INLINE float product_of_rows(const T* a, const T* b, int64_t width) {
  vf sum = {};
  for (int64_t d = 0; d < width; d += W) sum += load(a + d) * load(b + d);
  return horizontal_sum(sum);
}

// Hands out parts of one piece of scratch, or with a null base counts what they need.
struct Layout {
  size_t bytes = 0;
  template <class E>
  void take(E** pointer, char* base, int64_t count) {
    *pointer = (E*)(base + bytes);
    bytes += (size_t)round_up(count * (int64_t)sizeof(E), 64);
  }
  template <class Word>
  void take_block(KeyBlock<Word>* block, char* base, int64_t queries, int64_t width, int64_t depth) {
    const int64_t pairs = depth == 2 ? queries / 2 * SCORE_STRIDE : 0;
    take(&block->keys_t, base, KEYS * width / depth);
    take(&block->values_t, base, KEYS * width / depth);
    take(&block->keys, base, KEYS * width / depth);
    take(&block->scores, base, queries * SCORE_STRIDE);
    take(&block->grads, base, queries * SCORE_STRIDE);
    take(&block->weights_q, base, pairs);
    take(&block->grads_q, base, pairs);
    take(&block->grads_k, base, pairs);
  }
  template <class Word>
  void take_queries(QueryBlock<Word>* block, char* base, int64_t queries, int64_t width, int64_t depth) {
    take(&block->rows, base, queries * ROW_STRIDE);
    take(&block->grad_rows, base, queries * ROW_STRIDE);
    take(&block->panels, base, queries * width / depth);
    take(&block->grad_panels, base, queries * width / depth);
    take(&block->lse, base, queries);
    take(&block->delta, base, queries);
  }
};

}  // namespace
