// The layers between the scans on the CPU: normalisation over channels, depthwise convolution, normalisation over
// groups. Maps are channels-last; their pixels are stored as float, double, half or bfloat16 and computed in float
// (double for double).
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace xrk::cpu {

// Pixels i of x, gate and out start at i times their stride (in values). weight, bias (of the compute type) and gate may
// be null.
struct LayerNormTask {
  const void* x;
  const void* weight;
  const void* bias;
  const void* gate;
  void* out;
  std::size_t channels, x_stride, gate_stride;  // out is contiguous
  double eps;
};

// One image; x and out are (height, width, channels). weight is (taps, padded channels) and bias (padded channels), of
// the compute type, zero beyond the channels, aligned to 64 bytes.
struct DepthwiseTask {
  const void* x;
  const void* weight;
  const void* bias;
  void* out;
  std::size_t height, width, channels, padded_channels;
  std::size_t kernel, dilation;
  bool silu;
};

// One image's rows as (pixels, channels), groups of consecutive channels. `state` is (groups, 3): count, mean, sum of
// squared deviations from the mean.
struct GroupTask {
  const void* x;
  void* out;  // null for summaries
  const void* scale;       // (channels), compute type: y = ((x - mean) - rest) * scale + shift
  const void* mean;        // (channels): the mean rounded to the compute type
  const void* mean_rest;   // (channels): what that rounding left
  const void* shift;       // (channels)
  std::size_t channels, groups;
  bool silu;
};

// How many values of the compute type the depthwise convolution wants for one thread, and how wide its tiles are.
struct DepthwiseScratch {
  std::size_t values, tile;
};

// One set of kernels, compiled for one instruction set.
struct Layers {
  void (*layer_norm[STORAGES])(const LayerNormTask&, std::size_t first, std::size_t last);
  // Output rows [first, last).
  void (*depthwise[STORAGES])(const DepthwiseTask&, std::size_t first, std::size_t last, std::size_t tile,
                              void* scratch);
  // The summaries of pixels [first, last), into state (groups, 3). `scratch` holds 3 values for each channel,
  // their number rounded up to channel_padding.
  void (*group_summarise[STORAGES])(const GroupTask&, std::size_t first, std::size_t last, double* state,
                                    void* scratch);
  // Pixels [first, last).
  void (*group_apply[STORAGES])(const GroupTask&, std::size_t first, std::size_t last);
};

const Layers& baseline_layers();
#ifdef XRK_X86
const Layers& avx2_layers();
const Layers& avx512_layers();
#endif

// The set that belongs to the path in force (active_path).
const Layers& active_layers();

// Lanes of padding that every path can work with.
constexpr std::size_t channel_padding = 16;

DepthwiseScratch depthwise_scratch(const DepthwiseTask& task, std::size_t value_bytes);

// Each over the whole of its work, on at most `threads` threads; the result does not depend on how many. False where
// memory for scratch ran out.
bool layer_norm(const LayerNormTask& task, Storage storage, std::size_t pixels, std::size_t threads);
bool depthwise(const DepthwiseTask& task, Storage storage, std::size_t images, std::size_t threads);
bool group_summarise(const GroupTask& task, Storage storage, std::size_t images, std::size_t pixels, double* state,
                     std::size_t threads);
// task.scale, mean, mean_rest and shift are (images, channels) here.
bool group_apply(const GroupTask& task, Storage storage, std::size_t images, std::size_t pixels, std::size_t threads);

}  // namespace xrk::cpu
