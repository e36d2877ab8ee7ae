// The wavelet kernels, once for each instruction set that includes this file; everything is internal to it.
//
// Rows are combined first, along the columns, which the compiler vectorises as it stands; then each combined row is
// filtered along itself, from its even and its odd values laid apart, so that these loads are contiguous too.
#include <algorithm>
#include <cstddef>

#include "wavelet.h"

namespace xrk::cpu {
namespace {

// Where a value beyond the ends lies in the image that goes on as its own mirror image.
inline std::size_t mirrored(std::ptrdiff_t i, std::size_t n) {
  const std::ptrdiff_t period = 2 * static_cast<std::ptrdiff_t>(n);
  i %= period;
  if (i < 0) i += period;
  return static_cast<std::size_t>(i < static_cast<std::ptrdiff_t>(n) ? i : period - 1 - i);
}

// out[i] = sum_j taps[j] rows[j][i], j upwards.
template <typename T>
void combine(const T* const* rows, const T* taps, std::size_t count, T* __restrict out, std::size_t width) {
  for (std::size_t i = 0; i < width; ++i) out[i] = taps[0] * rows[0][i];
  for (std::size_t j = 1; j < count; ++j) {
    const T tap = taps[j];
    const T* row = rows[j];
    for (std::size_t i = 0; i < width; ++i) out[i] += tap * row[i];
  }
}

// The same of eight rows in one pass: db4, the common case.
template <typename T>
void combine8(const T* const* rows, const T* t, T* __restrict out, std::size_t width) {
  const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *e = rows[4], *f = rows[5], *g = rows[6],
          *h = rows[7];
  const T t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3], t4 = t[4], t5 = t[5], t6 = t[6], t7 = t[7];
  for (std::size_t i = 0; i < width; ++i) {
    T sum = t0 * a[i];
    sum += t1 * b[i];
    sum += t2 * c[i];
    sum += t3 * d[i];
    sum += t4 * e[i];
    sum += t5 * f[i];
    sum += t6 * g[i];
    sum += t7 * h[i];
    out[i] = sum;
  }
}

template <typename T>
void add_up(const T* const* rows, const T* taps, std::size_t count, T* out, std::size_t width) {
  if (count == 8) {
    combine8(rows, taps, out, width);
  } else {
    combine(rows, taps, count, out, width);
  }
}

// One row of `width` values -> (width + taps - 1) / 2 averages and as many details. even and odd hold the mirrored row's
// values 2i - taps and 2i + 1 - taps.
template <typename T>
void analyse_row(const T* row, std::size_t width, const T* low, const T* high, std::size_t taps, T* even, T* odd, T* a,
                 T* d) {
  const std::size_t count = (width + taps - 1) / 2, half = taps / 2;
  const auto value = [&](std::ptrdiff_t i) { return row[mirrored(i, width)]; };
  const auto shift = static_cast<std::ptrdiff_t>(taps);
  const std::size_t inside = width / 2;  // pairs that lie wholly in the row, from index `half` on
  for (std::size_t i = 0; i < half; ++i) {
    even[i] = value(2 * static_cast<std::ptrdiff_t>(i) - shift);
    odd[i] = value(2 * static_cast<std::ptrdiff_t>(i) + 1 - shift);
  }
  for (std::size_t i = 0; i < inside; ++i) {
    even[half + i] = row[2 * i];
    odd[half + i] = row[2 * i + 1];
  }
  for (std::size_t i = half + inside; i < count + half; ++i) {
    even[i] = value(2 * static_cast<std::ptrdiff_t>(i) - shift);
    odd[i] = value(2 * static_cast<std::ptrdiff_t>(i) + 1 - shift);
  }
  // x[2k + 1 - j]: for an even j the odd value number k - j / 2, for an odd one the even value number k - (j - 1) / 2.
  const T* rows[most_taps];
  for (std::size_t j = 0; j < taps; ++j) rows[j] = (j % 2 == 0 ? odd : even) + half - j / 2;
  add_up(rows, low, taps, a, count);
  add_up(rows, high, taps, d, count);
}

// Averages and details of `width` values each -> a row of 2 width - taps + 2.
template <typename T>
void synthesise_row(const T* a, const T* d, std::size_t width, const T* const* phases, std::size_t taps, T* even, T* odd,
                    T* row) {
  const std::size_t half = taps / 2, pairs = width - half + 1;
  const T* rows[most_taps];
  for (std::size_t t = 0; t < half; ++t) {
    rows[2 * t] = a + half - 1 - t;
    rows[2 * t + 1] = d + half - 1 - t;
  }
  add_up(rows, phases[0], taps, even, pairs);
  add_up(rows, phases[1], taps, odd, pairs);
  for (std::size_t i = 0; i < pairs; ++i) {
    row[2 * i] = even[i];
    row[2 * i + 1] = odd[i];
  }
}

template <typename T>
void analyse(const WaveletTask& task, std::size_t first, std::size_t last, void* scratch) {
  const std::size_t taps = task.taps, height = task.height, width = task.width;
  const std::size_t out_height = (height + taps - 1) / 2, out_width = (width + taps - 1) / 2;
  T low[most_taps], high[most_taps];
  for (std::size_t j = 0; j < taps; ++j) {
    low[j] = static_cast<T>(task.low[j]);
    high[j] = static_cast<T>(task.high[j]);
  }
  const T* x = static_cast<const T*>(task.x);
  T* out = static_cast<T*>(task.out);
  T* averages = static_cast<T*>(scratch);
  T* details = averages + width;
  T* even = details + width;
  T* odd = even + out_width + taps;
  const std::size_t plane = out_height * out_width;
  for (std::size_t k = first; k < last; ++k) {
    const T* rows[most_taps];
    for (std::size_t j = 0; j < taps; ++j) {
      const auto at = 2 * static_cast<std::ptrdiff_t>(k) + 1 - static_cast<std::ptrdiff_t>(j);
      rows[j] = x + mirrored(at, height) * width;
    }
    add_up(rows, low, taps, averages, width);
    add_up(rows, high, taps, details, width);
    T* row = out + k * out_width;
    analyse_row(averages, width, low, high, taps, even, odd, row, row + 2 * plane);
    analyse_row(details, width, low, high, taps, even, odd, row + plane, row + 3 * plane);
  }
}

template <typename T>
void synthesise(const WaveletTask& task, std::size_t first, std::size_t last, void* scratch) {
  const std::size_t taps = task.taps, half = taps / 2, height = task.height, width = task.width;
  const std::size_t out_width = 2 * width - taps + 2;
  // phases[p]: what the averages and the details of one pair of terms are multiplied by, for values 2q + p.
  T even_taps[most_taps], odd_taps[most_taps];
  for (std::size_t t = 0; t < half; ++t) {
    even_taps[2 * t] = static_cast<T>(task.low[taps - 1 - 2 * t]);
    even_taps[2 * t + 1] = static_cast<T>(task.high[taps - 1 - 2 * t]);
    odd_taps[2 * t] = static_cast<T>(task.low[taps - 2 - 2 * t]);
    odd_taps[2 * t + 1] = static_cast<T>(task.high[taps - 2 - 2 * t]);
  }
  const T* const phases[2] = {even_taps, odd_taps};
  const T* x = static_cast<const T*>(task.x);
  T* averages = static_cast<T*>(scratch);
  T* details = averages + width;
  T* even = details + width;
  T* odd = even + width;
  const std::size_t plane = height * width;
  for (std::size_t i = first; i < last; ++i) {
    const std::size_t q = i / 2;
    const T *across[most_taps], *along[most_taps];
    for (std::size_t t = 0; t < half; ++t) {
      const T* row = x + (q + half - 1 - t) * width;
      across[2 * t] = row;
      across[2 * t + 1] = row + plane;
      along[2 * t] = row + 2 * plane;
      along[2 * t + 1] = row + 3 * plane;
    }
    add_up(across, phases[i % 2], taps, averages, width);
    add_up(along, phases[i % 2], taps, details, width);
    synthesise_row(averages, details, width, phases, taps, even, odd, static_cast<T*>(task.out) + i * out_width);
  }
}

constexpr Wavelets make_wavelets() { return {{analyse<float>, analyse<double>}, {synthesise<float>, synthesise<double>}}; }

}  // namespace
}  // namespace xrk::cpu
