// The kernels themselves, in portable C++ that the compiler vectorises. Each rows_*.cpp includes this file once and is
// compiled for its own instruction set; all of it has internal linkage, as in cpu/pixels_path.h and for its reasons.
#pragma once

#include <limits>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "rows.h"

#if defined(__clang__)
#define XRK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define XRK_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace xrk::tiff {
namespace {

template <typename T>
inline T load(const void* at) {
  T value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
inline void store(void* at, T value) {
  __builtin_memcpy(at, &value, sizeof value);
}

inline std::uint8_t swapped(std::uint8_t v) { return v; }
inline std::uint16_t swapped(std::uint16_t v) { return static_cast<std::uint16_t>(v << 8 | v >> 8); }
inline std::uint32_t swapped(std::uint32_t v) { return __builtin_bswap32(v); }
inline std::uint64_t swapped(std::uint64_t v) { return __builtin_bswap64(v); }

template <typename T>
void swap_pixels(void* pixels, std::size_t count) {
  auto* at = static_cast<unsigned char*>(pixels);
  XRK_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) store(at + i * sizeof(T), swapped(load<T>(at + i * sizeof(T))));
}

void swap_row(void* pixels, std::size_t count, std::size_t bytes) {
  if (bytes == 2) swap_pixels<std::uint16_t>(pixels, count);
  if (bytes == 4) swap_pixels<std::uint32_t>(pixels, count);
  if (bytes == 8) swap_pixels<std::uint64_t>(pixels, count);
}

template <typename T>
void accumulate_pixels(void* row, std::size_t count) {
  auto* at = static_cast<unsigned char*>(row);
  T sum = 0;
  for (std::size_t i = 0; i < count; ++i, at += sizeof(T)) {
    sum = static_cast<T>(sum + load<T>(at));
    store(at, sum);
  }
}

void accumulate_row(void* row, std::size_t count, std::size_t bytes) {
  if (bytes == 1) accumulate_pixels<std::uint8_t>(row, count);
  if (bytes == 2) accumulate_pixels<std::uint16_t>(row, count);
  if (bytes == 4) accumulate_pixels<std::uint32_t>(row, count);
  if (bytes == 8) accumulate_pixels<std::uint64_t>(row, count);
}

// From the right end, so that each one is still there when it is needed: a block's last ones first.
template <typename T>
void difference_pixels(void* row, std::size_t count) {
  auto* at = static_cast<unsigned char*>(row);
  constexpr std::size_t block = 256;
  T before[block];
  for (std::size_t end = count; end > 1;) {
    const std::size_t first = end > block + 1 ? end - block : 1, number = end - first;
    for (std::size_t i = 0; i < number; ++i) before[i] = load<T>(at + (first - 1 + i) * sizeof(T));
    XRK_INDEPENDENT
    for (std::size_t i = 0; i < number; ++i) {
      store(at + (first + i) * sizeof(T), static_cast<T>(load<T>(at + (first + i) * sizeof(T)) - before[i]));
    }
    end = first;
  }
}

void difference_row(void* row, std::size_t count, std::size_t bytes) {
  if (bytes == 1) difference_pixels<std::uint8_t>(row, count);
  if (bytes == 2) difference_pixels<std::uint16_t>(row, count);
  if (bytes == 4) difference_pixels<std::uint32_t>(row, count);
  if (bytes == 8) difference_pixels<std::uint64_t>(row, count);
}

template <typename T>
void join_planes(const unsigned char* planes, void* out, std::size_t count) {
  auto* to = static_cast<unsigned char*>(out);
  XRK_INDEPENDENT
  for (std::size_t i = 0; i < count; ++i) {
    T value = 0;
    for (std::size_t plane = 0; plane < sizeof(T); ++plane) {
      value = static_cast<T>(value << 8 | planes[plane * count + i]);
    }
    store(to + i * sizeof(T), value);
  }
}

void unfold_row(unsigned char* row, void* out, std::size_t count, std::size_t bytes) {
  accumulate_pixels<std::uint8_t>(row, count * bytes);
  if (bytes == 2) join_planes<std::uint16_t>(row, out, count);
  if (bytes == 4) join_planes<std::uint32_t>(row, out, count);
  if (bytes == 8) join_planes<std::uint64_t>(row, out, count);
}

inline std::uint16_t pixel12(unsigned a, unsigned b) { return static_cast<std::uint16_t>(a << 4 | b >> 4); }

void unpack_row(const unsigned char* row, std::uint16_t* out, std::size_t count, unsigned bits) {
  std::size_t i = 0;
  if (bits == 12) {
    for (; i + 2 <= count; i += 2, row += 3) {
      out[i] = pixel12(row[0], row[1]);
      out[i + 1] = static_cast<std::uint16_t>((row[1] & 15u) << 8 | row[2]);
    }
    if (i < count) out[i] = pixel12(row[0], row[1]);
    return;
  }
  // Four pixels of 10 or 14 bits are 5 or 7 whole bytes.
  const unsigned mask = (1u << bits) - 1;
  const std::size_t group = bits / 2;
  for (; i < count; i += 4, row += group) {
    const std::size_t pixels = count - i < 4 ? count - i : 4;
    const std::size_t stored = (pixels * bits + 7) / 8;
    std::uint64_t packed = 0;
    for (std::size_t b = 0; b < stored; ++b) packed |= std::uint64_t{row[b]} << (56 - 8 * b);
    for (std::size_t p = 0; p < pixels; ++p) {
      out[i + p] = static_cast<std::uint16_t>(packed >> (64 - bits * (p + 1)) & mask);
    }
  }
}

// --- counts to values -----------------------------------------------------------------------------------------------

struct Half {
  std::uint16_t bits;
};

inline float widen(Half h) {
  // Exponent and mantissa as a float whose exponent is 112 too low: the product sets it right, subnormal numbers too.
  const std::uint32_t magnitude = (h.bits & 0x7fffu) << 13;
  const float scaled = load<float>(&magnitude) * 0x1p112f;
  std::uint32_t bits = load<std::uint32_t>(&scaled);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;  // infinity and what is not a number
  bits |= static_cast<std::uint32_t>(h.bits & 0x8000u) << 16;
  return load<float>(&bits);
}

template <typename P>
inline double real(const void* at) {
  if constexpr (std::is_same_v<P, Half>) {
    return static_cast<double>(widen(load<Half>(at)));
  } else {
    return static_cast<double>(load<P>(at));
  }
}

// The nearest float of v, but with a last bit of 1 where v is not exactly a float: rounding that to half precision gives
// what rounding v itself would.
inline float round_to_odd(double v) {
  const float nearest = static_cast<float>(v);
  std::uint32_t bits = load<std::uint32_t>(&nearest);
  const double back = static_cast<double>(nearest);
  const bool beyond = v < 0 ? back < v : back > v;
  bits -= beyond ? 1 : 0;
  bits |= back != v && v == v ? 1 : 0;
  return load<float>(&bits);
}

inline std::uint16_t narrow(float v) {
  const std::uint32_t bits = load<std::uint32_t>(&v);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // The sum with 0.5 rounds to multiples of 2**-24, half to even, by itself.
    const float sum = load<float>(&magnitude) + 0.5f;
    half = load<std::uint32_t>(&sum) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
}

inline void narrow_row(const float* v, void* out, std::size_t count) {
  auto* to = static_cast<unsigned char*>(out);
  std::size_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i), half);
  }
#endif
  for (; i < count; ++i) store(to + 2 * i, narrow(v[i]));
}

constexpr std::size_t size_of_pixel(const Half*) { return 2; }
template <typename P>
constexpr std::size_t size_of_pixel(const P*) {
  return sizeof(P);
}

template <typename P, typename V>
void normalise_row(const void* x, double black, double inverse_range, void* out, std::size_t count) {
  const auto* from = static_cast<const unsigned char*>(x);
  auto* to = static_cast<unsigned char*>(out);
  constexpr std::size_t step = size_of_pixel(static_cast<const P*>(nullptr));
  if constexpr (std::is_same_v<V, Half>) {
    constexpr std::size_t block = 256;
    float values[block];
    for (std::size_t first = 0; first < count; first += block) {
      const std::size_t number = count - first < block ? count - first : block;
      XRK_INDEPENDENT
      for (std::size_t i = 0; i < number; ++i) {
        values[i] = round_to_odd((real<P>(from + (first + i) * step) - black) * inverse_range);
      }
      narrow_row(values, to + 2 * first, number);
    }
  } else {
    XRK_INDEPENDENT
    for (std::size_t i = 0; i < count; ++i) {
      store(to + i * sizeof(V), static_cast<V>((real<P>(from + i * step) - black) * inverse_range));
    }
  }
}

template <typename P>
std::uint64_t correct_row(const void* x, const double* dark, const double* gain, double pedestal,
                          const unsigned char* invalid, void* out, std::size_t count) {
  const auto* from = static_cast<const unsigned char*>(x);
  auto* to = static_cast<unsigned char*>(out);
  constexpr std::size_t step = size_of_pixel(static_cast<const P*>(nullptr)), block = 256;
  constexpr bool whole = std::numeric_limits<P>::is_integer;
  double values[block];
  std::uint64_t limited = 0;
  for (std::size_t first = 0; first < count; first += block) {
    const std::size_t number = count - first < block ? count - first : block;
    XRK_INDEPENDENT
    for (std::size_t i = 0; i < number; ++i) {
      values[i] = (real<P>(from + (first + i) * step) - dark[first + i]) * gain[first + i] + pedestal;
    }
    for (std::size_t i = 0; i < number; ++i) {
      const std::size_t at = first + i;
      const P before = load<P>(from + at * step);
      const bool stays = invalid != nullptr && invalid[at] != 0;
      if constexpr (whole) {
        constexpr double lowest = std::numeric_limits<P>::min(), highest = std::numeric_limits<P>::max();
        // One step beyond the range still tells what has to be limited; the sum rounds half to even.
        double v = values[i] < lowest - 1 ? lowest - 1 : values[i];
        v = v > highest + 1 ? highest + 1 : v;
        v = (v + 6755399441055744.0) - 6755399441055744.0;
        double within = v < lowest ? lowest : v;
        within = within > highest ? highest : within;
        limited += within != v && !stays ? 1 : 0;
        store(to + at * step, stays ? before : static_cast<P>(within));
      } else {
        const double was = real<P>(from + at * step);
        const bool finite = was - was == 0.0;
        P after;
        if constexpr (std::is_same_v<P, Half>) {
          after = {narrow(round_to_odd(values[i]))};
        } else {
          after = static_cast<P>(values[i]);
        }
        store(to + at * step, stays || !finite ? before : after);
      }
    }
  }
  return limited;
}

// --- values to counts -----------------------------------------------------------------------------------------------

// Each loop works in lanes of one width, so that the compiler vectorises it; what one leaves for the next stays in the
// first-level cache. T: double; or float, where it holds every integer of the range and one step beyond. Adding and
// subtracting 1.5 * 2**52 (2**23) rounds where there is no instruction for it, too.
template <typename P, typename V, typename T>
Misfits round_values(const V* v, T scale, T offset, unsigned char* out, std::size_t count) {
  constexpr std::size_t span = 512;
  constexpr T shift = sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912.0);
  constexpr T lowest = std::numeric_limits<P>::min(), highest = std::numeric_limits<P>::max();
  using Whole = std::conditional_t<sizeof(P) == 4, std::int64_t, std::int32_t>;
  using Lane = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
  Misfits found;
  Whole whole[span];
  for (std::size_t first = 0; first < count; first += span) {
    const std::size_t here = count - first < span ? count - first : span;
    Lane limited = 0, absent = 0;
    for (std::size_t i = 0; i < here; ++i) {
      T value = static_cast<T>(v[first + i]);
      if constexpr (sizeof(T) == 8) value = value * scale + offset;
      absent += value == value ? 0 : 1;
      value = value == value ? value : T(0);
      // One step beyond the range keeps the rounding exact and still tells what has to be limited.
      value = value < lowest - 1 ? lowest - 1 : value;
      value = value > highest + 1 ? highest + 1 : value;
      value = (value + shift) - shift;
      T within = value < lowest ? lowest : value;
      within = within > highest ? highest : within;
      limited += within != value ? 1 : 0;
      whole[i] = static_cast<Whole>(within);
    }
    for (std::size_t i = 0; i < here; ++i) store(out + (first + i) * sizeof(P), static_cast<P>(whole[i]));
    found.limited += static_cast<std::uint64_t>(limited);
    found.not_numbers += static_cast<std::uint64_t>(absent);
  }
  return found;
}

template <typename P, typename V>
Misfits round_row(const V* v, double scale, double offset, void* out, std::size_t count) {
  auto* to = static_cast<unsigned char*>(out);
  // Without a factor, a float is a float all along: twice as many lanes, the same results.
  if constexpr (std::is_same_v<V, float> && sizeof(P) <= 2) {
    if (scale == 1.0 && offset == 0.0) return round_values<P, V, float>(v, 1.0f, 0.0f, to, count);
  }
  return round_values<P, V, double>(v, scale, offset, to, count);
}

#define XRK_INTEGERS(V)                                                                                             \
  {round_row<std::uint8_t, V>, round_row<std::int8_t, V>, round_row<std::uint16_t, V>, round_row<std::int16_t, V>, \
   round_row<std::uint32_t, V>, round_row<std::int32_t, V>}

#define XRK_VALUES(P) {normalise_row<P, Half>, normalise_row<P, float>, normalise_row<P, double>}

constexpr RowKernels make_rows() {
  return {swap_row,
          accumulate_row,
          unfold_row,
          difference_row,
          unpack_row,
          {correct_row<std::uint8_t>, correct_row<std::int8_t>, correct_row<std::uint16_t>, correct_row<std::int16_t>,
           correct_row<std::uint32_t>, correct_row<std::int32_t>, correct_row<Half>, correct_row<float>,
           correct_row<double>},
          {XRK_VALUES(std::uint8_t), XRK_VALUES(std::int8_t), XRK_VALUES(std::uint16_t), XRK_VALUES(std::int16_t),
           XRK_VALUES(std::uint32_t), XRK_VALUES(std::int32_t), XRK_VALUES(Half), XRK_VALUES(float),
           XRK_VALUES(double)},
          XRK_INTEGERS(float),
          XRK_INTEGERS(double)};
}

#undef XRK_VALUES
#undef XRK_INTEGERS

}  // namespace
}  // namespace xrk::tiff
