// What a TIFF file is made of, for the reader and the writer alike: numbers of tags, types and codecs, and how a page's
// pixels lie in its segments (TIFF 6.0, sections 2, 8, 14 and 15; BigTIFF; Technical Note 3 for predictor 3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace xrk::tiff {

enum class ByteOrder : std::uint8_t { little, big };

constexpr ByteOrder machine_order =
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    ByteOrder::big;
#else
    ByteOrder::little;
#endif

enum class Compression : std::uint16_t {
  none = 1,
  lzw = 5,
  deflate = 8,
  packbits = 32773,
  old_deflate = 32946,  // the same zlib stream as 8, under the number it had before
  zstd = 50000,
};

enum class Predictor : std::uint16_t { none = 1, horizontal = 2, floating = 3 };

enum class SampleFormat : std::uint16_t { unsigned_integer = 1, signed_integer = 2, floating = 3 };

enum Tag : std::uint16_t {
  NEW_SUBFILE_TYPE = 254,
  IMAGE_WIDTH = 256,
  IMAGE_LENGTH = 257,
  BITS_PER_SAMPLE = 258,
  COMPRESSION = 259,
  PHOTOMETRIC = 262,
  FILL_ORDER = 266,
  IMAGE_DESCRIPTION = 270,
  STRIP_OFFSETS = 273,
  SAMPLES_PER_PIXEL = 277,
  ROWS_PER_STRIP = 278,
  STRIP_BYTE_COUNTS = 279,
  X_RESOLUTION = 282,
  Y_RESOLUTION = 283,
  RESOLUTION_UNIT = 296,
  SOFTWARE = 305,
  PREDICTOR = 317,
  TILE_WIDTH = 322,
  TILE_LENGTH = 323,
  TILE_OFFSETS = 324,
  TILE_BYTE_COUNTS = 325,
  SAMPLE_FORMAT = 339,
  IMAGE_DEPTH = 32997,
  UIC2 = 33629,  // MetaMorph's stacks: one page that stands for many
};

enum FieldType : std::uint16_t {
  BYTE = 1, ASCII, SHORT, LONG, RATIONAL, SBYTE, UNDEFINED, SSHORT, SLONG, SRATIONAL, FLOAT, DOUBLE, IFD,
  LONG8 = 16, SLONG8, IFD8,
};

// Bytes of one value; 0 for a type that is none.
constexpr std::size_t field_bytes(std::uint16_t type) {
  constexpr std::uint8_t bytes[19] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8};
  return type < 19 ? bytes[type] : 0;
}

// Classic TIFF and BigTIFF differ in these sizes alone.
struct Variant {
  bool big;
  ByteOrder order;
  std::size_t header_bytes() const { return big ? 16 : 8; }
  std::size_t count_bytes() const { return big ? 8 : 2; }   // of the number of entries of a directory
  std::size_t entry_bytes() const { return big ? 20 : 12; }
  std::size_t offset_bytes() const { return big ? 8 : 4; }  // of an offset, and of the value inside an entry
};

// Integers of `bytes` bytes (1, 2, 4 or 8) in a file's byte order.
inline std::uint64_t load_integer(const unsigned char* at, std::size_t bytes, ByteOrder order) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < bytes; ++i) {
    value |= static_cast<std::uint64_t>(at[i]) << 8 * (order == ByteOrder::little ? i : bytes - 1 - i);
  }
  return value;
}

inline void store_integer(unsigned char* at, std::uint64_t value, std::size_t bytes, ByteOrder order) {
  for (std::size_t i = 0; i < bytes; ++i) {
    at[i] = static_cast<unsigned char>(value >> 8 * (order == ByteOrder::little ? i : bytes - 1 - i));
  }
}

// What goes wrong with a file. `offset` is the byte that it was seen at; `none` where no one byte is to blame.
class Failure : public std::runtime_error {
 public:
  enum class Kind {
    damaged,      // not what TIFF asks for, cut off, or impossible
    unsupported,  // sound as far as was seen, but nothing that this code reads or writes
    system,       // the operating system's refusal: reading, writing, memory
    cancelled,    // the caller no longer wants it
  };
  static constexpr std::uint64_t none = ~std::uint64_t{0};

  Failure(Kind kind, const std::string& what, std::uint64_t offset = none)
      : std::runtime_error(what), kind(kind), offset(offset) {}

  const Kind kind;
  const std::uint64_t offset;
};

// 64-bit arithmetic on what a file says; it fails instead of wrapping round.
inline std::uint64_t checked_multiply(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw Failure(Failure::Kind::damaged, "its sizes exceed 64 bits");
  return product;
}

inline std::uint64_t checked_add(std::uint64_t a, std::uint64_t b) {
  std::uint64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw Failure(Failure::Kind::damaged, "its sizes exceed 64 bits");
  return sum;
}

constexpr std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) { return a / b + (a % b != 0); }

// How the pixels of one page are stored: one sample per pixel, in strips or tiles ("segments"), row by row. All sides
// are at least 1, and make_geometry of the reader has checked that nothing below exceeds 64 bits.
struct Geometry {
  std::uint64_t width = 0, height = 0;
  std::uint64_t segment_width = 0, segment_height = 0;  // of a whole segment; a strip is as wide as the image
  std::uint16_t bits = 0;                               // of a stored pixel: 8, 16, 32, 64, or packed 10, 12, 14
  SampleFormat format = SampleFormat::unsigned_integer;
  Compression compression = Compression::none;
  Predictor predictor = Predictor::none;
  ByteOrder order = machine_order;
  bool tiled = false;

  bool packed() const { return bits % 8 != 0; }
  // Bytes of a pixel once it is decoded: packed ones come in the next larger integer.
  std::size_t pixel_bytes() const { return packed() ? 2 : bits / 8u; }
  std::uint64_t across() const { return tiled ? divide_up(width, segment_width) : 1; }
  std::uint64_t down() const { return divide_up(height, segment_height); }
  std::uint64_t segments() const { return across() * down(); }
  // Rows that a segment stores: tiles are always whole, the last strip ends with the image.
  std::uint64_t stored_rows(std::uint64_t segment) const {
    if (tiled) return segment_height;
    const std::uint64_t first = segment * segment_height;
    return height - first < segment_height ? height - first : segment_height;
  }
  // Bytes of one row of a segment, uncompressed: rows begin at whole bytes.
  std::uint64_t row_bytes() const { return packed() ? (segment_width * bits + 7) / 8 : segment_width * (bits / 8u); }
  std::uint64_t stored_bytes(std::uint64_t segment) const { return stored_rows(segment) * row_bytes(); }
  std::uint64_t decoded_bytes(std::uint64_t segment) const {
    return stored_rows(segment) * segment_width * pixel_bytes();
  }
};

}  // namespace xrk::tiff
