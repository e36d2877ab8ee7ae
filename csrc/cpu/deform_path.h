// The deformable convolution, once for each instruction set that includes this file; everything is internal to it.
//
// A block of output pixels is gathered into columns, (pixels, taps, channels), which stay in the second-level cache, and
// multiplied by the packed weights, a tile of pixels x outputs in registers at a time. Sums run over taps and channels in
// their order, so all paths differ by fused multiply-adds alone, and the number of threads changes nothing.
#pragma once

#include "deform.h"
#include "vectors_path.h"

namespace xrk::cpu {
namespace {

// --- the product --------------------------------------------------------------------------------------------------

// A tile of the product: pixels, and vectors of outputs. Its sums, with one column's value and a row of weights, fill
// the registers.
#if defined(__AVX512F__)
constexpr std::size_t tile_pixels = 12;
#elif defined(__AVX2__)
constexpr std::size_t tile_pixels = 6;
#else
constexpr std::size_t tile_pixels = 4;
#endif
constexpr std::size_t tile_vectors = 2;
template <typename T>
constexpr std::size_t panel = tile_vectors * lanes<T>;

// So many rows of weights of one panel stay in the first-level cache while all pixels of a block pass.
constexpr std::size_t panel_rows = 256;

constexpr std::size_t rounded_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// sums (PIXELS, panel) += columns (PIXELS, rows) weights (rows, panel)
template <typename T, std::size_t PIXELS>
inline void multiply(const T* columns, std::size_t column_stride, const T* weights, std::size_t rows, T* sums,
                     std::size_t sum_stride) {
  using V = Vector<T>;
  V tile[PIXELS][tile_vectors];
#pragma GCC unroll 12
  for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 2
    for (std::size_t v = 0; v < tile_vectors; ++v) tile[p][v] = load(sums + p * sum_stride + v * lanes<T>);
  }
  for (std::size_t r = 0; r < rows; ++r, weights += panel<T>) {
    V w[tile_vectors];
#pragma GCC unroll 2
    for (std::size_t v = 0; v < tile_vectors; ++v) w[v] = load(weights + v * lanes<T>);
#pragma GCC unroll 12
    for (std::size_t p = 0; p < PIXELS; ++p) {
      const V value = spread<T>(columns[p * column_stride + r]);
#pragma GCC unroll 2
      for (std::size_t v = 0; v < tile_vectors; ++v) tile[p][v] = madd(value, w[v], tile[p][v]);
    }
  }
#pragma GCC unroll 12
  for (std::size_t p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 2
    for (std::size_t v = 0; v < tile_vectors; ++v) store(sums + p * sum_stride + v * lanes<T>, tile[p][v]);
  }
}

// Sizes of one group's product, and where its parts lie.
template <typename T>
struct Product {
  std::size_t inputs, outputs, padded_outputs, rows;

  explicit Product(const DeformTask& task)
      : inputs(task.channels / task.groups),
        outputs(task.outputs / task.groups),
        padded_outputs(rounded_up(outputs, panel<T>)),
        rows(inputs * task.taps()) {}
};

// All groups' products for one block of pixels.
template <typename T>
void multiply_block(const DeformTask& task, const Product<T>& product, const T* columns, const T* packed, T* sums,
                    std::size_t pixels) {
  const std::size_t column_stride = task.taps() * task.channels, sum_stride = task.groups * product.padded_outputs;
  // One group's columns lie together, with more of them a tap's channels do.
  const std::size_t runs = task.groups == 1 ? 1 : task.taps(), run = product.rows / runs;
  for (std::size_t group = 0; group < task.groups; ++group) {
    const T* const weights = packed + group * product.rows * product.padded_outputs;
    for (std::size_t i = 0; i < runs; ++i) {
      const T* const from = columns + i * task.channels + group * product.inputs;
      for (std::size_t first = 0; first < run; first += panel_rows) {
        const std::size_t rows = run - first < panel_rows ? run - first : panel_rows;
        for (std::size_t output = 0; output < product.padded_outputs; output += panel<T>) {
          const T* const w = weights + output * product.rows + (i * run + first) * panel<T>;
          T* const to = sums + group * product.padded_outputs + output;
          std::size_t p = 0;
          for (; p + tile_pixels <= pixels; p += tile_pixels) {
            multiply<T, tile_pixels>(from + first + p * column_stride, column_stride, w, rows, to + p * sum_stride,
                                     sum_stride);
          }
          for (; p < pixels; ++p) {
            multiply<T, 1>(from + first + p * column_stride, column_stride, w, rows, to + p * sum_stride, sum_stride);
          }
        }
      }
    }
  }
}

// (group, panel of outputs, tap, input, output of the panel), zeros beyond the outputs.
template <typename S>
void pack_weights(const DeformTask& task, void* packed) {
  using T = Compute<S>;
  const Product<T> product(task);
  const T* const weight = static_cast<const T*>(task.weight);
  T* to = static_cast<T*>(packed);
  for (std::size_t group = 0; group < task.groups; ++group) {
    for (std::size_t first = 0; first < product.padded_outputs; first += panel<T>) {
      for (std::size_t tap = 0; tap < task.taps(); ++tap) {
        for (std::size_t c = 0; c < product.inputs; ++c) {
          for (std::size_t o = first; o < first + panel<T>; ++o) {
            const std::size_t row = (group * product.outputs + o) * product.inputs + c;
            *to++ = o < product.outputs ? weight[row * task.taps() + tap] : T(0);
          }
        }
      }
    }
  }
}

template <typename S>
std::size_t packed_values(const DeformTask& task) {
  const Product<Compute<S>> product(task);
  return task.groups * product.rows * product.padded_outputs;
}

// --- the columns --------------------------------------------------------------------------------------------------

// Whole pixels of an offset; what is further away than any map is large, is just outside.
template <typename T>
inline std::ptrdiff_t whole(T offset, T* rest) {
  constexpr T far = T(1 << 30);
  const T floor = __builtin_floor(offset);
  *rest = offset - floor;
  return static_cast<std::ptrdiff_t>(floor < -far ? -far : (floor > far ? far : floor));
}

// The channels of one deformable group at one tap of one output pixel.
template <typename S>
inline void sample(const DeformTask& task, const S* image, const S* zeros, std::ptrdiff_t row, std::ptrdiff_t column,
                   Compute<S> down, Compute<S> right, Compute<S> mask, std::size_t channels, Compute<S>* to) {
  using T = Compute<S>;
  const std::ptrdiff_t height = static_cast<std::ptrdiff_t>(task.height);
  const std::ptrdiff_t width = static_cast<std::ptrdiff_t>(task.width);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(task.channels);
  T y = 0, x = 0;
  const bool known = down == down && right == right;
  if (known) {
    row += whole(down, &y);
    column += whole(right, &x);
  }
  if (!known || row < -1 || row >= height || column < -1 || column >= width) {
    // A mask that is not a number shows here too, as it does in the definition.
    const Vector<T> value = spread<T>((known ? T(0) : down + right) * mask);
    for (std::size_t c = 0; c < channels; c += lanes<T>) {
      store_some(to + c, value, static_cast<std::int64_t>(channels - c));
    }
    return;
  }
  const S* const upper = image + (row * width + column) * stride;
  const S* const lower = upper + width * stride;
  const bool top = row >= 0, bottom = row + 1 < height, first = column >= 0, second = column + 1 < width;
  const S* const a = top && first ? upper : zeros;
  const S* const b = top && second ? upper + stride : zeros;
  const S* const c = bottom && first ? lower : zeros;
  const S* const d = bottom && second ? lower + stride : zeros;
  const Vector<T> wa = spread<T>((1 - y) * (1 - x) * mask), wb = spread<T>((1 - y) * x * mask);
  const Vector<T> wc = spread<T>(y * (1 - x) * mask), wd = spread<T>(y * x * mask);
  for (std::size_t i = 0; i < channels; i += lanes<T>) {
    const std::int64_t left = static_cast<std::int64_t>(channels - i);
    Vector<T> sum = load_some(a + i, left) * wa;
    sum = madd(load_some(b + i, left), wb, sum);
    sum = madd(load_some(c + i, left), wc, sum);
    sum = madd(load_some(d + i, left), wd, sum);
    store_some(to + i, sum, left);
  }
}

template <typename S>
void gather_pixel(const DeformTask& task, const S* zeros, std::size_t image, std::size_t i, std::size_t j,
                  Compute<S>* column) {
  using T = Compute<S>;
  const std::size_t taps = task.taps(), width = task.channels / task.deformable_groups;
  const S* const x = static_cast<const S*>(task.x) + image * task.height * task.width * task.channels;
  const auto at = [&](const PixelStrides& strides) {
    return static_cast<std::ptrdiff_t>(image) * strides.image + static_cast<std::ptrdiff_t>(i) * strides.row +
           static_cast<std::ptrdiff_t>(j) * strides.pixel;
  };
  const T* const offset = static_cast<const T*>(task.offset) + at(task.offset_strides);
  const T* const mask = task.mask ? static_cast<const T*>(task.mask) + at(task.mask_strides) : nullptr;
  std::ptrdiff_t row = static_cast<std::ptrdiff_t>(i) * task.stride + task.first - task.padding;
  for (std::size_t u = 0, tap = 0; u < task.kernel_height; ++u, row += task.dilation) {
    std::ptrdiff_t place = static_cast<std::ptrdiff_t>(j) * task.stride - task.padding;
    for (std::size_t v = 0; v < task.kernel_width; ++v, ++tap, place += task.dilation) {
      for (std::size_t g = 0; g < task.deformable_groups; ++g) {
        const T* const moved = offset + 2 * (g * taps + tap);
        sample<S>(task, x + g * width, zeros, row, place, moved[0], moved[1], mask ? mask[g * taps + tap] : T(1), width,
                  column + tap * task.channels + g * width);
      }
    }
  }
}

// --- blocks of pixels ---------------------------------------------------------------------------------------------

// Scratch: the columns, the sums, and zeros for pixels outside the map.
template <typename S>
DeformBlock deform_block(const DeformTask& task) {
  using T = Compute<S>;
  const Product<T> product(task);
  const std::size_t column = task.taps() * task.channels, sums = task.groups * product.padded_outputs;
  constexpr std::size_t cache = std::size_t{192} << 10;
  std::size_t pixels = cache / ((column + sums) * sizeof(T)) / tile_pixels * tile_pixels;
  pixels = pixels < tile_pixels ? tile_pixels : (pixels > 8 * tile_pixels ? 8 * tile_pixels : pixels);
  const std::size_t zeros = rounded_up(task.channels, 64);
  return {pixels, (pixels * (column + sums) + zeros + 2 * lanes<T>) * sizeof(T)};
}

template <typename S>
void deform_run(const DeformTask& task, const void* packed, std::size_t block, std::size_t first, std::size_t last,
                void* scratch) {
  using T = Compute<S>;
  const Product<T> product(task);
  const std::size_t column = task.taps() * task.channels, sums_of_pixel = task.groups * product.padded_outputs;
  T* const sums = static_cast<T*>(scratch);
  T* const columns = sums + block * sums_of_pixel;
  S* const zeros = reinterpret_cast<S*>(columns + block * column);
  __builtin_memset(zeros, 0, task.channels * sizeof(S));
  const T* const bias = static_cast<const T*>(task.bias);
  const std::size_t of_image = task.out_height * task.out_width;
  for (; first < last; first += block) {
    const std::size_t pixels = last - first < block ? last - first : block;
    for (std::size_t p = 0; p < pixels; ++p) {
      const std::size_t image = (first + p) / of_image, place = (first + p) % of_image;
      gather_pixel<S>(task, zeros, image, place / task.out_width, place % task.out_width, columns + p * column);
      for (std::size_t group = 0; group < task.groups; ++group) {
        T* const to = sums + p * sums_of_pixel + group * product.padded_outputs;
        for (std::size_t o = 0; o < product.padded_outputs; ++o) {
          to[o] = bias && o < product.outputs ? bias[group * product.outputs + o] : T(0);
        }
      }
    }
    multiply_block<T>(task, product, columns, static_cast<const T*>(packed), sums, pixels);
    for (std::size_t p = 0; p < pixels; ++p) {
      S* out = static_cast<S*>(task.out) + (first + p) * task.outputs;
      for (std::size_t group = 0; group < task.groups; ++group, out += product.outputs) {
        const T* const from = sums + p * sums_of_pixel + group * product.padded_outputs;
        for (std::size_t o = 0; o < product.outputs; o += lanes<T>) {
          store_some(out + o, load(from + o), static_cast<std::int64_t>(product.outputs - o));
        }
      }
    }
  }
}

#define XRK_FOR_STORAGES(kernel) {kernel<float>, kernel<double>, kernel<Half>, kernel<Brain>}

constexpr Deformations make_deformations() {
  return {XRK_FOR_STORAGES(deform_block), XRK_FOR_STORAGES(packed_values), XRK_FOR_STORAGES(pack_weights),
          XRK_FOR_STORAGES(deform_run)};
}

#undef XRK_FOR_STORAGES

}  // namespace
}  // namespace xrk::cpu
