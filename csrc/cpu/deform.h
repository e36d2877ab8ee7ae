// Modulated deformable convolution on the CPU. Maps are channels-last, stored as float, double, half or bfloat16 and
// computed in float (double for double); offsets, masks, weights and biases are of the compute type.
#pragma once

#include <cstddef>

#include "storage.h"

namespace xrk::cpu {

// Strides (in values) between images, rows and pixels of a map whose channels lie together.
struct PixelStrides {
  std::ptrdiff_t image, row, pixel;
};

struct DeformTask {
  const void* x;        // (images, height, width, channels)
  const void* offset;   // for each output pixel (deformable groups, taps, 2): down, to the right
  const void* mask;     // for each output pixel (deformable groups, taps), or null: ones
  const void* weight;   // (outputs, channels / groups, taps)
  const void* bias;     // (outputs), or null
  void* out;            // (images, out_height, out_width, outputs)
  std::size_t images, height, width, channels, out_height, out_width, outputs;
  std::size_t kernel_height, kernel_width, groups, deformable_groups;
  PixelStrides offset_strides, mask_strides;
  std::ptrdiff_t stride, padding, dilation;
  std::ptrdiff_t first;  // the row of x, before padding, that the taps of output row 0 begin at

  std::size_t taps() const { return kernel_height * kernel_width; }
};

// What a thread works in: so many output pixels at a time, in so many bytes.
struct DeformBlock {
  std::size_t pixels, bytes;
};

// One set of kernels, compiled for one instruction set.
struct Deformations {
  DeformBlock (*block[STORAGES])(const DeformTask&);
  // The weights in the order in which they are multiplied, and how many values that takes.
  std::size_t (*packed_values[STORAGES])(const DeformTask&);
  void (*pack[STORAGES])(const DeformTask&, void* packed);
  // Output pixels [first, last), counted over all images, in steps of `block` pixels from `first` on.
  void (*run[STORAGES])(const DeformTask&, const void* packed, std::size_t block, std::size_t first, std::size_t last,
                        void* scratch);
};

const Deformations& baseline_deformations();
#ifdef XRK_X86
const Deformations& avx2_deformations();
const Deformations& avx512_deformations();
#endif

// On at most `threads` threads; the result does not depend on how many. False where memory ran out.
bool deform_conv2d(const DeformTask& task, Storage storage, std::size_t threads);

}  // namespace xrk::cpu
