// The TIFF reader and writer under the sanitizers. Several threads read windows of one tiled file, which lies in memory,
// at once, and share a cache that holds a few of its tiles only: every pixel is compared. Several threads write files,
// and share what encoding keeps: every byte is compared.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
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

// How many files are not like the first one.
int write_segments_at_once() {
  Geometry geometry;
  geometry.width = width;
  geometry.height = height;
  geometry.segment_width = geometry.segment_height = side;
  geometry.tiled = true;
  geometry.bits = 16;
  geometry.compression = Compression::lzw;
  geometry.predictor = Predictor::horizontal;
  std::vector<float> values(width * height);
  for (std::uint64_t i = 0; i < values.size(); ++i) values[i] = pixel(i / width, i % width) + 0.25f;
  Encoders encoders;
  std::mutex mutex;
  std::vector<std::vector<unsigned char>> files;
  const auto work = [&](std::size_t threads) {
    std::FILE* const file = std::tmpfile();
    if (file == nullptr) return;
    std::uint64_t end = 0;
    for (std::uint64_t row = 0; row < height; row += 2 * side) {
      const std::uint64_t count = std::min(2 * side, height - row);
      const Rows rows{reinterpret_cast<const char*>(&values[row * width]), width * 4, row, count, Pixels::float32, 1, 0};
      Misfits misfits;
      const Place last = write_segments(encoders, fileno(file), end, 2, geometry, 1, rows, threads, misfits).back();
      end = last.offset + last.bytes;
    }
    std::vector<unsigned char> bytes(end);
    if (pread(fileno(file), bytes.data(), end, 0) != static_cast<ssize_t>(end)) bytes.clear();
    std::fclose(file);
    const std::lock_guard<std::mutex> lock(mutex);
    files.push_back(std::move(bytes));
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < 4; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  int wrong = 3 - static_cast<int>(files.size());
  for (const auto& bytes : files) wrong += bytes.empty() || bytes != files.front() ? 1 : 0;
  return wrong;
}
