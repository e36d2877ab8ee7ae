// From rows of pixels to the bytes of TIFF segments: conversion, predictor, byte order, compression (TIFF 6.0, sections
// 9, 13 and 14; Technical Notes 2 and 3 for deflate and predictor 3), and to their place in the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "format.h"
#include "rows.h"

namespace xrk::tiff {

// What a caller's pixels are: the file's own in the machine's byte order, or floats to be rounded to them.
enum class Pixels { stored, float32, float64 };

// Rows of the image that a caller hands over: pixel c of row first + r lies at data + r * stride, its pixels side by
// side. Floats become value * scale + offset before they are rounded.
struct Rows {
  const char* data;
  std::size_t stride;
  std::uint64_t first, count;
  Pixels pixels;
  double scale, offset;
};

// target[i] = source[i] * scale + offset in double precision, rounded half to even and limited to the range of the
// integer pixels of `geometry`; what is no number becomes 0. source: `count` floats as `pixels` says.
Misfits convert(const void* source, Pixels pixels, double scale, double offset, const Geometry& geometry, void* target,
                std::size_t count);

// Whether segments can be compressed like this here, with the libraries that were found.
bool can_encode(Compression compression);

// The encoders that are our own: they replace what `out` holds.
void encode_lzw(const unsigned char* data, std::size_t size, std::vector<unsigned char>& out);
void encode_packbits(const unsigned char* data, std::size_t size, std::size_t row_bytes,
                     std::vector<unsigned char>& out);

struct Place {
  std::uint64_t offset, bytes;
};

// What encoding needs and would take long to make anew for each call: compressors, and memory that was touched before.
class Encoders {
 public:
  struct Encoder;

  Encoders();
  ~Encoders();

  // One for these segments; `give` takes it back.
  std::unique_ptr<Encoder> take(Compression compression, int level);
  void give(std::unique_ptr<Encoder> encoder);

  // Memory for a compressed segment. No more than `most` of them are kept.
  std::vector<unsigned char> take_buffer();
  void give_buffer(std::vector<unsigned char>&& buffer, std::size_t most);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Encoder>> encoders_;
  std::vector<std::vector<unsigned char>> buffers_;
};

// Encodes the segments that `rows` covers (whole segments: `first` is a multiple of their height, and the end another
// one or the image's) on at most `threads` threads, and writes them one behind the other from `position` on, in their
// order whatever the number of threads, each at a multiple of `alignment`. level: of deflate and zstd. Returns where
// they lie. Where misfits.not_numbers is not 0 at the end, segments are missing.
//
// Throws Failure; what was written by then is unspecified.
std::vector<Place> write_segments(Encoders& encoders, int file, std::uint64_t position, std::uint64_t alignment,
                                  const Geometry& geometry, int level, const Rows& rows, std::size_t threads,
                                  Misfits& misfits);

}  // namespace xrk::tiff
