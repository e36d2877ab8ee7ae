// The wavelet kernels for AVX-512: called only where the processor has it.
#include "wavelet_path.h"

namespace xrk::cpu {

const Wavelets& avx512_wavelets() {
  static constexpr Wavelets wavelets = make_wavelets();
  return wavelets;
}

}  // namespace xrk::cpu
