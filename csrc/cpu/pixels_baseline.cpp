// The kernels for any processor: compiled with no instruction set beyond the platform's own.
#include "pixels_path.h"

namespace xrk::cpu {

const Path& baseline_path() {
  static constexpr Path path = make_path("baseline");
  return path;
}

}  // namespace xrk::cpu
