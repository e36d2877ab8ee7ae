// Large pages for results of many megabytes.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace xrk::cpu {

// From here on malloc takes memory from the system and gives it back at each call, whatever was freed before.
constexpr std::size_t large_bytes = std::size_t{32} << 20;

// Says that these bytes are about to be written as a whole. Fresh from the system, each of their pages is a fault at
// first touch: 24576 of 4 KiB for 96 MiB, or 48 of 2 MiB where large pages are given to those who ask (as numpy does for
// its arrays). A wish: nothing is lost where it is not granted, and small memory is left alone.
inline void will_fill(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  if (bytes < large_bytes) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace xrk::cpu
