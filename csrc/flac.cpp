// FLAC to samples, for the files that data sets are made of: mono, 16 bits, a known length, intact, nothing behind. Anything else is
// refused, checksums that do not fit included, and left to libsndfile, whose verdict and messages count.
//
// Format: RFC 9639. Most of the time goes into Rice codes (one every 6 to 8 cycles, out of a 64-bit window) and the
// linear predictor, whose chain from one sample to the next is a multiplication and an addition: the newest sample
// stays in a register, the older products are summed beside the chain.

#include <cstring>

#include "simd.h"

namespace {

using ast_fast::FlacArgs;

struct Tables {
  uint8_t crc8[256];
  uint16_t crc16[8][256];  // [i]: of a byte with i more bytes behind it
};

constexpr Tables make_tables() {
  Tables t{};
  for (int byte = 0; byte < 256; ++byte) {
    unsigned low = byte, high = byte << 8;
    for (int bit = 0; bit < 8; ++bit) {
      low = (low << 1) ^ (low & 0x80 ? 0x107 : 0);
      high = (high << 1) ^ (high & 0x8000 ? 0x18005 : 0);
    }
    t.crc8[byte] = (uint8_t)low;
    t.crc16[0][byte] = (uint16_t)high;
  }
  for (int i = 1; i < 8; ++i)
    for (int byte = 0; byte < 256; ++byte) {
      const unsigned before = t.crc16[i - 1][byte];
      t.crc16[i][byte] = (uint16_t)((before << 8) ^ t.crc16[0][before >> 8]);
    }
  return t;
}

constexpr Tables tables = make_tables();

unsigned crc8(const uint8_t* p, int64_t size) {
  unsigned crc = 0;
  for (int64_t i = 0; i < size; ++i) crc = tables.crc8[crc ^ p[i]];
  return crc;
}

unsigned crc16(const uint8_t* p, int64_t size) {
  unsigned crc = 0;
  for (; size >= 8; size -= 8, p += 8)
    crc = tables.crc16[7][p[0] ^ (crc >> 8)] ^ tables.crc16[6][p[1] ^ (crc & 255)] ^ tables.crc16[5][p[2]] ^
          tables.crc16[4][p[3]] ^ tables.crc16[3][p[4]] ^ tables.crc16[2][p[5]] ^ tables.crc16[1][p[6]] ^
          tables.crc16[0][p[7]];
  for (; size > 0; --size, ++p) crc = ((crc << 8) & 0xffff) ^ tables.crc16[0][(crc >> 8) ^ *p];
  return crc;
}

// A window on the bits: `count` of them, the next one topmost. Behind the data come zeros, and `over` says that some
// were taken; the window may hold further true bits below `count`.
struct Bits {
  const uint8_t* data;
  int64_t size, next = 0;  // byte that the window ends before
  uint64_t window = 0;
  int count = 0;

  AST_INLINE void refill() {  // at least 56 bits afterwards
    if (__builtin_expect(next + 8 <= size, 1)) {
      uint64_t word;
      memcpy(&word, data + next, 8);
      window |= __builtin_bswap64(word) >> count;
      next += (63 - count) >> 3;
      count |= 56;
      return;
    }
    for (; count <= 56; count += 8, ++next)
      if (next < size) window |= (uint64_t)data[next] << (56 - count);
  }
  AST_INLINE void skip(int bits) {
    window <<= bits;
    count -= bits;
  }
  uint32_t take(int bits) {  // up to 32
    if (bits == 0) return 0;
    refill();
    const uint32_t value = (uint32_t)(window >> (64 - bits));
    skip(bits);
    return value;
  }
  int32_t take_signed(int bits) {  // up to 32
    if (bits == 0) return 0;
    const int shift = 32 - bits;
    return (int32_t)(take(bits) << shift) >> shift;
  }
  // zeros before the next one, which is taken too; -1 where there are too many to be true
  int64_t take_unary() {
    for (int64_t zeros = 0; zeros < (1 << 20); zeros += 56) {
      refill();
      if (window >> 8) {
        const int more = __builtin_clzll(window);
        skip(more);
        skip(1);
        return zeros + more;
      }
      if (over()) break;
      skip(56);
    }
    return -1;
  }
  int64_t byte() const { return next - (count >> 3); }  // at a byte's boundary
  void align() { skip(count & 7); }
  bool over() const { return byte() > size; }
};

AST_INLINE int32_t unfolded(uint32_t value) { return (int32_t)(value >> 1) ^ -(int32_t)(value & 1); }

bool rice_partition(Bits& bits, int parameter, int32_t* out, int64_t count) {
  Bits b = bits;  // in registers
  for (int64_t i = 0; i < count; ++i) {
    // a window of zeros counts as too long
    int zeros = __builtin_clzll(b.window | 1);
    if (__builtin_expect(zeros + 1 + parameter > b.count, 0)) {
      b.refill();
      zeros = __builtin_clzll(b.window | 1);
      if (zeros + 1 + parameter > b.count) {
        const int64_t many = b.take_unary();
        if (many < 0 || (many >> (31 - parameter))) return false;
        out[i] = unfolded((uint32_t)many << parameter | b.take(parameter));
        continue;
      }
    }
    const uint64_t rest = b.window << zeros << 1;
    const uint32_t low = (uint32_t)(rest >> 1 >> (63 - parameter));
    out[i] = unfolded((uint32_t)zeros << parameter | low);
    b.window = rest << parameter;
    b.count -= zeros + 1 + parameter;
  }
  bits = b;
  return !b.over();
}

// residuals of a block into out[order...]
bool residuals(Bits& bits, int32_t* out, int64_t block, int order) {
  const int method = bits.take(2), width = method == 0 ? 4 : 5;
  if (method > 1) return false;
  const int partitions_log2 = bits.take(4);
  const int64_t each = block >> partitions_log2;
  if (each << partitions_log2 != block || each < order) return false;
  int64_t at = order;
  for (int64_t p = 0; p < 1 << partitions_log2; ++p) {
    const int64_t end = (p + 1) * each;
    const int parameter = bits.take(width);
    if (parameter == (1 << width) - 1) {
      const int raw = bits.take(5);
      for (; at < end; ++at) out[at] = bits.take_signed(raw);
      if (bits.over()) return false;
    } else if (!rice_partition(bits, parameter, out + at, end - at)) {
      return false;
    }
    at = end;
  }
  return true;
}

// Adds the prediction to each residual. Sums are of unsigned numbers, which may wrap: the format says that sums of true
// streams fit, and what others decode to is of no use anyway.
template <int Order, class Sum, class Signed>
void predict(int32_t* x, int64_t block, const int32_t* weights, int shift) {
  Sum w[Order];
  for (int j = 0; j < Order; ++j) w[j] = (Sum)(Signed)weights[j];
  Sum newest = (Sum)(Signed)x[Order - 1];
  for (int64_t i = Order; i < block; ++i) {
    Sum sum = 0;
    for (int j = Order - 1; j >= 1; --j) sum += w[j] * (Sum)(Signed)x[i - 1 - j];
    sum += w[0] * newest;
    const int32_t value = (int32_t)((uint32_t)x[i] + (uint32_t)(int32_t)((Signed)sum >> shift));
    x[i] = value;
    newest = (Sum)(Signed)value;
  }
}

template <class Sum, class Signed, int Order = 1>
void predict_by(int order, int32_t* x, int64_t block, const int32_t* weights, int shift) {
  if (order == Order) return predict<Order, Sum, Signed>(x, block, weights, shift);
  if constexpr (Order < 32) predict_by<Sum, Signed, Order + 1>(order, x, block, weights, shift);
}

bool linear(Bits& bits, int32_t* x, int64_t block, int depth, int order) {
  if (order > block) return false;
  for (int i = 0; i < order; ++i) x[i] = bits.take_signed(depth);
  const int precision = bits.take(4) + 1, shift = bits.take_signed(5);
  if (precision == 16 || shift < 0) return false;
  int32_t weights[32];
  for (int i = 0; i < order; ++i) weights[i] = bits.take_signed(precision);
  if (!residuals(bits, x, block, order)) return false;
  const int sum_bits = depth + precision + (order > 1 ? 32 - __builtin_clz(order - 1) : 0);
  if (sum_bits <= 32)
    predict_by<uint32_t, int32_t>(order, x, block, weights, shift);
  else
    predict_by<uint64_t, int64_t>(order, x, block, weights, shift);
  return true;
}

bool fixed(Bits& bits, int32_t* x, int64_t block, int depth, int order) {
  static constexpr int32_t weights[5][4] = {{}, {1}, {2, -1}, {3, -3, 1}, {4, -6, 4, -1}};
  if (order > block) return false;
  for (int i = 0; i < order; ++i) x[i] = bits.take_signed(depth);
  if (!residuals(bits, x, block, order)) return false;
  if (order > 0) predict_by<uint32_t, int32_t>(order, x, block, weights[order], 0);
  return true;
}

bool subframe(Bits& bits, int32_t* x, int64_t block, int depth) {
  const int head = bits.take(8), kind = head >> 1;
  int wasted = 0;
  if (head & 1) {
    const int64_t zeros = bits.take_unary();
    if (zeros < 0 || zeros + 1 >= depth) return false;
    wasted = (int)zeros + 1;
    depth -= wasted;
  }
  bool good = false;
  if (kind == 0) {
    const int32_t value = bits.take_signed(depth);
    for (int64_t i = 0; i < block; ++i) x[i] = value;
    good = true;
  } else if (kind == 1) {
    for (int64_t i = 0; i < block; ++i) x[i] = bits.take_signed(depth);
    good = true;
  } else if (kind >= 8 && kind <= 12) {
    good = fixed(bits, x, block, depth, kind - 8);
  } else if (kind >= 32 && kind < 64) {
    good = linear(bits, x, block, depth, kind - 31);
  }
  if (wasted)
    for (int64_t i = 0; i < block; ++i) x[i] = (int32_t)((uint32_t)x[i] << wasted);
  return good && !bits.over();
}

// samples in the frame at a byte, decoded into x; 0 if it is not one that we take
int64_t frame(Bits& bits, int32_t* x, int64_t most) {
  const int64_t begin = bits.byte();
  if (bits.take(15) != 0x7ffc) return 0;
  bits.take(1);  // whether block sizes vary: they are read from each frame anyway
  const int size_code = bits.take(4), rate_code = bits.take(4);
  const int channels = bits.take(4), depth_code = bits.take(3);
  if (bits.take(1) || channels != 0 || (depth_code != 0 && depth_code != 4) || rate_code == 15) return 0;
  const uint32_t number = bits.take(8);  // as UTF-8, up to seven bytes
  if (number >= 0x80) {
    const int more = __builtin_clz(~(number << 24)) - 1;
    if (more < 1 || more > 6) return 0;
    for (int i = 0; i < more; ++i)
      if (bits.take(8) >> 6 != 2) return 0;
  }
  int64_t block = 0;
  if (size_code == 1) block = 192;
  if (size_code >= 2 && size_code <= 5) block = 576 << (size_code - 2);
  if (size_code == 6) block = (int64_t)bits.take(8) + 1;
  if (size_code == 7) block = (int64_t)bits.take(16) + 1;
  if (size_code >= 8) block = 256 << (size_code - 8);
  if (rate_code == 12) bits.take(8);
  if (rate_code == 13 || rate_code == 14) bits.take(16);
  if (bits.over() || block < 1 || block > most) return 0;
  const int64_t checked = bits.byte() - begin;
  if (bits.take(8) != crc8(bits.data + begin, checked)) return 0;
  if (!subframe(bits, x, block, 16)) return 0;
  bits.align();
  const int64_t end = bits.byte();
  if (end + 2 > bits.size || bits.take(16) != crc16(bits.data + begin, end - begin)) return 0;
  return block;
}

// Whether what lies behind the last frame is no sound: nothing, zeros, or a tag of 128 bytes. More frames than the
// header promises, or another file, are for others to look at.
bool is_end(const uint8_t* rest, int64_t size) {
  if (size == 128 && memcmp(rest, "TAG", 3) == 0) return true;
  for (int64_t i = 0; i < size; ++i)
    if (rest[i]) return false;
  return true;
}

bool decode(const FlacArgs& a) {
  Bits bits{a.data, a.size};
  for (int64_t done = 0; done < a.samples;) {
    const int64_t left = a.samples - done;
    const int64_t block = frame(bits, a.scratch, left < a.most_samples ? left : a.most_samples);
    if (!block) return false;
    int32_t odd = 0;
    for (int64_t i = 0; i < block; ++i) {
      const int32_t value = a.scratch[i];
      odd |= value ^ (int16_t)value;
      a.out[done + i] = (int16_t)value;
    }
    if (odd) return false;
    done += block;
  }
  return is_end(a.data + bits.byte(), a.size - bits.byte());
}

}  // namespace

namespace ast_fast {

extern "C" bool AST_KERNEL(flac_decode)(const FlacArgs& a) {
  *a.done = decode(a);
  return true;
}

}  // namespace ast_fast
