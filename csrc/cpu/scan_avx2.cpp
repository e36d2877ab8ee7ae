// The scans' kernels for AVX2: compiled with -mavx2 -mfma, called only where the processor has both.
#include "scan_backward_path.h"

namespace xrk::cpu {

const ScanPath& avx2_scan_path() {
  static constexpr ScanPath path = make_scan_path();
  return path;
}

}  // namespace xrk::cpu
