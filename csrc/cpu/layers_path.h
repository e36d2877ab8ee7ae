// The layers' kernels over vectors of channels. Each layers_*.cpp includes this file once and is compiled for its own
// instruction set; all of it has internal linkage, as in pixels_path.h and for the same reason.
//
// Sums run over a fixed number of lanes in a fixed order, so that all paths differ by fused multiply-adds alone.
#pragma once

#include "layers.h"
#include "vectors_path.h"

namespace xrk::cpu {
namespace {

template <typename S>
constexpr std::size_t wide = lanes<Compute<S>>;

template <typename T>
inline Vector<T> silu_of(Vector<T> v) {
  return v / (exp2_of<T>(v * static_cast<T>(-1.4426950408889634074)) + static_cast<T>(1));
}

// The first `left` lanes of `some`, the others of `rest`.
template <typename T>
inline Vector<T> joined(Vector<T> some, Vector<T> rest, std::int64_t left) {
  T values[lanes<T>];
  store(values, rest);
  store_some(values, some, left);
  return load(values);
}

// What a row of `channels` still has from channel c on.
inline std::int64_t left_of(std::size_t channels, std::size_t c) {
  return static_cast<std::int64_t>(channels) - static_cast<std::int64_t>(c);
}

// --- layer_norm ---------------------------------------------------------------------------------------------------

constexpr std::size_t sum_lanes = 16;
template <typename T>
constexpr std::size_t sum_vectors = sum_lanes / lanes<T>;

template <typename T>
inline T sum_of_lanes(const Vector<T>* sums) {
  alignas(64) T a[sum_lanes];
  for (std::size_t v = 0; v < sum_vectors<T>; ++v) store(a + v * lanes<T>, sums[v]);
  for (std::size_t half = sum_lanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
  }
  return a[0];
}

// The sum over a row of channels of term(x), its lanes in the order of the channels.
template <typename S, typename Term>
inline Compute<S> sum_of_row(const S* x, std::size_t channels, const Term& term) {
  using A = Compute<S>;
  using V = Vector<A>;
  V sums[sum_vectors<A>] = {};
  std::size_t c = 0;
  for (; c + sum_lanes <= channels; c += sum_lanes) {
    for (std::size_t v = 0; v < sum_vectors<A>; ++v) sums[v] = term(load(x + c + v * wide<S>), sums[v]);
  }
  for (std::size_t v = 0; c < channels; ++v, c += wide<S>) {
    const std::int64_t left = left_of(channels, c);
    sums[v] = joined<A>(term(load_some(x + c, left), sums[v]), sums[v], left);
  }
  return sum_of_lanes<A>(sums);
}

// Pixels that are taken together, so that one's sums need not wait for another's.
constexpr std::size_t pixels_together = 4;

template <typename S>
void layer_norm_pixels(const LayerNormTask& task, std::size_t first, std::size_t last) {
  using A = Compute<S>;
  using V = Vector<A>;
  const std::size_t channels = task.channels;
  const A* const weight = static_cast<const A*>(task.weight);
  const A* const bias = static_cast<const A*>(task.bias);
  for (std::size_t pixel = first; pixel < last; pixel += pixels_together) {
    const std::size_t count = last - pixel < pixels_together ? last - pixel : pixels_together;
    const S* const x = static_cast<const S*>(task.x) + pixel * task.x_stride;
    // Deviations from the first channel, which are as exact as the values, however large their common mean is.
    V base[pixels_together], mean[pixels_together], scale[pixels_together];
    for (std::size_t p = 0; p < count; ++p) {
      const S* row = x + p * task.x_stride;
      const V from = spread<A>(load_some(row, 1)[0]);
      const A sum = sum_of_row(row, channels, [&](V v, V sums) { return sums + (v - from); });
      base[p] = from;
      mean[p] = spread<A>(sum / static_cast<A>(channels));
    }
    for (std::size_t p = 0; p < count; ++p) {
      const V from = base[p], middle = mean[p];
      const A sum = sum_of_row(x + p * task.x_stride, channels, [&](V v, V sums) {
        const V d = (v - from) - middle;
        return madd(d, d, sums);
      });
      const double variance = static_cast<double>(sum) / static_cast<double>(channels);
      scale[p] = spread<A>(static_cast<A>(1.0 / __builtin_sqrt(variance + task.eps)));
    }
    for (std::size_t p = 0; p < count; ++p) {
      const S* const row = x + p * task.x_stride;
      const S* const gate = static_cast<const S*>(task.gate) + (task.gate ? (pixel + p) * task.gate_stride : 0);
      S* const out = static_cast<S*>(task.out) + (pixel + p) * channels;
      for (std::size_t c = 0; c < channels; c += wide<S>) {
        const std::int64_t left = left_of(channels, c);
        const V d = (load_some(row + c, left) - base[p]) - mean[p];
        V y = d * (weight ? scale[p] * load_some(weight + c, left) : scale[p]);
        if (bias) y = y + load_some(bias + c, left);
        if (gate) y = y * silu_of<A>(load_some(gate + c, left));
        store_some(out + c, y, left);
      }
    }
  }
}

// --- depthwise_conv2d ---------------------------------------------------------------------------------------------

// One vector of channels of PIXELS output pixels next to each other: all taps from registers or the first cache.
template <typename S, std::size_t KERNEL, std::size_t PIXELS, bool SILU>
inline void depthwise_block(const Compute<S>* const* rows, std::size_t dilation, std::size_t stride,
                            const Compute<S>* weight, const Compute<S>* bias, S* out, std::size_t channels,
                            std::int64_t left) {
  using A = Compute<S>;
  using V = Vector<A>;
  V sums[PIXELS];
  for (std::size_t p = 0; p < PIXELS; ++p) sums[p] = load(bias);
#pragma GCC unroll 5
  for (std::size_t ky = 0; ky < KERNEL; ++ky) {
    const A* x = rows[ky];
#pragma GCC unroll 5
    for (std::size_t kx = 0; kx < KERNEL; ++kx, x += dilation * stride) {
      const V w = load(weight + (ky * KERNEL + kx) * stride);
#pragma GCC unroll 4
      for (std::size_t p = 0; p < PIXELS; ++p) sums[p] = madd(load(x + p * stride), w, sums[p]);
    }
  }
#pragma GCC unroll 4
  for (std::size_t p = 0; p < PIXELS; ++p) store_some(out + p * channels, SILU ? silu_of<A>(sums[p]) : sums[p], left);
}

template <typename S, std::size_t KERNEL, bool SILU>
void depthwise_row(const DepthwiseTask& task, const Compute<S>* const* rows, std::size_t columns, S* out) {
  using A = Compute<S>;
  const std::size_t channels = task.channels, stride = task.padded_channels;
  const A* const weight = static_cast<const A*>(task.weight);
  const A* const bias = static_cast<const A*>(task.bias);
  for (std::size_t column = 0; column < columns;) {
    const std::size_t pixels = columns - column < 4 ? 1 : 4;
    for (std::size_t c = 0; c < channels; c += wide<S>) {
      const A* at[KERNEL];
      for (std::size_t ky = 0; ky < KERNEL; ++ky) at[ky] = rows[ky] + column * stride + c;
      S* const to = out + column * channels + c;
      const std::int64_t left = left_of(channels, c);
      if (pixels == 4) {
        depthwise_block<S, KERNEL, 4, SILU>(at, task.dilation, stride, weight + c, bias + c, to, channels, left);
      } else {
        depthwise_block<S, KERNEL, 1, SILU>(at, task.dilation, stride, weight + c, bias + c, to, channels, left);
      }
    }
    column += pixels;
  }
}

// `pixels` pixels of `channels` values, `stride` apart in `to` and zeros between.
template <typename S>
void unpack(const S* from, std::size_t pixels, std::size_t channels, Compute<S>* to, std::size_t stride) {
  if (sizeof(S) == sizeof(Compute<S>) && channels == stride) {
    __builtin_memcpy(to, from, pixels * channels * sizeof(S));
    return;
  }
  for (std::size_t i = 0; i < pixels; ++i, from += channels, to += stride) {
    for (std::size_t c = 0; c < stride; c += wide<S>) store(to + c, load_some(from + c, left_of(channels, c)));
  }
}

template <typename S>
void depthwise_rows(const DepthwiseTask& task, std::size_t first, std::size_t last, std::size_t tile, void* scratch_) {
  using A = Compute<S>;
  const std::size_t channels = task.channels, stride = task.padded_channels, kernel = task.kernel;
  const std::size_t radius = (kernel - 1) / 2 * task.dilation, span = 2 * radius + 1;
  const std::size_t row_values = (tile + 2 * radius) * stride;
  A* const ring = static_cast<A*>(scratch_);  // `span` input rows of the tile, padded with zeros all round
  const S* const image = static_cast<const S*>(task.x);
  S* const target = static_cast<S*>(task.out);
  const auto run = kernel == 3 ? (task.silu ? depthwise_row<S, 3, true> : depthwise_row<S, 3, false>)
                               : (task.silu ? depthwise_row<S, 5, true> : depthwise_row<S, 5, false>);
  for (std::size_t left = 0; left < task.width; left += tile) {
    const std::size_t columns = left + tile < task.width ? tile : task.width - left;
    // The tile's columns that are inside the image, counted with the padding on its left.
    const std::size_t begin = left < radius ? radius - left : 0;
    const std::size_t beyond = left + columns + radius > task.width ? left + columns + radius - task.width : 0;
    const std::size_t end = columns + 2 * radius - beyond;
    // Padded row `row + radius` (so that none is negative) into its place in the ring.
    const auto fill = [&](std::size_t padded_row) {
      A* const to = ring + padded_row % span * row_values;
      if (padded_row < radius || padded_row - radius >= task.height) {
        __builtin_memset(to, 0, (columns + 2 * radius) * stride * sizeof(A));
        return;
      }
      const S* const from = image + ((padded_row - radius) * task.width + left + begin - radius) * channels;
      __builtin_memset(to, 0, begin * stride * sizeof(A));
      unpack(from, end - begin, channels, to + begin * stride, stride);
      __builtin_memset(to + end * stride, 0, beyond * stride * sizeof(A));
    };
    for (std::size_t row = first; row < first + span - 1; ++row) fill(row);
    for (std::size_t row = first; row < last; ++row) {
      fill(row + span - 1);
      const A* rows[5] = {};
      for (std::size_t ky = 0; ky < kernel; ++ky) rows[ky] = ring + (row + ky * task.dilation) % span * row_values;
      run(task, rows, columns, target + (row * task.width + left) * channels);
    }
  }
}

// --- group_norm ---------------------------------------------------------------------------------------------------

// Chan, Golub and LeVeque 1979: `into` and `other` are (count, mean, sum of squared deviations).
inline void merge_moments(double* into, double count, double mean, double squares) {
  const double total = into[0] + count;
  if (total == 0) return;
  const double gap = mean - into[1];
  into[2] += squares + gap * gap * (into[0] * count / total);
  into[1] += gap * (count / total);
  into[0] = total;
}

// Sums of deviations from the first pixel's value of each channel, so that a large common mean costs no digits.
template <typename S>
void group_summarise_pixels(const GroupTask& task, std::size_t first, std::size_t last, double* state, void* scratch_) {
  using A = Compute<S>;
  using V = Vector<A>;
  constexpr std::size_t block = 16;  // pixels whose rows stay in the first cache while all channels go over them
  const std::size_t channels = task.channels, width = channels / task.groups;
  // One vector more than there are channels may be written to.
  const std::size_t room = (channels + wide<S> - 1) / wide<S> * wide<S>;
  A* const base = static_cast<A*>(scratch_);
  A* const sums = base + room;
  A* const squares = sums + room;
  const S* const x = static_cast<const S*>(task.x) + first * channels;
  for (std::size_t c = 0; c < channels; c += wide<S>) {
    store(base + c, load_some(x + c, left_of(channels, c)));
    store(sums + c, V{});
    store(squares + c, V{});
  }
  for (std::size_t from = 0; from < last - first; from += block) {
    const std::size_t to = last - first - from < block ? last - first : from + block;
    for (std::size_t c = 0; c < channels; c += wide<S>) {
      const std::int64_t left = left_of(channels, c);
      const V middle = load(base + c);
      V sum = load(sums + c), square = load(squares + c);
      for (std::size_t pixel = from; pixel < to; ++pixel) {
        const V d = load_some(x + pixel * channels + c, left) - middle;
        sum = sum + d;
        square = madd(d, d, square);
      }
      store(sums + c, sum);
      store(squares + c, square);
    }
  }
  const double count = static_cast<double>(last - first);
  for (std::size_t g = 0; g < task.groups; ++g) {
    double* moments = state + 3 * g;
    moments[0] = moments[1] = moments[2] = 0;
    for (std::size_t c = g * width; c < (g + 1) * width; ++c) {
      const double sum = static_cast<double>(sums[c]);
      const double deviations = static_cast<double>(squares[c]) - sum * sum / count;
      // Rounding may leave a tiny negative rest where all pixels are equal; what is not a number stays so.
      merge_moments(moments, count, static_cast<double>(base[c]) + sum / count, deviations < 0 ? 0 : deviations);
    }
  }
}

template <typename S>
void group_apply_pixels(const GroupTask& task, std::size_t first, std::size_t last) {
  using A = Compute<S>;
  using V = Vector<A>;
  const std::size_t channels = task.channels;
  const A* const scale = static_cast<const A*>(task.scale);
  const A* const mean = static_cast<const A*>(task.mean);
  const A* const rest = static_cast<const A*>(task.mean_rest);
  const A* const shift = static_cast<const A*>(task.shift);
  for (std::size_t pixel = first; pixel < last; ++pixel) {
    const S* const x = static_cast<const S*>(task.x) + pixel * channels;
    S* const out = static_cast<S*>(task.out) + pixel * channels;
    for (std::size_t c = 0; c < channels; c += wide<S>) {
      const std::int64_t left = left_of(channels, c);
      const V d = (load_some(x + c, left) - load_some(mean + c, left)) - load_some(rest + c, left);
      const V y = madd(d, load_some(scale + c, left), load_some(shift + c, left));
      store_some(out + c, task.silu ? silu_of<A>(y) : y, left);
    }
  }
}

#define XRK_FOR_STORAGES(kernel) {kernel<float>, kernel<double>, kernel<Half>, kernel<Brain>}

constexpr Layers make_layers() {
  return {XRK_FOR_STORAGES(layer_norm_pixels), XRK_FOR_STORAGES(depthwise_rows),
          XRK_FOR_STORAGES(group_summarise_pixels), XRK_FOR_STORAGES(group_apply_pixels)};
}

#undef XRK_FOR_STORAGES

}  // namespace
}  // namespace xrk::cpu
