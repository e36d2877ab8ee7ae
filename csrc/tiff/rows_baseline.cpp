// The kernels for any processor: compiled with no instruction set beyond the platform's own.
#include "rows_path.h"

namespace xrk::tiff {

const RowKernels& baseline_rows() {
  static constexpr RowKernels rows = make_rows();
  return rows;
}

}  // namespace xrk::tiff
