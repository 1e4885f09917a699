// Gradients of flash attention on CPU, deterministic: every output element is summed by one thread in a fixed order.
//
// A work item is one head of one clip, or, when heads are few, one of a fixed number of ranges of its keys. It walks
// blocks of KEYS keys by blocks of QUERIES queries (attention_gradients.h). dQ is summed in fp32 in a buffer of the
// item's own; ranges of keys are added afterwards in order. The number of ranges follows from the shapes alone, so
// results are bitwise the same for every number of threads.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_gradients.h"

namespace {

constexpr int64_t QUERIES = 96;
constexpr int64_t ITEMS_WANTED = 32;

// One head's operands, and one block's scratch. Word stands for float or a pair of bf16.
template <class Word>
struct Memory {
  QueryBlock<Word> queries;  // of all the head's
  KeyBlock<Word> block;
  float *dk, *dv;            // [KEYS][width]
  float* dq;                 // [tq][width] when the keys are not split
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
  const StridedRows<const T> q = {(const T*)a.q + clip.q + item.head * a.q_head, a.q_row};
  const StridedRows<const T> d_o = {(const T*)a.d_o + clip.d_o + item.head * a.do_head, a.do_row};
  const StridedRows<const T> o = {(const T*)a.o + clip.o + item.head * a.o_head, a.o_row};
  pack_rows<Unit>(q, tq, padded, width, mem.queries.rows);
  pack_rows<Unit>(d_o, tq, padded, width, mem.queries.grad_rows);
  pack_panels<Unit>(q, tq, padded, width, mem.queries.panels);
  pack_panels<Unit>(d_o, tq, padded, width, mem.queries.grad_panels);
  mem.queries.panel = padded / Unit::DEPTH * NR;
  const float* lse = a.lse + clip.lse + item.head * a.lse_head;
  for (int64_t row = 0; row < padded; ++row) {
    mem.queries.delta[row] = row < tq ? product_of_rows(o(row), d_o(row), width) : 0.0f;
    // rows that only fill up a tile get probability 0
    mem.queries.lse[row] = row < tq ? lse[row] * LOG2E : __builtin_inff();
  }
  memset(mem.dq, 0, (size_t)(padded * width) * sizeof(float));
}

// the queries from `first` on of all that were prepared
template <class Unit>
AST_INLINE QueryBlock<typename Unit::Word> queries_from(QueryBlock<typename Unit::Word> all, int64_t first) {
  const int64_t rows = first * ROW_STRIDE, words = first / Unit::DEPTH * NR;
  return {all.rows + rows, all.grad_rows + rows, all.panels + words, all.grad_panels + words,
          all.panel,       all.lse + first,      all.delta + first};
}

template <class Unit, class T>
void run_item(const AttentionArgs& a, const Item& item, Memory<typename Unit::Word> mem) {
  const AttentionClip& clip = *item.clip;
  const int64_t width = a.width;
  const StridedRows<const T> k = {(const T*)a.k + clip.k + item.head * a.k_head, a.k_row};
  const StridedRows<const T> v = {(const T*)a.v + clip.v + item.head * a.v_head, a.v_row};
  T* dk = (T*)a.dk + clip.dk + item.head * a.dk_head;
  T* dv = (T*)a.dv + clip.dv + item.head * a.dv_head;
  if (item.dq) mem.dq = item.dq;
  mem.block.panel = KEYS / Unit::DEPTH * NR;
  prepare_queries<Unit, T>(a, item, mem);
  const StridedRows<float> sums_q = {mem.dq, width}, sums_k = {mem.dk, width}, sums_v = {mem.dv, width};
  for (int64_t start = item.key_begin; start < item.key_end; start += KEYS) {
    const int64_t count = smaller(KEYS, item.key_end - start);
    pack_transposed<Unit>(k.from(start, 0), count, width, mem.block.keys_t);
    pack_transposed<Unit>(v.from(start, 0), count, width, mem.block.values_t);
    pack_panels<Unit>(k.from(start, 0), count, KEYS, width, mem.block.keys);
    memset(mem.dk, 0, (size_t)(KEYS * width) * sizeof(float));
    memset(mem.dv, 0, (size_t)(KEYS * width) * sizeof(float));
    for (int64_t first = 0; first < clip.tq; first += QUERIES)
      block_of_scores<Unit, true, true>(width, a.scale, smaller(QUERIES, round_up(clip.tq - first, 2)), count,
                                        queries_from<Unit>(mem.queries, first), mem.block, AllSeen{},
                                        sums_q.from(first, 0), sums_k, sums_v);
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
void take_all(Layout& layout, Memory<Word>* mem, char* base, const AttentionArgs& a, int64_t depth) {
  const int64_t queries = padded_queries(a.max_tq) + MR, width = a.width;
  layout.take_queries(&mem->queries, base, queries, width, depth);
  layout.take_block(&mem->block, base, QUERIES, width, depth);
  layout.take(&mem->dk, base, KEYS * width);
  layout.take(&mem->dv, base, KEYS * width);
  layout.take(&mem->dq, base, queries * width);
}

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
    Layout sizes, places;
    take_all(sizes, &mem, nullptr, a, Unit::DEPTH);
    Scratch scratch(sizes.bytes);
    if (!scratch.base) {
#pragma omp atomic write
      failed = 1;
    } else {
      take_all(places, &mem, scratch.base, a, Unit::DEPTH);
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
