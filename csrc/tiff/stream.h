// Segments that are too large to be decoded at once: their bytes come some at a time, from the first to the last, in
// memory that does not depend on their size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "codecs.h"
#include "format.h"
#include "input.h"

namespace xrk::tiff {

class SegmentStream {
 public:
  SegmentStream() = default;
  SegmentStream(const SegmentStream&) = delete;
  SegmentStream& operator=(const SegmentStream&) = delete;
  virtual ~SegmentStream() = default;

  // Writes the next `bytes` bytes. After anything but `complete` the stream is of no more use.
  virtual Outcome next(unsigned char* out, std::size_t bytes) = 0;

  // Once all bytes of the pixels were taken: whether the codec's own check of them holds.
  virtual Outcome finish() { return Outcome::complete; }
};

// Whether there is a stream for this compression, with the libraries that there are.
bool can_stream(Compression compression);

// The segment of `bytes` bytes at `offset` of a file that outlives the stream.
std::unique_ptr<SegmentStream> open_stream(Compression compression, const Input& input, std::uint64_t offset,
                                           std::uint64_t bytes);

}  // namespace xrk::tiff
