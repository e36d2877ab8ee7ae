// zlib, libdeflate and libzstd: bound at build where their headers are, else loaded when first asked for, where the
// system has the library. The parts of their C interfaces that are used have been the same through all of the versions
// that share these sonames.
#pragma once

#include <cstddef>
#include <string>

namespace xrk::tiff {

// zlib's z_stream.
struct ZlibState {
  const unsigned char* next_in;
  unsigned avail_in;
  unsigned long total_in;
  unsigned char* next_out;
  unsigned avail_out;
  unsigned long total_out;
  const char* msg;
  void* state;
  void* (*zalloc)(void* opaque, unsigned items, unsigned size);
  void (*zfree)(void* opaque, void* address);
  void* opaque;
  int data_type;
  unsigned long adler, reserved;
};

// zlib's calls for whole buffers (compress.c, uncompr.c), and for streams (inflate.c). Results: 0 done, 1 the stream's
// end, -3 damaged data, -4 no memory, -5 the output is too small, or a stream needs more input.
struct Zlib {
  std::string version;
  bool bound;  // at build; else loaded
  int (*compress2)(unsigned char* out, unsigned long* out_bytes, const unsigned char* in, unsigned long in_bytes,
                   int level);
  unsigned long (*compress_bound)(unsigned long in_bytes);
  int (*uncompress)(unsigned char* out, unsigned long* out_bytes, const unsigned char* in, unsigned long in_bytes);
  int (*inflate_init)(ZlibState* state, const char* version, int state_bytes);
  int (*inflate)(ZlibState* state, int flush);
  int (*inflate_end)(ZlibState* state);
};

// libdeflate, for zlib streams in whole buffers. A compressor or decompressor serves one thread at a time.
struct Libdeflate {
  enum Result : int { success = 0, bad_data = 1, short_output = 2, insufficient_space = 3 };
  std::string version;  // where bound at build; the library itself does not tell
  bool bound;
  void* (*alloc_compressor)(int level);  // 1 to 12 (0 in later versions)
  // Bytes written, 0 where they do not fit.
  std::size_t (*zlib_compress)(void* compressor, const void* in, std::size_t in_bytes, void* out,
                               std::size_t out_available);
  std::size_t (*zlib_compress_bound)(void* compressor, std::size_t in_bytes);  // compressor may be null
  void (*free_compressor)(void* compressor);
  void* (*alloc_decompressor)();
  int (*zlib_decompress)(void* decompressor, const void* in, std::size_t in_bytes, void* out,
                         std::size_t out_available, std::size_t* out_bytes);
  void (*free_decompressor)(void* decompressor);
};

// libzstd, for whole buffers and for streams. A context serves one thread at a time; results are sizes, or what is_error
// says of them; of decompress_stream 0 at the end of a frame.
struct Libzstd {
  struct In {
    const void* src;
    std::size_t size, pos;
  };
  struct Out {
    void* dst;
    std::size_t size, pos;
  };
  std::string version;
  bool bound;
  std::size_t (*compress_bound)(std::size_t in_bytes);
  unsigned (*is_error)(std::size_t result);
  const char* (*error_name)(std::size_t result);
  int (*max_level)();
  void* (*create_compressor)();
  std::size_t (*compress)(void* compressor, void* out, std::size_t out_available, const void* in, std::size_t in_bytes,
                          int level);
  std::size_t (*free_compressor)(void* compressor);
  void* (*create_decompressor)();
  std::size_t (*decompress)(void* decompressor, void* out, std::size_t out_available, const void* in,
                            std::size_t in_bytes);
  std::size_t (*free_decompressor)(void* decompressor);
  void* (*create_stream)();
  std::size_t (*init_stream)(void* stream);
  std::size_t (*decompress_stream)(void* stream, Out* out, In* in);
  std::size_t (*free_stream)(void* stream);
};

// The library, or nullptr where there is none (or none of a known version), or `allow_library` has ruled it out.
const Zlib* zlib();
const Libdeflate* libdeflate();
const Libzstd* libzstd();

// "1.2.13, bound at build", "loaded", or "" without it. name: "zlib", "libdeflate" or "libzstd".
std::string describe_library(const std::string& name);

// For tests and benchmarks: whether the library of this name may be used, for the whole process. False for an unknown
// name. Not to be called while files are read or written.
bool allow_library(const std::string& name, bool allowed);

// Whether deflate (by either library) and zstd can be used now.
inline bool have_deflate() { return libdeflate() != nullptr || zlib() != nullptr; }
inline bool have_zstd() { return libzstd() != nullptr; }

}  // namespace xrk::tiff
