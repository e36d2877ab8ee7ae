// Threads that wait from one window, or band, to the next.
#pragma once

#include <cstddef>

namespace xrk::tiff {

// Calls work(given) on the caller's thread and on up to threads - 1 others at once, and returns when all are done with it.
// Each call takes its share itself: others come late, or not at all where the caller's is done before. `work` must not
// throw.
//
// The others belong to the process, stay until it ends, and are at most as many as one call ever asked for. A forked
// child starts with none.
void share_work(std::size_t threads, void (*work)(void* given), void* given);

template <typename Work>
void share_work(std::size_t threads, const Work& work) {
  share_work(threads, [](void* given) { (*static_cast<const Work*>(given))(); }, const_cast<Work*>(&work));
}

}  // namespace xrk::tiff
