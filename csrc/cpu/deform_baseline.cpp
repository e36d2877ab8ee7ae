// The deformable convolution for every processor of the architecture.
#include "deform_path.h"

namespace xrk::cpu {

const Deformations& baseline_deformations() {
  static constexpr Deformations deformations = make_deformations();
  return deformations;
}

}  // namespace xrk::cpu
