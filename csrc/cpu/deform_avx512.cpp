// The deformable convolution for AVX-512: called only where the processor has it.
// Every build compiles it; no processor with AVX-512 has run it so far. The tests run it where there is one.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own AVX-512 header for uninitialised variables (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "deform_path.h"

namespace xrk::cpu {

const Deformations& avx512_deformations() {
  static constexpr Deformations deformations = make_deformations();
  return deformations;
}

}  // namespace xrk::cpu
