// The wavelet kernels for AVX2: compiled with -mavx2, called only where the processor has it.
#include "wavelet_path.h"

namespace xrk::cpu {

const Wavelets& avx2_wavelets() {
  static constexpr Wavelets wavelets = make_wavelets();
  return wavelets;
}

}  // namespace xrk::cpu
