// PackBits (TIFF 6.0, section 9): runs of equal bytes and runs of different ones, each row by itself.
#include <algorithm>
#include <cstring>

#include "encode.h"

namespace xrk::tiff {
namespace {

constexpr std::size_t longest = 128;

unsigned char* encode_row(const unsigned char* data, const unsigned char* end, unsigned char* out) {
  const unsigned char* literal = data;  // bytes from here on are not written yet
  const auto flush = [&](const unsigned char* until) {
    while (literal < until) {
      const std::size_t count = std::min(longest, static_cast<std::size_t>(until - literal));
      *out++ = static_cast<unsigned char>(count - 1);
      std::memcpy(out, literal, count);
      out += count;
      literal += count;
    }
  };
  while (data < end) {
    const unsigned char* same = data + 1;
    const unsigned char* most = data + std::min(longest, static_cast<std::size_t>(end - data));
    while (same < most && *same == *data) ++same;
    const std::size_t run = static_cast<std::size_t>(same - data);
    // A run of two inside different bytes saves nothing, and costs a byte where it ends a literal.
    if (run >= 3 || (run == 2 && literal == data)) {
      flush(data);
      *out++ = static_cast<unsigned char>(257 - run);
      *out++ = *data;
      literal = same;
    }
    data = same;
  }
  flush(end);
  return out;
}

}  // namespace

void encode_packbits(const unsigned char* data, std::size_t size, std::size_t row_bytes,
                     std::vector<unsigned char>& out) {
  const std::size_t rows = size / row_bytes;
  out.resize(size + rows * (row_bytes / longest + 2));
  unsigned char* at = out.data();
  for (std::size_t row = 0; row < rows; ++row) at = encode_row(data + row * row_bytes, data + (row + 1) * row_bytes, at);
  out.resize(static_cast<std::size_t>(at - out.data()));
}

}  // namespace xrk::tiff
