// The pixel conversions of uint16 frames on an NVIDIA device, in double precision: the same formulas, and so the same
// integers, as csrc/cpu/pixels_path.h. Both are bound by memory, not by arithmetic.
#include "pixels.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace xrk::cuda {
namespace {

constexpr int block = 256;
// Enough blocks to fill any device; each thread then strides over the frame, so that the index never overflows a grid.
constexpr std::size_t most_blocks = 65535;

__device__ inline double widen(float v) { return static_cast<double>(v); }
__device__ inline double widen(__half v) { return static_cast<double>(__half2float(v)); }

// Both round once, from double. Through float, a half would be rounded twice.
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

template <typename V>
__global__ void __launch_bounds__(block)
    normalise_kernel(const unsigned short* x, double black, double inverse_range, V* out, std::size_t count) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * block;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * block + threadIdx.x; i < count; i += stride) {
    out[i] = narrow<V>(__dmul_rn(__dsub_rn(static_cast<double>(x[i]), black), inverse_range));
  }
}

// __dmul_rn and its kin keep the compiler from fusing two operations into one: the CPU rounds after each.
template <typename V>
__global__ void __launch_bounds__(block)
    apply_kernel(const unsigned short* x, const V* before, const V* after, double scale, unsigned short* out,
                 std::size_t count, unsigned long long* limited) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * block;
  unsigned int mine = 0;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * block + threadIdx.x; i < count; i += stride) {
    const double counts = static_cast<double>(x[i]);
    const double change = __dmul_rn(__dsub_rn(widen(after[i]), widen(before[i])), scale);
    double v = __dadd_rn(counts, change);
    if (isnan(v)) v = counts;
    v = rint(v);
    mine += v < 0.0 || v > 65535.0;
    out[i] = static_cast<unsigned short>(fmin(fmax(v, 0.0), 65535.0));
  }
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_down_sync(0xffffffffu, mine, offset);
  if (threadIdx.x % 32 == 0 && mine != 0) atomicAdd(limited, static_cast<unsigned long long>(mine));
}

unsigned int blocks_for(std::size_t count) {
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

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  // The runtime remembers a failure; left there, the next launch would report it as its own.
  cudaGetLastError();
  return 0;
}

int runtime_version() { return CUDART_VERSION; }

void normalise(const void* x, double black, double inverse_range, void* out, std::size_t count, Value value,
               std::uintptr_t stream) {
  const auto* source = static_cast<const unsigned short*>(x);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (value == HALF) {
    normalise_kernel<<<blocks_for(count), block, 0, queue>>>(source, black, inverse_range, static_cast<__half*>(out),
                                                             count);
  } else {
    normalise_kernel<<<blocks_for(count), block, 0, queue>>>(source, black, inverse_range, static_cast<float*>(out),
                                                             count);
  }
  check_launch("normalise");
}

void apply_residual(const void* x, const void* before, const void* after, double scale, void* out, std::size_t count,
                    Value value, void* limited, std::uintptr_t stream) {
  const auto* source = static_cast<const unsigned short*>(x);
  auto* target = static_cast<unsigned short*>(out);
  auto* counter = static_cast<unsigned long long*>(limited);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (value == HALF) {
    apply_kernel<<<blocks_for(count), block, 0, queue>>>(source, static_cast<const __half*>(before),
                                                         static_cast<const __half*>(after), scale, target, count,
                                                         counter);
  } else {
    apply_kernel<<<blocks_for(count), block, 0, queue>>>(source, static_cast<const float*>(before),
                                                         static_cast<const float*>(after), scale, target, count,
                                                         counter);
  }
  check_launch("apply_residual");
}

}  // namespace xrk::cuda
