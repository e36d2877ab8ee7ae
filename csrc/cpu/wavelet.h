// One level of the two-dimensional wavelet transform, and back, on the CPU; float or double.
#pragma once

#include <cstddef>

namespace xrk::cpu {

// Filters of the analysis (those of the synthesis are the same reversed), `taps` of them, an even number up to
// most_taps. height and width are those of the image (analysis) or of each of its four parts (synthesis).
struct WaveletTask {
  const void* x;
  void* out;
  const double* low;
  const double* high;
  std::size_t taps, height, width;
};

constexpr std::size_t most_taps = 16;

// One set of kernels, compiled for one instruction set. Each makes rows [first, last) of its output; `scratch` holds
// wavelet_scratch values. The order of every sum is that of the definition, so all sets give the same bits.
struct Wavelets {
  void (*analyse[2])(const WaveletTask&, std::size_t first, std::size_t last, void* scratch);
  void (*synthesise[2])(const WaveletTask&, std::size_t first, std::size_t last, void* scratch);
};

const Wavelets& baseline_wavelets();
#ifdef XRK_X86
const Wavelets& avx2_wavelets();
const Wavelets& avx512_wavelets();
#endif

constexpr std::size_t wavelet_scratch(std::size_t width, std::size_t taps) { return 8 * (width + 2 * taps + 16); }

// Over all images, on at most `threads` threads. False where memory for scratch ran out.
bool wavelet_analyse(const WaveletTask& task, bool doubles, std::size_t images, std::size_t threads);
bool wavelet_synthesise(const WaveletTask& task, bool doubles, std::size_t images, std::size_t threads);

}  // namespace xrk::cpu
