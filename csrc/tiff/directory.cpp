#include "directory.h"

#include <algorithm>
#include <array>
#include <unordered_set>

#include "stream.h"

namespace xrk::tiff {
namespace {

using std::to_string;

[[noreturn]] void damaged(const std::string& what, std::uint64_t offset) {
  throw Failure(Failure::Kind::damaged, what, offset);
}

[[noreturn]] void unsupported(const std::string& what) { throw Failure(Failure::Kind::unsupported, what); }

// The tags that say where and how the pixels lie. Each may be there once, with a type that it can have.
constexpr std::array<std::uint16_t, 19> structural = {
    NEW_SUBFILE_TYPE, IMAGE_WIDTH,  IMAGE_LENGTH, BITS_PER_SAMPLE, COMPRESSION,    PHOTOMETRIC,      FILL_ORDER,
    STRIP_OFFSETS,    SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTE_COUNTS, PREDICTOR, TILE_WIDTH,  TILE_LENGTH,
    TILE_OFFSETS,     TILE_BYTE_COUNTS,  SAMPLE_FORMAT,  IMAGE_DEPTH,       UIC2,
};

constexpr bool is_unsigned(std::uint16_t type) {
  return type == BYTE || type == SHORT || type == LONG || type == LONG8 || type == IFD || type == IFD8;
}

// A page's structural tags by their place in `structural`.
class Tags {
 public:
  // block: the directory's entries, which lie at `start` in the file.
  Tags(const Input& input, ByteOrder order, const std::vector<unsigned char>& block, std::uint64_t start)
      : input_(input), order_(order), block_(block), start_(start) {}

  // False for a tag that is none of these.
  bool add(std::uint16_t tag, const Values& values, bool inside, std::uint64_t entry_offset) {
    const auto found = std::find(structural.begin(), structural.end(), tag);
    if (found == structural.end()) return false;
    const auto at = static_cast<std::size_t>(found - structural.begin());
    if (present_[at]) damaged("its tag " + to_string(tag) + " is there twice", entry_offset);
    present_[at] = true;
    values_[at] = values;
    if (tag == UIC2) return true;
    if (!is_unsigned(values.type)) {
      damaged("its tag " + to_string(tag) + " has type " + to_string(values.type) + ", expected an unsigned integer",
              entry_offset);
    }
    if (values.count == 0) damaged("its tag " + to_string(tag) + " has no value", entry_offset);
    if (!inside) {
      damaged("the " + to_string(values.count) + " values of its tag " + to_string(tag) + " lie outside the file",
              entry_offset);
    }
    return true;
  }

  bool has(Tag tag) const { return present_[place(tag)]; }
  const Values& values(Tag tag) const { return values_[place(tag)]; }

  std::uint64_t number(Tag tag, std::uint64_t missing) const { return has(tag) ? number(tag) : missing; }

  std::uint64_t number(Tag tag) const {
    const Values& values = values_[place(tag)];
    if (values.count != 1) {
      damaged("its tag " + to_string(tag) + " has " + to_string(values.count) + " values, expected one", values.offset);
    }
    const std::size_t bytes = values.bytes();
    if (values.offset >= start_ && values.offset + bytes <= start_ + block_.size()) {
      return load_integer(block_.data() + (values.offset - start_), bytes, order_);
    }
    unsigned char elsewhere[8];
    input_.read(values.offset, elsewhere, bytes);
    return load_integer(elsewhere, bytes, order_);
  }

  std::uint64_t required(Tag tag, std::uint64_t page_offset) const {
    if (!has(tag)) damaged("a page without tag " + to_string(tag) + ", which TIFF asks for", page_offset);
    return number(tag);
  }

 private:
  static std::size_t place(Tag tag) {
    return static_cast<std::size_t>(std::find(structural.begin(), structural.end(), tag) - structural.begin());
  }

  const Input& input_;
  ByteOrder order_;
  const std::vector<unsigned char>& block_;
  std::uint64_t start_;
  std::array<bool, structural.size()> present_{};
  std::array<Values, structural.size()> values_{};
};

// The most bytes that one stored byte can stand for, from each codec's own format: 258 bytes from 2 bits; 128 from two
// bytes; a table of 4096 strings and codes of 9 bits at least; a block of 128 KiB from 4 bytes.
std::uint64_t largest_ratio(Compression compression) {
  switch (compression) {
    case Compression::deflate:
    case Compression::old_deflate:
      return 1032;
    case Compression::packbits:
      return 64;
    case Compression::lzw:
      return 4096;
    case Compression::zstd:
      return 32768;
    case Compression::none:
      break;
  }
  return 1;
}

// A page's geometry from its tags. Failure (unsupported) for pages beyond this reader, before anything else about them
// is judged.
Geometry make_geometry(const Tags& tags, std::uint64_t page_offset, ByteOrder order, const Limits& limits) {
  if (tags.has(UIC2)) unsupported("a MetaMorph stack");
  const std::uint64_t samples = tags.number(SAMPLES_PER_PIXEL, 1);
  if (samples != 1) unsupported(to_string(samples) + " samples per pixel");
  const std::uint64_t photometric = tags.number(PHOTOMETRIC, 1);
  if (photometric > 1) unsupported("photometric interpretation " + to_string(photometric));
  if (tags.number(IMAGE_DEPTH, 1) != 1) unsupported("a volume");
  if (tags.number(FILL_ORDER, 1) != 1) unsupported("bits in reversed order");

  Geometry g;
  g.order = order;
  const std::uint64_t compression = tags.number(COMPRESSION, 1);
  switch (compression) {
    case 1: case 5: case 8: case 32773: case 32946: case 50000:
      g.compression = static_cast<Compression>(compression);
      break;
    default:
      unsupported("compression " + to_string(compression));
  }
  const std::uint64_t bits = tags.number(BITS_PER_SAMPLE, 1);
  const std::uint64_t format = tags.number(SAMPLE_FORMAT, 1);
  const bool whole = bits == 8 || bits == 16 || bits == 32;
  const bool known = format == 3   ? bits == 16 || bits == 32 || bits == 64
                     : format == 2 ? whole
                     : format == 1 ? whole || bits == 10 || bits == 12 || bits == 14
                                   : false;
  if (!known) unsupported("pixels of " + to_string(bits) + " bits in sample format " + to_string(format));
  g.bits = static_cast<std::uint16_t>(bits);
  g.format = static_cast<SampleFormat>(format);
  const std::uint64_t predictor = tags.number(PREDICTOR, 1);
  if (predictor < 1 || predictor > 3) unsupported("predictor " + to_string(predictor));
  g.predictor = static_cast<Predictor>(predictor);
  if (g.predictor != Predictor::none) {
    if (g.compression == Compression::none) unsupported("a predictor without a compression");
    if (g.packed()) unsupported("a predictor with packed pixels");
    if (g.predictor == Predictor::floating && g.format != SampleFormat::floating) {
      damaged("it has the floating-point predictor, and integers", page_offset);
    }
  }

  g.width = tags.required(IMAGE_WIDTH, page_offset);
  g.height = tags.required(IMAGE_LENGTH, page_offset);
  const std::string size = to_string(g.width) + " x " + to_string(g.height) + " pixels";
  if (g.width == 0 || g.height == 0) damaged("it declares " + size, page_offset);
  if (g.width > limits.side || g.height > limits.side || checked_multiply(g.width, g.height) > limits.pixels) {
    damaged("it declares " + size + ", more than xrk takes", page_offset);
  }
  g.tiled = tags.has(TILE_WIDTH) || tags.has(TILE_LENGTH) || tags.has(TILE_OFFSETS);
  if (g.tiled) {
    g.segment_width = tags.required(TILE_WIDTH, page_offset);
    g.segment_height = tags.required(TILE_LENGTH, page_offset);
  } else {
    g.segment_width = g.width;
    g.segment_height = std::min(tags.number(ROWS_PER_STRIP, g.height), g.height);
  }
  // Tiles may stand out of the image, but not by more than writers ever make them.
  constexpr std::uint64_t beyond = 65536;
  if (g.segment_width == 0 || g.segment_height == 0 || g.segment_width > g.width + beyond ||
      g.segment_height > g.height + beyond) {
    damaged("it declares " + std::string(g.tiled ? "tiles" : "strips") + " of " + to_string(g.segment_width) + " x " +
                to_string(g.segment_height) + " pixels in an image of " + size,
            page_offset);
  }
  return g;
}

}  // namespace

Directory::Directory(const Input& input, const Limits& limits) : input_(input), limits_(limits) {
  unsigned char head[16] = {};
  input.read(0, head, std::min<std::uint64_t>(input.size(), sizeof head));
  if (input.size() < 8 || head[0] != head[1] || (head[0] != 'I' && head[0] != 'M')) damaged("it is no TIFF file", 0);
  variant_.order = head[0] == 'I' ? ByteOrder::little : ByteOrder::big;
  const std::uint64_t version = load_integer(head + 2, 2, variant_.order);
  if (version != 42 && version != 43) damaged("it is no TIFF file", 2);
  variant_.big = version == 43;
  if (variant_.big && (load_integer(head + 4, 2, variant_.order) != 8 || head[6] != 0 || head[7] != 0)) {
    damaged("a BigTIFF header has offsets of 8 bytes, this one has others", 4);
  }
  std::uint64_t next = load_integer(head + (variant_.big ? 8 : 4), variant_.offset_bytes(), variant_.order);
  if (variant_.big && input.size() < 16) damaged("it ends inside its header", input.size());

  std::unordered_set<std::uint64_t> seen;
  std::uint64_t entry_bytes = 0;
  while (next != 0 || pages_.empty()) {
    const std::string number = to_string(pages_.size() + 1);
    if (next < variant_.header_bytes() || !input.holds(next, variant_.count_bytes())) {
      damaged("page " + number + " is said to lie there, in a file of " + to_string(input.size()) + " bytes", next);
    }
    if (!seen.insert(next).second) damaged("its pages never end: page " + number + " lies there", next);
    if (pages_.size() >= limits.pages) damaged("it has page " + number + " there, more than xrk takes", next);
    Page page;
    page.offset = next;
    const std::vector<unsigned char> block = read_entries(page.offset, next);
    // Directories that do not share bytes fit into the file together.
    entry_bytes += block.size();
    if (entry_bytes > input.size()) damaged("its directories overlap", page.offset);
    look_at(page, block);
    pages_.push_back(page);
  }
}

// The entries of the directory at `offset`, as they are in the file, and the offset of the next directory.
std::vector<unsigned char> Directory::read_entries(std::uint64_t offset, std::uint64_t& next) const {
  unsigned char number[8];
  input_.read(offset, number, variant_.count_bytes());
  const std::uint64_t entries = load_integer(number, variant_.count_bytes(), variant_.order);
  const std::uint64_t start = offset + variant_.count_bytes();
  if (entries == 0) damaged("a directory without an entry", offset);
  if (entries > input_.size() / variant_.entry_bytes() ||
      !input_.holds(start, entries * variant_.entry_bytes() + variant_.offset_bytes())) {
    damaged("a directory of " + to_string(entries) + " entries does not end inside the file", offset);
  }
  std::vector<unsigned char> block(entries * variant_.entry_bytes() + variant_.offset_bytes());
  input_.read(start, block.data(), block.size());
  block.resize(entries * variant_.entry_bytes());
  unsigned char link[8];
  input_.read(start + block.size(), link, variant_.offset_bytes());
  next = load_integer(link, variant_.offset_bytes(), variant_.order);
  return block;
}

// Where an entry's values lie; false where they are not inside the file.
bool Directory::read_values(const unsigned char* entry, std::uint64_t entry_offset, Values& values) const {
  values.type = static_cast<std::uint16_t>(load_integer(entry + 2, 2, variant_.order));
  values.count = load_integer(entry + 4, variant_.offset_bytes(), variant_.order);
  const std::size_t each = field_bytes(values.type);
  const std::size_t place = 4 + variant_.offset_bytes();
  values.offset = entry_offset + place;
  if (each == 0 || values.count > input_.size() / each) return false;
  if (values.bytes() > variant_.offset_bytes()) {
    values.offset = load_integer(entry + place, variant_.offset_bytes(), variant_.order);
  }
  return input_.holds(values.offset, values.bytes());
}

void Directory::look_at(Page& page, const std::vector<unsigned char>& block) {
  const std::uint64_t start = page.offset + variant_.count_bytes();
  Tags tags(input_, variant_.order, block, start);
  for (std::size_t at = 0; at < block.size(); at += variant_.entry_bytes()) {
    Values values;
    const bool inside = read_values(block.data() + at, start + at, values);
    const auto tag = static_cast<std::uint16_t>(load_integer(block.data() + at, 2, variant_.order));
    tags.add(tag, values, inside, start + at);
  }
  page.subfile_type = static_cast<std::uint32_t>(tags.number(NEW_SUBFILE_TYPE, 0));
  if (!page.full() || !unsupported_.empty()) return;
  try {
    page.geometry = make_geometry(tags, page.offset, variant_.order, limits_);
  } catch (const Failure& failure) {
    if (failure.kind != Failure::Kind::unsupported) throw;
    unsupported_ = failure.what();
    return;
  }
  const Geometry& g = page.geometry;
  page.photometric = static_cast<std::uint16_t>(tags.number(PHOTOMETRIC, 1));
  const std::uint64_t expected = g.segments();
  const std::string what = g.tiled ? " tiles" : " strips";
  for (const bool sizes : {false, true}) {
    const Tag tag = g.tiled ? (sizes ? TILE_BYTE_COUNTS : TILE_OFFSETS) : (sizes ? STRIP_BYTE_COUNTS : STRIP_OFFSETS);
    // Old writers leave out how long uncompressed strips are: as long as their pixels.
    if (sizes && !tags.has(tag) && !g.tiled && g.compression == Compression::none) continue;
    if (!tags.has(tag)) damaged("a page without tag " + to_string(tag) + ", which TIFF asks for", page.offset);
    const Values& values = tags.values(tag);
    if (values.count != expected) {
      damaged("its tag " + to_string(tag) + " lists " + to_string(values.count) + what + " where its size asks for " +
                  to_string(expected),
              values.offset);
    }
    (sizes ? page.counts : page.offsets) = values;
  }
  const std::uint64_t largest = std::max(checked_multiply(g.row_bytes(), g.segment_height), g.decoded_bytes(0));
  if (g.compression != Compression::none && largest > limits_.segment_bytes && !can_stream(g.compression)) {
    unsupported_ = "compressed" + what + " of " + to_string(largest) + " bytes, which no library here decodes in parts";
  }
}

// Calls visit(segment) for each of the page's segments in turn, after it was checked.
template <typename Visit>
void Directory::visit_segments(const Page& page, const Visit& visit) const {
  const Geometry& g = page.geometry;
  const std::uint64_t ratio = largest_ratio(g.compression);
  const std::size_t offset_size = field_bytes(page.offsets.type), count_size = field_bytes(page.counts.type);
  constexpr std::uint64_t at_once = 4096;
  unsigned char offsets[8 * at_once], counts[8 * at_once];
  for (std::uint64_t first = 0; first < page.offsets.count; first += at_once) {
    const std::uint64_t number = std::min(at_once, page.offsets.count - first);
    input_.read(page.offsets.offset + first * offset_size, offsets, number * offset_size);
    const bool counted = page.counts.count != 0;
    if (counted) input_.read(page.counts.offset + first * count_size, counts, number * count_size);
    for (std::uint64_t i = 0; i < number; ++i) {
      const std::uint64_t needed = g.stored_bytes(first + i);
      const Segment segment{load_integer(offsets + i * offset_size, offset_size, variant_.order),
                            counted ? load_integer(counts + i * count_size, count_size, variant_.order) : needed};
      const auto name = [&] {
        return std::string(g.tiled ? "tile " : "strip ") + to_string(first + i + 1) + " of " +
               to_string(page.offsets.count);
      };
      if (segment.offset < variant_.header_bytes() || segment.bytes == 0) {
        damaged(name() + " was never written: it has " + to_string(segment.bytes) + " bytes at " +
                    to_string(segment.offset),
                page.offsets.offset + (first + i) * offset_size);
      }
      if (!input_.holds(segment.offset, segment.bytes)) {
        damaged(name() + " is cut off: " + to_string(segment.bytes) + " bytes are expected there, and the file ends at " +
                    to_string(input_.size()),
                segment.offset);
      }
      if (segment.bytes < divide_up(needed, ratio)) {
        damaged(name() + " is too short: " + to_string(segment.bytes) + " bytes cannot hold the " + to_string(needed) +
                    " of its pixels",
                segment.offset);
      }
      if (g.compression != Compression::none && needed > limits_.bomb_bytes &&
          segment.bytes < needed / limits_.growth) {
        damaged(name() + " grows from " + to_string(segment.bytes) + " to " + to_string(needed) +
                    " bytes, more than xrk takes",
                segment.offset);
      }
      visit(segment);
    }
  }
}

std::vector<Segment> Directory::segments(const Page& page) const {
  std::vector<Segment> table;
  table.reserve(page.offsets.count);
  visit_segments(page, [&](const Segment& segment) { table.push_back(segment); });
  return table;
}

void Directory::check_segments() const {
  // Tables that do not share bytes fit into the file together; twice that leaves room for writers that share some.
  std::uint64_t bytes = 0;
  for (const Page& page : pages_) {
    if (!page.full()) continue;
    bytes += page.offsets.bytes() + page.counts.bytes();
    if (bytes / 2 > input_.size()) damaged("its tables of segments overlap", page.offsets.offset);
    visit_segments(page, [](const Segment&) {});
  }
}

std::vector<Entry> Directory::entries(const Page& page) const {
  std::uint64_t next = 0;
  const std::vector<unsigned char> block = read_entries(page.offset, next);
  std::vector<Entry> entries;
  std::unordered_set<std::uint16_t> seen;
  for (std::size_t at = 0; at < block.size(); at += variant_.entry_bytes()) {
    Entry entry;
    entry.tag = static_cast<std::uint16_t>(load_integer(block.data() + at, 2, variant_.order));
    const bool inside =
        read_values(block.data() + at, page.offset + variant_.count_bytes() + at, entry.values);
    if (inside && seen.insert(entry.tag).second) entries.push_back(entry);
  }
  return entries;
}

}  // namespace xrk::tiff
