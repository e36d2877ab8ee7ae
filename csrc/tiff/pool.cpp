#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace xrk::tiff {
namespace {

struct Task {
  void (*work)(void*);
  void* given;
  std::size_t wanted;                  // threads that may still come
  std::atomic<std::size_t> inside{0};  // those that are at it
};

class Pool {
 public:
  void run(Task& task) {
    const std::size_t others = task.wanted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(&task);
      if (threads_ < others) begin_threads(others);
    }
    for (std::size_t i = 0; i < others; ++i) come_.notify_one();
    task.work(task.given);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find(tasks_.begin(), tasks_.end(), &task);
      if (found != tasks_.end()) tasks_.erase(found);
    }
    // Their last piece of work takes less time than to be woken up.
    for (int i = 0; i < 64 && task.inside > 0; ++i) std::this_thread::yield();
    std::unique_lock<std::mutex> lock(mutex_);
    left_.wait(lock, [&] { return task.inside == 0; });
  }

 private:
  void begin_threads(std::size_t wanted) {
    // Signals go to the threads that the program knows of.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads to be had: those that there are do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      come_.wait(lock, [this] { return !tasks_.empty(); });
      Task& task = *tasks_.front();
      ++task.inside;
      if (--task.wanted == 0) tasks_.erase(tasks_.begin());
      lock.unlock();
      task.work(task.given);
      lock.lock();
      if (--task.inside == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable come_, left_;
  std::vector<Task*> tasks_;  // of those that want more threads
  std::size_t threads_ = 0;
};

// Never destroyed: its threads may outlive the objects of this file as the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  // In a child there is none of the threads, and whoever held the mutex will not let go of it.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  static_cast<void>(registered);
  Pool* found = pool;
  if (found == nullptr) {
    auto* const made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void share_work(std::size_t threads, void (*work)(void*), void* given) {
  if (threads <= 1) return work(given);
  Task task{work, given, threads - 1};
  the_pool().run(task);
}

}  // namespace xrk::tiff
