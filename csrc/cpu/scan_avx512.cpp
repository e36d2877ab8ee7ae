// The scans' kernels for AVX-512: compiled for its F, BW, DQ and VL parts, called only where the processor has them.
// Every build compiles it; no processor with AVX-512 has run it so far. The tests run it where there is one.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own AVX-512 header for uninitialised variables (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "scan_backward_path.h"

namespace xrk::cpu {

const ScanPath& avx512_scan_path() {
  static constexpr ScanPath path = make_scan_path();
  return path;
}

}  // namespace xrk::cpu
