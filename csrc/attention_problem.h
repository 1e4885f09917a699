// What Python passes for attention, as the kernels take it. Part of the bindings.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "api.h"
#include "arguments.h"

namespace {

namespace py = pybind11;
using namespace ast_fast;

// (address, stride of a clip, of a row, of a head); packed tokens have no clip stride
struct View {
  uintptr_t address;
  int64_t clip, row, head;
  explicit View(const py::tuple& view) {
    need(view.size() == 4, "q, k, v, o and gradients", "(address, stride of a clip, of a row, of a head)");
    address = view[0].cast<uintptr_t>();
    clip = view[1].cast<int64_t>(), row = view[2].cast<int64_t>(), head = view[3].cast<int64_t>();
    sizes({clip, row, head}, "strides of q, k, v, o and gradients");
  }
};

// running totals of packed clips: they begin with 0, never fall and end with the number of rows
void check_totals(const int32_t* totals, int64_t clips, int64_t rows, const char* name) {
  bool good = totals[0] == 0 && totals[clips] == rows;
  for (int64_t b = 0; b < clips; ++b) good &= totals[b] <= totals[b + 1];
  need(good, name, "where each clip starts, from 0 on, never going backwards, and then the number of rows");
}

// One list of clips serves both layouts: `lengths` (null or valid keys per clip) for padded clips of `tq` and `tk`
// tokens, `cu_q` and `cu_k` (running totals) for packed ones of `tq` and `tk` tokens in all.
struct Problem {
  View vq, vk, vv, vo;
  AttentionArgs args{};
  std::vector<AttentionClip> clips;

  Problem(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& o, uintptr_t lse,
          int64_t lse_head, int64_t num_clips, int64_t tq, int64_t tk, int64_t heads, int64_t width, uintptr_t lengths,
          uintptr_t cu_q, uintptr_t cu_k, float scale, int dtype, int32_t threads)
      : vq(q), vk(k), vv(v), vo(o) {
    AttentionArgs& a = args;
    sizes({num_clips, tq, tk, heads, lse_head}, "num_clips, tq, tk, heads, lse_head");
    need(width == 32 || width == 64 || width == 96 || width == 128, "width", "a head width of 32, 64, 96 or 128");
    need(scale > 0.0f && std::isfinite(scale), "scale", "a finite number above 0");
    need((cu_q == 0) == (cu_k == 0), "cu_q, cu_k", "both or neither");
    need(cu_q == 0 || lengths == 0, "lengths", "0 with packed clips");
    const int64_t most_columns = cu_q ? (tq + num_clips * 128 + 127) / 128 * 128 : (tq + 127) / 128 * 128;
    need(lse_head >= most_columns, "lse_head", "a column for each query, padded to 128s");
    if (cu_q) {
      check_totals(at<int32_t>(cu_q), num_clips, tq, "cu_q"), check_totals(at<int32_t>(cu_k), num_clips, tk, "cu_k");
    }
    clips.resize(num_clips);
    const int64_t queries = num_clips && heads && tq, keys = num_clips && heads && tk;
    a.q = memory(vq.address, queries, "q"), a.k = memory(vk.address, keys, "k"), a.v = memory(vv.address, keys, "v");
    a.o = memory(vo.address, queries, "o"), a.lse = memory<float>(lse, queries, "lse");
    a.q_row = vq.row, a.k_row = vk.row, a.v_row = vv.row, a.o_row = vo.row;
    a.q_head = vq.head, a.k_head = vk.head, a.v_head = vv.head, a.o_head = vo.head;
    a.lse_head = lse_head, a.num_clips = num_clips, a.heads = heads, a.width = width, a.scale = scale;
    a.type = floating(dtype, "dtype"), a.threads = threads, a.clips = clips.data();
    const int32_t *valid = at<int32_t>(lengths), *sums_q = at<int32_t>(cu_q), *sums_k = at<int32_t>(cu_k);
    for (int64_t b = 0; b < num_clips; ++b) {
      AttentionClip& clip = clips[b];
      if (sums_q) {
        clip.q = sums_q[b] * vq.row, clip.o = sums_q[b] * vo.row;
        clip.k = sums_k[b] * vk.row, clip.v = sums_k[b] * vv.row;
        clip.tq = sums_q[b + 1] - sums_q[b], clip.tk = clip.tk_padded = sums_k[b + 1] - sums_k[b];
        clip.lse = (sums_q[b] + b * 128) / 128 * 128;
      } else {
        clip.q = b * vq.clip, clip.k = b * vk.clip, clip.v = b * vv.clip, clip.o = b * vo.clip;
        clip.tq = tq, clip.tk = clip.tk_padded = tk, clip.lse = b * heads * lse_head;
        if (valid) clip.tk = valid[b] < 0 ? 0 : valid[b] < tk ? valid[b] : tk;
      }
      a.max_tq = clip.tq > a.max_tq ? clip.tq : a.max_tq;
      a.max_tk = clip.tk > a.max_tk ? clip.tk : a.max_tk;
    }
  }

  void add_gradients(const py::tuple& d_o, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv,
                     uintptr_t cu_q, uintptr_t cu_k) {
    const View wo(d_o), wq(dq), wk(dk), wv(dv);
    AttentionArgs& a = args;
    const int64_t queries = a.q != nullptr, keys = a.k != nullptr;
    a.d_o = memory(wo.address, queries, "do"), a.dq = memory(wq.address, queries, "dq");
    a.dk = memory(wk.address, keys, "dk"), a.dv = memory(wv.address, keys, "dv");
    a.do_row = wo.row, a.dq_row = wq.row, a.dk_row = wk.row, a.dv_row = wv.row;
    a.do_head = wo.head, a.dq_head = wq.head, a.dk_head = wk.head, a.dv_head = wv.head;
    const int32_t *sums_q = at<int32_t>(cu_q), *sums_k = at<int32_t>(cu_k);
    for (int64_t b = 0; b < a.num_clips; ++b) {
      AttentionClip& clip = clips[b];
      clip.d_o = sums_q ? sums_q[b] * wo.row : b * wo.clip, clip.dq = sums_q ? sums_q[b] * wq.row : b * wq.clip;
      clip.dk = sums_k ? sums_k[b] * wk.row : b * wk.clip, clip.dv = sums_k ? sums_k[b] * wv.row : b * wv.clip;
    }
  }
};

// (rows, count, columns, count, table, rectangles, seen, bytes); every number in them is checked, because the kernels
// take addresses from them
RectangleList rectangle_list(const py::tuple& list, int64_t most_rows, int64_t most_columns) {
  need(list.size() == 8, "by_query, by_key", "(rows, count, columns, count, table, rectangles, seen, bytes)");
  const int64_t rows = list[1].cast<int64_t>(), columns = list[3].cast<int64_t>();
  RectangleList out{};
  out.rows = at<int32_t>(list[0].cast<uintptr_t>()), out.columns = at<int32_t>(list[2].cast<uintptr_t>());
  out.table = at<int64_t>(list[4].cast<uintptr_t>()), out.count = list[5].cast<int64_t>();
  out.seen = at<uint8_t>(list[6].cast<uintptr_t>()), out.seen_bytes = list[7].cast<int64_t>();
  const auto inside = [](const int32_t* tokens, int64_t count, int64_t limit) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= tokens[i] >= 0 && tokens[i] < limit;
    return all;
  };
  const auto part = [](int64_t first, int64_t count, int64_t of) {
    return first >= 0 && count >= 0 && first <= of && count <= of - first;
  };
  bool good = inside(out.rows, rows, most_rows) && inside(out.columns, columns, most_columns);
  for (int64_t i = 0; i < out.count; ++i) {
    const int64_t* entry = out.table + i * 6;
    good = good && part(entry[0], entry[1], rows) && part(entry[2], entry[3], columns) &&
           (entry[4] < 0 || part(entry[4], entry[1] * entry[3], out.seen_bytes)) && (i == 0 || entry[5] >= entry[-1]);
  }
  if (!good)
    throw py::value_error("the mask's rectangles do not fit " + std::to_string(most_rows) + " x " +
                          std::to_string(most_columns) +
                          " tokens: expected the rectangles of an AttentionMask of that size");
  return out;
}

MaskedAttentionArgs masked(const Problem& problem, const py::tuple& by_query, const py::tuple& by_key, int64_t tq,
                           int64_t tk) {
  return {problem.args, rectangle_list(by_query, tq, tk), rectangle_list(by_key, tk, tq)};
}

}  // namespace
