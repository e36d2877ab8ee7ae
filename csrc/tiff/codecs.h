// The codecs' decoders: one segment's bytes in, exactly as many bytes out as its geometry asks for.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace xrk::tiff {

enum class Outcome {
  complete,   // every byte of the output was written; what follows in the input is not looked at
  too_short,  // the input ended before the output was full
  too_long,   // the input holds more than the output takes
  corrupt,    // the input is nothing that the codec can have written
};

// Decoders read this many bytes beyond their input's end (never used), and write as many beyond the output's end.
constexpr std::size_t decoder_slack = 16;

// LZW as TIFF 6.0 has it (section 13): codes of 9 to 12 bits, most significant bit first, widened one code early.
Outcome decode_lzw(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes);

// PackBits (TIFF 6.0, section 9).
Outcome decode_packbits(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes);

// The decoders of one thread: contexts of the libraries, made when first needed.
class Decoders {
 public:
  Decoders() = default;
  Decoders(const Decoders&) = delete;
  Decoders& operator=(const Decoders&) = delete;
  ~Decoders();

  Outcome decode(Compression compression, const unsigned char* in, std::size_t in_bytes, unsigned char* out,
                 std::size_t out_bytes);

 private:
  Outcome decode_deflate(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes);
  Outcome decode_zstd(const unsigned char* in, std::size_t in_bytes, unsigned char* out, std::size_t out_bytes);

  void* libdeflate_ = nullptr;
  void* zstd_ = nullptr;
  void (*free_libdeflate_)(void*) = nullptr;
  std::size_t (*free_zstd_)(void*) = nullptr;
};

// Whether segments of this compression can be decoded here, with the libraries that there are.
bool can_decode(Compression compression);

}  // namespace xrk::tiff
