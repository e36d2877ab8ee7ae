// LZW as TIFF has it (TIFF 6.0, section 13): codes of 9 to 12 bits, the most significant bit first, and the code's width
// grows one code early.
#include <algorithm>
#include <array>
#include <cstring>

#include "encode.h"

namespace xrk::tiff {
namespace {

constexpr std::uint32_t clear_code = 256, end_code = 257, first_free = 258;
constexpr std::uint32_t last_code = 4093;  // readers differ in what they make of 4094 and 4095

// The table's strings: a hash table, keyed by the string without its last byte (its code, 12 bits) and that byte. An
// entry holds key and code in 32 bits, so that a look-up touches one word. With at most 3836 strings it is half empty.
constexpr unsigned table_bits = 13;
constexpr std::uint32_t empty = 0xffffffffu;

class Bits {
 public:
  explicit Bits(unsigned char* at) : at_(at) {}

  void put(std::uint32_t code, unsigned width) {
    held_ = held_ << width | code;
    count_ += width;
    if (count_ >= 32) {
      count_ -= 32;
      const auto word = static_cast<std::uint32_t>(held_ >> count_);
      at_[0] = static_cast<unsigned char>(word >> 24);
      at_[1] = static_cast<unsigned char>(word >> 16);
      at_[2] = static_cast<unsigned char>(word >> 8);
      at_[3] = static_cast<unsigned char>(word);
      at_ += 4;
    }
  }

  unsigned char* finish() {
    for (; count_ > 8; count_ -= 8) *at_++ = static_cast<unsigned char>(held_ >> (count_ - 8));
    if (count_ > 0) *at_++ = static_cast<unsigned char>(held_ << (8 - count_));
    count_ = 0;
    return at_;
  }

 private:
  unsigned char* at_;
  std::uint64_t held_ = 0;
  unsigned count_ = 0;
};

}  // namespace

void encode_lzw(const unsigned char* data, std::size_t size, std::vector<unsigned char>& out) {
  // A code of at most 12 bits for every byte, a clear code for every 3836 of them, and the ends.
  out.resize(size + size / 2 + size / 1024 + 16);
  Bits bits(out.data());
  bits.put(clear_code, 9);
  if (size > 0) {
    std::array<std::uint32_t, std::size_t{1} << table_bits> table;
    std::memset(table.data(), 0xff, sizeof(table));
    std::uint32_t next = first_free;
    unsigned width = 9;
    std::uint32_t string = data[0];
    for (std::size_t i = 1; i < size; ++i) {
      const std::uint32_t key = string << 8 | data[i];
      std::uint32_t slot = (key * 2654435769u) >> (32 - table_bits);
      std::uint32_t entry = table[slot];
      while (entry >> 12 != key && entry != empty) {
        slot = (slot + 1) & ((1u << table_bits) - 1);
        entry = table[slot];
      }
      if (entry != empty) {
        string = entry & 0xfff;
        continue;
      }
      bits.put(string, width);
      string = data[i];
      table[slot] = key << 12 | next;
      if (next == last_code) {
        bits.put(clear_code, width);
        std::memset(table.data(), 0xff, sizeof(table));
        next = first_free;
        width = 9;
        continue;
      }
      ++next;
      if (next == 1u << width) ++width;
    }
    bits.put(string, width);
    // The reader enters a string for this code as well before it reads the next one.
    ++next;
    if (next == 1u << width && width < 12) ++width;
    if (next > last_code) {
      bits.put(clear_code, width);
      width = 9;
    }
    bits.put(end_code, width);
  } else {
    bits.put(end_code, 9);
  }
  out.resize(static_cast<std::size_t>(bits.finish() - out.data()));
}

}  // namespace xrk::tiff
