// The deformable convolution for AVX2: compiled with -mavx2, called only where the processor has it.
#include "deform_path.h"

namespace xrk::cpu {

const Deformations& avx2_deformations() {
  static constexpr Deformations deformations = make_deformations();
  return deformations;
}

}  // namespace xrk::cpu
