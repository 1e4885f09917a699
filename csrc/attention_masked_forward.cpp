// Masked flash attention on CPU. A head's queries keep their running maximum, sum and output in fp32 while the
// rectangles of the mask are worked through, so that a query in several of them loses nothing between. Tokens of a
// rectangle are gathered as its operands are packed; hidden pairs of a rectangle get the score -inf.
//
// A work item is one head of one clip. Where these are few for the threads, heads share their running state, and the
// items are the rectangles of one pass after another: those of a pass have no query in common. A query meets its
// rectangles in the same order either way, so results are bitwise the same for every number of threads.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_masked.h"

namespace {

constexpr int64_t KEYS = 256;  // keys of a block
constexpr int SCORE_STRIDE = KEYS + 16;

// What queries hold between rectangles.
struct State {
  float* output;  // [tq][width], unset while `top` is -inf
  float *top, *sum;
};

struct Memory {
  float* scores;   // [MR][SCORE_STRIDE]
  float* weights;  // probabilities as words of the unit; shares `scores` for floats
  float* queries;  // [MR][ROW_STRIDE]
  float* unused;   // [MAX_WIDTH], output of rows that only fill up a tile
  float *keys, *values;  // K^T and V panels
  State own;
};

// one head of one clip
template <class T>
struct Head {
  StridedRows<const T> q, k, v;
  StridedRows<T> o;
  float* lse;
  int64_t tq;
};

template <class T>
Head<T> head_at(const AttentionArgs& a, int64_t index) {
  const AttentionClip& clip = a.clips[index / a.heads];
  const int64_t head = index % a.heads;
  return {{(const T*)a.q + clip.q + head * a.q_head, a.q_row}, {(const T*)a.k + clip.k + head * a.k_head, a.k_row},
          {(const T*)a.v + clip.v + head * a.v_head, a.v_row}, {(T*)a.o + clip.o + head * a.o_head, a.o_row},
          a.lse + clip.lse + head * a.lse_head,                clip.tq};
}

// the packed block of keys and what the tiles of queries need to know of it
struct KeyBlock {
  int64_t first, count;
  const uint8_t* end;  // of `seen`
};

template <class Unit, class T>
AST_INLINE void tile_of_queries(const AttentionArgs& a, const Head<T>& head, const Rectangle& rectangle, int64_t first,
                                const KeyBlock& block, const Memory& mem, const State& state) {
  typedef typename Unit::Word Word;
  constexpr int WEIGHT_STRIDE = Unit::DEPTH == 1 ? SCORE_STRIDE : KEYS / 2 + 16;
  const int64_t rows = smaller(MR, rectangle.num_rows - first);
  const int64_t width = a.width, words = width / Unit::DEPTH, count = block.count, whole = round_up(count, NR);
  const float c = a.scale * LOG2E;
  const int32_t* tokens = rectangle.rows + first;
  const T* queries[MR];
  float* outputs[MR];
  bool all_unset = true;
  for (int64_t r = 0; r < MR; ++r) {
    all_unset &= r >= rows || state.top[tokens[r]] == -__builtin_inff();
    queries[r] = head.q(tokens[r < rows ? r : 0]);
    outputs[r] = r < rows ? state.output + tokens[r] * width : mem.unused;
  }
  pack_rows<Unit>(ListedRows<const T>{queries}, MR, MR, width, (Word*)mem.queries);
  const Word* panel = (const Word*)mem.keys;
  for (int64_t key = 0; key < whole; key += NR, panel += words * NR) {
    const StridedRows<float> scores = {mem.scores + key, SCORE_STRIDE};
    if (count - key > W)
      micro<Unit, ROW_STRIDE, 1>(rows, (const Word*)mem.queries, panel, words, scores, false);
    else
      micro<Unit, ROW_STRIDE, 1, 1>(rows, (const Word*)mem.queries, panel, words, scores, false);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = mem.scores + r * SCORE_STRIDE;
    if (rectangle.seen)
      hide_pairs(scores, count, rectangle.seen + (first + r) * rectangle.num_columns + block.first, block.end);
    for (int64_t key = count; key < whole; ++key) scores[key] = -__builtin_inff();
    vf most[2] = {load(scores), load(scores + W)};
    for (int64_t i = NR; i < whole; i += NR) {
      most[0] = at_least(most[0], load(scores + i));
      most[1] = at_least(most[1], load(scores + i + W));
    }
    const float before = state.top[tokens[r]], here = horizontal_max(at_least(most[0], most[1])) * c;
    const float now = here > before ? here : before;
    if (before == -__builtin_inff()) {
      for (int64_t d = 0; !all_unset && d < width; d += W) store(outputs[r] + d, vf{});
    } else if (now != before) {
      float lanes[W];
      store(lanes, exp2_of(splat(before - now)));
      state.sum[tokens[r]] *= lanes[0];
      for (int64_t d = 0; d < width; d += W) store(outputs[r] + d, load(outputs[r] + d) * lanes[0]);
    }
    state.top[tokens[r]] = now;
    // a query that has seen nothing yet: any finite number in place of the maximum makes its probabilities 0
    const float base = now == -__builtin_inff() ? 0.0f : now;
    const float total = exponentials<Unit>(scores, mem.weights + r * WEIGHT_STRIDE, whole, c, base);
    state.sum[tokens[r]] += total;
  }
  const int64_t depth = ceil_div(count, Unit::DEPTH);
  const Word* values = (const Word*)mem.values;
  for (int64_t d = 0; d < width; d += NR, values += round_up(count, 2) / Unit::DEPTH * NR)
    micro<Unit, WEIGHT_STRIDE, 1>(rows, (const Word*)mem.weights, values, depth, ListedRows<float>{outputs, d},
                                    !all_unset);
}

template <class Unit, class T>
void run_rectangle(const MaskedAttentionArgs& m, const Head<T>& head, const Rectangle& rectangle, const Memory& mem,
                   const State& state) {
  const AttentionArgs& a = m.attention;
  for (int64_t start = 0; start < rectangle.num_columns; start += KEYS) {
    const int64_t count = smaller(KEYS, rectangle.num_columns - start);
    const T *keys[KEYS], *values[KEYS];
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = head.k(rectangle.columns[start + i]);
      values[i] = head.v(rectangle.columns[start + i]);
    }
    typedef typename Unit::Word Word;
    pack_transposed<Unit>(ListedRows<const T>{keys}, count, a.width, (Word*)mem.keys);
    pack_panels<Unit>(ListedRows<const T>{values}, count, round_up(count, 2), a.width, (Word*)mem.values);
    const KeyBlock block = {start, count, m.by_query.seen + m.by_query.seen_bytes};
    for (int64_t first = 0; first < rectangle.num_rows; first += MR)
      tile_of_queries<Unit, T>(a, head, rectangle, first, block, mem, state);
  }
}

AST_INLINE void begin(const State& state, int64_t tq) {
  for (int64_t row = 0; row < tq; ++row) state.top[row] = -__builtin_inff(), state.sum[row] = 0.0f;
}

// o and lse of rows `first` .. `last`
template <class T>
void finish(const Head<T>& head, const State& state, int64_t first, int64_t last, int64_t width) {
  for (int64_t row = first; row < last; ++row) {
    const float sum = state.sum[row], *output = state.output + row * width;
    T* o = head.o(row);
    if (sum == 0.0f) {
      head.lse[row] = __builtin_inff();
      memset(o, 0, (size_t)width * sizeof(T));
      continue;
    }
    const float inverse = 1.0f / sum;
    for (int64_t d = 0; d < width; d += W) store(o + d, load(output + d) * inverse);
    float lanes[W];
    store(lanes, log_of(splat(sum)));
    head.lse[row] = state.top[row] * 0.6931471805599453f + lanes[0];
  }
}

AST_INLINE int64_t state_floats(const AttentionArgs& a) {
  return round_up(a.max_tq, 16) * (a.width + 2);
}

AST_INLINE State state_in(float* memory, const AttentionArgs& a) {
  const int64_t rows = round_up(a.max_tq, 16);
  return {memory, memory + rows * a.width, memory + rows * (a.width + 1)};
}

// heads shared by all threads: one pass after another, then the results
template <class Unit, class T>
void share_of_rectangles(const MaskedAttentionArgs& m, const Memory* mem, float* states, int64_t part, int64_t parts) {
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads, tq = a.max_tq;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < items; ++item) begin(state_in(states + item * state_floats(a), a), tq);
  for (int64_t first = 0, last; first < m.by_query.count; first = last) {
    last = end_of_pass(m.by_query, first);
    each_of_share(m.by_query, first, last, items, part, parts, [&](int64_t item, const Rectangle& rectangle) {
      if (mem)
        run_rectangle<Unit, T>(m, head_at<T>(a, item), rectangle, *mem, state_in(states + item * state_floats(a), a));
    });
#pragma omp barrier
  }
#pragma omp for schedule(static) collapse(2)
  for (int64_t item = 0; item < items; ++item)
    for (int64_t row = 0; row < tq; row += 64)
      finish<T>(head_at<T>(a, item), state_in(states + item * state_floats(a), a), row, smaller(tq, row + 64), a.width);
}

template <class Unit, class T>
void share_of_heads(const MaskedAttentionArgs& m, const Memory& mem, int64_t part, int64_t parts) {
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads;
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
    const Head<T> head = head_at<T>(a, item);
    begin(mem.own, head.tq);
    for (int64_t index = 0; index < m.by_query.count; ++index) {
      if (index + 1 < m.by_query.count) {
        const Rectangle next = rectangle_at(m.by_query, index + 1);
        fetch_ahead(head.q, next.rows, next.num_rows, a.width);
        fetch_ahead(head.k, next.columns, next.num_columns, a.width);
        fetch_ahead(head.v, next.columns, next.num_columns, a.width);
      }
      run_rectangle<Unit, T>(m, head, rectangle_at(m.by_query, index), mem, mem.own);
    }
    finish<T>(head, mem.own, 0, head.tq, a.width);
  }
}

template <class Unit, class T>
bool forward(const MaskedAttentionArgs& m) {
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads;
  // four heads a thread keep the threads busy to within a fifth
  const bool shared = a.threads > 1 && items < 4 * (int64_t)a.threads && items % a.threads != 0;
  Scratch states(shared ? (size_t)(items * state_floats(a)) * sizeof(float) : 0);
  if (!states.base) return false;
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int64_t part = 0, parts = 1;
#if defined(_OPENMP)
    part = omp_get_thread_num(), parts = omp_get_num_threads();
#endif
    const int64_t tile = MR * (SCORE_STRIDE + KEYS + 16 + ROW_STRIDE) + MAX_WIDTH, keys = KEYS * a.width / Unit::DEPTH;
    Scratch scratch((size_t)(tile + 2 * keys + (shared ? 0 : state_floats(a))) * sizeof(float));
    Memory mem;
    if (scratch.base) {
      mem.scores = (float*)scratch.base;
      mem.weights = Unit::DEPTH == 1 ? mem.scores : mem.scores + MR * SCORE_STRIDE;
      mem.queries = mem.scores + MR * (SCORE_STRIDE + KEYS + 16);
      mem.unused = mem.queries + MR * ROW_STRIDE;
      mem.keys = mem.unused + MAX_WIDTH;
      mem.values = mem.keys + keys;
      mem.own = state_in(mem.values + keys, a);
    } else {
#pragma omp atomic write
      failed = 1;
    }
    // threads without memory still come to the barriers
    if (shared)
      share_of_rectangles<Unit, T>(m, scratch.base ? &mem : nullptr, (float*)states.base, part, parts);
    else if (scratch.base)
      share_of_heads<Unit, T>(m, mem, part, parts);
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(attention_masked_forward)(const MaskedAttentionArgs& m) {
#if defined(__AVX512BF16__)
  if (m.attention.type == BF16) return forward<PairUnit, bf16>(m);
#else
  if (m.attention.type == BF16) return forward<FloatUnit, bf16>(m);
#endif
  return forward<FloatUnit, float>(m);
}

}  // namespace ast_fast
