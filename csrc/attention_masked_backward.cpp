// Gradients of masked attention on CPU, deterministic. A head's gradients are summed in fp32 while the rectangles of
// the mask are worked through in order, and written once; a token in no rectangle keeps the zero.
//
// A work item is one head of one clip. Where these are few, by shape alone, heads share their sums and the items are
// rectangles: dQ by those of the mask's queries, dK and dV by those of its keys, one pass after another. The
// rectangles of a pass add to different rows, so results are bitwise the same for every number of threads; scores are
// computed twice then.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_gradients.h"
#include "attention_masked.h"

namespace {

constexpr int64_t QUERIES = 108;    // of a block; a multiple of MR that takes a row of 101 patches whole
constexpr int64_t MANY_HEADS = 8;   // from here on a head is an item

// one head of one clip
template <class T>
struct Head {
  StridedRows<const T> q, k, v, o, d_o;
  StridedRows<T> dq, dk, dv;
  const float* lse;
};

template <class T>
Head<T> head_at(const AttentionArgs& a, int64_t index) {
  const AttentionClip& c = a.clips[index / a.heads];
  const int64_t head = index % a.heads;
  return {{(const T*)a.q + c.q + head * a.q_head, a.q_row},
          {(const T*)a.k + c.k + head * a.k_head, a.k_row},
          {(const T*)a.v + c.v + head * a.v_head, a.v_row},
          {(const T*)a.o + c.o + head * a.o_head, a.o_row},
          {(const T*)a.d_o + c.d_o + head * a.do_head, a.do_row},
          {(T*)a.dq + c.dq + head * a.dq_head, a.dq_row},
          {(T*)a.dk + c.dk + head * a.dk_head, a.dk_row},
          {(T*)a.dv + c.dv + head * a.dv_head, a.dv_row},
          a.lse + c.lse + head * a.lse_head};
}

// one head's gradients, and what all of its rectangles need to know of the queries
struct Sums {
  float *dq, *dk, *dv;  // [tq][width], [tk][width]
  float *lse, *delta;   // [tq] base-2 log-sum-exp, rowsum(dO O)
};

template <class Word>
struct Memory {
  QueryBlock<Word> queries;
  KeyBlock<Word> keys;
  float *zeros, *unused;  // [MAX_WIDTH] a row to read and one to write where there is no token
  Sums own;
};

// Queries x keys of a rectangle, either of which may be its rows.
struct Tokens {
  const int32_t *queries, *keys;
  int64_t num_queries, num_keys;
};

// hides pairs of a block whose rectangle has queries as rows, or keys; rows beyond `queries` are not in `seen`
struct HideByQuery {
  const uint8_t *seen, *end;
  int64_t queries, pitch;
  AST_INLINE void operator()(float* scores, float*, int64_t r, int64_t count) const {
    if (r < queries) hide_pairs(scores, count, seen + r * pitch, end);
  }
};
struct HideByKey {
  const uint8_t* seen;
  int64_t queries, pitch;
  // a key seen by nobody is among the rows: neither its scores nor its dP, both of which may be NaN, may stay
  AST_INLINE void operator()(float* scores, float* grads, int64_t r, int64_t count) const {
    for (int64_t key = 0; key < count; ++key)
      if (r >= queries || !seen[key * pitch + r]) scores[key] = -__builtin_inff(), grads[key] = 0.0f;
  }
};

template <class Unit, class T>
void pack_queries(const Head<T>& head, const Sums& sums, const int32_t* tokens, int64_t count, int64_t width,
                  Memory<typename Unit::Word>& mem, float** dq) {
  const T *q[QUERIES], *d_o[QUERIES];
  const int64_t even = round_up(count, 2), padded = round_up(count, MR);
  for (int64_t r = 0; r < padded; ++r) {
    // a query that sees nothing may hold anything: it is a row of zeros with probabilities 0, as beyond the last
    const bool used = r < count && sums.lse[tokens[r]] != __builtin_inff();
    if (r < count) q[r] = used ? head.q(tokens[r]) : (const T*)mem.zeros;
    if (r < count) d_o[r] = used ? head.d_o(tokens[r]) : (const T*)mem.zeros;
    dq[r] = used ? sums.dq + tokens[r] * width : mem.unused;
    mem.queries.lse[r] = used ? sums.lse[tokens[r]] : __builtin_inff();
    mem.queries.delta[r] = used ? sums.delta[tokens[r]] : 0.0f;
  }
  pack_rows<Unit>(ListedRows<const T>{q}, count, padded, width, mem.queries.rows);
  pack_rows<Unit>(ListedRows<const T>{d_o}, count, padded, width, mem.queries.grad_rows);
  pack_panels<Unit>(ListedRows<const T>{q}, count, even, width, mem.queries.panels);
  pack_panels<Unit>(ListedRows<const T>{d_o}, count, even, width, mem.queries.grad_panels);
  mem.queries.panel = even / Unit::DEPTH * NR;
}

template <class Unit, class T>
void pack_keys(const Head<T>& head, const Sums& sums, const int32_t* tokens, int64_t count, int64_t width,
               Memory<typename Unit::Word>& mem, float** dk, float** dv) {
  const T *k[KEYS], *v[KEYS];
  for (int64_t i = 0; i < round_up(count, MR); ++i) {
    if (i < count) k[i] = head.k(tokens[i]), v[i] = head.v(tokens[i]);
    dk[i] = i < count ? sums.dk + tokens[i] * width : mem.unused;
    dv[i] = i < count ? sums.dv + tokens[i] * width : mem.unused;
  }
  pack_transposed<Unit>(ListedRows<const T>{k}, count, width, mem.keys.keys_t);
  pack_transposed<Unit>(ListedRows<const T>{v}, count, width, mem.keys.values_t);
  pack_panels<Unit>(ListedRows<const T>{k}, count, round_up(count, 2), width, mem.keys.keys);
  mem.keys.panel = round_up(count, 2) / Unit::DEPTH * NR;
}

// BY_KEY: the rectangle's rows are keys, and their gradients are wanted; else its rows are queries. ALL: both are.
template <class Unit, class T, bool BY_KEY, bool ALL>
void run_rectangle(const MaskedAttentionArgs& m, const RectangleList& list, const Rectangle& rectangle,
                   const Head<T>& head, const Sums& sums, Memory<typename Unit::Word>& mem) {
  const int64_t width = m.attention.width;
  const float scale = m.attention.scale;
  const Tokens tokens = BY_KEY ? Tokens{rectangle.columns, rectangle.rows, rectangle.num_columns, rectangle.num_rows}
                               : Tokens{rectangle.rows, rectangle.columns, rectangle.num_rows, rectangle.num_columns};
  float *dq[QUERIES], *dk[KEYS], *dv[KEYS];
  for (int64_t start = 0; start < tokens.num_keys; start += KEYS) {
    const int64_t count = smaller(KEYS, tokens.num_keys - start);
    pack_keys<Unit>(head, sums, tokens.keys + start, count, width, mem, dk, dv);
    for (int64_t first = 0; first < tokens.num_queries; first += QUERIES) {
      const int64_t queries = smaller(QUERIES, tokens.num_queries - first), rows = round_up(queries, 2);
      pack_queries<Unit>(head, sums, tokens.queries + first, queries, width, mem, dq);
      const ListedRows<float> to_q = {dq}, to_k = {dk}, to_v = {dv};
      const auto run = [&](auto hide) {
        block_of_scores<Unit, ALL || !BY_KEY, ALL || BY_KEY>(width, scale, rows, count, mem.queries, mem.keys, hide,
                                                             to_q, to_k, to_v);
      };
      if (!rectangle.seen)
        run(AllSeen{});
      else if (BY_KEY)
        run(HideByKey{rectangle.seen + start * rectangle.num_columns + first, queries, rectangle.num_columns});
      else
        run(HideByQuery{rectangle.seen + first * rectangle.num_columns + start, list.seen + list.seen_bytes, queries,
                        rectangle.num_columns});
    }
  }
}

// log-sum-exps and row sums of queries `first` .. `last`
template <class T>
void prepare_queries(const Head<T>& head, const Sums& sums, int64_t first, int64_t last, int64_t width) {
  for (int64_t row = first; row < last; ++row) {
    const bool used = head.lse[row] != __builtin_inff();
    sums.lse[row] = head.lse[row] * LOG2E;
    sums.delta[row] = used ? product_of_rows(head.o(row), head.d_o(row), width) : 0.0f;
  }
}

template <class T>
void write_rows(const StridedRows<T>& out, const float* sums, int64_t first, int64_t last, int64_t width) {
  for (int64_t row = first; row < last; ++row) write_row(out(row), sums + row * width, width);
}

AST_INLINE int64_t take_sums(Layout& layout, Sums* sums, char* base, const AttentionArgs& a) {
  // dq, dk and dv lie together, to be zeroed at once
  layout.take(&sums->dq, base, a.max_tq * a.width);
  layout.take(&sums->dk, base, a.max_tk * a.width);
  layout.take(&sums->dv, base, a.max_tk * a.width);
  layout.take(&sums->lse, base, a.max_tq);
  layout.take(&sums->delta, base, a.max_tq);
  return (int64_t)layout.bytes;
}

AST_INLINE void zero_sums(const Sums& sums, const AttentionArgs& a) {
  memset(sums.dq, 0, (size_t)(a.max_tq + 2 * a.max_tk) * (size_t)a.width * sizeof(float));
}

template <class Word>
void take_memory(Layout& layout, Memory<Word>* mem, char* base, const AttentionArgs& a, int64_t depth, bool own) {
  layout.take_queries(&mem->queries, base, QUERIES, a.width, depth);
  layout.take_block(&mem->keys, base, QUERIES, a.width, depth);
  layout.take(&mem->zeros, base, MAX_WIDTH);
  layout.take(&mem->unused, base, MAX_WIDTH);
  if (own) take_sums(layout, &mem->own, base, a);
}

template <class Unit, class T>
void share_of_heads(const MaskedAttentionArgs& m, Memory<typename Unit::Word>& mem, int64_t part, int64_t parts) {
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads;
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
    const Head<T> head = head_at<T>(a, item);
    zero_sums(mem.own, a);
    prepare_queries(head, mem.own, 0, a.max_tq, a.width);
    for (int64_t index = 0; index < m.by_query.count; ++index) {
      if (index + 1 < m.by_query.count) {
        const Rectangle next = rectangle_at(m.by_query, index + 1);
        fetch_ahead(head.q, next.rows, next.num_rows, a.width);
        fetch_ahead(head.d_o, next.rows, next.num_rows, a.width);
        fetch_ahead(head.k, next.columns, next.num_columns, a.width);
        fetch_ahead(head.v, next.columns, next.num_columns, a.width);
      }
      run_rectangle<Unit, T, false, true>(m, m.by_query, rectangle_at(m.by_query, index), head, mem.own, mem);
    }
    write_rows(head.dq, mem.own.dq, 0, a.max_tq, a.width);
    write_rows(head.dk, mem.own.dk, 0, a.max_tk, a.width);
    write_rows(head.dv, mem.own.dv, 0, a.max_tk, a.width);
  }
}

template <class Unit, class T, bool BY_KEY>
void share_of_side(const MaskedAttentionArgs& m, const RectangleList& list, const Sums* sums,
                   Memory<typename Unit::Word>* mem, int64_t part, int64_t parts) {
  const int64_t items = m.attention.num_clips * m.attention.heads;
  for (int64_t first = 0, last; first < list.count; first = last) {
    last = end_of_pass(list, first);
    each_of_share(list, first, last, items, part, parts, [&](int64_t item, const Rectangle& rectangle) {
      if (mem)
        run_rectangle<Unit, T, BY_KEY, false>(m, list, rectangle, head_at<T>(m.attention, item), sums[item], *mem);
    });
#pragma omp barrier
  }
}

// heads shared by all threads; those without memory still come to the barriers
template <class Unit, class T>
void share_of_rectangles(const MaskedAttentionArgs& m, Memory<typename Unit::Word>* mem, char* shared, int64_t part,
                         int64_t parts) {
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads;
  Sums of_item[MANY_HEADS];
  Layout places;
  for (int64_t item = 0; item < items; ++item) take_sums(places, &of_item[item], shared, a);
#pragma omp for schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    zero_sums(of_item[item], a);
    prepare_queries(head_at<T>(a, item), of_item[item], 0, a.max_tq, a.width);
  }
  share_of_side<Unit, T, false>(m, m.by_query, of_item, mem, part, parts);
  share_of_side<Unit, T, true>(m, m.by_key, of_item, mem, part, parts);
#pragma omp for schedule(static) collapse(2)
  for (int64_t item = 0; item < items; ++item)
    for (int64_t first = 0; first < larger(a.max_tq, a.max_tk); first += 64) {
      const Head<T> head = head_at<T>(a, item);
      write_rows(head.dq, of_item[item].dq, first, smaller(a.max_tq, first + 64), a.width);
      write_rows(head.dk, of_item[item].dk, first, smaller(a.max_tk, first + 64), a.width);
      write_rows(head.dv, of_item[item].dv, first, smaller(a.max_tk, first + 64), a.width);
    }
}

template <class Unit, class T>
bool backward(const MaskedAttentionArgs& m) {
  typedef typename Unit::Word Word;
  const AttentionArgs& a = m.attention;
  const int64_t items = a.num_clips * a.heads;
  const bool shared = items < MANY_HEADS;
  Layout of_sums;
  Sums unplaced;
  Scratch sums(shared ? (size_t)(items * take_sums(of_sums, &unplaced, nullptr, a)) : 0);
  if (!sums.base) return false;
  int32_t failed = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int64_t part = 0, parts = 1;
#if defined(_OPENMP)
    part = omp_get_thread_num(), parts = omp_get_num_threads();
#endif
    Memory<Word> mem;
    Layout sizes, places;
    take_memory(sizes, &mem, nullptr, a, Unit::DEPTH, !shared);
    Scratch scratch(sizes.bytes);
    if (scratch.base) {
      take_memory(places, &mem, scratch.base, a, Unit::DEPTH, !shared);
      memset(mem.zeros, 0, MAX_WIDTH * sizeof(float));
    } else {
#pragma omp atomic write
      failed = 1;
    }
    if (shared)
      share_of_rectangles<Unit, T>(m, scratch.base ? &mem : nullptr, sums.base, part, parts);
    else if (scratch.base)
      share_of_heads<Unit, T>(m, mem, part, parts);
  }
  return !failed;
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(attention_masked_backward)(const MaskedAttentionArgs& m) {
#if defined(__AVX512BF16__)
  if (m.attention.type == BF16) return backward<PairUnit, bf16>(m);
#else
  if (m.attention.type == BF16) return backward<FloatUnit, bf16>(m);
#endif
  return backward<FloatUnit, float>(m);
}

}  // namespace ast_fast
