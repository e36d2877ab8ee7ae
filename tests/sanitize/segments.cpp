// The TIFF reader under the sanitizers: several threads read windows of one tiled file, which lies in memory, at once, and
// share a cache that holds a few of its tiles only. Every pixel is compared.
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/tiff/encode.h"
#include "../../csrc/tiff/reader.h"

using namespace xrk::tiff;

namespace {

constexpr std::uint64_t width = 100, height = 90, side = 16, across = 7, down = 6;

std::uint16_t pixel(std::uint64_t row, std::uint64_t column) {
  return static_cast<std::uint16_t>(row * 517 + column * column * 31);
}

// The file, little-endian: LZW tiles, their tables, and one directory.
std::vector<unsigned char> make_file() {
  std::vector<unsigned char> file{'I', 'I', 42, 0, 0, 0, 0, 0};
  const auto number = [&](std::uint64_t value, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) file.push_back(static_cast<unsigned char>(value >> 8 * i));
  };
  std::vector<std::uint64_t> offsets, counts;
  for (std::uint64_t tile = 0; tile < across * down; ++tile) {
    std::vector<unsigned char> raw, encoded;
    for (std::uint64_t i = 0; i < side * side; ++i) {
      const std::uint16_t v = pixel(tile / across * side + i / side, tile % across * side + i % side);
      raw.push_back(static_cast<unsigned char>(v));
      raw.push_back(static_cast<unsigned char>(v >> 8));
    }
    encode_lzw(raw.data(), raw.size(), encoded);
    offsets.push_back(file.size());
    counts.push_back(encoded.size());
    file.insert(file.end(), encoded.begin(), encoded.end());
  }
  std::uint64_t tables[2];
  for (const auto* table : {&offsets, &counts}) {
    tables[table == &counts] = file.size();
    for (const std::uint64_t value : *table) number(value, 4);
  }
  store_integer(file.data() + 4, file.size(), 4, ByteOrder::little);
  const std::uint64_t entries[][3] = {
      {IMAGE_WIDTH, 1, width},        {IMAGE_LENGTH, 1, height},
      {BITS_PER_SAMPLE, 1, 16},       {COMPRESSION, 1, 5},
      {PHOTOMETRIC, 1, 1},            {TILE_WIDTH, 1, side},
      {TILE_LENGTH, 1, side},         {TILE_OFFSETS, across * down, tables[0]},
      {TILE_BYTE_COUNTS, across * down, tables[1]},
  };
  number(std::size(entries), 2);
  for (const auto& entry : entries) {
    number(entry[0], 2);
    number(LONG, 2);
    number(entry[1], 4);
    number(entry[2], 4);
  }
  number(0, 4);
  return file;
}

}  // namespace

// How many windows have a pixel that is not the file's.
int read_segments_at_once() {
  const std::vector<unsigned char> file = make_file();
  Reader reader(std::make_unique<Input>(file.data(), file.size()), Limits{}, 9 * side * side * 2);
  reader.directory().check_segments();
  std::atomic<int> wrong{0};
  const auto work = [&](std::uint64_t seed) {
    for (std::uint64_t i = 0; i < 60; ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      Window window;
      window.row = static_cast<std::int64_t>((seed >> 33) % (height - 20));
      window.column = static_cast<std::int64_t>((seed >> 45) % (width - 30));
      window.rows = 20;
      window.columns = 30;
      std::vector<std::uint16_t> out(20 * 30);
      window.out = reinterpret_cast<unsigned char*>(out.data());
      window.row_stride = 60;
      if (i % 3 == 0) reader.load(window, 2);
      reader.read(window, 2);
      bool same = true;
      for (std::uint64_t p = 0; p < out.size(); ++p) {
        same &= out[p] == pixel(static_cast<std::uint64_t>(window.row) + p / 30,
                                static_cast<std::uint64_t>(window.column) + p % 30);
      }
      wrong += same ? 0 : 1;
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed < 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  return wrong;
}
