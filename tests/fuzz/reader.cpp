// libFuzzer's target for the whole reader: any bytes are a file, and all that may come of it is a Failure.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/tiff/reader.h"

using namespace xrk::tiff;

namespace {

void look_at(Reader& reader) {
  if (!reader.directory().unsupported().empty() || reader.frames() == 0) return;
  reader.directory().check_segments();
  (void)reader.contiguous_start();
  (void)reader.set_hidden(3);
  for (std::uint64_t frame = 0; frame < reader.frames() && frame < 3; ++frame) {
    (void)reader.directory().entries(reader.frame(frame));
    const Geometry& g = reader.frame(frame).geometry;
    if (!can_decode(g.compression)) continue;
    // The window at the last corner, with a frame around it.
    constexpr std::uint64_t side = 64, halo = 9;
    Window window;
    window.page = frame;
    const std::uint64_t rows = g.height < side ? g.height : side, columns = g.width < side ? g.width : side;
    window.row = static_cast<std::int64_t>(g.height - rows) - static_cast<std::int64_t>(halo);
    window.column = static_cast<std::int64_t>(g.width - columns) - static_cast<std::int64_t>(halo);
    window.rows = rows + 2 * halo;
    window.columns = columns + 2 * halo;
    for (const Border border : {Border::reflect, Border::symmetric, Border::edge, Border::constant}) {
      for (int value = -1; value < VALUES; ++value) {
        window.border = border;
        window.values = value >= 0;
        window.value = value >= 0 ? static_cast<Value>(value) : V32;
        const std::size_t bytes = window.values ? value_sizes[window.value] : g.pixel_bytes();
        window.row_stride = window.columns * bytes;
        std::unique_ptr<unsigned char[]> out(new unsigned char[window.rows * window.row_stride]);
        window.out = out.get();
        reader.read(window, 1);
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    Limits limits;
    limits.segment_bytes = size % 2 == 0 ? 1 << 22 : 256;  // larger segments are decoded in parts
    limits.bomb_bytes = 1 << 23;                             // larger ones only take longer
    Reader reader(std::make_unique<Input>(data, size), limits, 1 << 20);
    look_at(reader);
  } catch (const Failure&) {
  }
  return 0;
}
