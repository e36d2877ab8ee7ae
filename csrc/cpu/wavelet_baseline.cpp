// The wavelet kernels for every processor of the architecture.
#include "wavelet_path.h"

namespace xrk::cpu {

const Wavelets& baseline_wavelets() {
  static constexpr Wavelets wavelets = make_wavelets();
  return wavelets;
}

}  // namespace xrk::cpu
