// Gradients of flash attention on CPU, deterministic: every output element is summed by one thread in a fixed order.
//
// A work item is one head of one clip, or, when heads are few, one of a fixed number of ranges of its keys. It walks
// blocks of KEYS keys by blocks of QUERIES queries and computes each score once: P = exp(q k^T scale - lse),
// dP = dO V^T, dS = P (dP - rowsum(dO O)) scale, dV += P^T dO, dK += dS^T Q, dQ += dS K. dQ is summed in fp32 in a
// buffer of the item's own; ranges of keys are added afterwards in order. The number of ranges follows from the
// shapes alone, so results are bitwise the same for every number of threads.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_tiles.h"

namespace {

constexpr int64_t KEYS = 192;     // multiples of both MR and NR
constexpr int64_t QUERIES = 96;
constexpr int SCORE_STRIDE = KEYS + 16;
constexpr int64_t ITEMS_WANTED = 32;
constexpr float LOG2E = 1.4426950408889634f;

// One head's operands, and one block's scratch. Word stands for float or a pair of bf16.
template <class Word>
struct Memory {
  Word *query_rows, *grad_rows;      // [tq][ROW_STRIDE]: Q and dO as A operands
  Word *query_panels, *grad_panels;  // [width / NR][tq][NR]: Q and dO as B operands
  float *lse, *delta;                // [tq] base-2 log-sum-exp, rowsum(dO O)
  Word *keys_t, *values_t;           // K^T, V^T panels of the block
  Word* keys;                        // K panels of the block
  float *scores, *grads;             // [QUERIES][SCORE_STRIDE]
  Word *weights_q, *grads_q, *grads_k;  // P and dS for sums over queries, dS for the sum over keys
  float *dk, *dv;                    // [KEYS][width]
  float* dq;                         // [tq][width] when the keys are not split
};

struct Item {
  const AttentionClip* clip;
  int64_t head, key_begin, key_end;
  float* dq;  // this item's own buffer, or null: the thread's, written out at once
};

AST_INLINE int64_t padded_queries(int64_t tq) { return round_up(tq, 2 * MR); }

template <class Unit, class T>
void prepare_queries(const AttentionArgs& a, const Item& item, Memory<typename Unit::Word>& mem) {
  const AttentionClip& clip = *item.clip;
  const int64_t tq = clip.tq, padded = padded_queries(tq), width = a.width;
  const T* q = (const T*)a.q + clip.q + item.head * a.q_head;
  const T* d_o = (const T*)a.d_o + clip.d_o + item.head * a.do_head;
  const T* o = (const T*)a.o + clip.o + item.head * a.o_head;
  pack_rows<Unit>(q, a.q_row, tq, padded, width, mem.query_rows);
  pack_rows<Unit>(d_o, a.do_row, tq, padded, width, mem.grad_rows);
  pack_panels<Unit>(q, a.q_row, tq, padded, width, mem.query_panels);
  pack_panels<Unit>(d_o, a.do_row, tq, padded, width, mem.grad_panels);
  const float* lse = a.lse + clip.lse + item.head * a.lse_head;
  for (int64_t row = 0; row < padded; ++row) {
    vf sum = {};
    if (row < tq)
      for (int64_t d = 0; d < width; d += W) sum += load(o + row * a.o_row + d) * load(d_o + row * a.do_row + d);
    mem.delta[row] = horizontal_sum(sum);
    // rows that only fill up a tile get probability 0
    mem.lse[row] = row < tq ? lse[row] * LOG2E : __builtin_inff();
  }
  memset(mem.dq, 0, (size_t)(padded * width) * sizeof(float));
}

// P and dS of one pair of query rows, from scores and dP, in the layouts that the three products read
template <class Unit>
AST_INLINE void probabilities(float* scores, float* grads, int64_t row, int64_t count, const float* lse,
                              const float* delta, float scale,
                              [[maybe_unused]] const Memory<typename Unit::Word>& mem) {
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

template <class Unit>
void block_of_scores(const AttentionArgs& a, int64_t first, int64_t rows, int64_t count,
                     const Memory<typename Unit::Word>& mem, int64_t padded) {
  typedef typename Unit::Word Word;
  const int64_t width = a.width, words = width / Unit::DEPTH, whole = round_up(count, NR);
  for (int64_t key = 0; key < whole; key += NR)
    for (int64_t r = 0; r < rows; r += MR) {
      const int64_t at = (first + r) * ROW_STRIDE;
      const int64_t panel = key / NR * words * NR;
      micro<Unit, ROW_STRIDE, 1>(rows - r, mem.query_rows + at, mem.keys_t + panel, words,
                                 mem.scores + r * SCORE_STRIDE + key, SCORE_STRIDE, false);
      micro<Unit, ROW_STRIDE, 1>(rows - r, mem.grad_rows + at, mem.values_t + panel, words,
                                 mem.grads + r * SCORE_STRIDE + key, SCORE_STRIDE, false);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t key = count; key < whole; ++key) mem.scores[r * SCORE_STRIDE + key] = -__builtin_inff();
  for (int64_t r = 0; r < rows; r += 2)
    probabilities<Unit>(mem.scores, mem.grads, r, whole, mem.lse + first + r, mem.delta + first + r, a.scale, mem);

  // sums over queries: A is P^T or dS^T, words of the score rows, one column a key
  const Word* weights_q = Unit::DEPTH == 1 ? (const Word*)mem.scores : mem.weights_q;
  const Word* grads_q = Unit::DEPTH == 1 ? (const Word*)mem.grads : mem.grads_q;
  const Word* grads_k = Unit::DEPTH == 1 ? (const Word*)mem.grads : mem.grads_k;
  constexpr int GRADS_K_STRIDE = SCORE_STRIDE / Unit::DEPTH;
  const int64_t query_words = rows / Unit::DEPTH, panel_words = padded / Unit::DEPTH * NR;
  for (int64_t d = 0; d < width; d += NR) {
    const int64_t panel = d / NR * panel_words + first / Unit::DEPTH * NR;
    for (int64_t key = 0; key < count; key += MR) {
      micro<Unit, 1, SCORE_STRIDE>(count - key, weights_q + key, mem.grad_panels + panel, query_words,
                                   mem.dv + key * width + d, width, true);
      micro<Unit, 1, SCORE_STRIDE>(count - key, grads_q + key, mem.query_panels + panel, query_words,
                                   mem.dk + key * width + d, width, true);
    }
    const int64_t key_words = ceil_div(count, Unit::DEPTH);
    const Word* keys = mem.keys + d / NR * (KEYS / Unit::DEPTH) * NR;
    for (int64_t r = 0; r < rows; r += MR)
      micro<Unit, GRADS_K_STRIDE, 1>(rows - r, grads_k + r * GRADS_K_STRIDE, keys, key_words,
                                     mem.dq + (first + r) * width + d, width, true);
  }
}

template <class T>
AST_INLINE void write_row(T* out, const float* values, int64_t width) {
  for (int64_t d = 0; d < width; d += W) store(out + d, load(values + d));
}

template <class Unit, class T>
void run_item(const AttentionArgs& a, const Item& item, Memory<typename Unit::Word> mem) {
  const AttentionClip& clip = *item.clip;
  const int64_t width = a.width, padded = padded_queries(clip.tq);
  const T* k = (const T*)a.k + clip.k + item.head * a.k_head;
  const T* v = (const T*)a.v + clip.v + item.head * a.v_head;
  T* dk = (T*)a.dk + clip.dk + item.head * a.dk_head;
  T* dv = (T*)a.dv + clip.dv + item.head * a.dv_head;
  if (item.dq) mem.dq = item.dq;
  prepare_queries<Unit, T>(a, item, mem);
  for (int64_t start = item.key_begin; start < item.key_end; start += KEYS) {
    const int64_t count = smaller(KEYS, item.key_end - start);
    pack_transposed<Unit>(k + start * a.k_row, a.k_row, count, width, mem.keys_t);
    pack_transposed<Unit>(v + start * a.v_row, a.v_row, count, width, mem.values_t);
    pack_panels<Unit>(k + start * a.k_row, a.k_row, count, KEYS, width, mem.keys);
    memset(mem.dk, 0, (size_t)(KEYS * width) * sizeof(float));
    memset(mem.dv, 0, (size_t)(KEYS * width) * sizeof(float));
    for (int64_t first = 0; first < clip.tq; first += QUERIES)
      block_of_scores<Unit>(a, first, smaller(QUERIES, round_up(clip.tq - first, 2)), count, mem, padded);
    for (int64_t key = 0; key < count; ++key) {
      write_row(dk + (start + key) * a.dk_row, mem.dk + key * width, width);
      write_row(dv + (start + key) * a.dv_row, mem.dv + key * width, width);
    }
  }
  if (!item.dq) {
    T* dq = (T*)a.dq + clip.dq + item.head * a.dq_head;
    for (int64_t row = 0; row < clip.tq; ++row) write_row(dq + row * a.dq_row, mem.dq + row * width, width);
  }
}

// keys beyond a clip's length get zero gradients, and so do the queries of a clip without keys
template <class T>
void write_zeros(const AttentionArgs& a, const AttentionClip& clip, int64_t head) {
  const size_t bytes = (size_t)a.width * sizeof(T);
  for (int64_t key = clip.tk; key < clip.tk_padded; ++key) {
    memset((T*)a.dk + clip.dk + head * a.dk_head + key * a.dk_row, 0, bytes);
    memset((T*)a.dv + clip.dv + head * a.dv_head + key * a.dv_row, 0, bytes);
  }
  for (int64_t row = 0; clip.tk == 0 && row < clip.tq; ++row)
    memset((T*)a.dq + clip.dq + head * a.dq_head + row * a.dq_row, 0, bytes);
}

template <class Word>
struct Layout {
  size_t bytes = 0;
  template <class E>
  void take(E** pointer, char* base, int64_t count) {
    *pointer = (E*)(base + bytes);
    bytes += (size_t)round_up(count * (int64_t)sizeof(E), 64);
  }
  void all(Memory<Word>* mem, char* base, const AttentionArgs& a, int64_t depth) {
    const int64_t queries = padded_queries(a.max_tq) + MR, width = a.width;
    take(&mem->query_rows, base, queries * ROW_STRIDE);
    take(&mem->grad_rows, base, queries * ROW_STRIDE);
    take(&mem->query_panels, base, queries * width / depth);
    take(&mem->grad_panels, base, queries * width / depth);
    take(&mem->lse, base, queries);
    take(&mem->delta, base, queries);
    take(&mem->keys_t, base, KEYS * width / depth);
    take(&mem->values_t, base, KEYS * width / depth);
    take(&mem->keys, base, KEYS * width / depth);
    take(&mem->scores, base, QUERIES * SCORE_STRIDE);
    take(&mem->grads, base, QUERIES * SCORE_STRIDE);
    take(&mem->weights_q, base, depth == 2 ? QUERIES / 2 * SCORE_STRIDE : 0);
    take(&mem->grads_q, base, depth == 2 ? QUERIES / 2 * SCORE_STRIDE : 0);
    take(&mem->grads_k, base, depth == 2 ? QUERIES / 2 * SCORE_STRIDE : 0);
    take(&mem->dk, base, KEYS * width);
    take(&mem->dv, base, KEYS * width);
    take(&mem->dq, base, queries * width);
  }
};

// sums the ranges' dQ of one head in order and writes it
template <class T>
void add_ranges(const AttentionArgs& a, const AttentionClip& clip, int64_t head, const float* parts, int64_t ranges,
                int64_t pitch) {
  for (int64_t row = 0; row < clip.tq; ++row) {
    T* dq = (T*)a.dq + clip.dq + head * a.dq_head + row * a.dq_row;
    for (int64_t d = 0; d < a.width; d += W) {
      vf sum = {};
      for (int64_t range = 0; range < ranges; ++range) sum += load(parts + range * pitch + row * a.width + d);
      store(dq + d, sum);
    }
  }
}

template <class Unit, class T>
bool backward(const AttentionArgs& a) {
  typedef typename Unit::Word Word;
  const int64_t heads = a.num_clips * a.heads;
  if (heads == 0) return true;
  // at least one: clips may all be without keys, and the sizes below divide by it
  const int64_t blocks = a.max_tk < 1 ? 1 : ceil_div(a.max_tk, KEYS);
  const int64_t wanted = heads >= ITEMS_WANTED ? 1 : ceil_div(ITEMS_WANTED, heads);
  const int64_t ranges = smaller(wanted, blocks);
  const int64_t range_keys = ceil_div(blocks, ranges) * KEYS;
  const int64_t pitch = (padded_queries(a.max_tq) + MR) * a.width;
  Scratch parts(ranges > 1 ? (size_t)(heads * ranges * pitch) * sizeof(float) : 0);
  if (!parts.base) return false;
  double total = 0.0;
  for (int64_t b = 0; b < a.num_clips; ++b)
    total += (double)(a.heads * ceil_div(a.clips[b].tk, range_keys)) * (double)(a.clips[b].tq + 64);
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int64_t part = 0, step = 1;
#if defined(_OPENMP)
    part = omp_get_thread_num(), step = omp_get_num_threads();
#endif
    Memory<Word> mem;
    Layout<Word> sizes, places;
    sizes.all(&mem, nullptr, a, Unit::DEPTH);
    Scratch scratch(sizes.bytes);
    if (!scratch.base) {
#pragma omp atomic write
      failed = 1;
    } else {
      places.all(&mem, scratch.base, a, Unit::DEPTH);
      Share share(total, part, step);
      for (int64_t b = 0; b < a.num_clips; ++b)
        for (int64_t head = 0; head < a.heads; ++head) {
          const AttentionClip& clip = a.clips[b];
          for (int64_t range = 0; range * range_keys < clip.tk; ++range) {
            if (!share.takes((double)(clip.tq + 64))) continue;
            const int64_t begin = range * range_keys;
            float* own = ranges > 1 ? (float*)parts.base + ((b * a.heads + head) * ranges + range) * pitch : nullptr;
            run_item<Unit, T>(a, {&clip, head, begin, smaller(clip.tk, begin + range_keys), own}, mem);
          }
        }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t index = 0; index < heads; ++index) {
      const AttentionClip& clip = a.clips[index / a.heads];
      if (ranges > 1 && clip.tk > 0)
        add_ranges<T>(a, clip, index % a.heads, (const float*)parts.base + index * ranges * pitch,
                      ceil_div(clip.tk, range_keys), pitch);
      write_zeros<T>(a, clip, index % a.heads);
    }
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(attention_backward)(const AttentionArgs& a) {
#if defined(__AVX512BF16__)
  if (a.type == BF16) return backward<PairUnit, bf16>(a);
#else
  if (a.type == BF16) return backward<FloatUnit, bf16>(a);
#endif
  return backward<FloatUnit, float>(a);
}

}  // namespace ast_fast
