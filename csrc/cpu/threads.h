// Splits a range of pixels over threads that live for one call: nothing is left behind that a fork could break.
#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace xrk::cpu {

// Below this many pixels a thread costs more than it saves.
constexpr std::size_t smallest_share = std::size_t{1} << 16;

// Calls run(part) for each part of [0, parts), each on a thread of its own, part 0 on the caller's; parts is 1 or more.
// `run` must not throw.
template <typename Run>
void run_parts(std::size_t parts, const Run& run) {
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  std::size_t part = 1;
  try {
    for (; part < parts; ++part) others.emplace_back(run, part);
  } catch (const std::system_error&) {
    // No more threads to be had: the caller's does the rest.
  }
  for (; part < parts; ++part) run(part);
  run(0);
  for (std::thread& other : others) other.join();
}

// Calls work(first, last, part) for consecutive parts of [0, count), part counting from 0, on at most `threads`
// threads, the caller's among them. `work` must not throw. Returns the number of parts.
template <typename Work>
std::size_t split(std::size_t count, std::size_t threads, const Work& work) {
  const std::size_t parts = std::max<std::size_t>(1, std::min(threads, count / smallest_share));
  // Boundaries at multiples of 64 pixels keep two threads off one cache line.
  const std::size_t share = ((count + parts - 1) / parts + 63) / 64 * 64;
  const auto run = [&](std::size_t part) {
    const std::size_t first = std::min(count, part * share);
    const std::size_t last = std::min(count, first + share);
    work(first, last, part);
  };
  run_parts(parts, run);
  return parts;
}

}  // namespace xrk::cpu
