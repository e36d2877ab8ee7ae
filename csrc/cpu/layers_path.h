// The layers' kernels in portable C++ with the compiler's vector types. Each layers_*.cpp includes this file once and is
// compiled for its own instruction set.
//
// As in pixels_path.h, all of it has internal linkage and nothing of the standard library with inline functions is
// used. Sums run over a fixed number of lanes in a fixed order, so that all paths differ by fused multiply-adds alone.
#pragma once

#include "layers.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define XRK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define XRK_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace xrk::cpu {
namespace {

// --- storage <-> compute type -----------------------------------------------------------------------------------

struct Half {
  std::uint16_t bits;
};
struct Brain {
  std::uint16_t bits;
};

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

inline std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
inline float of_bits(std::uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(Brain v) { return of_bits(static_cast<std::uint32_t>(v.bits) << 16); }
inline float load(Half v) {
  // Exponent and mantissa moved into place, then rebased by a product, which is exact and does subnormals too.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  std::uint32_t bits = bits_of(of_bits(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return of_bits(bits | sign);
}

inline void store(float& out, float v) { out = v; }
inline void store(double& out, double v) { out = v; }
inline void store(Brain& out, float v) {
  const std::uint32_t bits = bits_of(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(v == v ? rounded : 0x7fc0u);
}
inline void store(Half& out, float v) {
  const std::uint32_t bits = bits_of(v);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below the smallest normal half the sum with 0.5 rounds to multiples of 2**-24, half to even, by itself.
  const std::uint32_t subnormal = bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<std::uint16_t>(half | sign);
}

template <typename T>
void load_span(const T* x, Compute<T>* out, std::size_t count) {
  XRK_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) out[i] = load(x[i]);
}

template <typename T>
void store_span(const Compute<T>* x, T* out, std::size_t count) {
  XRK_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) store(out[i], x[i]);
}

// --- SiLU ---------------------------------------------------------------------------------------------------------

// exp(v) to 1e-7 of itself. Cody and Waite's reduction, then a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
inline float exponential(float v) {
  const float limited = v < -87.0f ? -87.0f : (v > 88.0f ? 88.0f : v);
  const float shifted = limited * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = limited - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled = p * of_bits((bits_of(shifted) << 23) + 0x3f800000u);
  return v > 88.0f ? __builtin_inff() : scaled;
}
inline double exponential(double v) { return __builtin_exp(v); }

template <typename A>
inline A silu(A v) {
  return v / (A{1} + exponential(-v));
}

// --- layer_norm ---------------------------------------------------------------------------------------------------

constexpr std::size_t sum_lanes = 16;

template <typename A>
inline A sum_of_lanes(const A* lanes) {
  A a[sum_lanes];
  for (std::size_t j = 0; j < sum_lanes; ++j) a[j] = lanes[j];
  for (std::size_t half = sum_lanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) a[j] += a[j + half];
  }
  return a[0];
}

template <typename T>
void layer_norm_pixels(const LayerNormTask& task, std::size_t first, std::size_t last, void* scratch_) {
  using A = Compute<T>;
  const std::size_t channels = task.channels;
  const std::size_t whole = channels / sum_lanes * sum_lanes;
  A* const d = static_cast<A*>(scratch_);
  A* const g = d + channels;
  const A* weight = static_cast<const A*>(task.weight);
  const A* bias = static_cast<const A*>(task.bias);
  for (std::size_t pixel = first; pixel < last; ++pixel) {
    const T* x = static_cast<const T*>(task.x) + pixel * task.x_stride;
    T* out = static_cast<T*>(task.out) + pixel * channels;
    // Deviations from the first channel, which are as exact as the values, however large their common mean is.
    const A base = load(x[0]);
    A lanes[sum_lanes] = {};
    for (std::size_t c = 0; c < whole; c += sum_lanes) {
      for (std::size_t j = 0; j < sum_lanes; ++j) {
        const A v = load(x[c + j]) - base;
        d[c + j] = v;
        lanes[j] += v;
      }
    }
    for (std::size_t c = whole; c < channels; ++c) {
      d[c] = load(x[c]) - base;
      lanes[c - whole] += d[c];
    }
    const A mean = sum_of_lanes(lanes) / static_cast<A>(channels);
    A squares[sum_lanes] = {};
    for (std::size_t c = 0; c < whole; c += sum_lanes) {
      for (std::size_t j = 0; j < sum_lanes; ++j) {
        const A v = d[c + j] - mean;
        d[c + j] = v;
        squares[j] += v * v;
      }
    }
    for (std::size_t c = whole; c < channels; ++c) {
      d[c] = d[c] - mean;
      squares[c - whole] += d[c] * d[c];
    }
    const double variance = static_cast<double>(sum_of_lanes(squares)) / static_cast<double>(channels);
    const A scale = static_cast<A>(1.0 / __builtin_sqrt(variance + task.eps));
    if (weight) {
      XRK_INDEPENDENT
      for (std::size_t c = 0; c < channels; ++c) d[c] = d[c] * (scale * weight[c]);
    } else {
      XRK_INDEPENDENT
      for (std::size_t c = 0; c < channels; ++c) d[c] = d[c] * scale;
    }
    if (bias) {
      XRK_INDEPENDENT
      for (std::size_t c = 0; c < channels; ++c) d[c] = d[c] + bias[c];
    }
    if (task.gate) {
      const T* gate = static_cast<const T*>(task.gate) + pixel * task.gate_stride;
      load_span(gate, g, channels);
      XRK_INDEPENDENT
      for (std::size_t c = 0; c < channels; ++c) d[c] = d[c] * silu(g[c]);
    }
    store_span(d, out, channels);
  }
}

// --- depthwise_conv2d ---------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr std::size_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t vector_bytes = 32;
#else
constexpr std::size_t vector_bytes = 16;
#endif

// Loads and stores may be unaligned.
typedef float FloatVector __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
typedef double DoubleVector __attribute__((vector_size(vector_bytes), aligned(8), may_alias));

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};

#if defined(__AVX512F__)
inline FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return _mm512_fmadd_ps(a, b, c); }
inline DoubleVector multiply_add(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return _mm256_fmadd_ps(a, b, c); }
inline DoubleVector multiply_add(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <typename V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// `pixels` (at most 4) output pixels next to each other, one vector of channels: all taps from registers or L1.
template <typename A, std::size_t pixels>
inline void depthwise_block(const A* const* rows, std::size_t kernel, std::size_t dilation, std::size_t stride,
                            const A* weight, const A* bias, A* out) {
  using V = typename VectorOf<A>::type;
  V sums[pixels];
  for (std::size_t p = 0; p < pixels; ++p) sums[p] = *reinterpret_cast<const V*>(bias);
  for (std::size_t ky = 0; ky < kernel; ++ky) {
    for (std::size_t kx = 0; kx < kernel; ++kx) {
      const V w = *reinterpret_cast<const V*>(weight + (ky * kernel + kx) * stride);
      const A* x = rows[ky] + kx * dilation * stride;
      for (std::size_t p = 0; p < pixels; ++p) {
        sums[p] = multiply_add(*reinterpret_cast<const V*>(x + p * stride), w, sums[p]);
      }
    }
  }
  for (std::size_t p = 0; p < pixels; ++p) *reinterpret_cast<V*>(out + p * stride) = sums[p];
}

template <typename T>
void depthwise_rows(const DepthwiseTask& task, std::size_t first, std::size_t last, std::size_t tile, void* scratch_) {
  using A = Compute<T>;
  constexpr std::size_t lanes = vector_bytes / sizeof(A);
  const std::size_t channels = task.channels, stride = task.padded_channels;
  const std::size_t kernel = task.kernel, dilation = task.dilation;
  const std::size_t radius = (kernel - 1) / 2 * dilation, span = 2 * radius + 1;
  const std::size_t row_values = (tile + 2 * radius) * stride;
  A* const ring = static_cast<A*>(scratch_);  // `span` input rows of the tile, padded with zeros all round
  A* const result = ring + span * row_values;
  const A* weight = static_cast<const A*>(task.weight);
  const A* bias = static_cast<const A*>(task.bias);
  const T* const image = static_cast<const T*>(task.x);
  T* const target = static_cast<T*>(task.out);
  for (std::size_t left = 0; left < task.width; left += tile) {
    const std::size_t columns = left + tile < task.width ? tile : task.width - left;
    // Padded row `row + radius` (so that none is negative) into its place in the ring.
    const auto fill = [&](std::size_t padded_row) {
      A* to = ring + padded_row % span * row_values;
      const bool inside = padded_row >= radius && padded_row - radius < task.height;
      if (!inside) {
        __builtin_memset(to, 0, (columns + 2 * radius) * stride * sizeof(A));
        return;
      }
      const T* from = image + (padded_row - radius) * task.width * channels;
      for (std::size_t i = 0; i < columns + 2 * radius; ++i, to += stride) {
        const std::size_t padded_column = left + i;
        if (padded_column < radius || padded_column - radius >= task.width) {
          __builtin_memset(to, 0, stride * sizeof(A));
        } else {
          load_span(from + (padded_column - radius) * channels, to, channels);
          for (std::size_t c = channels; c < stride; ++c) to[c] = A{0};
        }
      }
    };
    for (std::size_t row = first; row < first + span - 1; ++row) fill(row);
    for (std::size_t row = first; row < last; ++row) {
      fill(row + span - 1);
      const A* rows[5] = {};
      for (std::size_t ky = 0; ky < kernel; ++ky) rows[ky] = ring + (row + ky * dilation) % span * row_values;
      T* out = target + (row * task.width + left) * channels;
      for (std::size_t column = 0; column < columns; column += 4) {
        const std::size_t pixels = columns - column < 4 ? columns - column : 4;
        const A* here[5];
        for (std::size_t ky = 0; ky < kernel; ++ky) here[ky] = rows[ky] + column * stride;
        for (std::size_t c = 0; c < stride; c += lanes) {
          const A* at[5];
          for (std::size_t ky = 0; ky < kernel; ++ky) at[ky] = here[ky] + c;
          if (pixels == 4) {
            depthwise_block<A, 4>(at, kernel, dilation, stride, weight + c, bias + c, result + c);
          } else {
            for (std::size_t p = 0; p < pixels; ++p) {
              depthwise_block<A, 1>(at, kernel, dilation, stride, weight + c, bias + c, result + p * stride + c);
              for (std::size_t ky = 0; ky < kernel; ++ky) at[ky] += stride;
            }
          }
        }
        if (task.silu) {
          XRK_INDEPENDENT
          for (std::size_t i = 0; i < pixels * stride; ++i) result[i] = silu(result[i]);
        }
        for (std::size_t p = 0; p < pixels; ++p) {
          store_span(result + p * stride, out + (column + p) * channels, channels);
        }
      }
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
template <typename T>
void group_summarise_pixels(const GroupTask& task, std::size_t first, std::size_t last, double* state,
                            void* scratch_) {
  using A = Compute<T>;
  const std::size_t channels = task.channels, width = channels / task.groups;
  A* const base = static_cast<A*>(scratch_);
  A* const sums = base + channels;
  A* const squares = sums + channels;
  const T* x = static_cast<const T*>(task.x) + first * channels;
  load_span(x, base, channels);
  for (std::size_t c = 0; c < channels; ++c) sums[c] = squares[c] = A{0};
  for (std::size_t pixel = first; pixel < last; ++pixel, x += channels) {
    XRK_INDEPENDENT
    for (std::size_t c = 0; c < channels; ++c) {
      const A d = load(x[c]) - base[c];
      sums[c] += d;
      squares[c] += d * d;
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

template <typename T>
void group_apply_pixels(const GroupTask& task, std::size_t first, std::size_t last, void* scratch_) {
  using A = Compute<T>;
  const std::size_t channels = task.channels;
  A* const row = static_cast<A*>(scratch_);
  const A* scale = static_cast<const A*>(task.scale);
  const A* mean = static_cast<const A*>(task.mean);
  const A* rest = static_cast<const A*>(task.mean_rest);
  const A* shift = static_cast<const A*>(task.shift);
  for (std::size_t pixel = first; pixel < last; ++pixel) {
    const T* x = static_cast<const T*>(task.x) + pixel * channels;
    T* out = static_cast<T*>(task.out) + pixel * channels;
    XRK_INDEPENDENT
    for (std::size_t c = 0; c < channels; ++c) {
      row[c] = ((load(x[c]) - mean[c]) - rest[c]) * scale[c] + shift[c];
    }
    if (task.silu) {
      XRK_INDEPENDENT
      for (std::size_t c = 0; c < channels; ++c) row[c] = silu(row[c]);
    }
    store_span(row, out, channels);
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
