// The convolution, once for each instruction set that includes this file; everything is internal to it.
//
// A tile of pixels x one panel of outputs is summed up in registers: each value of x is spread over a vector and
// multiplied by the panel's weights. The pixels' windows are read where they lie; only those that reach beyond the row
// are copied, with their zeros. Every output value is summed in one order, over the kernel's rows, its columns and the
// channels, whatever the tiles and threads.
#pragma once

#include <cstring>

#include "convolution.h"
#include "vectors_path.h"

namespace xrk::cpu {
namespace {

// The sums of a tile, with a row of weights and one value, fill the registers.
#if defined(__AVX512F__)
constexpr std::size_t conv_pixels = 14;
#elif defined(__AVX2__)
constexpr std::size_t conv_pixels = 6;
#else
constexpr std::size_t conv_pixels = 2;
#endif
constexpr std::size_t conv_lanes = lanes<float>, conv_vectors = conv_panel / conv_lanes;

constexpr std::size_t few_pixels = 4;  // of a tile where outputs are few

constexpr std::size_t more(std::size_t a, std::size_t b) { return a < b ? b : a; }
constexpr std::size_t fewer(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Tiles that pass while a piece's weights are in the first-level cache.
constexpr std::size_t segment_tiles = 16;
constexpr std::size_t segment_pixels = segment_tiles * conv_pixels;

// What is done with a tile for one piece, and what before the first and after the last.
struct TileWork {
  std::size_t count, length;
  std::size_t step;   // values of x between runs
  std::size_t pixel;  // values of x between pixels
  const float* weight;
  const float* bias;  // before the first piece; else null
  bool last, relu;
  std::size_t outputs;  // of the panel
  std::size_t out_pixel, residual_pixel;
};

template <std::size_t PIXELS>
void add_tile(const TileWork& work, const float* x, float* sums, const float* residual, float* out) {
  FloatVector tile[PIXELS][conv_vectors];
  if (work.bias) {
#pragma GCC unroll 16
    for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 4
      for (std::size_t v = 0; v < conv_vectors; ++v) tile[p][v] = load(work.bias + v * conv_lanes);
    }
  } else {
#pragma GCC unroll 16
    for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 4
      for (std::size_t v = 0; v < conv_vectors; ++v) tile[p][v] = load(sums + p * conv_panel + v * conv_lanes);
    }
  }
  const float* weight = work.weight;
  const std::size_t pixel = work.pixel, length = work.length;
  for (std::size_t run = 0; run < work.count; ++run, x += work.step) {
    const float* value = x;
    const float* const end = x + length;
#pragma GCC unroll 4
    for (; value != end; ++value, weight += conv_panel) {
      FloatVector w[conv_vectors];
#pragma GCC unroll 4
      for (std::size_t v = 0; v < conv_vectors; ++v) w[v] = load(weight + v * conv_lanes);
#pragma GCC unroll 16
      for (std::size_t p = 0; p < PIXELS; ++p) {
        const FloatVector spread_value = spread<float>(value[p * pixel]);
#pragma GCC unroll 4
        for (std::size_t v = 0; v < conv_vectors; ++v) tile[p][v] = madd(spread_value, w[v], tile[p][v]);
      }
    }
  }
  if (!work.last) {
#pragma GCC unroll 16
    for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 4
      for (std::size_t v = 0; v < conv_vectors; ++v) store(sums + p * conv_panel + v * conv_lanes, tile[p][v]);
    }
    return;
  }
#pragma GCC unroll 16
  for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < conv_vectors; ++v) {
      const std::int64_t left = static_cast<std::int64_t>(work.outputs) - static_cast<std::int64_t>(v * conv_lanes);
      if (left <= 0) break;
      FloatVector sum = tile[p][v];
      if (residual) sum += load_some(residual + p * work.residual_pixel + v * conv_lanes, left);
      if (work.relu) sum = larger(FloatVector{}, sum);  // NaN stays NaN
      store_some(out + p * work.out_pixel + v * conv_lanes, sum, left);
    }
  }
}

using AddTile = void (*)(const TileWork&, const float*, float*, const float*, float*);

template <std::size_t PIXELS>
struct TileTable {
  static void fill(AddTile* table) {
    table[PIXELS] = add_tile<PIXELS>;
    TileTable<PIXELS - 1>::fill(table);
  }
};
template <>
struct TileTable<0> {
  static void fill(AddTile*) {}
};

std::size_t patch_columns(const ConvTask& task, std::size_t pixels) {
  return (pixels - 1) * task.column_step + (task.kernel_columns - 1) * task.column_dilation + 1;
}

std::size_t conv_scratch_values(const ConvTask& task) {
  return segment_pixels * conv_panel +
         task.kernel_rows * patch_columns(task, more(conv_pixels, few_pixels)) * task.channels;
}

// Whether the windows of `pixels` from column c on lie within the row.
bool within(const ConvTask& task, std::size_t c, std::size_t pixels) {
  const std::size_t from = c * task.column_step;
  return from >= task.left && from - task.left + patch_columns(task, pixels) <= task.width;
}

// The windows of `pixels` from column c on, with the zeros beside the row.
void fill_patch(const ConvTask& task, const float* rows, std::size_t c, std::size_t pixels, float* patch) {
  const std::size_t columns = patch_columns(task, pixels), from = c * task.column_step;
  const std::size_t zeros = from < task.left ? fewer(task.left - from, columns) : 0;
  const std::size_t first = from + zeros - task.left;
  const std::size_t present = first < task.width ? fewer(columns - zeros, task.width - first) : 0;
  const std::size_t size = task.channels;
  for (std::size_t k = 0; k < task.kernel_rows; ++k, patch += columns * size) {
    std::memset(patch, 0, zeros * size * sizeof(float));
    if (present) {
      std::memcpy(patch + zeros * size, rows + k * task.row_dilation * task.x_row + first * size,
                  present * size * sizeof(float));
    }
    std::memset(patch + (zeros + present) * size, 0, (columns - zeros - present) * size * sizeof(float));
  }
}

void run_convolution(const ConvTask& task, std::size_t first, std::size_t last, float* scratch) {
  AddTile table[conv_pixels + 1];
  TileTable<conv_pixels>::fill(table);
  float* const sums = scratch;
  float* const patch = scratch + segment_pixels * conv_panel;
  TileWork work{};
  work.pixel = task.column_step * task.channels;
  work.relu = task.relu;
  work.out_pixel = task.out_pixel;
  work.residual_pixel = task.residual_pixel;
  for (std::size_t unit = first; unit < last; ++unit) {
    const std::size_t panel = unit / task.rows, row = unit - panel * task.rows, output = panel * conv_panel;
    const float* const weight = task.weight + output * task.products();
    const float* const rows = task.x + row * task.row_step * task.x_row;
    work.outputs = fewer(conv_panel, task.outputs - output);
    for (std::size_t c = 0; c < task.columns;) {
      std::size_t pixels = fewer(conv_pixels, task.columns - c);
      const float* from = nullptr;
      std::size_t between = task.row_dilation * task.x_row;
      if (within(task, c, pixels)) {
        while (pixels < segment_pixels && c + pixels < task.columns) {
          const std::size_t more = fewer(conv_pixels, task.columns - c - pixels);
          if (!within(task, c, pixels + more)) break;
          pixels += more;
        }
        from = rows + (c * task.column_step - task.left) * task.channels;
      } else {
        fill_patch(task, rows, c, pixels, patch);
        from = patch;
        between = patch_columns(task, pixels) * task.channels;
      }
      float* const out = task.out + row * task.out_row + c * task.out_pixel + output;
      const float* const residual =
          task.residual ? task.residual + row * task.residual_row + c * task.residual_pixel + output : nullptr;
      for (std::size_t i = 0; i < task.piece_count; ++i) {
        const ConvPiece& piece = task.pieces[i];
        work.count = piece.count;
        work.length = piece.length;
        work.step = piece.down ? between : task.column_dilation * task.channels;
        work.weight = weight + piece.weights * conv_panel;
        work.bias = i == 0 ? task.bias + output : nullptr;
        work.last = i + 1 == task.piece_count;
        const float* const x = from + piece.kernel_row * between + piece.offset;
        for (std::size_t p = 0; p < pixels; p += conv_pixels) {
          table[fewer(conv_pixels, pixels - p)](work, x + p * work.pixel, sums + p * conv_panel,
                                                   residual ? residual + p * task.residual_pixel : nullptr,
                                                   out + p * task.out_pixel);
        }
      }
      c += pixels;
    }
  }
}

// --- few outputs: vectors of the values of a window rather than of outputs ------------------------------------------

// dots[p] = the product of the window of pixel p with one output's weights.
template <std::size_t PIXELS>
void dot_tile(const ConvTask& task, const float* x, std::size_t between, const float* weight, float* dots) {
  const std::size_t pixel = task.column_step * task.channels;
  const bool together = task.column_dilation == 1;
  const std::size_t length = (together ? task.kernel_columns : 1) * task.channels;
  const std::size_t runs = together ? 1 : task.kernel_columns;
  FloatVector sums[PIXELS] = {};
  for (std::size_t k = 0; k < task.kernel_rows; ++k) {
    for (std::size_t run = 0; run < runs; ++run, weight += length) {
      const float* const from = x + k * between + run * task.column_dilation * task.channels;
      std::size_t i = 0;
      for (; i + conv_lanes <= length; i += conv_lanes) {
        const FloatVector w = load(weight + i);
#pragma GCC unroll 4
        for (std::size_t p = 0; p < PIXELS; ++p) sums[p] = madd(load(from + p * pixel + i), w, sums[p]);
      }
      if (i == length) continue;
      const auto left = static_cast<std::int64_t>(length - i);
      const FloatVector w = load_some(weight + i, left);
#pragma GCC unroll 4
      for (std::size_t p = 0; p < PIXELS; ++p) sums[p] = madd(load_some(from + p * pixel + i, left), w, sums[p]);
    }
  }
#pragma GCC unroll 4
  for (std::size_t p = 0; p < PIXELS; ++p) {
    float parts[conv_lanes];
    store(parts, sums[p]);
#pragma GCC unroll 4
    for (std::size_t half = conv_lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (std::size_t j = 0; j < half; ++j) parts[j] += parts[j + half];
    }
    dots[p] = parts[0];
  }
}

void run_few(const ConvTask& task, std::size_t first, std::size_t last, float* scratch) {
  for (std::size_t row = first; row < last; ++row) {
    const float* const rows = task.x + row * task.row_step * task.x_row;
    for (std::size_t c = 0; c < task.columns;) {
      const std::size_t pixels = c + few_pixels <= task.columns ? few_pixels : 1;
      const float* from = nullptr;
      std::size_t between = task.row_dilation * task.x_row;
      if (within(task, c, pixels)) {
        from = rows + (c * task.column_step - task.left) * task.channels;
      } else {
        fill_patch(task, rows, c, pixels, scratch);
        from = scratch;
        between = patch_columns(task, pixels) * task.channels;
      }
      for (std::size_t o = 0; o < task.outputs; ++o) {
        const float* const weight = task.weight + o * task.products();
        float dots[few_pixels];
        if (pixels == few_pixels) {
          dot_tile<few_pixels>(task, from, between, weight, dots);
        } else {
          dot_tile<1>(task, from, between, weight, dots);
        }
        for (std::size_t p = 0; p < pixels; ++p) {
          float sum = task.bias[o] + dots[p];
          if (task.residual) sum += task.residual[row * task.residual_row + (c + p) * task.residual_pixel + o];
          task.out[row * task.out_row + (c + p) * task.out_pixel + o] = task.relu && sum < 0 ? 0 : sum;
        }
      }
      c += pixels;
    }
  }
}

}  // namespace
}  // namespace xrk::cpu
