// Splits work over threads, each with scratch memory of its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "threads.h"

namespace xrk::cpu {

// Below this many values a thread costs more than it saves.
constexpr std::size_t smallest_share_of_values = std::size_t{1} << 15;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

inline Memory allocate(std::size_t bytes) { return Memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)); }

// Calls work(first, last, scratch) for consecutive parts of `count` items, on as many threads as the values are worth,
// each with scratch memory of its own. False where that memory ran out; `work` was not called then.
template <typename Work>
bool share(std::size_t count, std::size_t values, std::size_t threads, std::size_t scratch_bytes, const Work& work) {
  if (count == 0) return true;
  const std::size_t worth = std::max<std::size_t>(1, values / smallest_share_of_values);
  const std::size_t parts = std::min({threads, worth, count});
  std::vector<Memory> scratch;
  for (std::size_t part = 0; part < parts; ++part) {
    scratch.push_back(allocate(scratch_bytes));
    if (!scratch.back()) return false;
  }
  // Without count * parts, which could overflow.
  const std::size_t base = count / parts, longer = count % parts;
  const auto run = [&](std::size_t part) {
    const std::size_t first = part * base + std::min(part, longer);
    work(first, first + base + (part < longer ? 1 : 0), scratch[part].get());
  };
  run_parts(parts, run);
  return true;
}

}  // namespace xrk::cpu
