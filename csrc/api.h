// The functions every instruction set provides: one argument struct a kernel, plain pointers and counts.
//
// Kernel sources are compiled once per instruction set with -DAST_ISA=<name>; AST_KERNEL(layer_norm_forward) then
// names the function ast_fast_<name>_layer_norm_forward. Everything else in those sources sits in anonymous
// namespaces and uses no std templates, so that no object exports a weak symbol compiled for a newer CPU.
#pragma once

#include <cstdint>

namespace ast_fast {

enum DType : int32_t { F32 = 0, BF16 = 1, I16 = 2 };

struct LayerNormArgs {
  const void* x;          // [rows, cols]
  const void* residual;   // [rows, cols], or null: plain LayerNorm
  const float* weight;    // [cols]
  const float* bias;      // [cols]
  void* y;                // [rows, cols]
  void* total;            // [rows, cols] of the residual's dtype
  float* mean;            // [rows]
  float* rstd;            // [rows]
  int64_t rows, cols, x_stride, residual_stride;
  double eps;
  DType x_type, residual_type, y_type;
  int32_t threads;
};

struct LayerNormGradArgs {
  const void* dy;         // [rows, cols]
  const void* dtotal;     // [rows, cols] or null: added to dx before rounding
  const void* x;          // [rows, cols]
  const float* weight;    // [cols]
  const float* mean;      // [rows]
  const float* rstd;      // [rows]
  void* dx;               // [rows, cols] of x's dtype
  float* partial;         // [chunks, 2, cols], overwritten
  float* dweight;         // [cols]
  float* dbias;           // [cols]
  int64_t rows, cols, dy_stride, dtotal_stride, x_stride, chunks;
  DType dy_type, dtotal_type, x_type;
  int32_t threads;
};

struct GeluArgs {
  const void* h;          // [rows, cols]
  const void* dg;         // [rows, cols], backward only
  void* g;                // [rows, cols]; may be h itself
  void* dh;               // [rows, cols], backward only; may be dg itself
  float* partial;         // [chunks, cols] or null: column sums of dh, backward only
  float* dbias;           // [cols] or null
  int64_t rows, cols, h_stride, dg_stride, chunks;
  DType type;
  int32_t threads;
};

struct ColumnSumArgs {
  const void* x;          // [rows, cols]
  float* partial;         // [chunks, cols], overwritten
  float* sums;            // [cols]
  int64_t rows, cols, stride, chunks;
  DType type;
  int32_t threads;
};

// In this order: x is fetched (and rescaled, biased), added to the residual, normalised, activated, stored.
struct Int8RowsArgs {
  const void* x;          // [rows, cols]
  const float* x_scale;   // [rows] or null: x is a product of quantised rows, still to be multiplied by their scales
  const float* bias;      // [cols], with x_scale
  const void* residual;   // [rows, cols] or null
  void* total;            // [rows, cols] of the residual's dtype: x + residual
  const float* weight;    // [cols] or null: LayerNorm's
  const float* shift;     // [cols]: its bias
  void* out;              // [rows, cols] bytes if q_scale, else of residual_type
  float* q_scale;         // [rows] or null: the output is quantised, (out - zero) * q_scale being the value
  int64_t rows, cols, x_stride, residual_stride;
  double eps;
  int32_t gelu, zero;     // zero in 1 to 254
  DType x_type, residual_type;
  int32_t threads;
};

struct PatchArgs {
  const void* x;          // [clips, frames, bins], bins contiguous
  void* columns;          // [clips, prefix + f * t, pt * pf]; the prefix rows are zeroed
  void* dx;               // [clips, frames, bins] contiguous, scatter only
  int64_t clips, frames, bins, x_stride_clip, x_stride_frame;
  int64_t f, t, pf, pt, fstride, tstride, prefix;
  DType type;
  int32_t threads;
};

struct PatchProjectArgs {
  const float* x;         // [clips, frames, bins], bins contiguous
  const float* weight;    // [width, pt * pf], time the slower axis; width a multiple of 32, pt * pf of 16
  const float* table;     // [prefix + f * t, width], added to every token
  float* y;               // [clips, prefix + f * t, width]
  int64_t clips, x_stride_clip, x_stride_frame, width;
  int64_t f, t, pf, pt, fstride, tstride, prefix;
  int32_t threads;
};

struct PatchWeightGradientArgs {
  const float* x;   // [clips, frames, bins], bins contiguous
  const float* dy;  // [clips, prefix + f * t, width], contiguous; width a multiple of 32
  float* dweight;   // [width / 32, pt * pf, 32], time the slower axis of a patch
  int64_t clips, x_stride_clip, x_stride_frame, width;
  int64_t f, t, pf, pt, fstride, tstride, prefix;
  int32_t threads;
};

// One clip of an attention problem; offsets count elements from the base pointers.
struct AttentionClip {
  int64_t q, k, v, o;            // first row of the clip
  int64_t dq, dk, dv, d_o;       // backward only
  int64_t tq, tk, tk_padded;     // queries, valid keys, keys stored (the rest get zero gradients)
  int64_t lse;                   // offset of head 0's first query in lse
};

struct AttentionArgs {
  const void *q, *k, *v;         // rows of `heads` x `width`
  void* o;                       // forward writes it, backward reads it
  float* lse;
  const void* d_o;
  void *dq, *dk, *dv;
  const AttentionClip* clips;
  const float* key_bias;         // forward only: null, or added to the scores of each clip's keys (natural log units)
  int64_t q_row, k_row, v_row, o_row, do_row, dq_row, dk_row, dv_row;          // strides between rows
  int64_t q_head, k_head, v_head, o_head, do_head, dq_head, dk_head, dv_head;  // strides between heads
  int64_t lse_head, key_bias_clip;
  int64_t num_clips, heads, width, max_tq, max_tk;
  float scale;
  DType type;
  int32_t threads;
};

// One side of an attention mask: rectangles of row tokens by column tokens, passes in order.
struct RectangleList {
  const int32_t *rows, *columns;  // tokens of all rectangles one after another
  const int64_t* table;           // [count, 6]: first row, rows, first column, columns, offset into seen or -1, pass
  const uint8_t* seen;            // [rows, columns] of the rectangles in which some pairs are hidden
  int64_t count, seen_bytes;
};

struct MaskedAttentionArgs {
  AttentionArgs attention;  // clips all of one size
  RectangleList by_query;   // rows are queries; rectangles of one pass have no row in common
  RectangleList by_key;     // rows are keys; the same pairs once more
};

struct LogMelTables {
  int64_t window_samples, hop_samples, n_fft, num_mel_bins;
  float preemphasis, log_floor, log_of_floor;
  float log_offset;            // added to every energy
  int32_t remove_dc, magnitude;
  const float* window;         // [window_samples rounded up to 16], zero padded
  const float* twiddles;       // see fft.h
  const float* split;          // [n_fft / 4 + 1, 2] cos, sin of 2 pi k / n_fft
  const int32_t* order;        // [n_fft / 2] digit-reversed position of complex input j
  const int32_t* mel_start;    // [num_mel_bins]
  const int32_t* mel_count;    // [num_mel_bins]
  const float* mel_weights;    // spans one after another
};

struct LogMelArgs {
  const LogMelTables* tables;
  const void* wave;            // [clips, samples]
  const int64_t* lengths;      // [clips]
  void* out;                   // [clips, num_frames, bins]; backward reads dy (float32) from it
  float* dwave;                // [clips, samples], backward only, zeroed by the caller
  int64_t clips, samples, wave_stride, num_frames;
  float scale;                 // 1 / 32768 for int16
  float gain, shift;           // out = value * gain + shift
  DType wave_type, out_type;
  int32_t threads;
};

struct FlacArgs {
  const uint8_t* data;         // frames, the metadata before them left out
  int64_t size;
  int16_t* out;                // [samples]
  int32_t* scratch;            // [most_samples]
  int64_t samples;             // in all
  int64_t most_samples;        // in a frame
  bool* done;                  // false: not a stream that this decodes
};

// clang-format off
#define AST_FOR_EACH_KERNEL(X)                     \
  X(layer_norm_forward, LayerNormArgs)             \
  X(layer_norm_backward, LayerNormGradArgs)        \
  X(gelu_forward, GeluArgs)                        \
  X(gelu_backward, GeluArgs)                       \
  X(column_sum, ColumnSumArgs)                     \
  X(int8_rows, Int8RowsArgs)                       \
  X(patch_gather, PatchArgs)                       \
  X(patch_scatter, PatchArgs)                      \
  X(patch_project, PatchProjectArgs)               \
  X(patch_weight_gradient, PatchWeightGradientArgs) \
  X(attention_forward, AttentionArgs)              \
  X(attention_backward, AttentionArgs)             \
  X(attention_masked_forward, MaskedAttentionArgs) \
  X(attention_masked_backward, MaskedAttentionArgs) \
  X(log_mel_forward, LogMelArgs)                   \
  X(log_mel_backward, LogMelArgs)                  \
  X(flac_decode, FlacArgs)
// clang-format on

#define AST_JOIN_(isa, name) ast_fast_##isa##_##name
#define AST_JOIN(isa, name) AST_JOIN_(isa, name)
#define AST_KERNEL(name) AST_JOIN(AST_ISA, name)

#ifdef AST_ISA
// a kernel returns false when it could not get its scratch memory
#define AST_DECLARE(name, Args) extern "C" bool AST_KERNEL(name)(const Args& args);
AST_FOR_EACH_KERNEL(AST_DECLARE)
#undef AST_DECLARE
#endif

}  // namespace ast_fast
