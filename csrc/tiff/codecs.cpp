#include "codecs.h"

#include <cstring>
#include <memory>
#include <new>

#include "libraries.h"

namespace xrk::tiff {

// --- LZW ------------------------------------------------------------------------------------------------------------
//
// Every string of the table but the single bytes stands in the output already: where its code was made, one string and
// the first byte of the next. An entry is that place, and the string's first eight bytes, so that the short strings
// of noisy images are one load and one store.

namespace {

struct Phrase {
  std::uint64_t head;    // its first eight bytes, the first one lowest; zero beyond its end
  std::uint32_t start;   // where it stands in the output
  std::uint32_t length;  // 0: no string
};

constexpr unsigned clear_code = 256, end_code = 257, first_free = 258, table_size = 4096;

inline std::uint64_t load_big_endian(const unsigned char* at) {
  std::uint64_t value;
  std::memcpy(&value, at, 8);
  return machine_order == ByteOrder::little ? __builtin_bswap64(value) : value;
}

inline void store_head(unsigned char* at, std::uint64_t head) {
  if (machine_order == ByteOrder::big) head = __builtin_bswap64(head);
  std::memcpy(at, &head, 8);
}

// head, its string `length` long, with one more byte.
inline std::uint64_t append(std::uint64_t head, std::uint32_t length, std::uint64_t byte) {
  return length < 8 ? head | byte << 8 * length : head;
}

}  // namespace

Outcome decode_lzw(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes) {
  // One entry more than there are codes: the last one is made and never used.
  Phrase table[table_size + 1];
  for (unsigned code = 0; code < clear_code; ++code) table[code] = {code, 0, 1};
  table[clear_code] = table[end_code] = {0, 0, 0};

  const unsigned char* const base = out;
  unsigned char* const end = out + out_bytes;
  const std::uint64_t bits = std::uint64_t{in_bytes} * 8;
  std::uint64_t at = 0;
  unsigned width = 9;
  const auto next_code = [&]() {
    const std::uint64_t window = load_big_endian(in + (at >> 3));
    const auto code = static_cast<unsigned>(window >> (64 - width - (at & 7))) & ((1u << width) - 1);
    at += width;
    return code;
  };

  while (out < end) {
    // Behind a clear code, and at the start: a single byte.
    width = 9;
    if (bits - at < width) return Outcome::too_short;
    unsigned code = next_code();
    if (code == clear_code) continue;
    if (code == end_code) return Outcome::too_short;
    if (code > end_code) return Outcome::corrupt;
    *out = static_cast<unsigned char>(code);
    // The entry that the next code completes: this string, and for now its own first byte, which is what the next
    // code's string begins with where that code is this very entry.
    unsigned free = first_free;
    std::uint64_t pending = code;
    std::uint32_t pending_length = 1;
    table[free] = {append(pending, 1, code), static_cast<std::uint32_t>(out - base), 2};
    ++out;

    bool cleared = false;
    while (!cleared && out < end) {
      // A run of codes of one width.
      const unsigned limit = width < 12 ? (1u << width) - 1 : table_size;
      std::uint64_t run = (bits - at) / width;
      if (run == 0) return Outcome::too_short;
      const bool full = free == table_size;  // without a clear code, the table stays as it is
      if (!full && run > limit - free) run = limit - free;
      for (; run > 0; --run) {
        code = next_code();
        const Phrase phrase = table[code];
        if (__builtin_expect(code > free || phrase.length == 0, false)) {
          if (out == end) return Outcome::complete;
          if (code == clear_code) {
            cleared = true;
            break;
          }
          return code == end_code ? Outcome::too_short : Outcome::corrupt;
        }
        if (__builtin_expect(phrase.length > static_cast<std::size_t>(end - out), false)) {
          return out == end ? Outcome::complete : Outcome::too_long;
        }
        const std::uint64_t first = phrase.head & 255;
        if (!full) table[free].head = append(pending, pending_length, first);
        const auto place = static_cast<std::uint32_t>(out - base);
        store_head(out, phrase.head);
        for (std::uint32_t done = 8; done < phrase.length; done += 8) {
          // The string may end where it is written now; it begins at least eight bytes before.
          std::memcpy(out + done, base + phrase.start + done, 8);
        }
        out += phrase.length;
        if (!full) {
          ++free;
          pending = phrase.head;
          pending_length = phrase.length;
          table[free] = {append(pending, pending_length, first), place, pending_length + 1};
        }
      }
      if (!cleared && free == limit && width < 12) ++width;
    }
  }
  return Outcome::complete;
}

// --- PackBits -------------------------------------------------------------------------------------------------------

Outcome decode_packbits(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes) {
  const unsigned char* const in_end = in + in_bytes;
  unsigned char* const end = out + out_bytes;
  while (out < end) {
    if (in == in_end) return Outcome::too_short;
    const unsigned head = *in++;
    if (head == 128) continue;  // nothing
    const std::size_t count = head < 128 ? head + 1 : 257 - head;
    const std::size_t taken = head < 128 ? count : 1;
    if (taken > static_cast<std::size_t>(in_end - in)) return Outcome::too_short;
    if (count > static_cast<std::size_t>(end - out)) return Outcome::too_long;
    if (head < 128) {
      std::memcpy(out, in, count);
    } else {
      std::memset(out, *in, count);
    }
    in += taken;
    out += count;
  }
  return Outcome::complete;
}

// --- the libraries' codecs ------------------------------------------------------------------------------------------

Decoders::~Decoders() {
  if (libdeflate_ != nullptr) free_libdeflate_(libdeflate_);
  if (zstd_ != nullptr) free_zstd_(zstd_);
}

Outcome Decoders::decode_deflate(const unsigned char* in, std::size_t in_bytes, unsigned char* out,
                                 std::size_t out_bytes) {
  if (const Libdeflate* library = libdeflate()) {
    if (libdeflate_ == nullptr) libdeflate_ = library->alloc_decompressor();
    if (libdeflate_ == nullptr) throw std::bad_alloc();
    free_libdeflate_ = library->free_decompressor;
    std::size_t written = 0;
    switch (library->zlib_decompress(libdeflate_, in, in_bytes, out, out_bytes, &written)) {
      case Libdeflate::success:
        return written == out_bytes ? Outcome::complete : Outcome::too_short;
      case Libdeflate::short_output:
        return Outcome::too_short;
      case Libdeflate::insufficient_space:
        return Outcome::too_long;
      default:
        return Outcome::corrupt;
    }
  }
  const Zlib* library = zlib();
  if (library == nullptr) return Outcome::corrupt;
  unsigned long written = out_bytes;
  const int result = library->uncompress(out, &written, in, in_bytes);
  if (result == 0) return written == out_bytes ? Outcome::complete : Outcome::too_short;
  if (result == -4) throw std::bad_alloc();
  return result == -5 && written == out_bytes ? Outcome::too_long : Outcome::corrupt;
}

Outcome Decoders::decode_zstd(const unsigned char* in, std::size_t in_bytes, unsigned char* out,
                              std::size_t out_bytes) {
  const Libzstd* library = libzstd();
  if (library == nullptr) return Outcome::corrupt;
  if (zstd_ == nullptr) zstd_ = library->create_decompressor();
  if (zstd_ == nullptr) throw std::bad_alloc();
  free_zstd_ = library->free_decompressor;
  const std::size_t written = library->decompress(zstd_, out, out_bytes, in, in_bytes);
  if (!library->is_error(written)) return written == out_bytes ? Outcome::complete : Outcome::too_short;
  return std::strstr(library->error_name(written), "too small") ? Outcome::too_long : Outcome::corrupt;
}

Outcome Decoders::decode(Compression compression, const unsigned char* in, std::size_t in_bytes, unsigned char* out,
                         std::size_t out_bytes) {
  switch (compression) {
    case Compression::lzw:
      return decode_lzw(in, in_bytes, out, out_bytes);
    case Compression::packbits:
      return decode_packbits(in, in_bytes, out, out_bytes);
    case Compression::deflate:
    case Compression::old_deflate:
      return decode_deflate(in, in_bytes, out, out_bytes);
    case Compression::zstd:
      return decode_zstd(in, in_bytes, out, out_bytes);
    case Compression::none:
      break;
  }
  if (in_bytes < out_bytes) return Outcome::too_short;
  std::memcpy(out, in, out_bytes);
  return Outcome::complete;
}

bool can_decode(Compression compression) {
  switch (compression) {
    case Compression::deflate:
    case Compression::old_deflate:
      return have_deflate();
    case Compression::zstd:
      return have_zstd();
    default:
      return true;
  }
}

}  // namespace xrk::tiff
