// The kernels for every processor of the architecture.
#include "layers_path.h"

namespace xrk::cpu {

const Layers& baseline_layers() {
  static constexpr Layers layers = make_layers();
  return layers;
}

}  // namespace xrk::cpu
