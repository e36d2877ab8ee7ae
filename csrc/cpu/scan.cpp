// Orders the scans' work: which positions, in which pieces, on which threads. What is computed for a channel does not
// depend on the pieces that threads take, so the bytes are the same for every number of threads.
#include "scan.h"

#include <algorithm>
#include <vector>

#include "large_pages.h"
#include "scan_work.h"

namespace xrk::cpu {
namespace {

// Projections of this many pixels are held at a time.
constexpr std::int64_t pixels_at_a_time = 16384;

// The way of direction k through an image, in pixels: line l, step s is pixel first + l * line + s * step.
struct Way {
  std::int64_t lines, steps, first, line, step;
};

Way way_of(int k, std::int64_t height, std::int64_t width) {
  const std::int64_t end = height * width - 1;
  if (k == 0) return {height, width, 0, width, 1};
  if (k == 1) return {width, height, 0, 1, width};
  if (k == 2) return {height, width, end, -width, -1};
  return {width, height, end, -1, -width};
}

// As one line, where the next line's first pixel is a step away from the last one.
Way flattened(const Way& way) {
  if (way.line != way.step * way.steps) return way;
  return {1, way.lines * way.steps, way.first, 0, way.step};
}

template <typename T>
Prepared<T> prepare(const Ss2dWeights<T>& w, int k) {
  const std::int64_t lanes = kernels<T>().lanes;
  const std::int64_t rows = w.rank + 2 * w.states;
  Prepared<T> out;
  out.padded = round_up(w.channels, lanes);
  out.outputs = round_up(rows, lanes);
  out.projection.assign(static_cast<std::size_t>(w.channels * out.outputs), T(0));
  for (std::int64_t q = 0; q < rows; ++q) {
    for (std::int64_t d = 0; d < w.channels; ++d) {
      out.projection[d * out.outputs + q] = w.projection[(k * rows + q) * w.channels + d];
    }
  }
  prepare_dt_weight(w.dt_weight + k * w.channels * w.rank, w.channels, w.rank, out);
  prepare_vector(w.dt_bias + k * w.channels, w.channels, out.padded, out.bias);
  prepare_vector(w.skip + k * w.channels, w.channels, out.padded, out.skip);
  prepare_a(w.a_logs + k * w.channels * w.states, true, w.channels, w.states, out);
  return out;
}

template <typename T>
constexpr Storage storage_of = sizeof(T) == 8 ? S_F64 : S_F32;

// Everything of a walk that all lines of one direction share.
template <typename T>
Walk<T> start_walk(const Ss2dWeights<T>& w, const Prepared<T>& p, Storage storage, const void* x) {
  Walk<T> walk{};
  walk.u = x;
  walk.u_storage = storage;
  walk.y_storage = storage_of<T>;
  walk.pitch = w.channels;
  walk.width = w.channels;
  walk.padded = p.padded;
  walk.dt_weight = p.dt_weight.data();
  walk.rank = w.rank;
  walk.bias = p.bias.data();
  walk.softplus = true;
  walk.row_pitch = p.outputs;
  walk.rows_by_step = true;
  walk.states = w.states;
  walk.a2 = p.a2.data();
  walk.skip = p.skip.data();
  return walk;
}

template <typename T>
void aim(Walk<T>& walk, const Steps& steps, const T* rows) {
  walk.steps = steps;
  walk.rows = rows;
  walk.b = rows + walk.rank;
  walk.c = walk.b + walk.states;
}

Steps line_of(const Way& way, std::int64_t line) {
  return {nullptr, way.first + line * way.line, way.step, way.steps};
}

// The steps from `at` to the end of their line, or to `last`, of the whole image's.
Steps segment_at(const Way& way, std::int64_t at, std::int64_t last) {
  const std::int64_t line = at / way.steps, step = at % way.steps;
  const std::int64_t count = std::min(way.steps - step, last - at);
  return {nullptr, way.first + line * way.line + step * way.step, way.step, count};
}

// work(steps, at) for the parts of lines that make up steps [first, last) of the whole image; at is a part's first step.
template <typename Work>
void for_segments(const Way& way, std::int64_t first, std::int64_t last, const Work& work) {
  for (std::int64_t at = first; at < last;) {
    const Steps steps = segment_at(way, at, last);
    work(steps, at);
    at += steps.count;
  }
}

// The projections of steps [first, last) of a whole image, line after line, into rows.
template <typename T>
void project_steps(const void* x, Storage storage, const Ss2dWeights<T>& w, const Prepared<T>& p, const Way& way,
                   std::int64_t first, std::int64_t last, T* rows, std::size_t threads) {
  const std::int64_t pixels = last - first;
  share((pixels + 3) / 4, pixels * w.channels * p.outputs / 8, threads, [&](std::int64_t from, std::int64_t to) {
    for_segments(way, first + from * 4, first + std::min(pixels, to * 4), [&](const Steps& steps, std::int64_t at) {
      kernels<T>().project(x, storage, w.channels, steps, p.projection.data(), p.outputs,
                           rows + (at - first) * p.outputs);
    });
  });
}

// work(first, last, rows) for consecutive lines, with the projections of all their pixels in `rows`, line after line.
template <typename T, typename Work>
void in_projected_lines(const void* x, Storage storage, const Ss2dWeights<T>& w, const Prepared<T>& p, const Way& way,
                        std::vector<T>& rows, std::size_t threads, const Work& work) {
  const std::int64_t at_a_time = std::min(way.lines, std::max<std::int64_t>(1, pixels_at_a_time / way.steps));
  rows.resize(static_cast<std::size_t>(at_a_time * way.steps * p.outputs));
  for (std::int64_t first = 0; first < way.lines; first += at_a_time) {
    const std::int64_t last = std::min(way.lines, first + at_a_time);
    project_steps(x, storage, w, p, way, first * way.steps, last * way.steps, rows.data(), threads);
    work(first, last, rows.data());
  }
}

const char* image_at(const Map& x, std::int64_t image_values, std::int64_t i) {
  return static_cast<const char*>(x.values) + i * image_values * static_cast<std::int64_t>(storage_bytes[x.storage]);
}

// work(walk, image, line, channel) for every line of direction k (numbered through all images) and every block of
// `together` channels, in any order on the threads; the walk has a state and a sum of its thread's own.
template <typename T, typename Work>
void for_lines(const Map& x, const Ss2dWeights<T>& w, int k, std::int64_t together, std::size_t threads,
               const Work& work) {
  const Prepared<T> p = prepare(w, k);
  const Way way = way_of(k, x.height, x.width);
  const std::int64_t blocks = (p.padded + together - 1) / together;
  std::vector<T> rows;
  for (std::int64_t i = 0; i < x.batch; ++i) {
    const char* values = image_at(x, x.height * x.width * w.channels, i);
    in_projected_lines(values, x.storage, w, p, way, rows, threads,
                       [&](std::int64_t first, std::int64_t last, const T* projected) {
      const std::int64_t cost = (last - first) * way.steps * w.channels * (w.states + 2);
      share((last - first) * blocks, cost, threads, [&](std::int64_t from, std::int64_t to) {
        std::vector<T> state(static_cast<std::size_t>(w.states * p.padded));
        std::vector<T> sum(static_cast<std::size_t>(p.padded));
        Walk<T> walk = start_walk(w, p, x.storage, values);
        walk.state = state.data();
        walk.delta_sum = sum.data();
        for (std::int64_t task = from; task < to; ++task) {
          const std::int64_t line = first + task / blocks;
          aim(walk, line_of(way, line), projected + (line - first) * way.steps * p.outputs);
          work(walk, i, i * way.lines + line, task % blocks * together);
        }
      });
    });
  }
}

}  // namespace

template <typename T>
void selective_scan_2d(const Map& x, const Ss2dWeights<T>& w, void* y, std::size_t threads) {
  const std::int64_t pixels = x.height * x.width, image = pixels * w.channels;
  const ScanKernels<T>& kernel = kernels<T>();
  const Map out{y, x.storage, x.batch, x.height, x.width};
  will_fill(y, static_cast<std::size_t>(x.batch * image) * storage_bytes[x.storage]);
  // One thread finds a short block's pixels in its cache again; several should not be launched for so little.
  const std::int64_t block = std::min(pixels, threads > 1 ? pixels_at_a_time : pixels_at_a_time / 16);
  std::vector<T> rows, state;
  std::vector<std::uint16_t> rest(storage_bytes[x.storage] == 2 ? static_cast<std::size_t>(image) : 0);
  for (std::int64_t i = 0; i < x.batch; ++i) {
    // The order in which the public implementation adds up: rows in both senses, then columns.
    for (const int k : {0, 2, 1, 3}) {
      const Prepared<T> p = prepare(w, k);
      const Way way = flattened(way_of(k, x.height, x.width));
      rows.resize(static_cast<std::size_t>(block * p.outputs));
      state.assign(static_cast<std::size_t>(w.states * p.padded), T(0));
      Walk<T> common = start_walk(w, p, x.storage, image_at(x, image, i));
      common.y = const_cast<char*>(image_at(out, image, i));
      common.rest = rest.data();
      common.y_storage = x.storage;
      common.put = k == 0 ? Put::set : k == 3 ? Put::last : Put::add;
      common.state = state.data();
      for (std::int64_t first = 0; first < pixels; first += block) {
        const std::int64_t last = std::min(pixels, first + block);
        project_steps(common.u, x.storage, w, p, way, first, last, rows.data(), threads);
        const std::int64_t cost = (last - first) * w.channels * (w.states + 2);
        share(p.padded / kernel.lanes, cost, threads, [&](std::int64_t from, std::int64_t to) {
          Walk<T> walk = common;
          for (std::int64_t c = from * kernel.lanes; c < to * kernel.lanes; c += kernel.group) {
            for_segments(way, first, last, [&](const Steps& steps, std::int64_t at) {
              aim(walk, steps, rows.data() + (at - first) * p.outputs);
              const std::int64_t after = at + steps.count;
              walk.next = after < last ? segment_at(way, after, last) : Steps{};
              kernel.walk(walk, c, std::min(c + kernel.group, to * kernel.lanes));
            });
          }
        });
      }
    }
  }
}

template <typename T>
void summarise_lines(const Map& x, const Ss2dWeights<T>& w, int direction, T* sums, T* ends, std::size_t threads) {
  const ScanKernels<T>& kernel = kernels<T>();
  const auto summarise = [&](Walk<T>& walk, std::int64_t, std::int64_t line, std::int64_t c) {
    kernel.summarise(walk, c, c + kernel.lanes);
    for (std::int64_t d = c; d < std::min(c + kernel.lanes, w.channels); ++d) {
      const std::int64_t at = line * w.channels + d;
      sums[at] = walk.delta_sum[d];
      for (std::int64_t n = 0; n < w.states; ++n) ends[at * w.states + n] = walk.state[n * walk.padded + d];
    }
  };
  for_lines(x, w, direction, kernel.lanes, threads, summarise);
}

template <typename T>
void scan_lines(const Map& x, const Ss2dWeights<T>& w, int direction, T* states, T* y, std::size_t threads) {
  const std::int64_t image = x.height * x.width * w.channels;
  const ScanKernels<T>& kernel = kernels<T>();
  const auto scan = [&](Walk<T>& walk, std::int64_t i, std::int64_t line, std::int64_t c) {
    const std::int64_t end = std::min(c + kernel.group, walk.padded);
    T* own = states + line * w.channels * w.states;
    for (std::int64_t d = c; d < std::min(end, w.channels); ++d) {
      for (std::int64_t n = 0; n < w.states; ++n) walk.state[n * walk.padded + d] = own[d * w.states + n];
    }
    walk.y = y + i * image;
    walk.put = Put::add;
    kernel.walk(walk, c, end);
    for (std::int64_t d = c; d < std::min(end, w.channels); ++d) {
      for (std::int64_t n = 0; n < w.states; ++n) own[d * w.states + n] = walk.state[n * walk.padded + d];
    }
  };
  for_lines(x, w, direction, kernel.group, threads, scan);
}

template <typename T>
void selective_scan(const Scan1d<T>& scan, std::size_t threads) {
  const ScanKernels<T>& kernel = kernels<T>();
  const std::int64_t channels = scan.channels / scan.groups;  // of one group
  std::vector<Prepared<T>> prepared(static_cast<std::size_t>(scan.groups));
  for (std::int64_t g = 0; g < scan.groups; ++g) {
    Prepared<T>& p = prepared[g];
    p.padded = round_up(channels, kernel.lanes);
    prepare_a(scan.a + g * channels * scan.states, false, channels, scan.states, p);
    prepare_vector(scan.skip ? scan.skip + g * channels : nullptr, channels, p.padded, p.skip);
    prepare_vector(scan.bias ? scan.bias + g * channels : nullptr, channels, p.padded, p.bias);
  }
  const std::int64_t blocks = (prepared[0].padded + kernel.group - 1) / kernel.group;
  const std::int64_t cost = scan.batch * scan.length * scan.channels * (scan.states + 2);
  share(scan.batch * scan.groups * blocks, cost, threads, [&](std::int64_t from, std::int64_t to) {
    std::vector<T> state(static_cast<std::size_t>(scan.states * prepared[0].padded));
    for (std::int64_t task = from; task < to; ++task) {
      const std::int64_t i = task / blocks / scan.groups, g = task / blocks % scan.groups;
      const std::int64_t c = task % blocks * kernel.group;
      const Prepared<T>& p = prepared[g];
      const std::int64_t end = std::min(c + kernel.group, p.padded);
      const std::int64_t offset = i * scan.length * scan.channels + g * channels;
      const std::int64_t rows = (i * scan.groups + g) * scan.length * scan.states;
      Walk<T> walk{};
      walk.steps = {scan.order, 0, 1, scan.length};
      if (scan.order && scan.order_per_image) walk.steps.order += i * scan.length;
      walk.u = scan.u + offset;
      walk.u_storage = walk.y_storage = storage_of<T>;
      walk.y = scan.y + offset;
      walk.put = Put::set;
      walk.pitch = scan.channels;
      walk.width = channels;
      walk.padded = p.padded;
      walk.delta = scan.delta + offset;
      walk.bias = p.bias.data();
      walk.softplus = scan.softplus;
      walk.b = scan.b + rows;
      walk.c = scan.c + rows;
      walk.rows = walk.b;
      walk.row_pitch = scan.states;
      walk.states = scan.states;
      walk.a2 = p.a2.data();
      walk.skip = p.skip.data();
      walk.state = state.data();
      T* own = scan.state + (i * scan.channels + g * channels) * scan.states;
      for (std::int64_t d = c; d < end; ++d) {
        for (std::int64_t n = 0; n < scan.states; ++n) {
          state[n * p.padded + d] = d < channels ? own[d * scan.states + n] : T(0);
        }
      }
      kernel.walk(walk, c, end);
      for (std::int64_t d = c; d < std::min(end, channels); ++d) {
        for (std::int64_t n = 0; n < scan.states; ++n) own[d * scan.states + n] = state[n * p.padded + d];
      }
    }
  });
}

#define XRK_SCANS(T)                                                                                      \
  template void selective_scan_2d<T>(const Map&, const Ss2dWeights<T>&, void*, std::size_t);               \
  template void summarise_lines<T>(const Map&, const Ss2dWeights<T>&, int, T*, T*, std::size_t);           \
  template void scan_lines<T>(const Map&, const Ss2dWeights<T>&, int, T*, T*, std::size_t);                \
  template void selective_scan<T>(const Scan1d<T>&, std::size_t);
XRK_SCANS(float)
XRK_SCANS(double)
#undef XRK_SCANS

}  // namespace xrk::cpu
