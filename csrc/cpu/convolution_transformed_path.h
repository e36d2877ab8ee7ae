// The 3 x 3 convolution by Winograd's F(2 x 2, 3 x 3), once for each instruction set; everything is internal to it.
//
// Four pixels of the result are A' [(G w G') * (B' d B)] A, d the 4 x 4 values of x that they look at: 16 products a
// channel rather than 36, summed over the channels before the last transform. A group of such tiles is transformed, all
// panels of outputs are multiplied with it and transformed back, so that nothing of it leaves the second-level cache.
// Of a map that nearest neighbours double before the convolution 9 products are left of the 16.
// Lavin, Gray 2015, arXiv 1509.09308.
#pragma once

#include "convolution_path.h"

namespace xrk::cpu {
namespace {

constexpr std::size_t points = 16;

constexpr std::size_t doubled_points = 9;

// Points of one tile lie so far apart that they do not fall into the same set of a cache.
constexpr std::size_t plane_of(std::size_t tiles, std::size_t size) { return tiles * size + conv_panel; }

std::size_t transformed_scratch_values(const ConvTask& task) {
  const std::size_t channels = task.x ? task.channels : 0;
  const std::size_t group = task.tile_group;
  return points * (plane_of(group, channels) + plane_of(group, conv_panel)) +
         doubled_points * plane_of(group, task.doubled_channels) + more(points * channels, doubled_points * task.doubled_channels);
}

// All lanes, or the first `left`.
template <bool FULL>
inline FloatVector take(const float* p, std::int64_t left) {
  return FULL ? load(p) : load_some(p, left);
}
template <bool FULL>
inline void put(float* p, FloatVector v, std::int64_t left) {
  if (FULL) {
    store(p, v);
  } else {
    store_some(p, v, left);
  }
}

// values (points, tile_group, channels) at one tile, from four rows of four pixels.
struct Plain {
  static constexpr std::size_t size = 4;

  template <bool FULL>
  static inline void transform(const float* const* rows, std::size_t channels, std::size_t c, std::size_t plane,
                               float* values) {
    const std::int64_t left = static_cast<std::int64_t>(channels - c);
    FloatVector t[4][4];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) {
      FloatVector d[4];
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) d[i] = take<FULL>(rows[i] + j * channels + c, left);
      t[0][j] = d[0] - d[2];
      t[1][j] = d[1] + d[2];
      t[2][j] = d[2] - d[1];
      t[3][j] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      float* const to = values + 4 * i * plane + c;
      put<FULL>(to, t[i][0] - t[i][2], left);
      put<FULL>(to + plane, t[i][1] + t[i][2], left);
      put<FULL>(to + 2 * plane, t[i][2] - t[i][1], left);
      put<FULL>(to + 3 * plane, t[i][1] - t[i][3], left);
    }
  }
};

// The same where rows and columns are doubled: of d[1] and d[2], which are equal, the difference is 0 and needs no
// product; their sum is twice one of them, and the weights have the 2. Values (doubled_points, tile_group, channels).
struct Doubled {
  static constexpr std::size_t size = 3;

  template <bool FULL>
  static inline void transform(const float* const* rows, std::size_t channels, std::size_t c, std::size_t plane,
                               float* values) {
    const std::int64_t left = static_cast<std::int64_t>(channels - c);
    FloatVector t[3][3];
#pragma GCC unroll 3
    for (std::size_t j = 0; j < 3; ++j) {
      FloatVector d[3];
#pragma GCC unroll 3
      for (std::size_t i = 0; i < 3; ++i) d[i] = take<FULL>(rows[i] + j * channels + c, left);
      t[0][j] = d[0] - d[1];
      t[1][j] = d[1];
      t[2][j] = d[1] - d[2];
    }
#pragma GCC unroll 3
    for (std::size_t i = 0; i < 3; ++i) {
      float* const to = values + 3 * i * plane + c;
      put<FULL>(to, t[i][0] - t[i][1], left);
      put<FULL>(to + plane, t[i][1], left);
      put<FULL>(to + 2 * plane, t[i][1] - t[i][2], left);
    }
  }
};

template <typename Kind>
void transform_tile(const float* const* rows, std::size_t channels, std::size_t plane, float* values) {
  std::size_t c = 0;
  for (; c + conv_lanes <= channels; c += conv_lanes) Kind::template transform<true>(rows, channels, c, plane, values);
  if (c < channels) Kind::template transform<false>(rows, channels, c, plane, values);
}

// Up to 2 x 2 pixels of a panel's outputs, from sums (points, tile_group, conv_panel) at one tile, of which a doubled
// map alone has no third in either direction.
template <bool DOUBLED_ALONE, bool FULL>
void finish_tile(const ConvTask& task, const float* sums, std::size_t plane, const float* bias, std::size_t outputs,
                 std::size_t tile_row, std::size_t tile_column, std::size_t output) {
  const std::size_t column = 2 * tile_column, columns = fewer(2, task.columns - column);
  for (std::size_t v = 0; v * conv_lanes < outputs; ++v) {
    const std::int64_t left = static_cast<std::int64_t>(outputs - v * conv_lanes);
    FloatVector t[2][4];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) {
      if (DOUBLED_ALONE && j == 2) continue;
      FloatVector m[4];
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) {
        if (!(DOUBLED_ALONE && i == 2)) m[i] = load(sums + (4 * i + j) * plane + v * conv_lanes);
      }
      t[0][j] = DOUBLED_ALONE ? m[0] + m[1] : m[0] + m[1] + m[2];
      t[1][j] = DOUBLED_ALONE ? m[1] - m[3] : m[1] - m[2] - m[3];
    }
    const FloatVector b = load(bias + v * conv_lanes);
#pragma GCC unroll 2
    for (std::size_t i = 0; i < 2; ++i) {
      const std::size_t row = 2 * tile_row + i - task.cut;
      if (row >= task.rows) continue;  // beyond either end
      const FloatVector y[2] = {b + (DOUBLED_ALONE ? t[i][0] + t[i][1] : t[i][0] + t[i][1] + t[i][2]),
                                b + (DOUBLED_ALONE ? t[i][1] - t[i][3] : t[i][1] - t[i][2] - t[i][3])};
      for (std::size_t j = 0; j < columns; ++j) {
        const std::size_t at = output + v * conv_lanes;
        FloatVector sum = y[j];
        if (task.residual) {
          sum += take<FULL>(task.residual + row * task.residual_row + (column + j) * task.residual_pixel + at, left);
        }
        if (task.relu) sum = larger(FloatVector{}, sum);  // NaN stays NaN
        put<FULL>(task.out + row * task.out_row + (column + j) * task.out_pixel + at, sum, left);
      }
    }
  }
}

struct Map {
  const float* x;
  std::size_t channels, row, width, height;
};

// SIZE rows of SIZE pixels, with zeros beyond the map; `patch` holds a copy where there are any.
template <std::size_t SIZE>
void look_at(const Map& map, std::ptrdiff_t row, std::ptrdiff_t column, float* patch, const float** rows) {
  const auto height = static_cast<std::ptrdiff_t>(map.height), width = static_cast<std::ptrdiff_t>(map.width);
  constexpr auto size = static_cast<std::ptrdiff_t>(SIZE);
  const auto at = [&](std::ptrdiff_t r, std::ptrdiff_t c) {
    return map.x + static_cast<std::size_t>(r) * map.row + static_cast<std::size_t>(c) * map.channels;
  };
  if (row >= 0 && row + size <= height && column >= 0 && column + size <= width) {
    for (std::ptrdiff_t i = 0; i < size; ++i) rows[i] = at(row + i, column);
    return;
  }
  std::memset(patch, 0, SIZE * SIZE * map.channels * sizeof(float));
  for (std::ptrdiff_t i = 0; i < size; ++i) {
    float* const to = patch + static_cast<std::size_t>(i) * SIZE * map.channels;
    rows[i] = to;
    if (row + i < 0 || row + i >= height) continue;
    for (std::ptrdiff_t j = 0; j < size; ++j) {
      if (column + j < 0 || column + j >= width) continue;
      std::memcpy(to + static_cast<std::size_t>(j) * map.channels, at(row + i, column + j),
                  map.channels * sizeof(float));
    }
  }
}

void run_transformed(const ConvTask& task, std::size_t first, std::size_t last, float* scratch) {
  AddTile table[conv_pixels + 1];
  TileTable<conv_pixels>::fill(table);
  const std::size_t across = (task.columns + 1) / 2, all = across * ((task.rows + task.cut + 1) / 2);
  const std::size_t group = task.tile_group, channels = task.x ? task.channels : 0;
  const Map map{task.x, channels, task.x_row, task.width, task.rows + 2};
  const Map small{task.doubled, task.doubled_channels, task.doubled_row, task.doubled_width, task.doubled_height};
  const auto left = static_cast<std::ptrdiff_t>(task.left), cut = static_cast<std::ptrdiff_t>(task.cut);
  const std::size_t plane = plane_of(group, channels), small_plane = plane_of(group, small.channels);
  const std::size_t sum_plane = plane_of(group, conv_panel);
  float* const values = scratch;
  float* const small_values = values + points * plane;
  float* const sums = small_values + doubled_points * small_plane;
  float* const patch = sums + points * sum_plane;
  static constexpr float zeros[conv_panel] = {};
  TileWork work{};
  work.count = 1;
  const auto multiply = [&](std::size_t tiles, const float* from, std::size_t size, const float* weight, float* to,
                            bool fresh) {
    work.length = work.pixel = size;
    work.weight = weight;
    work.bias = fresh ? zeros : nullptr;
    for (std::size_t p = 0; p < tiles; p += conv_pixels) {
      table[fewer(conv_pixels, tiles - p)](work, from + p * size, to + p * conv_panel, nullptr, nullptr);
    }
  };
  for (std::size_t g = first; g < last; ++g) {
    const std::size_t from = g * group, tiles = fewer(group, all - from);
    for (std::size_t i = 0; i < tiles; ++i) {
      const auto row = static_cast<std::ptrdiff_t>((from + i) / across);
      const auto column = static_cast<std::ptrdiff_t>((from + i) % across);
      const float* rows[4];
      if (map.x) {
        look_at<Plain::size>(map, 2 * row - cut, 2 * column - left, patch, rows);
        transform_tile<Plain>(rows, channels, plane, values + i * channels);
      }
      if (small.x) {
        look_at<Doubled::size>(small, row - cut, column - 1, patch, rows);
        transform_tile<Doubled>(rows, small.channels, small_plane, small_values + i * small.channels);
      }
    }
    for (std::size_t panel = 0; panel < task.panels(); ++panel) {
      const std::size_t output = panel * conv_panel;
      for (std::size_t point = 0; point < points; ++point) {
        const std::size_t down = point / 4, right = point % 4;
        float* const to = sums + point * sum_plane;
        if (map.x) {
          multiply(tiles, values + point * plane, channels,
                   task.weight + (panel * points + point) * channels * conv_panel, to, true);
        }
        if (small.x && down != 2 && right != 2) {
          const std::size_t k = fewer(down, 2) * 3 + fewer(right, 2);
          multiply(tiles, small_values + k * small_plane, small.channels,
                   task.doubled_weight + (panel * doubled_points + k) * small.channels * conv_panel, to, !map.x);
        }
      }
      const std::size_t outputs = fewer(conv_panel, task.outputs - output);
      const auto finish = outputs < conv_panel ? (map.x ? finish_tile<false, false> : finish_tile<true, false>)
                                               : (map.x ? finish_tile<false, true> : finish_tile<true, true>);
      for (std::size_t i = 0; i < tiles; ++i) {
        finish(task, sums + i * conv_panel, sum_plane, task.bias + output, outputs, (from + i) / across,
               (from + i) % across, output);
      }
    }
  }
}

constexpr Convolutions make_convolutions() {
  return {conv_scratch_values, run_convolution, run_few, transformed_scratch_values, run_transformed, 4 * conv_pixels};
}

}  // namespace
}  // namespace xrk::cpu
