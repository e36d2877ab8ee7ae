// The wavelet transform over whole images: scratch memory and the split over threads.
#include "wavelet.h"

#include <algorithm>

#include "large_pages.h"
#include "pixels.h"
#include "share.h"

namespace xrk::cpu {
namespace {

const Wavelets& active_wavelets() {
#ifdef XRK_X86
  const Path* path = &active_path();
  if (path == &avx512_path()) return avx512_wavelets();
  if (path == &avx2_path()) return avx2_wavelets();
#endif
  return baseline_wavelets();
}

using Kernel = void (*)(const WaveletTask&, std::size_t, std::size_t, void*);

// Output rows of all images, those of one image after those of the one before.
bool over_rows(const WaveletTask& task, Kernel kernel, std::size_t value_bytes, std::size_t images, std::size_t rows,
               std::size_t in_values, std::size_t out_values, std::size_t threads) {
  const std::size_t scratch = wavelet_scratch(task.width, task.taps) * value_bytes;
  will_fill(task.out, images * out_values * value_bytes);
  return share(images * rows, images * out_values, threads, scratch,
               [&](std::size_t first, std::size_t last, void* memory) {
                 while (first < last) {
                   const std::size_t image = first / rows, top = first - image * rows;
                   const std::size_t bottom = std::min(rows, top + (last - first));
                   WaveletTask one = task;
                   one.x = static_cast<const char*>(task.x) + image * in_values * value_bytes;
                   one.out = static_cast<char*>(task.out) + image * out_values * value_bytes;
                   kernel(one, top, bottom, memory);
                   first += bottom - top;
                 }
               });
}

}  // namespace

bool wavelet_analyse(const WaveletTask& task, bool doubles, std::size_t images, std::size_t threads) {
  const std::size_t rows = (task.height + task.taps - 1) / 2, columns = (task.width + task.taps - 1) / 2;
  return over_rows(task, active_wavelets().analyse[doubles], doubles ? 8 : 4, images, rows, task.height * task.width,
                   4 * rows * columns, threads);
}

bool wavelet_synthesise(const WaveletTask& task, bool doubles, std::size_t images, std::size_t threads) {
  const std::size_t rows = 2 * task.height - task.taps + 2, columns = 2 * task.width - task.taps + 2;
  return over_rows(task, active_wavelets().synthesise[doubles], doubles ? 8 : 4, images, rows,
                   4 * task.height * task.width, rows * columns, threads);
}

}  // namespace xrk::cpu
