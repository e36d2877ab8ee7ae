// Convolution of rows of a map in float, channels-last, with weights that were packed once: bias, sum and ReLU inside.
#pragma once

#include <cstddef>

namespace xrk::cpu {

// Outputs whose weights lie together: (panels, kernel rows, kernel columns, channels, panel), zeros beyond the outputs;
// where they are transformed the kernel counts as 4 x 4.
constexpr std::size_t conv_panel = 16;

// So few outputs have their weights one after the other: (outputs, kernel rows, kernel columns, channels).
constexpr std::size_t conv_few = 4;

// A run of products that read consecutive values of x: `count` times `length` of them, row after row of the kernel or
// column after column. Its weights lie together.
struct ConvPiece {
  std::size_t kernel_row, offset;  // where it begins: row of the kernel, and values from the row's first on
  std::size_t count, length;
  std::size_t weights;  // rows of the panel before it
  bool down;            // the next one lies in the next row of the kernel, not in its next column
};

// Strides are in values. `x` begins with the first row that the first row of the result looks at; `left` columns of
// zeros lie beside it, and as many to the right as are looked at. `residual` may be null, or `out` itself.
struct ConvTask {
  const float* x;
  const float* weight;
  const float* bias;  // (panels * conv_panel)
  const float* residual;
  float* out;
  std::size_t channels, outputs, width;
  std::size_t rows, columns;  // of the result
  std::size_t kernel_rows, kernel_columns, row_step, column_step, row_dilation, column_dilation, left;
  std::size_t x_row, out_row, out_pixel, residual_row, residual_pixel;
  bool relu;
  bool transformed;  // see convolution_transformed_path.h; the kernel is 3 x 3, steps and dilations are 1
  const ConvPiece* pieces;
  std::size_t piece_count;
  std::size_t tile_group;  // tiles of 2 x 2 pixels that are transformed together
  // Where it is transformed, another part of its input or, with x and weight null, all of it: a map that nearest
  // neighbours double. Its weights are (panels, 9, doubled_channels, conv_panel).
  const float* doubled;
  const float* doubled_weight;
  std::size_t doubled_channels, doubled_row, doubled_width, doubled_height;
  std::size_t cut;  // rows of the first tile above the result, 0 or 1; `doubled` begins with the row above the tile's
                    // first pixels, less the cut

  std::size_t products() const { return kernel_rows * kernel_columns * channels; }  // of one output value
  bool few() const { return outputs <= conv_few && !transformed; }
  std::size_t panels() const { return (outputs + conv_panel - 1) / conv_panel; }
};

// One set of kernels, compiled for one instruction set.
struct Convolutions {
  std::size_t (*scratch_values)(const ConvTask&);
  // Rows of panels [first, last), counted panel after panel.
  void (*run)(const ConvTask&, std::size_t first, std::size_t last, float* scratch);
  // Rows [first, last), where the outputs are few.
  void (*run_few)(const ConvTask&, std::size_t first, std::size_t last, float* scratch);
  std::size_t (*transformed_scratch_values)(const ConvTask&);
  // Groups of tiles [first, last).
  void (*run_transformed)(const ConvTask&, std::size_t first, std::size_t last, float* scratch);
  std::size_t largest_group;
};

const Convolutions& baseline_convolutions();
#ifdef XRK_X86
const Convolutions& avx2_convolutions();
const Convolutions& avx512_convolutions();
#endif

// On at most `threads` threads; the result does not depend on how many. False where memory ran out. Sets pieces and groups.
bool convolution(ConvTask task, std::size_t threads);

}  // namespace xrk::cpu
