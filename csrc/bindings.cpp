// The one file that knows Python: picks the kernels of the best instruction set this CPU has and exposes them over raw
// pointers and counts, so that building needs no torch. The adapters in ast_fast/cpp/ check shapes and own the memory.
//
// AST_FAST_CPU_ISA in the environment forces a lower instruction set (for tests). Threads: the count comes with every
// call; in a child made by fork, where an OpenMP team would hang, everything runs on one thread.

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "api.h"
#include "arguments.h"
#include "attention_problem.h"
#include "log_mel_tables.h"

namespace py = pybind11;
using namespace ast_fast;

#define AST_DECLARE_FOR(isa, name, Args) extern "C" bool ast_fast_##isa##_##name(const Args&);
#define AST_DECLARE_baseline(name, Args) AST_DECLARE_FOR(baseline, name, Args)
#define AST_DECLARE_avx2(name, Args) AST_DECLARE_FOR(avx2, name, Args)
#define AST_DECLARE_avx512(name, Args) AST_DECLARE_FOR(avx512, name, Args)
#define AST_DECLARE_avx512bf16(name, Args) AST_DECLARE_FOR(avx512bf16, name, Args)

AST_FOR_EACH_KERNEL(AST_DECLARE_baseline)
#ifdef AST_HAS_AVX2
AST_FOR_EACH_KERNEL(AST_DECLARE_avx2)
#endif
#ifdef AST_HAS_AVX512
AST_FOR_EACH_KERNEL(AST_DECLARE_avx512)
#endif
#ifdef AST_HAS_AVX512BF16
AST_FOR_EACH_KERNEL(AST_DECLARE_avx512bf16)
#endif

namespace {

struct Kernels {
  const char* isa;
#define AST_MEMBER(name, Args) bool (*name)(const Args&);
  AST_FOR_EACH_KERNEL(AST_MEMBER)
#undef AST_MEMBER
};

#define AST_ENTRY_baseline(name, Args) ast_fast_baseline_##name,
#define AST_ENTRY_avx2(name, Args) ast_fast_avx2_##name,
#define AST_ENTRY_avx512(name, Args) ast_fast_avx512_##name,
#define AST_ENTRY_avx512bf16(name, Args) ast_fast_avx512bf16_##name,

const Kernels baseline_kernels = {"baseline", AST_FOR_EACH_KERNEL(AST_ENTRY_baseline)};
#ifdef AST_HAS_AVX2
const Kernels avx2_kernels = {"avx2", AST_FOR_EACH_KERNEL(AST_ENTRY_avx2)};
#endif
#ifdef AST_HAS_AVX512
const Kernels avx512_kernels = {"avx512", AST_FOR_EACH_KERNEL(AST_ENTRY_avx512)};
#endif
#ifdef AST_HAS_AVX512BF16
const Kernels avx512bf16_kernels = {"avx512bf16", AST_FOR_EACH_KERNEL(AST_ENTRY_avx512bf16)};
#endif

// the instruction sets this build has and this CPU runs, worst first
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable = {&baseline_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef AST_HAS_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) usable.push_back(&avx2_kernels);
#endif
#ifdef AST_HAS_AVX512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) usable.push_back(&avx512_kernels);
#endif
#ifdef AST_HAS_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) usable.push_back(&avx512bf16_kernels);
#endif
#endif
  return usable;
}

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const Kernels* choose_kernels() {
  const auto usable = usable_kernels();
  const char* wanted = std::getenv("AST_FAST_CPU_ISA");
  if (!wanted || !*wanted) return usable.back();
  std::string names;
  for (const Kernels* kernels : usable) {
    if (std::string(kernels->isa) == wanted) return kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->isa;
  }
  throw py::import_error("AST_FAST_CPU_ISA=" + std::string(wanted) + " is not available; this build on this CPU has: " +
                         names);
}

const Kernels* kernels = nullptr;
bool in_forked_child = false;

int32_t team(int threads) { return in_forked_child || threads < 1 ? 1 : threads; }

template <class Args>
void call(bool (*kernel)(const Args&), const Args& args) {
  bool done;
  {
    py::gil_scoped_release release;
    done = kernel(args);
  }
  if (!done) throw std::bad_alloc();
}

void layer_norm_forward(uintptr_t x, int x_type, int64_t x_stride, uintptr_t residual, int residual_type,
                        int64_t residual_stride, uintptr_t weight, uintptr_t bias, double eps, uintptr_t y, int y_type,
                        uintptr_t total, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols, int threads) {
  LayerNormArgs a{};
  rows_of(rows, cols, x_stride, "x_stride"), rows_of(rows, cols, residual_stride, "residual_stride");
  const int64_t count = rows && cols;
  a.x = memory(x, count, "x"), a.residual = at(residual);
  a.weight = memory<float>(weight, count, "weight"), a.bias = memory<float>(bias, count, "bias");
  a.y = memory(y, count, "y"), a.total = memory(total, residual && count, "total");
  a.mean = memory<float>(mean, count, "mean"), a.rstd = memory<float>(rstd, count, "rstd");
  a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.residual_stride = residual_stride, a.eps = eps;
  a.x_type = floating(x_type, "x_type"), a.residual_type = floating(residual_type, "residual_type");
  a.y_type = floating(y_type, "y_type"), a.threads = team(threads);
  if (count) call(kernels->layer_norm_forward, a);
}

void layer_norm_backward(uintptr_t dy, int dy_type, int64_t dy_stride, uintptr_t dtotal, int dtotal_type,
                         int64_t dtotal_stride, uintptr_t x, int x_type, int64_t x_stride, uintptr_t weight,
                         uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t partial, int64_t chunks,
                         uintptr_t dweight, uintptr_t dbias, int64_t rows, int64_t cols, int threads) {
  LayerNormGradArgs a{};
  rows_of(rows, cols, dy_stride, "dy_stride"), rows_of(rows, cols, dtotal_stride, "dtotal_stride");
  rows_of(rows, cols, x_stride, "x_stride"), chunks_of(chunks);
  a.dy = memory(dy, rows && cols, "dy"), a.dtotal = at(dtotal), a.x = memory(x, rows && cols, "x");
  a.weight = memory<float>(weight, cols, "weight"), a.mean = memory<float>(mean, rows, "mean");
  a.rstd = memory<float>(rstd, rows, "rstd"), a.dx = memory(dx, rows && cols, "dx");
  a.partial = memory<float>(partial, cols, "partial"), a.dweight = memory<float>(dweight, cols, "dweight");
  a.dbias = memory<float>(dbias, cols, "dbias"), a.rows = rows, a.cols = cols, a.chunks = chunks;
  a.dy_stride = dy_stride, a.dtotal_stride = dtotal_stride, a.x_stride = x_stride;
  a.dy_type = floating(dy_type, "dy_type"), a.dtotal_type = floating(dtotal_type, "dtotal_type");
  a.x_type = floating(x_type, "x_type"), a.threads = team(threads);
  call(kernels->layer_norm_backward, a);
}

void gelu_forward(uintptr_t h, int64_t h_stride, uintptr_t g, int dtype, int64_t rows, int64_t cols, int threads) {
  GeluArgs a{};
  rows_of(rows, cols, h_stride, "h_stride");
  a.h = memory(h, rows && cols, "h"), a.g = memory(g, rows && cols, "g");
  a.h_stride = h_stride, a.rows = rows, a.cols = cols;
  a.type = floating(dtype, "dtype"), a.threads = team(threads);
  call(kernels->gelu_forward, a);
}

void gelu_backward(uintptr_t dg, int64_t dg_stride, uintptr_t h, int64_t h_stride, uintptr_t dh, uintptr_t g,
                   uintptr_t partial, int64_t chunks, uintptr_t dbias, int dtype, int64_t rows, int64_t cols,
                   int threads) {
  GeluArgs a{};
  rows_of(rows, cols, dg_stride, "dg_stride"), rows_of(rows, cols, h_stride, "h_stride"), chunks_of(chunks);
  need((partial == 0) == (dbias == 0), "partial, dbias", "both or neither");
  a.dg = memory(dg, rows && cols, "dg"), a.h = memory(h, rows && cols, "h"), a.dh = memory(dh, rows && cols, "dh");
  a.g = memory(g, rows && cols, "g"), a.dg_stride = dg_stride, a.h_stride = h_stride;
  a.partial = at<float>(partial), a.chunks = chunks, a.dbias = at<float>(dbias), a.rows = rows, a.cols = cols;
  a.type = floating(dtype, "dtype"), a.threads = team(threads);
  call(kernels->gelu_backward, a);
}

// a few words of each range of memory, spread from its first to its last: tells whether a tensor was written to, by
// whatever means, without reading all of it. Ranges come as (address, bytes).
uint64_t fingerprint(const py::list& ranges) {
  constexpr int64_t WORDS = 16;
  uint64_t hash = 1469598103934665603u;
  for (const py::handle& range : ranges) {
    const auto pair = range.cast<py::tuple>();
    need(pair.size() == 2, "ranges", "(address, bytes) each");
    const int64_t words = pair[1].cast<int64_t>() / 8;
    const char* base = memory<const char>(pair[0].cast<uintptr_t>(), words, "address");
    for (int64_t i = 0; i < WORDS && words > 0; ++i) {
      uint64_t word;
      std::memcpy(&word, base + 8 * ((words - 1) * i / (WORDS - 1)), 8);
      hash = (hash ^ word) * 1099511628211u;
      hash ^= hash >> 29;
    }
  }
  return hash;
}

void int8_rows(uintptr_t x, int x_type, int64_t x_stride, uintptr_t x_scale, uintptr_t bias, uintptr_t residual,
               int64_t residual_stride, uintptr_t total, int residual_type, uintptr_t weight, uintptr_t shift, double eps,
               bool gelu, uintptr_t out, uintptr_t q_scale, int zero, int64_t rows, int64_t cols, int threads) {
  Int8RowsArgs a{};
  rows_of(rows, cols, x_stride, "x_stride"), rows_of(rows, cols, residual_stride, "residual_stride");
  memory(x, rows && cols, "x"), memory(out, rows && cols, "out"), memory(total, residual && rows && cols, "total");
  need((x_scale == 0) == (bias == 0), "x_scale, bias", "both or neither");
  need((weight == 0) == (shift == 0), "weight, shift", "both or neither");
  need(zero >= 1 && zero <= 254, "zero", "1 to 254");
  a.x = at(x), a.x_scale = at<float>(x_scale), a.bias = at<float>(bias), a.residual = at(residual), a.total = at(total);
  a.weight = at<float>(weight), a.shift = at<float>(shift), a.out = at(out), a.q_scale = at<float>(q_scale);
  a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.residual_stride = residual_stride, a.eps = eps;
  a.gelu = gelu, a.zero = zero, a.x_type = floating(x_type, "x_type");
  a.residual_type = floating(residual_type, "residual_type");
  a.threads = team(threads);
  call(kernels->int8_rows, a);
}

void column_sum(uintptr_t x, int64_t stride, uintptr_t partial, int64_t chunks, uintptr_t sums, int dtype,
                int64_t rows, int64_t cols, int threads) {
  ColumnSumArgs a{};
  rows_of(rows, cols, stride, "stride"), chunks_of(chunks);
  a.x = memory(x, rows && cols, "x"), a.stride = stride, a.partial = memory<float>(partial, cols, "partial");
  a.chunks = chunks, a.sums = memory<float>(sums, cols, "sums");
  a.type = floating(dtype, "dtype"), a.rows = rows, a.cols = cols, a.threads = team(threads);
  call(kernels->column_sum, a);
}

PatchArgs patch_args(uintptr_t x, int64_t stride_clip, int64_t stride_frame, uintptr_t columns, int dtype,
                     int64_t clips, int64_t frames, int64_t bins, py::tuple grid, int threads) {
  PatchArgs a{};
  a.x = memory(x, clips, "x"), a.dx = at(x), a.columns = memory(columns, clips, "columns");
  a.x_stride_clip = stride_clip, a.x_stride_frame = stride_frame;
  a.type = floating(dtype, "dtype"), a.clips = clips, a.frames = frames, a.bins = bins, a.threads = team(threads);
  sizes({stride_clip, stride_frame}, "stride_clip, stride_frame");
  read_grid(a, grid), grid_within(a, frames, bins);
  return a;
}

void patch_gather(uintptr_t x, int64_t stride_clip, int64_t stride_frame, uintptr_t columns, int dtype, int64_t clips,
                  int64_t frames, int64_t bins, py::tuple grid, int threads) {
  call(kernels->patch_gather,
       patch_args(x, stride_clip, stride_frame, columns, dtype, clips, frames, bins, grid, threads));
}

void patch_scatter(uintptr_t columns, uintptr_t dx, int dtype, int64_t clips, int64_t frames, int64_t bins,
                   py::tuple grid, int threads) {
  call(kernels->patch_scatter, patch_args(dx, 0, 0, columns, dtype, clips, frames, bins, grid, threads));
}

void patch_project(uintptr_t x, int64_t stride_clip, int64_t stride_frame, uintptr_t weight, uintptr_t table,
                   uintptr_t y, int64_t clips, int64_t frames, int64_t bins, int64_t width, py::tuple grid,
                   int threads) {
  PatchProjectArgs a{};
  a.x = memory<float>(x, clips, "x"), a.x_stride_clip = stride_clip, a.x_stride_frame = stride_frame;
  a.weight = memory<float>(weight, clips, "weight"), a.table = memory<float>(table, clips, "table");
  a.y = memory<float>(y, clips, "y"), a.clips = clips, a.width = width, a.threads = team(threads);
  sizes({stride_clip, stride_frame}, "stride_clip, stride_frame");
  read_grid(a, grid), grid_within(a, frames, bins), blocks_of(a);
  call(kernels->patch_project, a);
}

void patch_weight_gradient(uintptr_t x, int64_t stride_clip, int64_t stride_frame, uintptr_t dy, uintptr_t dweight,
                           int64_t clips, int64_t frames, int64_t bins, int64_t width, py::tuple grid, int threads) {
  PatchWeightGradientArgs a{};
  a.x = memory<float>(x, clips, "x"), a.x_stride_clip = stride_clip, a.x_stride_frame = stride_frame;
  a.dy = memory<float>(dy, clips, "dy"), a.dweight = memory<float>(dweight, width, "dweight");
  a.clips = clips, a.width = width, a.threads = team(threads);
  sizes({stride_clip, stride_frame}, "stride_clip, stride_frame");
  read_grid(a, grid), grid_within(a, frames, bins), blocks_of(a);
  call(kernels->patch_weight_gradient, a);
}

void attention_forward(py::tuple q, py::tuple k, py::tuple v, py::tuple o, uintptr_t lse, int64_t lse_head,
                       int64_t num_clips, int64_t tq, int64_t tk, int64_t heads, int64_t width, uintptr_t lengths,
                       uintptr_t cu_q, uintptr_t cu_k, float scale, int dtype, int threads, uintptr_t key_bias) {
  Problem problem(q, k, v, o, lse, lse_head, num_clips, tq, tk, heads, width, lengths, cu_q, cu_k, scale, dtype,
                  team(threads));
  need(key_bias == 0 || cu_q == 0, "key_bias", "0 with packed clips");
  problem.args.key_bias = at<float>(key_bias), problem.args.key_bias_clip = tk;
  call(kernels->attention_forward, problem.args);
}

void attention_backward(py::tuple q, py::tuple k, py::tuple v, py::tuple o, uintptr_t lse, int64_t lse_head,
                        int64_t num_clips, int64_t tq, int64_t tk, int64_t heads, int64_t width, uintptr_t lengths,
                        uintptr_t cu_q, uintptr_t cu_k, float scale, int dtype, int threads, py::tuple d_o,
                        py::tuple dq, py::tuple dk, py::tuple dv) {
  Problem problem(q, k, v, o, lse, lse_head, num_clips, tq, tk, heads, width, lengths, cu_q, cu_k, scale, dtype,
                  team(threads));
  problem.add_gradients(d_o, dq, dk, dv, cu_q, cu_k);
  call(kernels->attention_backward, problem.args);
}

void attention_masked_forward(py::tuple q, py::tuple k, py::tuple v, py::tuple o, uintptr_t lse, int64_t lse_head,
                              int64_t num_clips, int64_t tq, int64_t tk, int64_t heads, int64_t width,
                              py::tuple by_query, py::tuple by_key, float scale, int dtype, int threads) {
  const Problem problem(q, k, v, o, lse, lse_head, num_clips, tq, tk, heads, width, 0, 0, 0, scale, dtype,
                        team(threads));
  call(kernels->attention_masked_forward, masked(problem, by_query, by_key, tq, tk));
}

void attention_masked_backward(py::tuple q, py::tuple k, py::tuple v, py::tuple o, uintptr_t lse, int64_t lse_head,
                               int64_t num_clips, int64_t tq, int64_t tk, int64_t heads, int64_t width,
                               py::tuple by_query, py::tuple by_key, float scale, int dtype, int threads,
                               py::tuple d_o, py::tuple dq, py::tuple dk, py::tuple dv) {
  Problem problem(q, k, v, o, lse, lse_head, num_clips, tq, tk, heads, width, 0, 0, 0, scale, dtype, team(threads));
  problem.add_gradients(d_o, dq, dk, dv, 0, 0);
  call(kernels->attention_masked_backward, masked(problem, by_query, by_key, tq, tk));
}

LogMelArgs log_mel_args(const LogMelTablesOwner& owner, uintptr_t wave, int wave_type, int64_t wave_stride,
                        uintptr_t lengths, uintptr_t out, int out_type, int64_t clips, int64_t samples,
                        int64_t num_frames, double mean, double std, int threads) {
  LogMelArgs a{};
  sizes({clips, samples, wave_stride, num_frames}, "clips, samples, wave_stride, num_frames");
  need(std::isfinite(mean) && std::isfinite(std) && std > 0.0, "mean, std", "finite numbers, and std above 0");
  const int64_t count = clips && num_frames && owner.tables.num_mel_bins;
  a.lengths = memory<int64_t>(lengths, count, "lengths");
  for (int64_t clip = 0; clip < clips && count; ++clip)
    need(a.lengths[clip] <= samples, "lengths", "no more than the samples");
  a.tables = &owner.tables, a.wave = memory(wave, count && samples, "wave"), a.out = memory(out, count, "out");
  a.clips = clips, a.samples = samples, a.wave_stride = wave_stride, a.num_frames = num_frames;
  a.scale = wave_type == I16 ? 1.0f / 32768.0f : 1.0f;
  a.gain = (float)(0.5 / std), a.shift = (float)(-0.5 * mean / std);
  a.wave_type = samples_type(wave_type, "wave_type"), a.out_type = floating(out_type, "out_type");
  a.threads = team(threads);
  return a;
}

void log_mel_forward(const LogMelTablesOwner& owner, uintptr_t wave, int wave_type, int64_t wave_stride,
                     uintptr_t lengths, uintptr_t out, int out_type, int64_t clips, int64_t samples,
                     int64_t num_frames, double mean, double std, int threads) {
  call(kernels->log_mel_forward, log_mel_args(owner, wave, wave_type, wave_stride, lengths, out, out_type, clips,
                                              samples, num_frames, mean, std, threads));
}

void log_mel_backward(const LogMelTablesOwner& owner, uintptr_t dy, uintptr_t wave, int64_t wave_stride,
                      uintptr_t lengths, uintptr_t dwave, int64_t clips, int64_t samples, int64_t num_frames,
                      double mean, double std, int threads) {
  LogMelArgs a =
      log_mel_args(owner, wave, F32, wave_stride, lengths, dy, F32, clips, samples, num_frames, mean, std, threads);
  a.dwave = memory<float>(dwave, clips && samples, "dwave");
  call(kernels->log_mel_backward, a);
}

bool flac_decode(const py::bytes& file, int64_t begin, uintptr_t out, uintptr_t scratch, int64_t samples,
                 int64_t most_samples) {
  bool done = false;
  const std::string_view bytes = file;
  if (begin < 0 || begin > (int64_t)bytes.size()) return false;
  sizes({samples, most_samples}, "samples, most_samples");
  memory(out, samples, "out"), memory(scratch, most_samples, "scratch");
  FlacArgs a{};
  a.data = (const uint8_t*)bytes.data() + begin, a.size = (int64_t)bytes.size() - begin;
  a.out = at<int16_t>(out), a.scratch = at<int32_t>(scratch);
  a.samples = samples, a.most_samples = most_samples, a.done = &done;
  call(kernels->flac_decode, a);
  return done;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of ast_fast over raw pointers; use ast_fast.ops or ast_fast.cpp instead.";
  kernels = choose_kernels();
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
  m.attr("F32") = (int)F32;
  m.attr("BF16") = (int)BF16;
  m.attr("I16") = (int)I16;
  m.def("isa", [] { return kernels->isa; }, "The instruction set in use.");
  m.def("is_amd", &is_amd, "Whether the processor is one of AMD's.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const Kernels* each : usable_kernels()) names.append(each->isa);
        return names;
      },
      "Every instruction set of this build that this CPU runs, worst first.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("gelu_forward", &gelu_forward);
  m.def("gelu_backward", &gelu_backward);
  m.def("fingerprint", &fingerprint);
  m.def("int8_rows", &int8_rows);
  m.def("column_sum", &column_sum);
  m.def("patch_gather", &patch_gather);
  m.def("patch_scatter", &patch_scatter);
  m.def("patch_project", &patch_project);
  m.def("patch_weight_gradient", &patch_weight_gradient);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("attention_masked_forward", &attention_masked_forward);
  m.def("attention_masked_backward", &attention_masked_backward);
  m.def("log_mel_forward", &log_mel_forward);
  m.def("log_mel_backward", &log_mel_backward);
  m.def("flac_decode", &flac_decode);
  py::class_<LogMelTablesOwner>(m, "LogMelTables")
      .def(py::init([](uintptr_t window, uintptr_t filters, int64_t window_samples, int64_t hop_samples, int64_t n_fft,
                       int64_t num_mel_bins, double preemphasis, bool remove_dc, double log_floor, bool magnitude,
                       double log_offset) {
        positive({window_samples, hop_samples, n_fft, num_mel_bins}, "window_samples, hop_samples, n_fft, num_mel_bins");
        memory(window, 1, "window"), memory(filters, 1, "filters");
        return std::make_unique<LogMelTablesOwner>(at<double>(window), at<double>(filters), window_samples,
                                                   hop_samples, n_fft, num_mel_bins, preemphasis, remove_dc,
                                                   log_floor, magnitude, log_offset);
      }));
}
