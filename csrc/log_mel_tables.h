// The constant tables of one log-mel setting, computed once in double precision and rounded once to fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "api.h"

namespace ast_fast {

class LogMelTablesOwner {
 public:
  LogMelTables tables{};

  LogMelTablesOwner(const double* window, const double* filters, int64_t window_samples, int64_t hop_samples,
                    int64_t n_fft, int64_t num_mel_bins, double preemphasis, bool remove_dc, double log_floor) {
    if (n_fft < 2 || (n_fft & (n_fft - 1)) != 0 || window_samples < 1 || window_samples > n_fft || hop_samples < 1)
      throw std::invalid_argument("log-mel tables: n_fft must be a power of two and hold the window");
    const int64_t half = n_fft / 2;
    window_.assign((window_samples + 63) / 64 * 64, 0.0f);
    // halved here, exactly, so that the split of the packed real transform needs no factor 1/2
    for (int64_t n = 0; n < window_samples; ++n) window_[n] = (float)(window[n] * 0.5);

    const double turn = 6.283185307179586476925286766559;
    int64_t m = (__builtin_ctzll((unsigned long long)half) & 1) ? 2 : 4;
    for (; m < half; m *= 4)
      for (int64_t k = 0; k < m; ++k)
        for (int q = 1; q <= 3; ++q) {
          const double angle = turn * (double)(q * k) / (double)(4 * m);
          twiddles_.push_back((float)std::cos(angle));
          twiddles_.push_back((float)std::sin(angle));
        }
    for (int64_t k = 0; k <= n_fft / 4; ++k) {
      split_.push_back((float)std::cos(turn * (double)k / (double)n_fft));
      split_.push_back((float)std::sin(turn * (double)k / (double)n_fft));
    }
    for (int64_t j = 0; j < half; ++j) order_.push_back((int32_t)reversed(j, half));

    for (int64_t mel = 0; mel < num_mel_bins; ++mel) {
      const double* filter = filters + mel * (half + 1);
      int64_t first = 0, last = half;
      while (first <= half && filter[first] == 0.0) ++first;
      while (last >= first && filter[last] == 0.0) --last;
      start_.push_back((int32_t)(first <= half ? first : 0));
      count_.push_back((int32_t)(first <= half ? last - first + 1 : 0));
      for (int64_t bin = first; bin <= last; ++bin) weights_.push_back((float)filter[bin]);
    }
    tables = {window_samples, hop_samples,      n_fft,          num_mel_bins,  (float)preemphasis, (float)log_floor,
              (float)std::log((double)(float)log_floor), remove_dc ? 1 : 0, window_.data(), twiddles_.data(), split_.data(), order_.data(),
              start_.data(),  count_.data(),    weights_.data()};
  }
  LogMelTablesOwner(const LogMelTablesOwner&) = delete;
  LogMelTablesOwner& operator=(const LogMelTablesOwner&) = delete;

 private:
  std::vector<float> window_, twiddles_, split_, weights_;
  std::vector<int32_t> order_, start_, count_;

  // where decimation in time wants input j: its last stage has radix 4, an odd log2 leaves a radix 2 for the first
  static int64_t reversed(int64_t j, int64_t count) {
    if (count == 1) return 0;
    const int64_t radix = count >= 4 ? 4 : 2;
    return (j % radix) * (count / radix) + reversed(j / radix, count / radix);
  }
};

}  // namespace ast_fast
