#include "stream.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "libraries.h"

namespace xrk::tiff {
namespace {

constexpr std::size_t piece = std::size_t{1} << 16;  // bytes of a file that are read at a time

// The stored bytes of a segment, piece by piece.
class Stored {
 public:
  Stored(const Input& input, std::uint64_t offset, std::uint64_t bytes)
      : input_(input), offset_(offset), left_(bytes), piece_(std::min<std::uint64_t>(piece, bytes)) {}

  // The next piece, which stands until the next call; 0 bytes at the end.
  std::size_t more(const unsigned char*& at) {
    const auto bytes = static_cast<std::size_t>(std::min<std::uint64_t>(piece_.size(), left_));
    input_.read(offset_, piece_.data(), bytes);
    offset_ += bytes;
    left_ -= bytes;
    at = piece_.data();
    return bytes;
  }

 private:
  const Input& input_;
  std::uint64_t offset_, left_;
  std::vector<unsigned char> piece_;
};

// The same, byte by byte.
class Bytes {
 public:
  Bytes(const Input& input, std::uint64_t offset, std::uint64_t bytes) : stored_(input, offset, bytes) {}

  bool take(unsigned char& byte) {
    if (at_ == end_) {
      end_ = stored_.more(piece_);
      at_ = 0;
      if (end_ == 0) return false;
    }
    byte = piece_[at_++];
    return true;
  }

 private:
  Stored stored_;
  const unsigned char* piece_ = nullptr;
  std::size_t at_ = 0, end_ = 0;
};

// --- our own codecs ---------------------------------------------------------------------------------------------------

// As decode_lzw, but a string is spelt from its last byte to its first, by the codes that it grew from: what it was a
// copy of is no longer there.
class LzwStream : public SegmentStream {
 public:
  LzwStream(const Input& input, std::uint64_t offset, std::uint64_t bytes) : bytes_(input, offset, bytes) {
    for (unsigned code = 0; code < clear_code; ++code) {
      strings_[code] = {0, 1, static_cast<unsigned char>(code), static_cast<unsigned char>(code)};
    }
  }

  Outcome next(unsigned char* out, std::size_t bytes) override {
    while (bytes > 0) {
      if (told_ < length_) {
        const std::size_t part = std::min(bytes, length_ - told_);
        std::memcpy(out, spelt_ + told_, part);
        told_ += part;
        out += part;
        bytes -= part;
        continue;
      }
      unsigned code;
      if (!next_code(code) || code == end_code) return Outcome::too_short;
      if (code == clear_code) {
        previous_ = none;
        width_ = 9;
        continue;
      }
      if (previous_ == none) {
        if (code > end_code) return Outcome::corrupt;
        free_ = first_free;
      } else {
        if (code > free_) return Outcome::corrupt;
        if (free_ < table_size) {
          // The last string with the first byte of this one, which may be that very string.
          const String& before = strings_[previous_];
          const unsigned char first = code == free_ ? before.first : strings_[code].first;
          strings_[free_++] = {static_cast<std::uint16_t>(previous_), static_cast<std::uint16_t>(before.length + 1),
                               before.first, first};
        }
        if (width_ < 12 && free_ == (1u << width_) - 1) ++width_;
      }
      previous_ = code;
      length_ = strings_[code].length;
      told_ = 0;
      for (std::size_t at = length_; at-- > 0; code = strings_[code].before) spelt_[at] = strings_[code].last;
    }
    return Outcome::complete;
  }

 private:
  static constexpr unsigned clear_code = 256, end_code = 257, first_free = 258, table_size = 4096, none = ~0u;
  struct String {
    std::uint16_t before, length;  // the code of all but its last byte
    unsigned char first, last;
  };

  bool next_code(unsigned& code) {
    for (; held_ < width_; held_ += 8) {
      unsigned char byte;
      if (!bytes_.take(byte)) return false;
      bits_ = bits_ << 8 | byte;
    }
    held_ -= width_;
    code = bits_ >> held_ & ((1u << width_) - 1);
    return true;
  }

  Bytes bytes_;
  String strings_[table_size] = {};
  unsigned char spelt_[table_size];  // the string at hand; the longest one grows by a byte with each code
  std::size_t length_ = 0, told_ = 0;
  std::uint32_t bits_ = 0;
  unsigned held_ = 0, width_ = 9, free_ = first_free, previous_ = none;
};

class PackBitsStream : public SegmentStream {
 public:
  PackBitsStream(const Input& input, std::uint64_t offset, std::uint64_t bytes) : bytes_(input, offset, bytes) {}

  Outcome next(unsigned char* out, std::size_t bytes) override {
    while (bytes > 0) {
      if (left_ == 0) {
        unsigned char head;
        if (!bytes_.take(head)) return Outcome::too_short;
        if (head == 128) continue;
        repeated_ = head > 128;
        left_ = repeated_ ? 257u - head : head + 1u;
        if (repeated_ && !bytes_.take(byte_)) return Outcome::too_short;
      }
      if (!repeated_ && !bytes_.take(byte_)) return Outcome::too_short;
      *out++ = byte_;
      --left_;
      --bytes;
    }
    return Outcome::complete;
  }

 private:
  Bytes bytes_;
  unsigned left_ = 0;
  bool repeated_ = false;
  unsigned char byte_ = 0;
};

// --- the libraries' codecs ----------------------------------------------------------------------------------------------

// What finish() of a library's stream does: one byte more either ends the stream, which checks its sum, or belongs to
// rows that are not part of the image.
Outcome end_of(SegmentStream& stream, const bool& ended) {
  unsigned char beyond;
  if (ended) return Outcome::complete;
  const Outcome outcome = stream.next(&beyond, 1);
  return ended ? Outcome::complete : outcome;
}

class InflateStream : public SegmentStream {
 public:
  InflateStream(const Input& input, std::uint64_t offset, std::uint64_t bytes)
      : stored_(input, offset, bytes), library_(*zlib()) {
    if (library_.inflate_init(&state_, library_.version.c_str(), sizeof state_) != 0) throw std::bad_alloc();
  }
  ~InflateStream() override { library_.inflate_end(&state_); }

  Outcome next(unsigned char* out, std::size_t bytes) override {
    while (bytes > 0) {
      if (ended_) return Outcome::too_short;
      if (state_.avail_in == 0) state_.avail_in = static_cast<unsigned>(stored_.more(state_.next_in));
      const bool last = state_.avail_in == 0;
      const unsigned part = static_cast<unsigned>(std::min<std::size_t>(bytes, std::size_t{1} << 30));
      state_.next_out = out;
      state_.avail_out = part;
      const int result = library_.inflate(&state_, 0);
      const std::size_t made = part - state_.avail_out;
      out += made;
      bytes -= made;
      ended_ = result == 1;
      if (result == -4) throw std::bad_alloc();
      if (result != 0 && result != 1 && result != -5) return Outcome::corrupt;  // -5: it needs more input
      if (made == 0 && last && !ended_) return Outcome::too_short;
    }
    return Outcome::complete;
  }

  Outcome finish() override { return end_of(*this, ended_); }

 private:
  Stored stored_;
  const Zlib& library_;
  ZlibState state_ = {};
  bool ended_ = false;
};

class ZstdStream : public SegmentStream {
 public:
  ZstdStream(const Input& input, std::uint64_t offset, std::uint64_t bytes)
      : stored_(input, offset, bytes), library_(*libzstd()), state_(library_.create_stream()) {
    if (state_ == nullptr) throw std::bad_alloc();
    library_.init_stream(state_);
  }
  ~ZstdStream() override { library_.free_stream(state_); }

  Outcome next(unsigned char* out, std::size_t bytes) override {
    Libzstd::Out to{out, bytes, 0};
    while (to.pos < to.size) {
      if (in_.pos == in_.size) {
        const unsigned char* at;
        in_ = {nullptr, stored_.more(at), 0};
        in_.src = at;
      }
      const bool last = in_.size == 0;
      const std::size_t read = in_.pos, written = to.pos;
      const std::size_t result = library_.decompress_stream(state_, &to, &in_);
      if (library_.is_error(result)) return Outcome::corrupt;
      ended_ = result == 0;  // of a frame: others may follow
      if (read == in_.pos && written == to.pos) return last ? Outcome::too_short : Outcome::corrupt;
    }
    return Outcome::complete;
  }

  Outcome finish() override { return end_of(*this, ended_); }

 private:
  Stored stored_;
  const Libzstd& library_;
  void* state_;
  Libzstd::In in_{nullptr, 0, 0};
  bool ended_ = false;
};

}  // namespace

bool can_stream(Compression compression) {
  switch (compression) {
    case Compression::lzw:
    case Compression::packbits:
      return true;
    case Compression::deflate:
    case Compression::old_deflate:
      return zlib() != nullptr;
    case Compression::zstd:
      return libzstd() != nullptr;
    case Compression::none:
      break;
  }
  return false;
}

std::unique_ptr<SegmentStream> open_stream(Compression compression, const Input& input, std::uint64_t offset,
                                           std::uint64_t bytes) {
  switch (compression) {
    case Compression::lzw:
      return std::make_unique<LzwStream>(input, offset, bytes);
    case Compression::packbits:
      return std::make_unique<PackBitsStream>(input, offset, bytes);
    case Compression::zstd:
      return std::make_unique<ZstdStream>(input, offset, bytes);
    default:
      return std::make_unique<InflateStream>(input, offset, bytes);
  }
}

}  // namespace xrk::tiff
