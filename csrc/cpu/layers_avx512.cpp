// The kernels for AVX-512: called only where the processor has it.
#include "layers_path.h"

namespace xrk::cpu {

const Layers& avx512_layers() {
  static constexpr Layers layers = make_layers();
  return layers;
}

}  // namespace xrk::cpu
