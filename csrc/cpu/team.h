// Runs work on the threads that torch computes with: they wait for it already, and stay out of each other's way.
#pragma once

#include <dlfcn.h>

#include <cstddef>

#include "threads.h"

namespace xrk::cpu {

// The OpenMP runtime that torch brought into the process, by the one entry that GCC's, LLVM's and Intel's all have; null
// where there is none.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline OpenMPParallel open_mp() {
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Calls work() on up to `threads` threads at once, the caller's among them: it takes its share itself, for there may be
// fewer. `work` must not throw.
template <typename Work>
void run_team(std::size_t threads, const Work& work) {
  if (threads <= 1) return work();
  if (const OpenMPParallel parallel = open_mp()) {
    parallel([](void* given) { (*static_cast<const Work*>(given))(); }, const_cast<Work*>(&work),
             static_cast<unsigned>(threads), 0);
  } else {
    run_parts(threads, [&](std::size_t) { work(); });
  }
}

}  // namespace xrk::cpu
