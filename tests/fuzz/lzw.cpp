// libFuzzer's target for LZW: against a decoder written as the format's text reads (TIFF 6.0, section 13), at once and
// some bytes at a time, and what our encoder writes comes back.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/tiff/codecs.h"
#include "../../csrc/tiff/encode.h"
#include "../../csrc/tiff/stream.h"

using namespace xrk::tiff;

namespace {

// The same outcome and, where that is `complete`, the same bytes are expected of both.
Outcome plain_decoder(const std::uint8_t* in, std::size_t in_bytes, std::string& out, std::size_t out_bytes) {
  std::vector<std::string> table;
  std::size_t at = 0;
  unsigned width = 9;
  const std::string* previous = nullptr;
  std::string kept;
  while (out.size() < out_bytes) {
    if (at + width > in_bytes * 8) return Outcome::too_short;
    unsigned code = 0;
    for (unsigned i = 0; i < width; ++i, ++at) code = code << 1 | (in[at / 8] >> (7 - at % 8) & 1u);
    if (code == 257) return Outcome::too_short;
    if (code == 256) {
      table.clear();
      previous = nullptr;
      width = 9;
      continue;
    }
    std::string phrase;
    if (code < 256) {
      phrase.assign(1, static_cast<char>(code));
    } else if (code - 258 < table.size()) {
      phrase = table[code - 258];
    } else if (previous != nullptr && code - 258 == table.size() && table.size() < 4096 - 258) {
      phrase = kept + kept[0];
    } else {
      return Outcome::corrupt;
    }
    if (phrase.size() > out_bytes - out.size()) return Outcome::too_long;
    out += phrase;
    if (previous != nullptr && table.size() < 4096 - 258) table.push_back(kept + phrase[0]);
    kept = phrase;
    previous = &kept;
    const std::size_t next = table.size() + 258;
    width = next < 511 ? 9 : next < 1023 ? 10 : next < 2047 ? 11 : 12;
  }
  return Outcome::complete;
}

// The input as the reader hands it over: with room behind it that is never used.
std::vector<unsigned char> with_slack(const std::uint8_t* data, std::size_t size) {
  std::vector<unsigned char> padded(size + decoder_slack, 0xaa);
  if (size > 0) std::memcpy(padded.data(), data, size);
  return padded;
}

void expect(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::size_t out_bytes = data[0] * std::size_t{64} + data[1];
  data += 2;
  size -= 2;
  const std::vector<unsigned char> in = with_slack(data, size);
  std::vector<unsigned char> out(out_bytes + decoder_slack);
  const Outcome outcome = decode_lzw(in.data(), size, out.data(), out_bytes);
  std::string plain;
  expect(outcome == plain_decoder(data, size, plain, out_bytes));
  if (outcome == Outcome::complete) expect(out_bytes == 0 || std::memcmp(out.data(), plain.data(), out_bytes) == 0);

  // A stream does not see what comes after the bytes that it is asked for.
  const Input input(data, size);
  const auto stream = open_stream(Compression::lzw, input, 0, size);
  Outcome streamed = Outcome::complete;
  std::vector<unsigned char> parts(out_bytes);
  constexpr std::size_t part = 37;
  for (std::size_t first = 0; first < out_bytes && streamed == Outcome::complete; first += part) {
    streamed = stream->next(parts.data() + first, out_bytes - first < part ? out_bytes - first : part);
  }
  expect(streamed == (outcome == Outcome::too_long ? Outcome::complete : outcome));
  if (outcome == Outcome::complete) expect(out_bytes == 0 || std::memcmp(parts.data(), plain.data(), out_bytes) == 0);

  std::vector<unsigned char> encoded;
  encode_lzw(data, size, encoded);
  const std::vector<unsigned char> stored = with_slack(encoded.data(), encoded.size());
  std::vector<unsigned char> back(size + decoder_slack);
  expect(decode_lzw(stored.data(), encoded.size(), back.data(), size) == Outcome::complete);
  expect(size == 0 || std::memcmp(back.data(), data, size) == 0);
  return 0;
}
