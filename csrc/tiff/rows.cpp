#include "rows.h"

#include <cstring>

#include "../cpu/pixels.h"

namespace xrk::tiff {

Pixel pixel_of(const Geometry& geometry) {
  const std::size_t bytes = geometry.pixel_bytes();
  switch (geometry.format) {
    case SampleFormat::floating:
      return bytes == 2 ? F16 : bytes == 4 ? F32 : F64;
    case SampleFormat::signed_integer:
      return bytes == 1 ? I8 : bytes == 2 ? I16 : I32;
    default:
      return bytes == 1 ? U8 : bytes == 2 ? U16 : U32;
  }
}

const RowKernels& active_rows() {
#ifdef XRK_X86
  if (std::strcmp(cpu::active_path().name, "baseline") != 0) return avx2_rows();
#endif
  return baseline_rows();
}

}  // namespace xrk::tiff
