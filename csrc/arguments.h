// What Python may pass to the bindings: a number that the kernels could not use raises ValueError before any of them
// runs. That an address holds as much as the counts say is for the adapters in ast_fast/cpp/ to see to, which know the
// tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <initializer_list>
#include <string>

#include "api.h"

namespace {

namespace py = pybind11;
using namespace ast_fast;

constexpr int64_t MOST = int64_t{1} << 48;  // of any count or stride: products of two sizes stay far from 2^63

void need(bool good, const char* name, const char* expected) {
  if (!good) throw py::value_error(std::string("ast_fast._C: ") + name + ": expected " + expected);
}

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// memory of `count` elements; none is read where there are none
template <class T = void>
T* memory(uintptr_t address, int64_t count, const char* name) {
  need(address != 0 || count == 0, name, "an address");
  return at<T>(address);
}

DType floating(int code, const char* name) {
  need(code == F32 || code == BF16, name, "F32 or BF16");
  return static_cast<DType>(code);
}

DType samples_type(int code, const char* name) {
  need(code == F32 || code == I16, name, "F32 or I16");
  return static_cast<DType>(code);
}

void sizes(std::initializer_list<int64_t> values, const char* names) {
  for (const int64_t value : values) need(value >= 0 && value <= MOST, names, "0 or more, and below 2^48");
}

void positive(std::initializer_list<int64_t> values, const char* names) {
  for (const int64_t value : values) need(value >= 1 && value <= MOST, names, "1 or more, and below 2^48");
}

// rows of `cols` contiguous elements; a stride of 0 repeats one row
void rows_of(int64_t rows, int64_t cols, int64_t stride, const char* name) {
  sizes({rows, cols}, "rows, cols");
  need(stride >= 0 && stride <= MOST, name, "a stride of 0 or more");
}

// sums over rows go through `chunks` rows of scratch
void chunks_of(int64_t chunks) { need(chunks >= 1 && chunks <= 1 << 20, "chunks", "1 or more"); }

// f, t, pf, pt, fstride, tstride, prefix of a patch grid
template <class Args>
void read_grid(Args& a, const py::tuple& grid) {
  need(grid.size() == 7, "grid", "(f, t, pf, pt, fstride, tstride, prefix)");
  int64_t* fields[] = {&a.f, &a.t, &a.pf, &a.pt, &a.fstride, &a.tstride, &a.prefix};
  for (size_t i = 0; i < 7; ++i) *fields[i] = grid[i].cast<int64_t>();
  sizes({a.clips, a.prefix}, "clips, prefix");
  positive({a.f, a.t, a.pf, a.pt, a.fstride, a.tstride}, "grid");
  need(a.f * a.pf <= MOST && a.t * a.pt <= MOST, "grid", "sizes below 2^48");
}

template <class Args>
void grid_within(const Args& a, int64_t frames, int64_t bins) {
  sizes({frames, bins}, "frames, bins");
  need(a.pf <= bins && a.f - 1 <= (bins - a.pf) / a.fstride, "grid", "patches within the bins");
  need(a.pt <= frames && a.t - 1 <= (frames - a.pt) / a.tstride, "grid", "patches within the frames");
}

// the blocks that kernels with a product of their own work on
template <class Args>
void blocks_of(const Args& a) {
  positive({a.width}, "width");
  need(a.width % 32 == 0 && a.pf * a.pt % 16 == 0, "width, grid", "a width of 32s and patches of 16s");
}

}  // namespace
