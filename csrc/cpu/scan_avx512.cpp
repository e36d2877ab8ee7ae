// The scans' kernels for AVX-512: compiled for its F, BW, DQ and VL parts, called only where the processor has them.
#include "scan_path.h"

namespace xrk::cpu {

const ScanPath& avx512_scan_path() {
  static constexpr ScanPath path = make_scan_path();
  return path;
}

}  // namespace xrk::cpu
