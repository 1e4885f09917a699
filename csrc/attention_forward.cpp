// Flash attention on CPU: softmax(q k^T scale) v without storing the scores (Dao et al. 2022), online softmax over
// blocks of keys. K^T and V of one head are packed once by each thread that works on it; a tile of MR queries then runs
// scores -> softmax -> output for KEYS keys at a time inside the first-level cache.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_tiles.h"

namespace {

constexpr int64_t KEYS = 512;        // keys of a block
constexpr int64_t CHUNK = 8 * MR;    // queries of a work item
constexpr int SCORE_STRIDE = KEYS + 16;

struct Memory {
  float* scores;   // [MR][SCORE_STRIDE]
  float* weights;  // probabilities as words of the unit; shares `scores` for floats
  float* queries;  // [MR][ROW_STRIDE]
  float* output;   // [MR][ROW_STRIDE]
  float* keys;     // K^T panels
  float* values;   // V panels
};

AST_INLINE int64_t padded_keys(int64_t tk) { return round_up(tk, NR); }

// scores count in units of 1 / scale
AST_INLINE void add_bias(float* scores, const float* bias, int64_t count, float unit) {
  int64_t key = 0;
  for (; key + W <= count; key += W) store(scores + key, load(scores + key) + load(bias + key) * unit);
  for (; key < count; ++key) scores[key] += bias[key] * unit;
}

template <class Unit, class T>
void tile_of_queries(const AttentionArgs& a, const AttentionClip& clip, const float* bias, int64_t head, int64_t first,
                     int64_t rows, const Memory& mem) {
  typedef typename Unit::Word Word;
  constexpr int WEIGHT_STRIDE = Unit::DEPTH == 1 ? SCORE_STRIDE : KEYS / 2 + 16;
  const int64_t width = a.width, words = width / Unit::DEPTH, tk = clip.tk;
  const float c = a.scale * LOG2E;
  const T* q = (const T*)a.q + clip.q + head * a.q_head + first * a.q_row;
  pack_rows<Unit>(StridedRows<const T>{q, a.q_row}, rows, MR, width, (Word*)mem.queries);
  float top[MR], sum[MR];
  for (int r = 0; r < MR; ++r) top[r] = -__builtin_inff(), sum[r] = 0.0f;

  for (int64_t start = 0; start < tk; start += KEYS) {
    const int64_t count = smaller(KEYS, tk - start), whole = round_up(count, NR);
    const Word* panel = (const Word*)mem.keys + start * words;
    for (int64_t key = 0; key < whole; key += NR, panel += words * NR)
      micro<Unit, ROW_STRIDE, 1>(rows, (const Word*)mem.queries, panel, words,
                                 StridedRows<float>{mem.scores + key, SCORE_STRIDE}, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = mem.scores + r * SCORE_STRIDE;
      if (bias) add_bias(scores, bias + start, count, 1.0f / a.scale);
      for (int64_t key = count; key < whole; ++key) scores[key] = -__builtin_inff();
      vf most[2] = {load(scores), load(scores + W)};
      for (int64_t i = NR; i < whole; i += NR) {
        most[0] = at_least(most[0], load(scores + i));
        most[1] = at_least(most[1], load(scores + i + W));
      }
      const float here = horizontal_max(at_least(most[0], most[1])) * c;
      const float now = here > top[r] ? here : top[r];
      float* output = mem.output + r * ROW_STRIDE;
      if (start == 0) {
        for (int64_t d = 0; d < width; d += W) store(output + d, vf{});
      } else if (now != top[r]) {
        float lanes[W];
        store(lanes, exp2_of(splat(top[r] - now)));
        sum[r] *= lanes[0];
        for (int64_t d = 0; d < width; d += W) store(output + d, load(output + d) * lanes[0]);
      }
      top[r] = now;
      sum[r] += exponentials<Unit>(scores, mem.weights + r * WEIGHT_STRIDE, whole, c, now);
    }
    const int64_t stored = round_up(tk, 2) / Unit::DEPTH;
    const int64_t depth = ceil_div(count, Unit::DEPTH);
    const Word* values = (const Word*)mem.values + start / Unit::DEPTH * NR;
    for (int64_t d = 0; d < width; d += NR, values += stored * NR)
      micro<Unit, WEIGHT_STRIDE, 1>(rows, (const Word*)mem.weights, values, depth,
                                    StridedRows<float>{mem.output + d, ROW_STRIDE}, true);
  }

  float* lse = a.lse + clip.lse + head * a.lse_head + first;
  T* o = (T*)a.o + clip.o + head * a.o_head + first * a.o_row;
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = 1.0f / sum[r];
    for (int64_t d = 0; d < width; d += W) store(o + r * a.o_row + d, load(mem.output + r * ROW_STRIDE + d) * inverse);
    float lanes[W];
    store(lanes, log_of(splat(sum[r])));
    lse[r] = top[r] * 0.6931471805599453f + lanes[0];
  }
}

template <class T>
void no_keys(const AttentionArgs& a, const AttentionClip& clip, int64_t head, int64_t first, int64_t rows) {
  for (int64_t r = first; r < first + rows; ++r) {
    a.lse[clip.lse + head * a.lse_head + r] = __builtin_inff();
    memset((T*)a.o + clip.o + head * a.o_head + r * a.o_row, 0, (size_t)a.width * sizeof(T));
  }
}

template <class Unit, class T>
void share_of_work(const AttentionArgs& a, const Memory& mem, Share share) {
  typedef typename Unit::Word Word;
  for (int64_t b = 0; b < a.num_clips; ++b) {
    const AttentionClip& clip = a.clips[b];
    const float* bias = a.key_bias ? a.key_bias + b * a.key_bias_clip : nullptr;
    for (int64_t head = 0; head < a.heads; ++head) {
      bool packed = false;
      for (int64_t chunk = 0; chunk < clip.tq; chunk += CHUNK) {
        if (!share.takes((double)(clip.tk + 64))) continue;
        const int64_t end = smaller(clip.tq, chunk + CHUNK);
        if (clip.tk == 0) {
          no_keys<T>(a, clip, head, chunk, end - chunk);
          continue;
        }
        if (!packed) {
          const StridedRows<const T> k = {(const T*)a.k + clip.k + head * a.k_head, a.k_row};
          const StridedRows<const T> v = {(const T*)a.v + clip.v + head * a.v_head, a.v_row};
          pack_transposed<Unit>(k, clip.tk, a.width, (Word*)mem.keys);
          pack_panels<Unit>(v, clip.tk, round_up(clip.tk, 2), a.width, (Word*)mem.values);
          packed = true;
        }
        for (int64_t first = chunk; first < end; first += MR)
          tile_of_queries<Unit, T>(a, clip, bias, head, first, smaller(MR, end - first), mem);
      }
    }
  }
}

template <class Unit, class T>
bool forward(const AttentionArgs& a) {
  double total = 0.0;
  for (int64_t b = 0; b < a.num_clips; ++b)
    total += (double)(a.heads * ceil_div(a.clips[b].tq, CHUNK)) * (double)(a.clips[b].tk + 64);
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int64_t part = 0, step = 1;
#if defined(_OPENMP)
    part = omp_get_thread_num(), step = omp_get_num_threads();
#endif
    const int64_t tile = MR * (SCORE_STRIDE + KEYS + 16 + 2 * ROW_STRIDE);
    const int64_t keys = (padded_keys(a.max_tk) + NR) * a.width / Unit::DEPTH;
    Scratch scratch((size_t)(tile + 2 * keys) * sizeof(float));
    if (!scratch.base) {
#pragma omp atomic write
      failed = 1;
    } else {
      Memory mem;
      mem.scores = (float*)scratch.base;
      mem.weights = Unit::DEPTH == 1 ? mem.scores : mem.scores + MR * SCORE_STRIDE;
      mem.queries = mem.scores + MR * (SCORE_STRIDE + KEYS + 16);
      mem.output = mem.queries + MR * ROW_STRIDE;
      mem.keys = mem.output + MR * ROW_STRIDE;
      mem.values = mem.keys + keys;
      share_of_work<Unit, T>(a, mem, Share(total, part, step));
    }
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(attention_forward)(const AttentionArgs& a) {
#if defined(__AVX512BF16__)
  if (a.type == BF16) return forward<PairUnit, bf16>(a);
#else
  if (a.type == BF16) return forward<FloatUnit, bf16>(a);
#endif
  return forward<FloatUnit, float>(a);
}

}  // namespace ast_fast
