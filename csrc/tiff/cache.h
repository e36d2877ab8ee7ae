// Decoded segments, or parts of large ones, kept as long as a budget of bytes allows: windows that overlap decode what they share once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace xrk::tiff {

// Memory for one decoded segment.
class Block {
 public:
  explicit Block(std::size_t bytes) : data_(static_cast<unsigned char*>(std::malloc(bytes))), bytes_(bytes) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(data_); }

  unsigned char* data() { return data_; }
  const unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  unsigned char* data_;
  std::size_t bytes_;
};

using BlockPointer = std::shared_ptr<const Block>;

// Blocks that nobody reads any more. Their pages are in memory: the next segment need not ask the system for others.
class Spares {
 public:
  Spares() { blocks_.reserve(most); }

  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty()) return nullptr;
    std::unique_ptr<Block> block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }

  void give(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.size() < most) blocks_.push_back(std::move(block));
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.clear();
  }

 private:
  static constexpr std::size_t most = 4;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

class Cache {
 public:
  struct Key {
    std::uint64_t page, segment, part;
    bool operator==(const Key& other) const {
      return page == other.page && segment == other.segment && part == other.part;
    }
  };

  explicit Cache(std::uint64_t budget) : budget_(budget), spares_(std::make_shared<Spares>()) {}

  // The block under this key. Where there is none, make(spare) makes it, once, however many threads ask at the same
  // time, as a std::unique_ptr<Block>; `spare` is one that nobody needs any more, or null. What `make` throws goes to
  // the thread that called it; the others then try for themselves.
  template <typename Make>
  BlockPointer get(const Key& key, const Make& make) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      for (;;) {
        const auto found = places_.find(key);
        if (found == places_.end()) break;
        if (found->second->block) {
          kept_.splice(kept_.begin(), kept_, found->second);
          return found->second->block;
        }
        made_.wait(lock);
      }
      kept_.push_front({key, nullptr});
      try {
        places_[key] = kept_.begin();
      } catch (...) {
        kept_.pop_front();
        throw;
      }
    }
    BlockPointer block;
    try {
      // The last who lets go of it hands it back; what others read of it is done by then.
      block = BlockPointer(make(spares_->take()).release(),
                           [spares = spares_](const Block* done) { spares->give(own(done)); });
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = places_.find(key);
      kept_.erase(found->second);
      places_.erase(found);
      made_.notify_all();
      throw;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = places_.find(key);
    found->second->block = block;
    bytes_ += block->bytes();
    shrink(key);
    made_.notify_all();
    return block;
  }

  // Whether there is a block under this key; if so, it is the last one asked for.
  bool refresh(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = places_.find(key);
    if (found == places_.end() || !found->second->block) return false;
    kept_.splice(kept_.begin(), kept_, found->second);
    return true;
  }

  std::uint64_t budget() const { return budget_; }

  std::uint64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = kept_.begin(); at != kept_.end();) at = at->block ? drop(at) : std::next(at);
    spares_->clear();
  }

 private:
  static std::unique_ptr<Block> own(const Block* block) { return std::unique_ptr<Block>(const_cast<Block*>(block)); }

  struct Kept {
    Key key;
    BlockPointer block;  // null while it is made
  };
  struct Hash {
    std::size_t operator()(const Key& key) const {
      return static_cast<std::size_t>((key.page * 0x9e3779b97f4a7c15u) ^ (key.segment * 0xc2b2ae3d27d4eb4fu) ^
                                      (key.part * 0x165667b19e3779f9u));
    }
  };

  // Lets go of the blocks that were not asked for the longest, never of the one that was just made: one alone may be
  // larger than the budget, and would be decoded again for every window.
  void shrink(const Key& newest) {
    for (auto at = kept_.end(); bytes_ > budget_ && at != kept_.begin();) {
      --at;
      if (at->block && !(at->key == newest)) at = drop(at);
    }
  }

  std::list<Kept>::iterator drop(std::list<Kept>::iterator at) {
    bytes_ -= at->block->bytes();
    places_.erase(at->key);
    return kept_.erase(at);
  }

  const std::uint64_t budget_;
  mutable std::mutex mutex_;
  std::condition_variable made_;
  std::list<Kept> kept_;  // the last one asked for first
  std::unordered_map<Key, std::list<Kept>::iterator, Hash> places_;
  const std::shared_ptr<Spares> spares_;
  std::uint64_t bytes_ = 0;
};

}  // namespace xrk::tiff
