#include "windows.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace xrk::cuda {
namespace {

constexpr int block = 256;
constexpr std::int64_t most_blocks = 65535;

template <typename V>
__device__ V narrow(double v);
template <>
__device__ inline float narrow<float>(double v) {
  return static_cast<float>(v);
}
template <>
__device__ inline __half narrow<__half>(double v) {
  return __double2half(v);
}

__device__ inline double widen(float v) { return static_cast<double>(v); }
__device__ inline double widen(__half v) { return static_cast<double>(__half2float(v)); }

// The position in [0, size) that stands at position `at` of an axis: inside_position of csrc/tiff/border.h.
__device__ std::int64_t inside(std::int64_t at, std::int64_t size, Border border) {
  if (at >= 0 && at < size) return at;
  if (border == EDGE || size == 1) return at < 0 ? 0 : size - 1;
  const std::int64_t period = border == REFLECT ? 2 * (size - 1) : 2 * size;
  const std::int64_t phase = (at % period + period) % period;
  if (phase < size) return phase;
  return border == REFLECT ? period - phase : period - 1 - phase;
}

__device__ unsigned int pixel(const unsigned char* row, std::int64_t column, int bits) {
  if (bits == 16) return reinterpret_cast<const unsigned short*>(row)[column];
  const std::int64_t bit = column * bits;
  const unsigned char* at = row + bit / 8;
  const int before = static_cast<int>(bit % 8), end = before + bits;
  // A pixel lies in two bytes, or in three; the third is read only where it belongs to the pixel.
  unsigned int held = static_cast<unsigned int>(at[0]) << 16 | static_cast<unsigned int>(at[1]) << 8;
  if (end > 16) held |= at[2];
  return held >> (24 - end) & ((1u << bits) - 1);
}

template <typename V>
__global__ void __launch_bounds__(block)
    read_kernel(PackedRows x, std::int64_t top, std::int64_t left, Border border, double black, double inverse_range,
                V* out, std::int64_t out_rows, std::int64_t out_columns) {
  const std::int64_t count = out_rows * out_columns, stride = static_cast<std::int64_t>(gridDim.x) * block;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x; i < count; i += stride) {
    const std::int64_t row = top + i / out_columns, column = left + i % out_columns;
    const bool outside = row < 0 || row >= x.height || column < 0 || column >= x.width;
    if (outside && border == CONSTANT) {
      out[i] = narrow<V>(0.0);
      continue;
    }
    const std::int64_t r = inside(row, x.height, border) - x.first, c = inside(column, x.width, border);
    const auto* line = static_cast<const unsigned char*>(x.data) + r * static_cast<std::int64_t>(x.stride);
    // Each operation rounds on its own, as on the CPU.
    out[i] = narrow<V>(__dmul_rn(__dsub_rn(static_cast<double>(pixel(line, c, x.bits)), black), inverse_range));
  }
}

template <typename V>
__global__ void __launch_bounds__(block)
    round_kernel(const V* v, double scale, double offset, unsigned short* out, std::size_t count,
                 unsigned long long* misfits) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * block;
  unsigned int limited = 0, absent = 0;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * block + threadIdx.x; i < count; i += stride) {
    double exact = __dadd_rn(__dmul_rn(widen(v[i]), scale), offset);
    const bool unknown = isnan(exact);
    absent += unknown;
    exact = unknown ? 0.0 : rint(exact);
    limited += exact < 0.0 || exact > 65535.0;
    out[i] = static_cast<unsigned short>(fmin(fmax(exact, 0.0), 65535.0));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    limited += __shfl_down_sync(0xffffffffu, limited, lanes);
    absent += __shfl_down_sync(0xffffffffu, absent, lanes);
  }
  if (threadIdx.x % 32 != 0) return;
  if (limited != 0) atomicAdd(misfits, static_cast<unsigned long long>(limited));
  if (absent != 0) atomicAdd(misfits + 1, static_cast<unsigned long long>(absent));
}

unsigned int blocks_for(std::int64_t count) {
  return static_cast<unsigned int>(std::min(most_blocks, (count + block - 1) / block));
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("the CUDA kernel of ") + name + " was not launched: " +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void read_window(const PackedRows& x, std::int64_t top, std::int64_t left, Border border, double black,
                 double inverse_range, void* out, std::int64_t out_rows, std::int64_t out_columns, Value value,
                 std::uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const unsigned int blocks = blocks_for(out_rows * out_columns);
  if (value == HALF) {
    read_kernel<<<blocks, block, 0, queue>>>(x, top, left, border, black, inverse_range, static_cast<__half*>(out),
                                             out_rows, out_columns);
  } else {
    read_kernel<<<blocks, block, 0, queue>>>(x, top, left, border, black, inverse_range, static_cast<float*>(out),
                                             out_rows, out_columns);
  }
  check_launch("read_window");
}

void round_counts(const void* v, double scale, double offset, void* out, std::size_t count, Value value, void* misfits,
                  std::uintptr_t stream) {
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  auto* target = static_cast<unsigned short*>(out);
  auto* counters = static_cast<unsigned long long*>(misfits);
  const unsigned int blocks = blocks_for(static_cast<std::int64_t>(count));
  if (value == HALF) {
    round_kernel<<<blocks, block, 0, queue>>>(static_cast<const __half*>(v), scale, offset, target, count, counters);
  } else {
    round_kernel<<<blocks, block, 0, queue>>>(static_cast<const float*>(v), scale, offset, target, count, counters);
  }
  check_launch("round_counts");
}

}  // namespace xrk::cuda
