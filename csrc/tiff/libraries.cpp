#include "libraries.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <memory>

#ifdef XRK_HAVE_ZLIB
#include <zlib.h>
#endif
#ifdef XRK_HAVE_LIBDEFLATE
#include <libdeflate.h>
#endif
#ifdef XRK_HAVE_LIBZSTD
#include <zstd.h>
#endif

namespace xrk::tiff {
namespace {

// The first of these libraries that the system finds, and its functions by name.
class Loaded {
 public:
  explicit Loaded(std::initializer_list<const char*> names) {
    for (const char* name : names) {
      if ((handle_ = dlopen(name, RTLD_NOW | RTLD_LOCAL)) != nullptr) return;
    }
  }

  template <typename Function>
  void bind(Function*& function, const char* name) {
    void* found = handle_ ? dlsym(handle_, name) : nullptr;
    if (found == nullptr) complete_ = false;
    static_assert(sizeof function == sizeof found);
    std::memcpy(&function, &found, sizeof found);
  }

  // Whether all were found. The library then stays for the life of the process.
  bool complete() const { return handle_ != nullptr && complete_; }
  void close() {
    if (handle_ != nullptr) dlclose(handle_);
  }

 private:
  void* handle_ = nullptr;
  bool complete_ = true;
};

const unsigned char sample[] = "black, black, black, white: a text that both directions must agree on";

// --- zlib -----------------------------------------------------------------------------------------------------------

std::unique_ptr<Zlib> find_zlib() {
  auto found = std::make_unique<Zlib>();
#ifdef XRK_HAVE_ZLIB
  found->version = zlibVersion();
  found->bound = true;
  found->compress2 = ::compress2;
  found->compress_bound = ::compressBound;
  found->uncompress = ::uncompress;
  static_assert(sizeof(ZlibState) == sizeof(z_stream));
  found->inflate_init = [](ZlibState* state, const char* version, int state_bytes) {
    return ::inflateInit_(reinterpret_cast<z_stream*>(state), version, state_bytes);
  };
  found->inflate = [](ZlibState* state, int flush) { return ::inflate(reinterpret_cast<z_stream*>(state), flush); };
  found->inflate_end = [](ZlibState* state) { return ::inflateEnd(reinterpret_cast<z_stream*>(state)); };
#else
  Loaded library({"libz.so.1", "libz.1.dylib"});
  const char* (*version)() = nullptr;
  library.bind(version, "zlibVersion");
  library.bind(found->compress2, "compress2");
  library.bind(found->compress_bound, "compressBound");
  library.bind(found->uncompress, "uncompress");
  library.bind(found->inflate_init, "inflateInit_");
  library.bind(found->inflate, "inflate");
  library.bind(found->inflate_end, "inflateEnd");
  if (!library.complete() || version()[0] != '1') {
    library.close();
    return nullptr;
  }
  found->version = version();
  found->bound = false;
#endif
  return found;
}

// --- libdeflate -----------------------------------------------------------------------------------------------------

// The library does not tell its version, so that a text goes there and back before it is trusted.
bool works(const Libdeflate& library) {
  unsigned char packed[256], back[sizeof sample];
  std::size_t bytes = 0, back_bytes = 0;
  if (void* compressor = library.alloc_compressor(1)) {
    bytes = library.zlib_compress(compressor, sample, sizeof sample, packed, sizeof packed);
    library.free_compressor(compressor);
  }
  if (bytes == 0) return false;
  int result = Libdeflate::bad_data;
  if (void* decompressor = library.alloc_decompressor()) {
    result = library.zlib_decompress(decompressor, packed, bytes, back, sizeof back, &back_bytes);
    library.free_decompressor(decompressor);
  }
  return result == Libdeflate::success && back_bytes == sizeof sample && std::memcmp(back, sample, sizeof sample) == 0;
}

std::unique_ptr<Libdeflate> find_libdeflate() {
  auto found = std::make_unique<Libdeflate>();
#ifdef XRK_HAVE_LIBDEFLATE
  found->version = LIBDEFLATE_VERSION_STRING;
  found->bound = true;
  found->alloc_compressor = [](int level) -> void* { return libdeflate_alloc_compressor(level); };
  found->zlib_compress = [](void* compressor, const void* in, std::size_t in_bytes, void* out, std::size_t available) {
    return libdeflate_zlib_compress(static_cast<libdeflate_compressor*>(compressor), in, in_bytes, out, available);
  };
  found->zlib_compress_bound = [](void* compressor, std::size_t in_bytes) {
    return libdeflate_zlib_compress_bound(static_cast<libdeflate_compressor*>(compressor), in_bytes);
  };
  found->free_compressor = [](void* c) { libdeflate_free_compressor(static_cast<libdeflate_compressor*>(c)); };
  found->alloc_decompressor = []() -> void* { return libdeflate_alloc_decompressor(); };
  found->zlib_decompress = [](void* decompressor, const void* in, std::size_t in_bytes, void* out,
                              std::size_t available, std::size_t* out_bytes) -> int {
    auto* own = static_cast<libdeflate_decompressor*>(decompressor);
    return libdeflate_zlib_decompress(own, in, in_bytes, out, available, out_bytes);
  };
  found->free_decompressor = [](void* d) { libdeflate_free_decompressor(static_cast<libdeflate_decompressor*>(d)); };
#else
  Loaded library({"libdeflate.so.0", "libdeflate.0.dylib", "libdeflate.dylib"});
  library.bind(found->alloc_compressor, "libdeflate_alloc_compressor");
  library.bind(found->zlib_compress, "libdeflate_zlib_compress");
  library.bind(found->zlib_compress_bound, "libdeflate_zlib_compress_bound");
  library.bind(found->free_compressor, "libdeflate_free_compressor");
  library.bind(found->alloc_decompressor, "libdeflate_alloc_decompressor");
  library.bind(found->zlib_decompress, "libdeflate_zlib_decompress");
  library.bind(found->free_decompressor, "libdeflate_free_decompressor");
  found->bound = false;
  if (!library.complete() || !works(*found)) {
    library.close();
    return nullptr;
  }
  return found;
#endif
  return works(*found) ? std::move(found) : nullptr;
}

// --- libzstd --------------------------------------------------------------------------------------------------------

std::unique_ptr<Libzstd> find_libzstd() {
  auto found = std::make_unique<Libzstd>();
#ifdef XRK_HAVE_LIBZSTD
  found->version = ZSTD_versionString();
  found->bound = true;
  found->compress_bound = ZSTD_compressBound;
  found->is_error = ZSTD_isError;
  found->error_name = ZSTD_getErrorName;
  found->max_level = ZSTD_maxCLevel;
  found->create_compressor = []() -> void* { return ZSTD_createCCtx(); };
  found->compress = [](void* compressor, void* out, std::size_t available, const void* in, std::size_t in_bytes,
                       int level) {
    return ZSTD_compressCCtx(static_cast<ZSTD_CCtx*>(compressor), out, available, in, in_bytes, level);
  };
  found->free_compressor = [](void* c) { return ZSTD_freeCCtx(static_cast<ZSTD_CCtx*>(c)); };
  found->create_decompressor = []() -> void* { return ZSTD_createDCtx(); };
  found->decompress = [](void* decompressor, void* out, std::size_t available, const void* in, std::size_t in_bytes) {
    return ZSTD_decompressDCtx(static_cast<ZSTD_DCtx*>(decompressor), out, available, in, in_bytes);
  };
  found->free_decompressor = [](void* d) { return ZSTD_freeDCtx(static_cast<ZSTD_DCtx*>(d)); };
  static_assert(sizeof(Libzstd::In) == sizeof(ZSTD_inBuffer) && sizeof(Libzstd::Out) == sizeof(ZSTD_outBuffer));
  found->create_stream = []() -> void* { return ZSTD_createDStream(); };
  found->init_stream = [](void* stream) { return ZSTD_initDStream(static_cast<ZSTD_DStream*>(stream)); };
  found->decompress_stream = [](void* stream, Libzstd::Out* out, Libzstd::In* in) {
    return ZSTD_decompressStream(static_cast<ZSTD_DStream*>(stream), reinterpret_cast<ZSTD_outBuffer*>(out),
                                 reinterpret_cast<ZSTD_inBuffer*>(in));
  };
  found->free_stream = [](void* stream) { return ZSTD_freeDStream(static_cast<ZSTD_DStream*>(stream)); };
  const unsigned number = ZSTD_versionNumber();
#else
  Loaded library({"libzstd.so.1", "libzstd.1.dylib"});
  unsigned (*version)() = nullptr;
  library.bind(version, "ZSTD_versionNumber");
  library.bind(found->compress_bound, "ZSTD_compressBound");
  library.bind(found->is_error, "ZSTD_isError");
  library.bind(found->error_name, "ZSTD_getErrorName");
  library.bind(found->max_level, "ZSTD_maxCLevel");
  library.bind(found->create_compressor, "ZSTD_createCCtx");
  library.bind(found->compress, "ZSTD_compressCCtx");
  library.bind(found->free_compressor, "ZSTD_freeCCtx");
  library.bind(found->create_decompressor, "ZSTD_createDCtx");
  library.bind(found->decompress, "ZSTD_decompressDCtx");
  library.bind(found->free_decompressor, "ZSTD_freeDCtx");
  library.bind(found->create_stream, "ZSTD_createDStream");
  library.bind(found->init_stream, "ZSTD_initDStream");
  library.bind(found->decompress_stream, "ZSTD_decompressStream");
  library.bind(found->free_stream, "ZSTD_freeDStream");
  if (!library.complete()) {
    library.close();
    return nullptr;
  }
  const unsigned number = version();
  found->version = std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
                   std::to_string(number % 100);
  found->bound = false;
#endif
  // The format and these functions are the same in all versions of this number.
  return number / 10000 == 1 ? std::move(found) : nullptr;
}

std::atomic<bool> zlib_allowed{true}, libdeflate_allowed{true}, libzstd_allowed{true};

template <typename Library>
std::string describe(const Library* library) {
  if (library == nullptr) return "";
  return (library->version.empty() ? "" : library->version + ", ") + (library->bound ? "bound at build" : "loaded");
}

}  // namespace

// None is ever destroyed: who uses them may outlive this file's other objects.
const Zlib* zlib() {
  static const Zlib* const found = find_zlib().release();
  return zlib_allowed.load(std::memory_order_relaxed) ? found : nullptr;
}

const Libdeflate* libdeflate() {
  static const Libdeflate* const found = find_libdeflate().release();
  return libdeflate_allowed.load(std::memory_order_relaxed) ? found : nullptr;
}

const Libzstd* libzstd() {
  static const Libzstd* const found = find_libzstd().release();
  return libzstd_allowed.load(std::memory_order_relaxed) ? found : nullptr;
}

std::string describe_library(const std::string& name) {
  if (name == "zlib") return describe(zlib());
  if (name == "libdeflate") return describe(libdeflate());
  if (name == "libzstd") return describe(libzstd());
  return "";
}

bool allow_library(const std::string& name, bool allowed) {
  std::atomic<bool>* const switched = name == "zlib"         ? &zlib_allowed
                                      : name == "libdeflate" ? &libdeflate_allowed
                                      : name == "libzstd"    ? &libzstd_allowed
                                                             : nullptr;
  if (switched != nullptr) switched->store(allowed);
  return switched != nullptr;
}

}  // namespace xrk::tiff
