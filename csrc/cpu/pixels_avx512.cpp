// The kernels for AVX-512 (F, BW, DQ, VL): compiled for these, called only where the processor has all four.
// Every build compiles it; no processor with AVX-512 has run it so far. The tests run it where there is one.
#include "pixels_path.h"

namespace xrk::cpu {

const Path& avx512_path() {
  static constexpr Path path = make_path("avx512");
  return path;
}

}  // namespace xrk::cpu
