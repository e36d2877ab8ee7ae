// The pixel conversions of uint16 frames on an NVIDIA device; see pixels.cu. Plain C++, so that the bindings need no
// header of the CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xrk::cuda {

enum Value : int { HALF, FLOAT };

// 0 without a driver or a device.
int device_count();

// The version of the CUDA runtime that is linked in, as CUDART_VERSION writes it: 12080 is 12.8.
int runtime_version();

// Both are queued on the stream (0: the default stream) of the current device and return before the work is done.
// They throw std::runtime_error with CUDA's own words where the launch fails. count > 0.
void normalise(const void* x, double black, double inverse_range, void* out, std::size_t count, Value value,
               std::uintptr_t stream);

// Adds the number of pixels limited to the range of uint16 to the 64-bit counter at device address `limited`.
void apply_residual(const void* x, const void* before, const void* after, double scale, void* out, std::size_t count,
                    Value value, void* limited, std::uintptr_t stream);

}  // namespace xrk::cuda
