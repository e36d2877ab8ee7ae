#include "input.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "format.h"

namespace xrk::tiff {

Input::Input(int descriptor) : descriptor_(descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(descriptor);
    throw Failure(Failure::Kind::system, "it is not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

Input::~Input() {
  if (descriptor_ >= 0) close(descriptor_);
}

void Input::read(std::uint64_t offset, void* to, std::size_t bytes) const {
  if (!holds(offset, bytes)) {
    throw Failure(Failure::Kind::damaged,
                  std::to_string(bytes) + " bytes are expected there, and the file ends at " + std::to_string(size_),
                  offset);
  }
  if (bytes == 0) return;
  if (data_ != nullptr) {
    std::memcpy(to, data_ + offset, bytes);
    return;
  }
  auto* at = static_cast<unsigned char*>(to);
  while (bytes > 0) {
    // The system takes no more than 2 GiB at once.
    const ssize_t got =
        pread(descriptor_, at, std::min<std::size_t>(bytes, std::size_t{1} << 30), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Failure(Failure::Kind::system, std::strerror(errno), offset);
    if (got == 0) throw Failure(Failure::Kind::damaged, "the file was cut short while it was read", offset);
    at += got;
    bytes -= static_cast<std::size_t>(got);
    offset += static_cast<std::uint64_t>(got);
  }
}

}  // namespace xrk::tiff
