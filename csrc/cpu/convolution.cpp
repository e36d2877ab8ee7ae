// The convolution over whole bands: pieces, scratch memory and the split over threads.
#include "convolution.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "pixels.h"
#include "share.h"
#include "team.h"

namespace xrk::cpu {
namespace {

const Convolutions& active_convolutions() {
#ifdef XRK_X86
  const Path* path = &active_path();
  if (path == &avx512_path()) return avx512_convolutions();
  if (path == &avx2_path()) return avx2_convolutions();
#endif
  return baseline_convolutions();
}

// So many rows of a panel's weights stay in the first-level cache while a segment of pixels passes.
constexpr std::size_t piece_rows = 288;

// Fewer products than this are not worth a second thread.
constexpr std::size_t smallest_share_of_products = std::size_t{1} << 19;

std::vector<ConvPiece> pieces_of(const ConvTask& task) {
  // Without dilation the columns of a kernel's row read consecutive values.
  const bool together = task.column_dilation == 1 || task.kernel_columns == 1;
  const std::size_t length = together ? task.kernel_columns * task.channels : task.channels;
  const std::size_t columns = together ? 1 : task.kernel_columns;
  const std::size_t neighbours = together ? task.kernel_rows : task.kernel_columns;
  const std::size_t apart = task.column_dilation * task.channels;
  std::vector<ConvPiece> pieces;
  if (length > piece_rows) {
    const std::size_t parts = (length + piece_rows - 1) / piece_rows, part = (length + parts - 1) / parts;
    for (std::size_t i = 0; i < task.kernel_rows * columns; ++i) {
      for (std::size_t from = 0; from < length; from += part) {
        pieces.push_back({i / columns, i % columns * apart + from, 1, std::min(part, length - from),
                          i * length + from, together});
      }
    }
    return pieces;
  }
  const std::size_t most = piece_rows / length, parts = (neighbours + most - 1) / most;
  const std::size_t part = (neighbours + parts - 1) / parts;
  for (std::size_t row = 0; row < (together ? 1 : task.kernel_rows); ++row) {
    for (std::size_t i = 0; i < neighbours; i += part) {
      const std::size_t count = std::min(part, neighbours - i);
      pieces.push_back({together ? i : row, together ? 0 : i * apart, count, length, (row * neighbours + i) * length,
                        together});
    }
  }
  return pieces;
}

// Calls run(first, last, scratch) for all of `units`, on up to `team` threads. False where memory ran out.
template <typename Run>
bool spread_over(std::size_t team, std::size_t units, std::size_t scratch_values, const Run& run) {
  // A thread that is held up leaves its share to the others.
  const std::size_t parts = team == 1 ? 1 : std::min(units, 4 * team);
  std::atomic<std::size_t> next{0};
  std::atomic<bool> done{true};
  run_team(std::min(team, parts), [&] {
    const Memory scratch = allocate(scratch_values * sizeof(float));
    if (!scratch) {
      done = false;
      return;
    }
    for (std::size_t part = next++; part < parts; part = next++) {
      run(part * units / parts, (part + 1) * units / parts, static_cast<float*>(scratch.get()));
    }
  });
  return done;
}

}  // namespace

bool convolution(ConvTask task, std::size_t threads) {
  const Convolutions& kernels = active_convolutions();
  if (task.rows == 0 || task.columns == 0) return true;
  const std::size_t depth = (task.x ? task.products() : 0) + 3 * task.doubled_channels;
  const std::size_t products = task.rows * task.columns * task.panels() * conv_panel * depth;
  const std::size_t worth = std::max<std::size_t>(1, products / smallest_share_of_products);
  const std::size_t team = std::min(threads, worth);
  if (task.transformed) {
    const std::size_t tiles = (task.rows + task.cut + 1) / 2 * ((task.columns + 1) / 2);
    std::size_t groups = (tiles + kernels.largest_group - 1) / kernels.largest_group;
    groups = (groups + team - 1) / team * team;  // as many for each thread
    task.tile_group = (tiles + groups - 1) / groups;
    return spread_over(team, (tiles + task.tile_group - 1) / task.tile_group, kernels.transformed_scratch_values(task),
                       [&](std::size_t first, std::size_t last, float* scratch) {
                         kernels.run_transformed(task, first, last, scratch);
                       });
  }
  if (task.few()) {
    return spread_over(team, task.rows, kernels.scratch_values(task),
                       [&](std::size_t first, std::size_t last, float* scratch) {
                         kernels.run_few(task, first, last, scratch);
                       });
  }
  const std::vector<ConvPiece> pieces = pieces_of(task);
  task.pieces = pieces.data();
  task.piece_count = pieces.size();
  return spread_over(team, task.rows * task.panels(), kernels.scratch_values(task),
                     [&](std::size_t first, std::size_t last, float* scratch) {
                       kernels.run(task, first, last, scratch);
                     });
}

}  // namespace xrk::cpu
