#include "encode.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "libraries.h"
#include "pool.h"

namespace xrk::tiff {
namespace {

// --- compression --------------------------------------------------------------------------------------------------------

[[noreturn]] void refuse(const std::string& what) { throw Failure(Failure::Kind::system, what); }

// What a library keeps for one thread from segment to segment.
class Compressor {
 public:
  Compressor(Compression compression, int level) : compression_(compression), level_(level) {
    if (compression == Compression::zstd && have_zstd()) {
      state_ = libzstd()->create_compressor();
      free_ = [](void* state) { libzstd()->free_compressor(state); };
    } else if (is_deflate() && libdeflate() != nullptr) {
      state_ = libdeflate()->alloc_compressor(level);
      free_ = libdeflate()->free_compressor;
    } else {
      return;
    }
    if (state_ == nullptr) throw std::bad_alloc();
  }
  ~Compressor() {
    if (state_ != nullptr) free_(state_);
  }
  Compressor(const Compressor&) = delete;
  Compressor& operator=(const Compressor&) = delete;

  bool is(Compression compression, int level) const { return compression_ == compression && level_ == level; }

  void run(const unsigned char* data, std::size_t size, std::size_t row_bytes, std::vector<unsigned char>& out) {
    if (compression_ == Compression::none) {
      out.assign(data, data + size);
    } else if (compression_ == Compression::lzw) {
      encode_lzw(data, size, out);
    } else if (compression_ == Compression::packbits) {
      encode_packbits(data, size, row_bytes, out);
    } else if (compression_ == Compression::zstd && state_ != nullptr) {
      out.resize(libzstd()->compress_bound(size));
      const std::size_t bytes = libzstd()->compress(state_, out.data(), out.size(), data, size, level_);
      if (libzstd()->is_error(bytes)) refuse(std::string("zstd: ") + libzstd()->error_name(bytes));
      out.resize(bytes);
    } else if (is_deflate() && state_ != nullptr) {
      out.resize(libdeflate()->zlib_compress_bound(state_, size));
      const std::size_t bytes = libdeflate()->zlib_compress(state_, data, size, out.data(), out.size());
      if (bytes == 0) refuse("libdeflate needs more than the room it asks for");
      out.resize(bytes);
    } else if (is_deflate() && zlib() != nullptr) {
      unsigned long bytes = zlib()->compress_bound(size);
      out.resize(bytes);
      const int result = zlib()->compress2(out.data(), &bytes, data, size, std::min(level_, 9));
      if (result != 0) refuse("zlib gives the error " + std::to_string(result));
      out.resize(bytes);
    } else {
      refuse("there is no encoder for TIFF compression " + std::to_string(static_cast<int>(compression_)));
    }
  }

 private:
  bool is_deflate() const {
    return compression_ == Compression::deflate || compression_ == Compression::old_deflate;
  }

  Compression compression_;
  int level_;
  void* state_ = nullptr;
  void (*free_)(void*) = nullptr;
};

}  // namespace

// --- what is kept ---------------------------------------------------------------------------------------------------------

struct Encoders::Encoder {
  Encoder(Compression compression, int level) : compressor(compression, level) {}

  Compressor compressor;
  std::vector<char> segment, line;
};

Encoders::Encoders() = default;
Encoders::~Encoders() = default;

std::unique_ptr<Encoders::Encoder> Encoders::take(Compression compression, int level) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!encoders_.empty()) {
      std::unique_ptr<Encoder> encoder = std::move(encoders_.back());
      encoders_.pop_back();
      if (encoder->compressor.is(compression, level)) return encoder;
    }
  }
  return std::make_unique<Encoder>(compression, level);
}

void Encoders::give(std::unique_ptr<Encoder> encoder) {
  const std::lock_guard<std::mutex> lock(mutex_);
  encoders_.push_back(std::move(encoder));
}

std::vector<unsigned char> Encoders::take_buffer() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (buffers_.empty()) return {};
  std::vector<unsigned char> buffer = std::move(buffers_.back());
  buffers_.pop_back();
  return buffer;
}

void Encoders::give_buffer(std::vector<unsigned char>&& buffer, std::size_t most) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (buffers_.size() < most) buffers_.push_back(std::move(buffer));
}

namespace {

// --- segments -------------------------------------------------------------------------------------------------------------

class SegmentEncoder {
 public:
  SegmentEncoder(const Geometry& geometry, Encoders::Encoder& kept)
      : geometry_(geometry), compressor_(kept.compressor), segment_(kept.segment), line_(kept.line) {}

  void encode(const Rows& rows, std::uint64_t segment, std::vector<unsigned char>& out) {
    const std::uint64_t across = geometry_.across();
    const std::uint64_t first = segment / across * geometry_.segment_height - rows.first;
    const std::uint64_t column = segment % across * geometry_.segment_width;
    const std::uint64_t inside = std::min(geometry_.segment_height, rows.count - first);
    const std::uint64_t columns = std::min(geometry_.segment_width, geometry_.width - column);
    const std::uint64_t height = geometry_.tiled ? geometry_.segment_height : inside;
    const std::size_t line = geometry_.row_bytes();
    segment_.resize(height * line);
    for (std::uint64_t row = 0; row < inside; ++row) {
      char* target = segment_.data() + row * line;
      gather(rows, first + row, column, columns, target);
      store(target);
    }
    // Beyond the image's edge the last pixels go on: that costs least.
    for (std::uint64_t row = inside; row < height; ++row) {
      std::memcpy(segment_.data() + row * line, segment_.data() + (inside - 1) * line, line);
    }
    compressor_.run(reinterpret_cast<const unsigned char*>(segment_.data()), segment_.size(), line, out);
  }

  Misfits misfits;

 private:
  void gather(const Rows& rows, std::uint64_t row, std::uint64_t column, std::size_t count, char* target) {
    const std::size_t bytes = geometry_.pixel_bytes();
    const char* source = rows.data + row * rows.stride;
    if (rows.pixels == Pixels::stored) {
      std::memcpy(target, source + column * bytes, count * bytes);
    } else {
      source += column * (rows.pixels == Pixels::float64 ? 8 : 4);
      const Misfits found = convert(source, rows.pixels, rows.scale, rows.offset, geometry_, target, count);
      misfits.limited += found.limited;
      misfits.not_numbers += found.not_numbers;
    }
    for (std::size_t i = count; i < geometry_.segment_width; ++i) {
      std::memcpy(target + i * bytes, target + (count - 1) * bytes, bytes);
    }
  }

  // From the machine's pixels to the file's, in place.
  void store(char* line) {
    const std::size_t bytes = geometry_.pixel_bytes(), count = geometry_.segment_width;
    const RowKernels& kernels = active_rows();
    if (geometry_.predictor == Predictor::floating) {
      // All most significant bytes of the row, then all next ones, whatever the byte order; then differences of bytes.
      line_.assign(line, line + count * bytes);
      for (std::size_t plane = 0; plane < bytes; ++plane) {
        const char* byte = line_.data() + (machine_order == ByteOrder::little ? bytes - 1 - plane : plane);
        for (std::size_t i = 0; i < count; ++i) line[plane * count + i] = byte[i * bytes];
      }
      return kernels.difference(line, count * bytes, 1);
    }
    if (geometry_.predictor == Predictor::horizontal) kernels.difference(line, count, bytes);
    if (geometry_.order != machine_order && bytes > 1) kernels.swap(line, count, bytes);
  }

  const Geometry& geometry_;
  Compressor& compressor_;
  std::vector<char>&segment_, &line_;
};

// --- the file ---------------------------------------------------------------------------------------------------------------

void write_all(int file, const void* data_, std::size_t size, std::uint64_t position) {
  const char* data = static_cast<const char*>(data_);
  while (size > 0) {
    // Linux takes a little less than 2 GiB at a time.
    const std::size_t part = std::min<std::size_t>(size, std::size_t{1} << 30);
    const ssize_t written = pwrite(file, data, part, static_cast<off_t>(position));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) refuse(std::strerror(written < 0 ? errno : EIO));
    data += written;
    size -= static_cast<std::size_t>(written);
    position += static_cast<std::uint64_t>(written);
  }
}

// The segments as they become ready, written in their order by whichever thread completes the next one.
class Queue {
 public:
  Queue(int file, std::uint64_t position, std::uint64_t alignment, std::size_t count, Encoders& encoders,
        std::size_t kept)
      : places(count),
        file_(file),
        position_(position),
        alignment_(alignment),
        encoders_(encoders),
        kept_(kept),
        ready_(count),
        done_(count, false) {}

  void put(std::size_t index, std::vector<unsigned char>&& bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_[index] = std::move(bytes);
    done_[index] = true;
    if (writing_) return;
    writing_ = true;
    while (next_ < ready_.size() && done_[next_]) {
      std::vector<unsigned char> segment = std::move(ready_[next_]);
      const std::uint64_t offset = divide_up(position_, alignment_) * alignment_;
      places[next_++] = {offset, segment.size()};
      position_ = offset + segment.size();
      lock.unlock();
      write_all(file_, segment.data(), segment.size(), offset);
      encoders_.give_buffer(std::move(segment), kept_);
      lock.lock();
    }
    writing_ = false;
  }

  std::vector<Place> places;

 private:
  int file_;
  std::uint64_t position_, alignment_;
  Encoders& encoders_;
  const std::size_t kept_;
  std::vector<std::vector<unsigned char>> ready_;
  std::vector<bool> done_;
  std::size_t next_ = 0;
  bool writing_ = false;
  std::mutex mutex_;
};

// Strips as they are in memory need no pass at all.
std::vector<Place> write_as_it_is(int file, std::uint64_t position, const Geometry& geometry, const Rows& rows) {
  write_all(file, rows.data, rows.count * rows.stride, position);
  std::vector<Place> places;
  for (std::uint64_t row = 0; row < rows.count; row += geometry.segment_height) {
    const std::uint64_t bytes = std::min(geometry.segment_height, rows.count - row) * rows.stride;
    places.push_back({position, bytes});
    position += bytes;
  }
  return places;
}

}  // namespace

Misfits convert(const void* source, Pixels pixels, double scale, double offset, const Geometry& geometry, void* target,
                std::size_t count) {
  const Pixel pixel = pixel_of(geometry);
  const RowKernels& kernels = active_rows();
  if (pixels == Pixels::float64) {
    return kernels.round64[pixel](static_cast<const double*>(source), scale, offset, target, count);
  }
  return kernels.round32[pixel](static_cast<const float*>(source), scale, offset, target, count);
}

bool can_encode(Compression compression) {
  switch (compression) {
    case Compression::none:
    case Compression::lzw:
    case Compression::packbits:
      return true;
    case Compression::deflate:
    case Compression::old_deflate:
      return have_deflate();
    case Compression::zstd:
      return have_zstd();
  }
  return false;
}

std::vector<Place> write_segments(Encoders& encoders, int file, std::uint64_t position, std::uint64_t alignment,
                                  const Geometry& geometry, int level, const Rows& rows, std::size_t threads,
                                  Misfits& misfits) {
  const bool as_it_is = geometry.compression == Compression::none && !geometry.tiled && alignment == 1 &&
                        rows.pixels == Pixels::stored && geometry.order == machine_order &&
                        rows.stride == geometry.row_bytes();
  if (as_it_is) return write_as_it_is(file, position, geometry, rows);
  const std::uint64_t before = rows.first / geometry.segment_height * geometry.across();
  const std::size_t count = divide_up(rows.count, geometry.segment_height) * geometry.across();
  threads = std::max<std::size_t>(1, std::min(threads, count));
  Queue queue(file, position, alignment, count, encoders, threads);
  std::size_t next = 0;
  std::exception_ptr problem;
  std::mutex mutex;
  const auto work = [&] {
    try {
      std::unique_ptr<Encoders::Encoder> kept = encoders.take(geometry.compression, level);
      SegmentEncoder encoder(geometry, *kept);
      for (;;) {
        std::size_t index;
        {
          const std::lock_guard<std::mutex> lock(mutex);
          if (problem != nullptr || misfits.not_numbers > 0 || next == count) break;
          index = next++;
        }
        std::vector<unsigned char> bytes = encoders.take_buffer();
        encoder.encode(rows, before + index, bytes);
        {
          const std::lock_guard<std::mutex> lock(mutex);
          misfits.limited += std::exchange(encoder.misfits.limited, 0);
          misfits.not_numbers += std::exchange(encoder.misfits.not_numbers, 0);
        }
        queue.put(index, std::move(bytes));
      }
      encoders.give(std::move(kept));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (problem == nullptr) problem = std::current_exception();
    }
  };
  share_work(threads, work);
  if (problem != nullptr) std::rethrow_exception(problem);
  return queue.places;
}

}  // namespace xrk::tiff
