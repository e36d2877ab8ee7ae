// The directories (IFDs) of a file: its pages, and where their segments lie. Everything that a file says is checked
// here before anything is allocated or read because of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "format.h"
#include "input.h"

namespace xrk::tiff {

struct Limits {
  std::uint64_t side = (std::uint64_t{1} << 31) - 1;     // pixels in one direction
  std::uint64_t pixels = std::uint64_t{1} << 40;         // of a page
  std::uint64_t pages = std::uint64_t{1} << 18;
  std::uint64_t segment_bytes = std::uint64_t{1} << 25;  // of a compressed segment that is decoded at once
  // Compressed segments beyond this size may not grow more than `growth` times: a small file must not fill the memory.
  std::uint64_t bomb_bytes = std::uint64_t{1} << 28;
  std::uint64_t growth = 32;
};

// Values of a tag: where they lie in the file, inside the entry or elsewhere.
struct Values {
  std::uint16_t type = 0;
  std::uint64_t count = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes() const { return count * field_bytes(type); }
};

struct Page {
  std::uint64_t offset = 0;        // of its directory
  std::uint32_t subfile_type = 0;  // bit 0: a reduced copy, bit 2: a mask; only offset and this are known of both
  std::uint16_t photometric = 1;
  Geometry geometry;
  Values offsets, counts;  // of its segments; no counts: each is as long as its pixels

  bool full() const { return (subfile_type & 0b101) == 0; }
};

// Where a page's segments lie.
struct Segment {
  std::uint64_t offset, bytes;
};

struct Entry {
  std::uint16_t tag;
  Values values;
};

class Directory {
 public:
  // Walks all pages. A Failure (damaged) where the chain or a page is not sound. Pages that are sound as far as they
  // were looked at but beyond this reader end the look at pages; `unsupported` then says what the first one is.
  Directory(const Input& input, const Limits& limits);

  const Variant& variant() const { return variant_; }
  const std::vector<Page>& pages() const { return pages_; }
  const std::string& unsupported() const { return unsupported_; }

  // The page's segments, each of them inside the file and able to hold its pixels. Fails where one is not.
  std::vector<Segment> segments(const Page& page) const;

  // Looks at the segments of every page, as `segments` does, and keeps nothing.
  void check_segments() const;

  // A page's entries whose values lie inside the file; no tag twice.
  std::vector<Entry> entries(const Page& page) const;

 private:
  std::vector<unsigned char> read_entries(std::uint64_t offset, std::uint64_t& next) const;
  bool read_values(const unsigned char* entry, std::uint64_t entry_offset, Values& values) const;
  void look_at(Page& page, const std::vector<unsigned char>& block);
  template <typename Visit>
  void visit_segments(const Page& page, const Visit& visit) const;

  const Input& input_;
  Limits limits_;
  Variant variant_{false, ByteOrder::little};
  std::vector<Page> pages_;
  std::string unsupported_;
};

}  // namespace xrk::tiff
