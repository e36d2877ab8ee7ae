// The deformable convolution over whole maps: memory and the split over threads.
#include "deform.h"

#include "large_pages.h"
#include "pixels.h"
#include "share.h"

namespace xrk::cpu {
namespace {

const Deformations& active_deformations() {
#ifdef XRK_X86
  const Path* path = &active_path();
  if (path == &avx512_path()) return avx512_deformations();
  if (path == &avx2_path()) return avx2_deformations();
#endif
  return baseline_deformations();
}

}  // namespace

bool deform_conv2d(const DeformTask& task, Storage storage, std::size_t threads) {
  const Deformations& kernels = active_deformations();
  const DeformBlock block = kernels.block[storage](task);
  const Memory packed = allocate(kernels.packed_values[storage](task) * (storage == S_F64 ? 8 : 4));
  if (!packed) return false;
  kernels.pack[storage](task, packed.get());
  const std::size_t pixels = task.images * task.out_height * task.out_width;
  will_fill(task.out, pixels * task.outputs * storage_bytes[storage]);
  // A pixel's sums are worth its columns: there are as many products as there are weights.
  const std::size_t products = pixels * task.outputs * (task.channels / task.groups) * task.taps();
  return share((pixels + block.pixels - 1) / block.pixels, products / 16, threads, block.bytes,
               [&](std::size_t first, std::size_t last, void* scratch) {
                 kernels.run[storage](task, packed.get(), block.pixels, first * block.pixels,
                                      std::min(pixels, last * block.pixels), scratch);
               });
}

}  // namespace xrk::cpu
