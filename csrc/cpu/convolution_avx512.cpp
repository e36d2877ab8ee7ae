// The kernels for AVX-512: called only where the processor has it.
// Every build compiles it; no processor with AVX-512 has run it so far. The tests run it where there is one.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own AVX-512 header for uninitialised variables (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "convolution_transformed_path.h"

namespace xrk::cpu {

const Convolutions& avx512_convolutions() {
  static constexpr Convolutions convolutions = make_convolutions();
  return convolutions;
}

}  // namespace xrk::cpu
