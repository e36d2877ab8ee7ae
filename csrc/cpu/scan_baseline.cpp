// The scans' kernels for every processor: compiled with the default flags.
#include "scan_backward_path.h"

namespace xrk::cpu {

const ScanPath& baseline_scan_path() {
  static constexpr ScanPath path = make_scan_path();
  return path;
}

}  // namespace xrk::cpu
