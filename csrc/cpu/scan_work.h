// What the scans and their gradients share: the kernels of this processor, weights as the kernels want them, threads.
// Included by scan.cpp and scan_backward.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pixels.h"
#include "scan.h"
#include "threads.h"

namespace xrk::cpu {
namespace {

// Below this much work a thread costs more than it saves.
constexpr std::int64_t smallest_work = std::int64_t{1} << 17;

inline const ScanPath& active_scan_path() {
#ifdef XRK_X86
  const char* name = active_path().name;
  if (std::strcmp(name, "avx512") == 0) return avx512_scan_path();
  if (std::strcmp(name, "avx2") == 0) return avx2_scan_path();
#endif
  return baseline_scan_path();
}

template <typename T>
const ScanKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return active_scan_path().single;
  } else {
    return active_scan_path().twice;
  }
}

inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// work(first, last) for consecutive parts of [0, count), on as many threads as `cost` units of work are worth.
template <typename Work>
void share(std::int64_t count, std::int64_t cost, std::size_t threads, const Work& work) {
  const std::int64_t worth = std::max<std::int64_t>(1, cost / smallest_work);
  const std::int64_t parts = std::max<std::int64_t>(1, std::min({static_cast<std::int64_t>(threads), count, worth}));
  const auto run = [&](std::size_t index) {
    const auto part = static_cast<std::int64_t>(index);
    work(count * part / parts, count * (part + 1) / parts);
  };
  run_parts(static_cast<std::size_t>(parts), run);
}

// One direction's weights as the kernels want them: padded to whole vectors, states before channels.
template <typename T>
struct Prepared {
  std::int64_t padded, outputs;
  std::vector<T> projection, dt_weight, bias, a2, skip;
};

template <typename T>
void prepare_a(const T* a, bool logs, std::int64_t channels, std::int64_t states, Prepared<T>& out) {
  out.a2.assign(static_cast<std::size_t>(states * out.padded), T(0));
  for (std::int64_t d = 0; d < channels; ++d) {
    for (std::int64_t n = 0; n < states; ++n) {
      const double value = static_cast<double>(a[d * states + n]);
      out.a2[n * out.padded + d] = static_cast<T>((logs ? -std::exp(value) : value) * 1.4426950408889634074);
    }
  }
}

// dt_weight (D, rank), rank 0 for none.
template <typename T>
void prepare_dt_weight(const T* weight, std::int64_t channels, std::int64_t rank, Prepared<T>& out) {
  out.dt_weight.assign(static_cast<std::size_t>(rank * out.padded), T(0));
  for (std::int64_t d = 0; d < channels; ++d) {
    for (std::int64_t r = 0; r < rank; ++r) out.dt_weight[r * out.padded + d] = weight[d * rank + r];
  }
}

template <typename T>
void prepare_vector(const T* values, std::int64_t channels, std::int64_t padded, std::vector<T>& out) {
  out.assign(static_cast<std::size_t>(padded), T(0));
  if (values) std::copy(values, values + channels, out.begin());
}

}  // namespace
}  // namespace xrk::cpu
