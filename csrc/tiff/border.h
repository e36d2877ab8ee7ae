// The pixels of a window that lie outside the image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace xrk::tiff {

// What stands where a window reaches beyond the image; the names are numpy.pad's. `constant` is 0 in the output.
enum class Border { reflect, symmetric, edge, constant };

// The position in [0, size) that stands at position `at` of an axis.
inline std::int64_t inside_position(std::int64_t at, std::int64_t size, Border border) {
  if (at >= 0 && at < size) return at;
  if (border == Border::edge || size == 1) return at < 0 ? 0 : size - 1;
  // Reflected again and again, an axis repeats itself: without its last pixel twice, or with it.
  const std::int64_t period = border == Border::reflect ? 2 * (size - 1) : 2 * size;
  const std::int64_t phase = (at % period + period) % period;
  if (phase < size) return phase;
  return border == Border::reflect ? period - phase : period - 1 - phase;
}

// One axis of a window; of its positions, [first, last) lie inside the image.
struct Axis {
  std::int64_t start, count, size;  // of the window, in the image's positions; of the image
  std::int64_t first() const { return start < 0 ? -start : 0; }                                  // in the window
  std::int64_t last() const { return start + count > size ? size - start : count; }              // in the window
  // Where in the window the pixel for its position `at` is found.
  std::int64_t source(std::int64_t at, Border border) const { return inside_position(start + at, size, border) - start; }
  // Whether all that the border repeats lies in the window itself.
  bool closed(Border border) const {
    if (border == Border::constant) return true;
    const auto within = [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t at = from; at < to; ++at) {
        if (source(at, border) < first() || source(at, border) >= last()) return false;
      }
      return true;
    };
    return within(0, first()) && within(last(), count);
  }
};

template <typename T>
void fill_row(unsigned char* row, const Axis& columns, const std::vector<std::int64_t>& sources) {
  const auto fill = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t x = from; x < to; ++x) {
      std::memcpy(row + x * static_cast<std::int64_t>(sizeof(T)),
                  row + sources[static_cast<std::size_t>(x)] * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    }
  };
  fill(0, columns.first());
  fill(columns.last(), columns.count);
}

// Fills what lies outside the image from the pixels inside, which are there already. `bytes`: of a pixel, 1, 2, 4 or 8.
inline void fill_border(unsigned char* out, std::size_t row_stride, const Axis& rows, const Axis& columns,
                        Border border, std::size_t bytes) {
  const std::int64_t left = columns.first(), right = columns.last();
  std::vector<std::int64_t> sources;
  if (border != Border::constant && (left > 0 || right < columns.count)) {
    for (std::int64_t x = 0; x < columns.count; ++x) sources.push_back(columns.source(x, border));
  }
  for (std::int64_t y = rows.first(); y < rows.last() && (left > 0 || right < columns.count); ++y) {
    unsigned char* const row = out + static_cast<std::size_t>(y) * row_stride;
    if (border == Border::constant) {
      std::memset(row, 0, static_cast<std::size_t>(left) * bytes);
      std::memset(row + static_cast<std::size_t>(right) * bytes, 0,
                  static_cast<std::size_t>(columns.count - right) * bytes);
    } else if (bytes == 1) {
      fill_row<std::uint8_t>(row, columns, sources);
    } else if (bytes == 2) {
      fill_row<std::uint16_t>(row, columns, sources);
    } else if (bytes == 4) {
      fill_row<std::uint32_t>(row, columns, sources);
    } else {
      fill_row<std::uint64_t>(row, columns, sources);
    }
  }
  const std::size_t row_bytes = static_cast<std::size_t>(columns.count) * bytes;
  for (std::int64_t y = 0; y < rows.count; ++y) {
    if (y == rows.first()) y = rows.last();
    if (y >= rows.count) break;
    unsigned char* const row = out + static_cast<std::size_t>(y) * row_stride;
    if (border == Border::constant) {
      std::memset(row, 0, row_bytes);
    } else {
      std::memcpy(row, out + static_cast<std::size_t>(rows.source(y, border)) * row_stride, row_bytes);
    }
  }
}

}  // namespace xrk::tiff
