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
                    int64_t n_fft, int64_t num_mel_bins, double preemphasis, bool remove_dc, double log_floor,
                    bool magnitude, double log_offset) {
    if (!transformable(n_fft) || window_samples < 1 || window_samples > n_fft || hop_samples < 1)
      throw std::invalid_argument("log-mel tables: n_fft must be 2, or 4 times a product of 2, 3 and 5, and hold the window");
    const int64_t half = n_fft / 2;
    window_.assign((window_samples + 63) / 64 * 64, 0.0f);
    // halved here, exactly, so that the split of the packed real transform needs no factor 1/2
    for (int64_t n = 0; n < window_samples; ++n) window_[n] = (float)(window[n] * 0.5);

    const double turn = 6.283185307179586476925286766559;
    const int64_t even = half & -half;
    int64_t m = (__builtin_ctzll((unsigned long long)even) & 1) ? 2 : 4;
    for (int64_t radix = 4; m < half; m *= radix) {
      if (m == even) radix = 5;
      if (radix == 5 && half / m % 5 != 0) radix = 3;
      for (int64_t k = 0; k < m; ++k)
        for (int64_t q = 1; q < radix; ++q) {
          const double angle = turn * (double)(q * k) / (double)(radix * m);
          twiddles_.push_back((float)std::cos(angle));
          twiddles_.push_back((float)std::sin(angle));
        }
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
    const float log_of_floor = (float)std::log((double)(float)log_floor);
    tables = {window_samples,     hop_samples,       n_fft,           num_mel_bins,       (float)preemphasis,
              (float)log_floor,   log_of_floor,      (float)log_offset, remove_dc ? 1 : 0, magnitude ? 1 : 0,
              window_.data(),     twiddles_.data(),  split_.data(),   order_.data(),      start_.data(),
              count_.data(),      weights_.data()};
  }
  LogMelTablesOwner(const LogMelTablesOwner&) = delete;
  LogMelTablesOwner& operator=(const LogMelTablesOwner&) = delete;

 private:
  std::vector<float> window_, twiddles_, split_, weights_;
  std::vector<int32_t> order_, start_, count_;

  // the half-size transform has stages of radix 2 to 5, and bins 0 and n/4 of a real one stand alone
  static bool transformable(int64_t n_fft) {
    if (n_fft == 2) return true;
    if (n_fft < 4 || n_fft % 4 != 0) return false;
    for (int64_t prime : {2, 3, 5})
      while (n_fft % prime == 0) n_fft /= prime;
    return n_fft == 1;
  }

  // where decimation in time wants input j; the stages run in the opposite order: one of radix 2 if the power of two
  // in `count` has an odd logarithm, then 4, 5, 3
  static int64_t reversed(int64_t j, int64_t count) {
    if (count == 1) return 0;
    const int64_t radix = count % 3 == 0 ? 3 : count % 5 == 0 ? 5 : count >= 4 ? 4 : 2;
    return (j % radix) * (count / radix) + reversed(j / radix, count / radix);
  }
};

}  // namespace ast_fast
