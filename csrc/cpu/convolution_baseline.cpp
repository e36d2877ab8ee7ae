// The kernels for every processor of the architecture.
#include "convolution_transformed_path.h"

namespace xrk::cpu {

const Convolutions& baseline_convolutions() {
  static constexpr Convolutions convolutions = make_convolutions();
  return convolutions;
}

}  // namespace xrk::cpu
