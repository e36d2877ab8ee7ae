// The two pixel conversions of a frame on the CPU, for every dtype a frame has, on the widest vector unit present.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xrk::cpu {

// A frame's dtypes, and the two that values computed from it have.
enum Pixel : int { U8, U16, I16, I32, F32, F64, PIXELS };
enum Value : int { V32, V64, VALUES };

// out[i] = (x[i] - black) * inverse_range, in double precision, stored as the value type.
using NormaliseSpan = void (*)(const void* x, double black, double inverse_range, void* out, std::size_t count);

// out[i] = x[i] + (after[i] - before[i]) * scale, in double precision. Integers are rounded half to even and limited to
// their type's range; a sum that is not a number leaves x[i] as it was. Returns how many were limited.
using ApplySpan = std::size_t (*)(const void* x, const void* before, const void* after, double scale, void* out,
                                  std::size_t count);

// One set of kernels, compiled for one instruction set.
struct Path {
  const char* name;
  NormaliseSpan normalise[PIXELS][VALUES];
  ApplySpan apply_residual[PIXELS][VALUES];
};

const Path& baseline_path();
#ifdef XRK_X86
const Path& avx2_path();
const Path& avx512_path();
#endif

// The path in force: the widest that this processor and its operating system support, until select_path names another.
const Path& active_path();

// Takes the path of this name; false, and no change, where it is unknown or does not run here.
bool select_path(const char* name);

// Writes the names of the paths that run here, widest first, and returns how many (at most 3).
std::size_t supported_paths(const char* names[3]);

}  // namespace xrk::cpu
