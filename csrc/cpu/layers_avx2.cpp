// The kernels for AVX2: compiled with -mavx2 -mfma, called only where the processor has both.
#include "layers_path.h"

namespace xrk::cpu {

const Layers& avx2_layers() {
  static constexpr Layers layers = make_layers();
  return layers;
}

}  // namespace xrk::cpu
