#include "reader.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace xrk::tiff {
namespace {

using std::to_string;

constexpr std::size_t chunk_bytes = std::size_t{1} << 18;    // of uncompressed rows, for one thread at a time
constexpr std::size_t worth_a_call = 2048;                    // bytes that are not needed cost less than a system call
constexpr std::size_t kept_scratch = std::size_t{1} << 24;  // of a worker, from one call to the next
constexpr std::size_t kept_tables = 8;
constexpr std::uint64_t parts = 32;  // of the most that is decoded at once: what comes at a time of a larger segment
constexpr std::size_t kept_running = 64;

const char* codec_name(Compression compression) {
  switch (compression) {
    case Compression::lzw:
      return "LZW";
    case Compression::packbits:
      return "PackBits";
    case Compression::zstd:
      return "zstd";
    default:
      return "deflate";
  }
}

[[noreturn]] void refuse(Outcome outcome, const Geometry& g, const Segment& segment, std::uint64_t index) {
  const std::string what = outcome == Outcome::too_short  ? " end before the "
                           : outcome == Outcome::too_long ? " hold more than the "
                                                          : " are damaged, which should be the ";
  throw Failure(Failure::Kind::damaged,
                std::string("the ") + codec_name(g.compression) + " data of " + (g.tiled ? "tile " : "strip ") +
                    to_string(index + 1) + " of " + to_string(g.segments()) + what + to_string(g.stored_bytes(index)) +
                    " bytes of its pixels",
                segment.offset);
}

// Whether rows are decoded in a place of their own, before their pixels are put together.
bool aside(const Geometry& g) { return g.packed() || g.predictor == Predictor::floating; }

// From `count` rows as they were compressed to pixels in the machine's byte order, in `out`: where the rows lie already,
// unless they are `aside`. The rows are used up.
void finish_rows(const Geometry& g, unsigned char* rows, std::uint64_t count, unsigned char* out) {
  const RowKernels& kernels = active_rows();
  const std::size_t row_bytes = g.row_bytes(), width = g.segment_width, pixel = g.pixel_bytes();
  const bool swap = g.order != machine_order && pixel > 1 && !aside(g);
  for (std::uint64_t row = 0; row < count; ++row) {
    unsigned char* const from = rows + row * row_bytes;
    unsigned char* const to = out + row * width * pixel;
    if (swap) kernels.swap(from, width, pixel);
    if (g.predictor == Predictor::horizontal) kernels.accumulate(from, width, pixel);
    if (g.predictor == Predictor::floating) kernels.unfold(from, to, width, pixel);
    if (g.packed()) kernels.unpack(from, reinterpret_cast<std::uint16_t*>(to), width, g.bits);
  }
}

unsigned char* at_least(std::vector<unsigned char>& buffer, std::size_t bytes) {
  if (buffer.size() < bytes) buffer.resize(bytes);
  return buffer.data();
}

}  // namespace

Reader::Reader(std::unique_ptr<Input> input, const Limits& limits, std::uint64_t cache_bytes)
    : input_(std::move(input)), whole_bytes_(limits.segment_bytes), directory_(*input_, limits), cache_(cache_bytes) {
  for (std::size_t i = 0; i < directory_.pages().size(); ++i) {
    if (directory_.pages()[i].full()) frames_.push_back(i);
  }
}

// --- where the segments lie -----------------------------------------------------------------------------------------

Reader::Table Reader::table(std::uint64_t frame) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = tables_.begin(); at != tables_.end(); ++at) {
      if (at->first == frame) {
        tables_.splice(tables_.begin(), tables_, at);
        return at->second;
      }
    }
  }
  auto made = std::make_shared<std::vector<Segment>>();
  if (hidden_) {
    const std::uint64_t bytes = stack_.geometry.stored_bytes(0);
    made->push_back({hidden_start_ + frame * bytes, bytes});
  } else {
    *made = directory_.segments(this->frame(frame));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  tables_.emplace_front(frame, made);
  if (tables_.size() > kept_tables) tables_.pop_back();
  return made;
}

std::uint64_t Reader::contiguous_start() {
  const Geometry& g = frame(0).geometry;
  if (g.compression != Compression::none || g.tiled) return Failure::none;
  const Table segments = table(0);
  for (std::size_t i = 1; i < segments->size(); ++i) {
    if ((*segments)[i].offset != (*segments)[i - 1].offset + g.stored_bytes(i - 1)) return Failure::none;
  }
  return segments->front().offset;
}

bool Reader::set_hidden(std::uint64_t frames) {
  const std::uint64_t start = contiguous_start();
  if (frames_.size() != 1 || frames < 2 || start == Failure::none) return false;
  Page page = frame(0);
  page.geometry.segment_height = page.geometry.height;
  std::uint64_t bytes;
  if (__builtin_mul_overflow(page.geometry.stored_bytes(0), frames, &bytes)) return false;
  if (!input_->holds(start, bytes)) return false;
  stack_ = page;
  hidden_ = frames;
  hidden_start_ = start;
  const std::lock_guard<std::mutex> lock(mutex_);
  tables_.clear();
  return true;
}

// --- threads --------------------------------------------------------------------------------------------------------

std::unique_ptr<Reader::Worker> Reader::take_worker() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (workers_.empty()) return std::make_unique<Worker>();
  std::unique_ptr<Worker> worker = std::move(workers_.back());
  workers_.pop_back();
  return worker;
}

void Reader::give_worker(std::unique_ptr<Worker> worker) {
  for (auto* buffer : {&worker->stored, &worker->rows}) {
    if (buffer->size() > kept_scratch) std::vector<unsigned char>().swap(*buffer);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  workers_.push_back(std::move(worker));
}

// Calls job(i, worker) for each i below count, in order as far as several threads can. Of what they throw, the first in
// order is thrown again.
template <typename Job>
void Reader::run_jobs(std::uint64_t count, std::size_t threads, const Job& job) {
  std::atomic<std::uint64_t> next{0};
  std::mutex guard;
  std::exception_ptr thrown;
  std::uint64_t thrown_at = count;
  const auto run = [&] {
    std::uint64_t i = 0;
    try {
      std::unique_ptr<Worker> worker = take_worker();
      while ((i = next.fetch_add(1)) < count) {
        if (cancelled_) throw Failure(Failure::Kind::cancelled, "it was closed while it was read");
        job(i, *worker);
      }
      give_worker(std::move(worker));
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(guard);
      if (i < thrown_at || !thrown) {
        thrown = std::current_exception();
        thrown_at = i;
      }
    }
  };
  share_work(static_cast<std::size_t>(std::min<std::uint64_t>(threads, count)), run);
  if (thrown) std::rethrow_exception(thrown);
}

// --- one segment ----------------------------------------------------------------------------------------------------

// The segment's pixels, rows of segment_width of them, in the machine's byte order.
void Reader::decode(const Geometry& g, const Segment& segment, std::uint64_t index, unsigned char* out,
                    Worker& worker) const {
  const std::size_t bytes = g.stored_bytes(index), row_bytes = g.row_bytes();
  // No codec makes twice as much of anything: the rest of a larger segment is not part of its image.
  const bool compressed = g.compression != Compression::none;
  const std::size_t stored =
      compressed ? std::min<std::uint64_t>(segment.bytes, 2 * std::uint64_t{bytes} + 65536) : bytes;
  unsigned char* rows = aside(g) ? at_least(worker.rows, bytes + decoder_slack) : out;
  unsigned char* const in = compressed ? at_least(worker.stored, stored + decoder_slack) : rows;
  input_->read(segment.offset, in, stored);
  Outcome outcome = Outcome::complete;
  if (compressed) outcome = worker.decoders.decode(g.compression, in, stored, rows, bytes);
  const std::uint64_t whole = row_bytes * g.segment_height;
  if (outcome == Outcome::too_long && whole > bytes) {
    // The last strip, which some writers fill up to the height of the others.
    rows = at_least(worker.rows, whole + decoder_slack);
    outcome = worker.decoders.decode(g.compression, in, stored, rows, whole);
    if (!aside(g)) std::memcpy(out, rows, bytes);
    if (!aside(g)) rows = out;
  }
  if (outcome != Outcome::complete) refuse(outcome, g, segment, index);
  finish_rows(g, rows, g.stored_rows(index), out);
}

// Rows of a block in the cache: a segment's, or those of a part of it where it is too large to be decoded at once.
std::uint64_t Reader::block_rows(const Geometry& g) const {
  if (g.compression == Compression::none || g.decoded_bytes(0) <= whole_bytes_) return g.segment_height;
  return std::max<std::uint64_t>(1, whole_bytes_ / parts / (g.segment_width * g.pixel_bytes()));
}

// One part of a segment's pixels. Parts that come before are decoded once more where the stream is beyond this one.
void Reader::decode_part(std::uint64_t frame, const Segment& segment, std::uint64_t index, std::uint64_t part,
                         unsigned char* out, Worker& worker) {
  const Geometry& g = this->frame(frame).geometry;
  const std::uint64_t height = block_rows(g), first = part * height, stored = g.stored_rows(index);
  const std::uint64_t end = std::min(first + height, stored);
  const std::lock_guard<std::mutex> lock(running_mutex_);
  const auto found = std::find_if(running_.begin(), running_.end(), [&](const Running& one) {
    return one.frame == frame && one.segment == index;
  });
  Running here{frame, index, 0, nullptr};
  if (found != running_.end()) {
    if (found->row <= first) here = std::move(*found);
    running_.erase(found);
  }
  if (here.stream == nullptr) here.stream = open_stream(g.compression, *input_, segment.offset, segment.bytes);
  while (here.row < end) {
    if (cancelled_) throw Failure(Failure::Kind::cancelled, "it was closed while it was read");
    const std::uint64_t rows = std::min(height, end - here.row), bytes = rows * g.row_bytes();
    const bool wanted = here.row == first;
    unsigned char* const to = aside(g) || !wanted ? at_least(worker.rows, bytes) : out;
    Outcome outcome = here.stream->next(to, bytes);
    here.row += rows;
    if (outcome == Outcome::complete && here.row == stored) outcome = here.stream->finish();
    if (outcome != Outcome::complete) refuse(outcome, g, segment, index);
    if (wanted) finish_rows(g, to, rows, out);
  }
  running_.push_front(std::move(here));
  if (running_.size() > kept_running) running_.pop_back();
}

// The pixels of a segment, or of a part of it (see block_rows).
BlockPointer Reader::block(std::uint64_t frame, const std::vector<Segment>& table, std::uint64_t index,
                           std::uint64_t part, Worker& worker) {
  const Geometry& g = this->frame(frame).geometry;
  return cache_.get({frame, index, part}, [&](std::unique_ptr<Block> spare) {
    const std::uint64_t height = block_rows(g);
    const bool whole = height >= g.segment_height;
    const std::uint64_t pixels = whole ? g.decoded_bytes(index) : height * g.segment_width * g.pixel_bytes();
    const std::size_t bytes = pixels + decoder_slack;
    if (!spare || spare->bytes() < bytes || spare->bytes() / 2 > bytes) spare = std::make_unique<Block>(bytes);
    if (whole) {
      decode(g, table[index], index, spare->data(), worker);
    } else {
      decode_part(frame, table[index], index, part, spare->data(), worker);
    }
    ++decoded_;
    return spare;
  });
}

// --- windows --------------------------------------------------------------------------------------------------------

Reader::Area Reader::inside(const Window& window) const {
  const Geometry& g = frame(window.page).geometry;
  const auto first = [](std::int64_t at) { return static_cast<std::uint64_t>(std::max<std::int64_t>(at, 0)); };
  const auto last = [](std::int64_t at, std::uint64_t count, std::uint64_t size) {
    const std::int64_t end = at + static_cast<std::int64_t>(count);
    return std::min(static_cast<std::uint64_t>(std::max<std::int64_t>(end, 0)), size);
  };
  return {first(window.row), last(window.row, window.rows, g.height), first(window.column),
          last(window.column, window.columns, g.width)};
}

// Writes `count` decoded pixels, the first of them at this place of the image, to where the window has them.
void Reader::place(const Window& window, const Geometry& g, std::uint64_t row, std::uint64_t column,
                   const unsigned char* pixels, std::uint64_t count) const {
  const auto y = static_cast<std::size_t>(static_cast<std::int64_t>(row) - window.row);
  const auto x = static_cast<std::size_t>(static_cast<std::int64_t>(column) - window.column);
  const std::size_t bytes = window.values ? value_sizes[window.value] : g.pixel_bytes();
  unsigned char* const to = window.out + y * window.row_stride + x * bytes;
  const auto normalise = active_rows().normalise[pixel_of(g)][window.value];
  if (window.correction != nullptr) {
    const Correction& c = *window.correction;
    const auto correct = active_rows().correct[pixel_of(g)];
    const double* const dark = c.dark + row * c.dark_stride + column;
    const double* const gain = c.gain + row * c.gain_stride + column;
    const unsigned char* const invalid = c.invalid ? c.invalid + row * g.width + column : nullptr;
    // Corrected counts on their way to values stay in the first-level cache.
    constexpr std::size_t span = 512;
    unsigned char counts[span * 8];
    std::uint64_t limited = 0;
    for (std::size_t at = 0; at < count; at += span) {
      const std::size_t here = std::min<std::size_t>(span, count - at);
      unsigned char* const target = window.values ? counts : to + at * bytes;
      limited += correct(pixels + at * g.pixel_bytes(), dark + at, gain + at, c.pedestal, invalid ? invalid + at : nullptr,
                         target, here);
      if (window.values) normalise(counts, window.black, window.inverse_range, to + at * bytes, here);
    }
    if (limited != 0 && window.limited != nullptr) *window.limited += limited;
  } else if (window.values) {
    normalise(pixels, window.black, window.inverse_range, to, count);
  } else if (to != pixels) {
    std::memcpy(to, pixels, count * bytes);
  }
}

// Calls use(first row, first column, rows, pixels) for each decoded block that touches the area.
template <typename Use>
void Reader::for_blocks(std::uint64_t frame, const Area& area, std::size_t threads, const Use& use) {
  const Geometry& g = this->frame(frame).geometry;
  const Table segments = table(frame);
  const std::uint64_t first = area.left / g.segment_width, across = (area.right - 1) / g.segment_width - first + 1;
  const std::uint64_t height = block_rows(g), each = divide_up(g.segment_height, height);
  const auto place_of = [&](std::uint64_t row) {
    return row / g.segment_height * each + row % g.segment_height / height;
  };
  const std::uint64_t top = place_of(area.top), down = place_of(area.bottom - 1) - top + 1;
  const auto index_of = [&](std::uint64_t i) { return (top + i / across) / each * g.across() + first + i % across; };
  // Parts of one segment come one after the other, whoever asks for them.
  if (each > 1) threads = 1;
  // What is decoded already comes last: it fills the time of the threads that are done before the others.
  std::vector<std::uint64_t> order;
  const bool all_fit = checked_multiply(across * down, g.decoded_bytes(0) + decoder_slack) <= cache_.budget();
  if (threads > 1 && all_fit) {
    order.resize(across * down);
    std::iota(order.begin(), order.end(), 0);
    std::stable_partition(order.begin(), order.end(), [&](std::uint64_t i) {
      return !cache_.refresh({frame, index_of(i), 0});
    });
  }
  run_jobs(across * down, threads, [&](std::uint64_t i, Worker& worker) {
    if (!order.empty()) i = order[i];
    const std::uint64_t y = (top + i / across) / each, part = (top + i / across) % each, x = first + i % across;
    use(y * g.segment_height + part * height, x * g.segment_width, std::min(height, g.segment_height - part * height),
        block(frame, *segments, index_of(i), part, worker));
  });
}

void Reader::read_segments(const Window& window, const Area& area, std::size_t threads) {
  const Geometry& g = frame(window.page).geometry;
  for_blocks(window.page, area, threads,
             [&](std::uint64_t above, std::uint64_t left, std::uint64_t rows, const BlockPointer& block) {
    const std::uint64_t from = std::max(area.left, left), to = std::min(area.right, left + g.segment_width);
    const std::uint64_t bottom = std::min(area.bottom, above + rows);
    const std::size_t pixel = g.pixel_bytes();
    for (std::uint64_t row = std::max(area.top, above); row < bottom; ++row) {
      const std::size_t at = ((row - above) * g.segment_width + (from - left)) * pixel;
      place(window, g, row, from, block->data() + at, to - from);
    }
  });
}

// Rows [top, bottom) of one column of uncompressed segments.
void Reader::read_rows(const Window& window, const Area& area, const std::vector<Segment>& table, std::uint64_t column,
                       std::uint64_t top, std::uint64_t bottom, Worker& worker) const {
  const Geometry& g = frame(window.page).geometry;
  const RowKernels& kernels = active_rows();
  const std::size_t pixel = g.pixel_bytes(), row_bytes = g.row_bytes();
  const std::uint64_t left = column * g.segment_width;
  const std::uint64_t from = std::max(area.left, left), to = std::min(area.right, left + g.segment_width);
  const std::size_t needed = (to - from) * pixel;
  const bool swap = g.order != machine_order && pixel > 1 && !g.packed();
  const bool as_stored = !window.values && !g.packed() && window.correction == nullptr;
  const bool row_by_row = !g.packed() && row_bytes - needed > worth_a_call;
  for (std::uint64_t row = top; row < bottom;) {
    const std::uint64_t within = row % g.segment_height;
    std::uint64_t rows = std::min(bottom - row, g.segment_height - within);
    const std::uint64_t index = row / g.segment_height * g.across() + column;
    std::uint64_t offset = table[index].offset + within * row_bytes;
    if (!g.tiled) {
      for (std::uint64_t next = index + 1; row + rows < bottom && table[next].offset == offset + rows * row_bytes;) {
        rows += std::min(bottom - row - rows, g.stored_rows(next++));
      }
    }
    unsigned char* const target = window.out +
        static_cast<std::size_t>(static_cast<std::int64_t>(row) - window.row) * window.row_stride +
        static_cast<std::size_t>(static_cast<std::int64_t>(from) - window.column) * pixel;
    if (row_by_row) {
      offset += (from - left) * pixel;
      for (std::uint64_t i = 0; i < rows; ++i) {
        unsigned char* const at = as_stored ? target + i * window.row_stride : at_least(worker.stored, needed);
        input_->read(offset + i * row_bytes, at, needed);
        if (swap) kernels.swap(at, to - from, pixel);
        place(window, g, row + i, from, at, to - from);
      }
    } else if (as_stored && needed == row_bytes && window.row_stride == row_bytes) {
      input_->read(offset, target, rows * row_bytes);
      if (swap) kernels.swap(target, rows * (to - from), pixel);
    } else {
      unsigned char* const stored = at_least(worker.stored, rows * row_bytes);
      input_->read(offset, stored, rows * row_bytes);
      for (std::uint64_t i = 0; i < rows; ++i) {
        unsigned char* at = stored + i * row_bytes;
        if (g.packed()) {
          auto* const unpacked = at_least(worker.rows, g.segment_width * pixel);
          kernels.unpack(at, reinterpret_cast<std::uint16_t*>(unpacked), g.segment_width, g.bits);
          at = unpacked;
        }
        at += (from - left) * pixel;
        if (swap) kernels.swap(at, to - from, pixel);
        place(window, g, row + i, from, at, to - from);
      }
    }
    row += rows;
  }
}

void Reader::read_uncompressed(const Window& window, const Area& area, std::size_t threads) {
  const Geometry& g = frame(window.page).geometry;
  const Table segments = table(window.page);
  const std::uint64_t first = area.left / g.segment_width, across = (area.right - 1) / g.segment_width - first + 1;
  const std::uint64_t height = std::max<std::uint64_t>(1, chunk_bytes / g.row_bytes());
  const std::uint64_t down = divide_up(area.bottom - area.top, height);
  run_jobs(across * down, threads, [&](std::uint64_t i, Worker& worker) {
    const std::uint64_t top = area.top + i / across * height;
    read_rows(window, area, *segments, first + i % across, top, std::min(top + height, area.bottom), worker);
  });
}

// Whether the window is taken from whole decoded segments. Uncompressed ones are read straight to where they are wanted,
// since the system keeps them, but for narrow windows of wide strips: a system call for each row costs more than
// keeping the strips for the windows beside this one.
bool Reader::through_cache(const Geometry& g, const Area& area) const {
  if (g.compression != Compression::none) return true;
  const std::uint64_t needed = (area.right - area.left) * g.pixel_bytes();
  const std::uint64_t strips = (area.bottom - 1) / g.segment_height - area.top / g.segment_height + 1;
  return !g.tiled && !g.packed() && g.row_bytes() > needed + worth_a_call &&
         checked_multiply(strips, g.decoded_bytes(0) + decoder_slack) <= cache_.budget() / 2;
}

void Reader::read(const Window& window, std::size_t threads) {
  const Geometry& g = frame(window.page).geometry;
  const Area area = inside(window);
  const Axis rows{window.row, static_cast<std::int64_t>(window.rows), static_cast<std::int64_t>(g.height)};
  const Axis columns{window.column, static_cast<std::int64_t>(window.columns), static_cast<std::int64_t>(g.width)};
  if (area.top >= area.bottom || area.left >= area.right || !rows.closed(window.border) ||
      !columns.closed(window.border)) {
    throw std::invalid_argument("the window does not hold the pixels that its border repeats");
  }
  if (through_cache(g, area)) {
    read_segments(window, area, threads);
  } else {
    read_uncompressed(window, area, threads);
  }
  const std::size_t bytes = window.values ? value_sizes[window.value] : g.pixel_bytes();
  fill_border(window.out, window.row_stride, rows, columns, window.border, bytes);
}

void Reader::load(const Window& window, std::size_t threads) {
  const Area area = inside(window);
  if (area.top >= area.bottom || area.left >= area.right) return;
  if (!through_cache(frame(window.page).geometry, area)) return;
  for_blocks(window.page, area, threads, [](std::uint64_t, std::uint64_t, std::uint64_t, const BlockPointer&) {});
}

}  // namespace xrk::tiff
