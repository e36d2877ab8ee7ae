// Between rows of a file's uint16 pixels and the network's windows on an NVIDIA device: what csrc/tiff does on the CPU,
// so that only the file's own pixels cross the bus.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pixels.h"

namespace xrk::cuda {

// What stands where a window reaches beyond the image, by numpy.pad's names; CONSTANT is 0 in the output.
enum Border : int { REFLECT, SYMMETRIC, EDGE, CONSTANT };

// Rows [first, first + rows) of an image of height x width pixels: 16 bits each, or 10, 12 or 14 bits packed from each
// byte's highest on, every row beginning with a byte, as TIFF has them.
struct PackedRows {
  const void* data;
  std::size_t stride;  // bytes from row to row
  std::int64_t first, rows, height, width;
  int bits;
};

// out[r][c] = (pixel(top + r, left + c) - black) * inverse_range in double precision, stored as `value`, for
// out_rows x out_columns pixels. Every row that the window shows, its border's among them, must be among `x`.
void read_window(const PackedRows& x, std::int64_t top, std::int64_t left, Border border, double black,
                 double inverse_range, void* out, std::int64_t out_rows, std::int64_t out_columns, Value value,
                 std::uintptr_t stream);

// out[i] = v[i] * scale + offset in double precision, rounded half to even and limited to uint16; no number becomes 0.
// Adds to the two 64-bit counters at device address `misfits` how many were limited, and how many were no numbers.
void round_counts(const void* v, double scale, double offset, void* out, std::size_t count, Value value, void* misfits,
                  std::uintptr_t stream);

}  // namespace xrk::cuda
