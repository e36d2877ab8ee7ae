// The kernels for AVX2: compiled with -mavx2 -mfma -mf16c, called only where the processor has all three.
#include "rows_path.h"

namespace xrk::tiff {

const RowKernels& avx2_rows() {
  static constexpr RowKernels rows = make_rows();
  return rows;
}

}  // namespace xrk::tiff
