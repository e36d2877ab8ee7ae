// The bytes of a file, by position. Nothing is mapped: a mapped file that another process cuts short is a signal, a read
// of it is an error.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xrk::tiff {

class Input {
 public:
  // Takes over a descriptor that is open for reading, and closes it. Fails unless it is a regular file's.
  explicit Input(int descriptor);
  // Bytes that the caller keeps, in place of a file.
  Input(const unsigned char* data, std::size_t bytes) : data_(data), size_(bytes) {}
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;
  ~Input();

  // The file's size when it was opened.
  std::uint64_t size() const { return size_; }

  // Whether `bytes` bytes from `offset` on lie inside the file.
  bool holds(std::uint64_t offset, std::uint64_t bytes) const { return offset <= size_ && bytes <= size_ - offset; }

  // Reads them; a Failure where they are not there (any more) or cannot be read.
  void read(std::uint64_t offset, void* to, std::size_t bytes) const;

 private:
  int descriptor_ = -1;
  const unsigned char* data_ = nullptr;
  std::uint64_t size_ = 0;
};

}  // namespace xrk::tiff
