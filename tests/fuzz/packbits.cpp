// libFuzzer's target for PackBits: no byte beyond the output is written, the bytes are the same at once and some at a
// time, and what our encoder writes comes back.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/tiff/codecs.h"
#include "../../csrc/tiff/encode.h"
#include "../../csrc/tiff/stream.h"

using namespace xrk::tiff;

namespace {

void expect(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const std::size_t out_bytes = data[0] * std::size_t{64} + data[1], row_bytes = data[2] + std::size_t{1};
  data += 3;
  size -= 3;
  // Blocks of their exact sizes, so that a byte too far is seen.
  std::unique_ptr<unsigned char[]> out(new unsigned char[out_bytes]);
  const Outcome outcome = decode_packbits(data, size, out.get(), out_bytes);
  const Input input(data, size);
  const auto stream = open_stream(Compression::packbits, input, 0, size);
  std::unique_ptr<unsigned char[]> parts(new unsigned char[out_bytes]);
  Outcome streamed = Outcome::complete;
  constexpr std::size_t part = 37;
  for (std::size_t first = 0; first < out_bytes && streamed == Outcome::complete; first += part) {
    streamed = stream->next(parts.get() + first, out_bytes - first < part ? out_bytes - first : part);
  }
  // A stream does not see what comes after the bytes that it is asked for: the rest of a run, or that it is cut short.
  expect(streamed == outcome || streamed == Outcome::complete);
  if (outcome == Outcome::complete) expect(out_bytes == 0 || std::memcmp(parts.get(), out.get(), out_bytes) == 0);

  size -= size % row_bytes;
  std::vector<unsigned char> encoded;
  encode_packbits(data, size, row_bytes, encoded);
  std::unique_ptr<unsigned char[]> back(new unsigned char[size]);
  expect(decode_packbits(encoded.data(), encoded.size(), back.get(), size) == Outcome::complete);
  expect(size == 0 || std::memcmp(back.get(), data, size) == 0);
  return 0;
}
