// The kernels for AVX2: compiled with -mavx2 -mfma, called only where the processor has both.
#include "pixels_path.h"

namespace xrk::cpu {

const Path& avx2_path() {
  static constexpr Path path = make_path("avx2");
  return path;
}

}  // namespace xrk::cpu
