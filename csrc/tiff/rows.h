// What is done to rows of decoded pixels, on the widest vector unit present: byte order, predictors, packed bits, and
// the conversion of counts to values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace xrk::tiff {

// A decoded pixel's type, and what a window can be given in: the same, or values.
enum Pixel : int { U8, I8, U16, I16, U32, I32, F16, F32, F64, PIXELS };
enum Value : int { V16, V32, V64, VALUES };

constexpr std::size_t pixel_sizes[PIXELS] = {1, 1, 2, 2, 4, 4, 2, 4, 8};
constexpr std::size_t value_sizes[VALUES] = {2, 4, 8};

Pixel pixel_of(const Geometry& geometry);

// Values that an integer pixel does not hold.
struct Misfits {
  std::uint64_t limited = 0;
  std::uint64_t not_numbers = 0;
};

constexpr int integers = I32 + 1;  // pixels up to here are integers

// One set of kernels, compiled for one instruction set. Rows need no alignment.
struct RowKernels {
  // Swaps the bytes of `count` pixels of 2, 4 or 8 bytes.
  void (*swap)(void* pixels, std::size_t count, std::size_t bytes);
  // Predictor 2: each pixel of the row becomes the sum of all up to it, modulo its range. Pixels of 1, 2, 4, 8 bytes.
  void (*accumulate)(void* row, std::size_t count, std::size_t bytes);
  // Predictor 3: the row's bytes are differences, and its pixels' bytes lie in planes, the most significant first.
  // `row` is used up; the pixels go to `out`, in the machine's byte order. Pixels of 2, 4 or 8 bytes.
  void (*unfold)(unsigned char* row, void* out, std::size_t count, std::size_t bytes);
  // The other way, in place: each pixel's difference to the one at its left.
  void (*difference)(void* row, std::size_t count, std::size_t bytes);
  // Packed pixels of 10, 12 or 14 bits, the most significant bit first.
  void (*unpack)(const unsigned char* row, std::uint16_t* out, std::size_t count, unsigned bits);
  // out[i] = (x[i] - dark[i]) * gain[i] + pedestal in double precision, in the pixel's type: integers rounded half to even
  // and limited to their range, and returned is how many were. Where invalid[i] (it may be null) or x[i] is not finite,
  // out[i] = x[i].
  std::uint64_t (*correct[PIXELS])(const void* x, const double* dark, const double* gain, double pedestal,
                                   const unsigned char* invalid, void* out, std::size_t count);
  // out[i] = (x[i] - black) * inverse_range in double precision, rounded once to the value's type.
  void (*normalise[PIXELS][VALUES])(const void* x, double black, double inverse_range, void* out, std::size_t count);
  // out[i] = v[i] * scale + offset in double precision, rounded half to even and limited to the range of the pixel's type;
  // what is no number becomes 0.
  Misfits (*round32[integers])(const float* v, double scale, double offset, void* out, std::size_t count);
  Misfits (*round64[integers])(const double* v, double scale, double offset, void* out, std::size_t count);
};

const RowKernels& baseline_rows();
#ifdef XRK_X86
const RowKernels& avx2_rows();
#endif

// The set in force: that of the path which csrc/cpu takes.
const RowKernels& active_rows();

}  // namespace xrk::tiff
