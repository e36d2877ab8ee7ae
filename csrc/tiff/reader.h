// Windows of a TIFF file's pages: only the segments that a window touches are read, decoded in several threads, and
// written straight to where the caller wants them.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "border.h"
#include "cache.h"
#include "codecs.h"
#include "directory.h"
#include "format.h"
#include "input.h"
#include "rows.h"
#include "stream.h"

namespace xrk::tiff {

// Dark and flat-field correction: counts become (count - dark) * gain + pedestal in double precision, rounded half to even
// and limited to their range where they are integers. Counts of invalid pixels, and what is not finite, stay as they are.
struct Correction {
  // Of each pixel of the image; rows so many values apart, 0 where all rows are the same.
  const double *dark = nullptr, *gain = nullptr;
  std::size_t dark_stride = 0, gain_stride = 0;
  double pedestal = 0;
  const unsigned char* invalid = nullptr;  // as wide as the image; null where no pixel is
};

struct Window {
  std::uint64_t page = 0;           // of Reader::frames
  std::int64_t row = 0, column = 0;  // of its first pixel, which may lie outside the image
  std::uint64_t rows = 0, columns = 0;
  Border border = Border::reflect;
  unsigned char* out = nullptr;  // its pixels are adjacent, its rows `row_stride` bytes apart
  std::size_t row_stride = 0;
  bool values = false;  // (count - black) * inverse_range as `value`; else the counts themselves
  Value value = V32;
  double black = 0, inverse_range = 1;
  const Correction* correction = nullptr;           // of the counts, before they become values
  std::atomic<std::uint64_t>* limited = nullptr;  // with a correction: counts the pixels that left their range
};

class Reader {
 public:
  Reader(std::unique_ptr<Input> input, const Limits& limits, std::uint64_t cache_bytes);

  const Input& input() const { return *input_; }
  const Directory& directory() const { return directory_; }

  // The pages at full resolution, in the file's order; one page that stands for many (see `set_hidden`) counts as many.
  std::uint64_t frames() const { return hidden_ ? hidden_ : frames_.size(); }
  const Page& frame(std::uint64_t index) const { return hidden_ ? stack_ : directory_.pages()[frames_[index]]; }

  // Where the first page's pixels start, if they are uncompressed and without a gap; else Failure::none.
  std::uint64_t contiguous_start();
  // The only page, one without a gap, is followed by others of its size, `frames` in all, without directories of their
  // own: ImageJ's form for stacks of any size. False, and no change, where the file does not hold them.
  bool set_hidden(std::uint64_t frames);

  // Writes the window's pixels. Fails where the file does, at the first segment in its order that does.
  void read(const Window& window, std::size_t threads);

  // Decodes what `read` will take from decoded segments, for later.
  void load(const Window& window, std::size_t threads);

  // Ends reads under way, and all later ones, with a Failure (cancelled).
  void cancel() { cancelled_ = true; }

  std::uint64_t cached_bytes() const { return cache_.bytes(); }
  std::uint64_t decoded_segments() const { return decoded_; }

 private:
  using Table = std::shared_ptr<const std::vector<Segment>>;
  struct Area {
    std::uint64_t top, bottom, left, right;  // in the image; bottom and right excluded
  };
  // A segment that is decoded from its first row on, and the row that comes next.
  struct Running {
    std::uint64_t frame, segment, row;
    std::unique_ptr<SegmentStream> stream;
  };
  // What one thread needs, kept from one call to the next.
  struct Worker {
    Decoders decoders;
    std::vector<unsigned char> stored, rows;
  };

  Table table(std::uint64_t frame);
  Area inside(const Window& window) const;
  bool through_cache(const Geometry& geometry, const Area& area) const;
  template <typename Job>
  void run_jobs(std::uint64_t count, std::size_t threads, const Job& job);
  std::uint64_t block_rows(const Geometry& geometry) const;
  BlockPointer block(std::uint64_t frame, const std::vector<Segment>& table, std::uint64_t index, std::uint64_t part,
                     Worker& worker);
  void decode(const Geometry& geometry, const Segment& segment, std::uint64_t index, unsigned char* out,
              Worker& worker) const;
  void decode_part(std::uint64_t frame, const Segment& segment, std::uint64_t index, std::uint64_t part,
                   unsigned char* out, Worker& worker);
  void place(const Window& window, const Geometry& geometry, std::uint64_t row, std::uint64_t column,
             const unsigned char* pixels, std::uint64_t count) const;
  template <typename Use>
  void for_blocks(std::uint64_t frame, const Area& area, std::size_t threads, const Use& use);
  void read_segments(const Window& window, const Area& area, std::size_t threads);
  void read_uncompressed(const Window& window, const Area& area, std::size_t threads);
  void read_rows(const Window& window, const Area& area, const std::vector<Segment>& table, std::uint64_t column,
                 std::uint64_t top, std::uint64_t bottom, Worker& worker) const;
  std::unique_ptr<Worker> take_worker();
  void give_worker(std::unique_ptr<Worker> worker);

  std::unique_ptr<Input> input_;
  const std::uint64_t whole_bytes_;  // of a segment that is decoded at once
  Directory directory_;
  std::vector<std::size_t> frames_;
  std::uint64_t hidden_ = 0, hidden_start_ = 0;
  Page stack_;  // what each of the hidden frames looks like
  Cache cache_;
  std::atomic<bool> cancelled_{false};
  std::atomic<std::uint64_t> decoded_{0};
  std::mutex mutex_;
  std::list<std::pair<std::uint64_t, Table>> tables_;  // of the pages read last
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex running_mutex_;
  std::list<Running> running_;  // the one used last first
};

}  // namespace xrk::tiff
