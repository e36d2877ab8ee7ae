// The kernels for AVX2: compiled with -mavx2 -mfma, called only where the processor has both.
#include "convolution_transformed_path.h"

namespace xrk::cpu {

const Convolutions& avx2_convolutions() {
  static constexpr Convolutions convolutions = make_convolutions();
  return convolutions;
}

}  // namespace xrk::cpu
