// The layers over whole maps: scratch memory and the split over threads.
#include "layers.h"

#include <algorithm>
#include <vector>

#include "large_pages.h"
#include "pixels.h"
#include "share.h"

namespace xrk::cpu {
namespace {

std::size_t compute_bytes(Storage storage) { return storage == S_F64 ? 8 : 4; }

const char* at(const void* base, std::size_t bytes) { return base ? static_cast<const char*>(base) + bytes : nullptr; }

// Pixels that are summed up in the compute type before their sums are merged in double precision. Fixed, so that the
// result depends neither on the number of threads nor on the instruction set's width.
constexpr std::size_t chunk_pixels = 256;

}  // namespace

const Layers& active_layers() {
#ifdef XRK_X86
  const Path* path = &active_path();
  if (path == &avx512_path()) return avx512_layers();
  if (path == &avx2_path()) return avx2_layers();
#endif
  return baseline_layers();
}

bool layer_norm(const LayerNormTask& task, Storage storage, std::size_t pixels, std::size_t threads) {
  const auto kernel = active_layers().layer_norm[storage];
  will_fill(task.out, pixels * task.channels * storage_bytes[storage]);
  return share(pixels, pixels * task.channels, threads, 0,
               [&](std::size_t first, std::size_t last, void*) { kernel(task, first, last); });
}

DepthwiseScratch depthwise_scratch(const DepthwiseTask& task, std::size_t value_bytes) {
  const std::size_t halo = (task.kernel - 1) * task.dilation, span = halo + 1;
  // The ring of rows should stay in a core's second-level cache; the halo should not outweigh the tile.
  constexpr std::size_t cache = std::size_t{192} << 10;
  const std::size_t fitting = cache / (span * task.padded_channels * value_bytes);
  std::size_t tile = std::max<std::size_t>(fitting > halo ? fitting - halo : 0, 8 * halo);
  tile = std::max<std::size_t>(tile, 16);
  // Tiles of one width, a whole number of blocks of 4 pixels.
  const std::size_t tiles = (task.width + tile - 1) / tile;
  tile = ((task.width + tiles - 1) / tiles + 3) / 4 * 4;
  return {span * (tile + halo) * task.padded_channels, tile};
}

bool depthwise(const DepthwiseTask& task, Storage storage, std::size_t images, std::size_t threads) {
  const auto kernel = active_layers().depthwise[storage];
  const std::size_t bytes = compute_bytes(storage);
  const DepthwiseScratch scratch_size = depthwise_scratch(task, bytes);
  const std::size_t values = task.height * task.width * task.channels;
  will_fill(task.out, images * values * storage_bytes[storage]);
  return share(images * task.height, images * values, threads, scratch_size.values * bytes,
               [&](std::size_t first, std::size_t last, void* scratch) {
                 while (first < last) {
                   const std::size_t image = first / task.height, top = first - image * task.height;
                   const std::size_t bottom = std::min(task.height, top + (last - first));
                   DepthwiseTask one = task;
                   one.x = at(task.x, image * values * storage_bytes[storage]);
                   one.out = const_cast<char*>(at(task.out, image * values * storage_bytes[storage]));
                   kernel(one, top, bottom, scratch_size.tile, scratch);
                   first += bottom - top;
                 }
               });
}

bool group_summarise(const GroupTask& task, Storage storage, std::size_t images, std::size_t pixels, double* state,
                     std::size_t threads) {
  const auto kernel = active_layers().group_summarise[storage];
  const std::size_t chunks = (pixels + chunk_pixels - 1) / chunk_pixels;
  const std::size_t numbers = 3 * task.groups;
  const std::size_t padded = (task.channels + channel_padding - 1) / channel_padding * channel_padding;
  const std::size_t scratch = 3 * padded * compute_bytes(storage);
  std::vector<double> parts(images * chunks * numbers);
  const bool done = share(
      images * chunks, images * pixels * task.channels, threads, scratch,
      [&](std::size_t first, std::size_t last, void* memory) {
        for (std::size_t i = first; i < last; ++i) {
          const std::size_t image = i / chunks, from = i % chunks * chunk_pixels;
          GroupTask one = task;
          one.x = at(task.x, image * pixels * task.channels * storage_bytes[storage]);
          kernel(one, from, std::min(pixels, from + chunk_pixels), parts.data() + i * numbers, memory);
        }
      });
  if (!done) return false;
  for (std::size_t image = 0; image < images; ++image) {
    for (std::size_t g = 0; g < task.groups; ++g) {
      double* into = state + (image * task.groups + g) * 3;
      into[0] = into[1] = into[2] = 0;
      for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
        const double* part = parts.data() + (image * chunks + chunk) * numbers + 3 * g;
        const double total = into[0] + part[0], gap = part[1] - into[1];
        into[2] += part[2] + gap * gap * (into[0] * part[0] / total);
        into[1] += gap * (part[0] / total);
        into[0] = total;
      }
    }
  }
  return true;
}

bool group_apply(const GroupTask& task, Storage storage, std::size_t images, std::size_t pixels, std::size_t threads) {
  const auto kernel = active_layers().group_apply[storage];
  const std::size_t bytes = compute_bytes(storage);
  will_fill(task.out, images * pixels * task.channels * storage_bytes[storage]);
  return share(images * pixels, images * pixels * task.channels, threads, 0,
               [&](std::size_t first, std::size_t last, void*) {
                 while (first < last) {
                   const std::size_t image = first / pixels, from = first - image * pixels;
                   const std::size_t to = std::min(pixels, from + (last - first));
                   const std::size_t values = image * pixels * task.channels * storage_bytes[storage];
                   const std::size_t row = image * task.channels * bytes;
                   GroupTask one = task;
                   one.x = at(task.x, values);
                   one.out = const_cast<char*>(at(task.out, values));
                   one.scale = at(task.scale, row);
                   one.mean = at(task.mean, row);
                   one.mean_rest = at(task.mean_rest, row);
                   one.shift = at(task.shift, row);
                   kernel(one, from, to);
                   first += to - from;
                 }
               });
}

}  // namespace xrk::cpu
