// The kernels themselves, in portable C++ that the compiler vectorises. Each pixels_*.cpp includes this file once and
// is compiled for its own instruction set.
//
// All of it has internal linkage, and no header with inline functions of the standard library is used beyond <limits>
// and <type_traits>: an inline function emitted here for AVX-512 could be the copy that the linker keeps for everyone.
//
// numpy gives the same bits: each operation is one IEEE double operation (compiled with -ffp-contract=off). Nobody
// asks for floating-point exceptions, which would keep the comparisons from being vectorised (-fno-trapping-math).
#pragma once

#include <limits>
#include <type_traits>

#include "pixels.h"

// Before a loop: no iteration reads what another one writes. That is so where out is one of the inputs, too, since each
// pixel is read before it is written; the caller allows no other overlap.
#if defined(__clang__)
#define XRK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define XRK_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace xrk::cpu {
namespace {

// Adding and subtracting 1.5 * 2**52 rounds half to even, for |v| < 2**51, on instruction sets without a rounding
// instruction too. The caller has limited v to a 32-bit range by then.
inline double round_half_even(double v) {
  constexpr double shift = 6755399441055744.0;
  return (v + shift) - shift;
}

template <typename P, typename V>
void normalise_span(const void* x_, double black, double inverse_range, void* out_, std::size_t count) {
  const P* x = static_cast<const P*>(x_);
  V* out = static_cast<V*>(out_);
  XRK_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = static_cast<V>((static_cast<double>(x[i]) - black) * inverse_range);
  }
}

template <typename P, typename V>
std::size_t apply_span(const void* x_, const void* before_, const void* after_, double scale, void* out_,
                       std::size_t count) {
  const P* x = static_cast<const P*>(x_);
  const V* before = static_cast<const V*>(before_);
  const V* after = static_cast<const V*>(after_);
  P* out = static_cast<P*>(out_);
  if constexpr (std::is_floating_point_v<P>) {
    XRK_INDEPENDENT
    for (std::size_t i = 0; i < count; ++i) {
      const double change = static_cast<double>(after[i]) - static_cast<double>(before[i]);
      out[i] = static_cast<P>(static_cast<double>(x[i]) + change * scale);
    }
    return 0;
  } else {
    constexpr double lowest = static_cast<double>(std::numeric_limits<P>::min());
    constexpr double highest = static_cast<double>(std::numeric_limits<P>::max());
    std::int64_t limited = 0;
    XRK_INDEPENDENT
    for (std::size_t i = 0; i < count; ++i) {
      const double counts = static_cast<double>(x[i]);
      const double change = static_cast<double>(after[i]) - static_cast<double>(before[i]);
      double v = counts + change * scale;
      v = v == v ? v : counts;
      // One step beyond the range keeps the rounding exact and still tells what has to be limited.
      v = v < lowest - 1 ? lowest - 1 : v;
      v = v > highest + 1 ? highest + 1 : v;
      v = round_half_even(v);
      double within = v < lowest ? lowest : v;
      within = within > highest ? highest : within;
      limited += within != v ? 1 : 0;
      out[i] = static_cast<P>(static_cast<std::int32_t>(within));
    }
    return static_cast<std::size_t>(limited);
  }
}

#define XRK_FOR_PIXELS(kernel)                                                               \
  {                                                                                          \
    {kernel<std::uint8_t, float>, kernel<std::uint8_t, double>},                             \
        {kernel<std::uint16_t, float>, kernel<std::uint16_t, double>},                       \
        {kernel<std::int16_t, float>, kernel<std::int16_t, double>},                         \
        {kernel<std::int32_t, float>, kernel<std::int32_t, double>},                         \
        {kernel<float, float>, kernel<float, double>}, {kernel<double, float>, kernel<double, double>}, \
  }

constexpr Path make_path(const char* name) {
  return {name, XRK_FOR_PIXELS(normalise_span), XRK_FOR_PIXELS(apply_span)};
}

#undef XRK_FOR_PIXELS

}  // namespace
}  // namespace xrk::cpu
