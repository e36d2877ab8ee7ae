// Which set of kernels runs on this processor.
#include <atomic>
#include <cstring>

#ifdef XRK_X86
#include <cpuid.h>
#endif

#include "pixels.h"

namespace xrk::cpu {
namespace {

#ifdef XRK_X86
// Compilers' __builtin_cpu_supports do not all know this one. It needs nothing saved beyond AVX2's registers.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// __builtin_cpu_supports asks the operating system too: a kernel that does not save the wide registers counts as none.
std::size_t find_paths(const Path* paths[3]) {
  std::size_t found = 0;
#ifdef XRK_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) paths[found++] = &avx512_path();
  if (avx2) paths[found++] = &avx2_path();
#endif
  paths[found++] = &baseline_path();
  return found;
}

const Path* widest_path() {
  const Path* paths[3];
  find_paths(paths);
  return paths[0];
}

std::atomic<const Path*>& selected() {
  static std::atomic<const Path*> path{widest_path()};
  return path;
}

}  // namespace

const Path& active_path() { return *selected().load(std::memory_order_acquire); }

bool select_path(const char* name) {
  const Path* paths[3];
  const std::size_t found = find_paths(paths);
  for (std::size_t i = 0; i < found; ++i) {
    if (std::strcmp(paths[i]->name, name) == 0) {
      selected().store(paths[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

std::size_t supported_paths(const char* names[3]) {
  const Path* paths[3];
  const std::size_t found = find_paths(paths);
  for (std::size_t i = 0; i < found; ++i) names[i] = paths[i]->name;
  return found;
}

}  // namespace xrk::cpu
