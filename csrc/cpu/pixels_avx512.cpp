// The kernels for AVX-512 (F, BW, DQ, VL): compiled for these, called only where the processor has all four.
#include "pixels_path.h"

namespace xrk::cpu {

const Path& avx512_path() {
  static constexpr Path path = make_path("avx512");
  return path;
}

}  // namespace xrk::cpu
