// Runs every kernel of csrc/cpu over odd shapes, on every path that this processor has and on several threads, for a
// build with sanitizers (run.py). No Python and no torch: their runtimes are not clean under ThreadSanitizer, this
// program's threads are std::thread alone. Every array is a heap block of its exact size, so that a value read or
// written beyond an end is seen, and every result is compared with that of the baseline path on one thread.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/layers.h"
#include "../../csrc/cpu/pixels.h"
#include "../../csrc/cpu/scan.h"
#include "../../csrc/cpu/threads.h"

using namespace xrk::cpu;

int read_segments_at_once();  // segments.cpp
int write_segments_at_once();

namespace {

int failures = 0;
std::string place;

// Values of one storage in a heap block without a byte to spare.
class Block {
 public:
  Block(Storage storage, std::size_t count) : storage_(storage), count_(count) {
    bytes_ = new unsigned char[bytes() ? bytes() : 1];
    std::memset(bytes_, 0, bytes());
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  Block(Block&& other) noexcept : storage_(other.storage_), count_(other.count_), bytes_(other.bytes_) {
    other.bytes_ = nullptr;
  }
  ~Block() { delete[] bytes_; }

  std::size_t bytes() const { return count_ * storage_bytes[storage_]; }
  std::size_t count() const { return count_; }
  Storage storage() const { return storage_; }
  void* data() { return bytes_; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes_);
  }

  // Small values: eighths from -2 to 2, which every storage holds exactly.
  void fill(std::uint32_t seed, double scale = 1, double offset = 0) {
    for (std::size_t i = 0; i < count_; ++i) {
      seed = seed * 1664525u + 1013904223u;
      set(i, offset + scale * (static_cast<double>(seed >> 27) - 16) / 8);
    }
  }

  double get(std::size_t i) const {
    if (storage_ == S_F64) return at<double>(i);
    if (storage_ == S_F32) return at<float>(i);
    const std::uint16_t bits = at<std::uint16_t>(i);
    if (storage_ == S_BF16) {
      const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
      float value;
      std::memcpy(&value, &wide, 4);
      return value;
    }
    const int exponent = (bits >> 10) & 31;
    const double mantissa = bits & 1023;
    double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) value = mantissa != 0 ? NAN : INFINITY;
    return bits & 0x8000 ? -value : value;
  }

 private:
  template <typename T>
  T at(std::size_t i) const {
    T value;
    std::memcpy(&value, bytes_ + i * sizeof value, sizeof value);
    return value;
  }

  void set(std::size_t i, double value) {
    const auto put = [&](auto v) { std::memcpy(bytes_ + i * sizeof v, &v, sizeof v); };
    if (storage_ == S_F64) return put(value);
    const float single = static_cast<float>(value);
    if (storage_ == S_F32) return put(single);
    std::uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (storage_ == S_BF16) return put(static_cast<std::uint16_t>(bits >> 16));
    // Cut off, not rounded: exact for the values of `fill`.
    const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
    const std::uint32_t half = exponent <= 0 ? 0 : (static_cast<std::uint32_t>(exponent) << 10) | ((bits >> 13) & 1023);
    put(static_cast<std::uint16_t>(((bits >> 16) & 0x8000) | half));
  }

  Storage storage_;
  std::size_t count_;
  unsigned char* bytes_;
};

Storage compute(Storage storage) { return storage == S_F64 ? S_F64 : S_F32; }

double tolerance(Storage storage) {
  constexpr double each[STORAGES] = {2e-5, 1e-11, 4e-3, 3e-2};
  return each[storage];
}

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s: %s\n", place.c_str(), what);
}

bool close(const Block& a, const Block& b) {
  double most = 1;
  for (std::size_t i = 0; i < b.count(); ++i) most = std::fmax(most, std::fabs(b.get(i)));
  for (std::size_t i = 0; i < b.count(); ++i) {
    if (!(std::fabs(a.get(i) - b.get(i)) <= tolerance(b.storage()) * most)) return false;
  }
  return true;
}

// work(result, threads) on every path with 1 and 3 threads: near what the baseline gives, the same bytes for each number
// of threads.
template <typename Work>
void on_every_path(const std::string& name, Storage storage, std::size_t count, const Work& work) {
  place = name;
  select_path("baseline");
  Block expected(storage, count);
  work(expected, 1);
  const char* paths[3];
  const std::size_t found = supported_paths(paths);
  for (std::size_t i = 0; i < found; ++i) {
    select_path(paths[i]);
    place = name + " on " + paths[i];
    Block one(storage, count), three(storage, count);
    work(one, 1);
    work(three, 3);
    expect(close(one, expected), "far from the baseline's result");
    expect(std::memcmp(one.data(), three.data(), one.bytes()) == 0, "three threads give other bytes than one");
  }
}

std::string name_of(const char* kernel, Storage storage, std::initializer_list<std::size_t> sizes) {
  constexpr const char* names[STORAGES] = {"float32", "float64", "float16", "bfloat16"};
  std::string name = std::string(kernel) + " " + names[storage];
  for (const std::size_t size : sizes) name += " " + std::to_string(size);
  return name;
}

// --- scans --------------------------------------------------------------------------------------------------------

template <typename T>
void scans(Storage storage, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t channels,
           std::int64_t states, std::int64_t rank) {
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const std::size_t values = size(batch * height * width * channels);
  const Storage type = compute(storage);
  Block x(storage, values), projection(type, size(4 * (rank + 2 * states) * channels));
  Block dt_weight(type, size(4 * channels * rank)), dt_bias(type, size(4 * channels));
  Block a_logs(type, size(4 * channels * states)), skip(type, size(4 * channels));
  x.fill(1);
  projection.fill(2, 0.1);
  dt_weight.fill(3, 0.5);
  dt_bias.fill(4, 0.25, -2);
  a_logs.fill(5);
  skip.fill(6);
  const Ss2dWeights<T> w{projection.as<T>(), dt_weight.as<T>(), dt_bias.as<T>(), a_logs.as<T>(),
                         skip.as<T>(),       channels,          rank,            states};
  const Map map{x.data(), storage, batch, height, width};
  const auto name = [&](const char* kernel) {
    return name_of(kernel, storage, {size(batch), size(height), size(width), size(channels), size(states), size(rank)});
  };
  on_every_path(name("selective_scan_2d"), storage, values, [&](Block& out, std::size_t threads) {
    selective_scan_2d<T>(map, w, out.data(), threads);
  });
  for (int direction = 0; direction < 4; ++direction) {
    const std::int64_t lines = direction % 2 == 0 ? height : width;
    const std::size_t sums = size(batch * lines * channels), ends = sums * size(states);
    on_every_path(name("summarise_lines"), type, sums + ends, [&](Block& out, std::size_t threads) {
      Block sum(type, sums), end(type, ends);
      summarise_lines<T>(map, w, direction, sum.as<T>(), end.as<T>(), threads);
      std::memcpy(out.data(), sum.data(), sum.bytes());
      std::memcpy(out.as<T>() + sums, end.data(), end.bytes());
    });
    on_every_path(name("scan_lines"), type, values, [&](Block& out, std::size_t threads) {
      Block state(type, ends);
      state.fill(7);
      scan_lines<T>(map, w, direction, state.as<T>(), out.as<T>(), threads);
    });
  }
}

template <typename T>
void scans_1d(std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t groups, std::int64_t states,
              int order_kind) {
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const Storage type = sizeof(T) == 8 ? S_F64 : S_F32;
  Block u(type, size(batch * length * channels)), delta(type, u.count());
  Block a(type, size(channels * states)), b(type, size(batch * groups * length * states)), c(type, b.count());
  Block skip(type, size(channels)), bias(type, size(channels));
  u.fill(1);
  delta.fill(2, 1, order_kind == 1 ? 2.5 : 0);  // without softplus, of one sign: states decay
  a.fill(3, 0.5, -1.25);
  b.fill(4);
  c.fill(5);
  skip.fill(6);
  bias.fill(7);
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < (order_kind == 2 ? batch : 1) * length; ++i) order.push_back(length - 1 - i % length);
  on_every_path(name_of("selective_scan", type, {size(batch), size(length), size(channels), size(groups), size(states)}),
                type, u.count(), [&](Block& out, std::size_t threads) {
                  Block state(type, size(batch * channels * states));
                  state.fill(8);
                  Scan1d<T> scan{};
                  scan.u = u.as<T>();
                  scan.delta = delta.as<T>();
                  scan.a = a.as<T>();
                  scan.b = b.as<T>();
                  scan.c = c.as<T>();
                  scan.skip = order_kind == 1 ? nullptr : skip.as<T>();
                  scan.bias = order_kind == 1 ? nullptr : bias.as<T>();
                  scan.order = order_kind == 0 ? nullptr : order.data();
                  scan.order_per_image = order_kind == 2;
                  scan.softplus = order_kind != 1;
                  scan.state = state.as<T>();
                  scan.y = out.as<T>();
                  scan.batch = batch;
                  scan.length = length;
                  scan.channels = channels;
                  scan.groups = groups;
                  scan.states = states;
                  selective_scan<T>(scan, threads);
                });
}

// With a rank: of one direction of an image, from its projections.
template <typename T>
void scan_gradients(std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t groups,
                    std::int64_t states, std::int64_t rank, int order_kind) {
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const Storage type = sizeof(T) == 8 ? S_F64 : S_F32;
  const std::int64_t row = rank + 2 * states;
  Block u(type, size(batch * length * channels)), delta(type, u.count()), y(type, u.count());
  Block a(type, size(channels * states)), b(type, size(batch * groups * length * states)), c(type, b.count());
  Block bias(type, size(channels)), state(type, size(batch * channels * states));
  Block rows(type, size(batch * length * row)), dt_weight(type, size(channels * rank));
  u.fill(1);
  delta.fill(2);
  a.fill(3, 0.5, -1.25);
  b.fill(4);
  c.fill(5);
  y.fill(6);
  bias.fill(7);
  state.fill(8);
  rows.fill(9);
  dt_weight.fill(10, 0.25);
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < (order_kind == 2 ? batch : 1) * length; ++i) order.push_back(length - 1 - i % length);
  const std::size_t counts[] = {u.count(), a.count(), rank ? 0 : delta.count(), rank ? 0 : b.count(),
                                rank ? 0 : c.count(), rank ? 0 : state.count(), rank ? rows.count() : 0,
                                dt_weight.count(), rank ? bias.count() : 0};
  std::size_t all = 0;
  for (const std::size_t count : counts) all += count;
  on_every_path(name_of("scan gradients", type, {size(batch), size(length), size(channels), size(states), size(rank)}),
                type, all, [&](Block& out, std::size_t threads) {
                  std::vector<Block> grads;
                  for (const std::size_t count : counts) grads.emplace_back(type, count);
                  const auto grad = [&](std::size_t i) { return counts[i] ? grads[i].as<T>() : nullptr; };
                  Scan1d<T> scan{};
                  scan.u = u.as<T>();
                  scan.delta = delta.as<T>();
                  scan.a = a.as<T>();
                  scan.b = b.as<T>();
                  scan.c = c.as<T>();
                  scan.bias = bias.as<T>();
                  scan.order = order_kind == 0 ? nullptr : order.data();
                  scan.order_per_image = order_kind == 2;
                  scan.reversed = rank > 1;
                  scan.softplus = true;
                  scan.start = rank ? nullptr : state.as<T>();
                  scan.batch = batch;
                  scan.length = length;
                  scan.channels = channels;
                  scan.groups = groups;
                  scan.states = states;
                  Scan1dGradients<T> gradients{};
                  if (rank) gradients.rows = rows.as<T>(), gradients.dt_weight = dt_weight.as<T>(), gradients.rank = rank;
                  gradients.y_grad = y.as<T>();
                  gradients.u_grad = grad(0);
                  gradients.a_grad = grad(1);
                  gradients.delta_grad = grad(2);
                  gradients.b_grad = grad(3);
                  gradients.c_grad = grad(4);
                  gradients.state_grad = grad(5);
                  gradients.rows_grad = grad(6);
                  gradients.dt_weight_grad = grad(7);
                  gradients.bias_grad = grad(8);
                  selective_scan_backward<T>(scan, gradients, threads);
                  T* to = out.as<T>();
                  for (Block& each : grads) {
                    std::memcpy(to, each.data(), each.bytes());
                    to += each.count();
                  }
                });
}

// --- layers -------------------------------------------------------------------------------------------------------

void layer_norms(Storage storage, std::size_t pixels, std::size_t channels, std::size_t gap, bool all) {
  const Storage type = compute(storage);
  const std::size_t stride = channels + gap;
  Block x(storage, (pixels - 1) * stride + channels), gate(storage, x.count()), weight(type, channels);
  Block bias(type, channels);
  x.fill(1, 1, 4);
  gate.fill(2);
  weight.fill(3);
  bias.fill(4);
  on_every_path(name_of("layer_norm", storage, {pixels, channels, gap}), storage, pixels * channels,
                [&](Block& out, std::size_t threads) {
                  LayerNormTask task{};
                  task.x = x.data();
                  task.out = out.data();
                  if (all) task.weight = weight.data(), task.bias = bias.data(), task.gate = gate.data();
                  task.channels = channels;
                  task.x_stride = task.gate_stride = stride;
                  task.eps = 1e-5;
                  expect(layer_norm(task, storage, pixels, threads), "no memory");
                });
}

void depthwise_convolutions(Storage storage, std::size_t images, std::size_t height, std::size_t width,
                            std::size_t channels, std::size_t kernel, std::size_t dilation, bool silu) {
  const Storage type = compute(storage);
  const std::size_t padded = (channels + channel_padding - 1) / channel_padding * channel_padding;
  Block x(storage, images * height * width * channels), weight(type, kernel * kernel * padded), bias(type, padded);
  x.fill(1);
  weight.fill(2, 0.25);
  bias.fill(3);
  on_every_path(name_of("depthwise", storage, {images, height, width, channels, kernel, dilation}), storage, x.count(),
                [&](Block& out, std::size_t threads) {
                  const DepthwiseTask task{x.data(), weight.data(), bias.data(), out.data(), height,   width,
                                           channels, padded,        kernel,      dilation,   silu};
                  expect(depthwise(task, storage, images, threads), "no memory");
                });
}

void group_norms(Storage storage, std::size_t images, std::size_t pixels, std::size_t channels, std::size_t groups) {
  const Storage type = compute(storage);
  Block x(storage, images * pixels * channels), scale(type, images * channels), mean(type, scale.count());
  Block rest(type, scale.count()), shift(type, scale.count());
  x.fill(1, 1, 2);
  scale.fill(2);
  mean.fill(3);
  shift.fill(4);
  on_every_path(name_of("group_summarise", storage, {images, pixels, channels, groups}), S_F64, images * groups * 3,
                [&](Block& out, std::size_t threads) {
                  GroupTask task{};
                  task.x = x.data();
                  task.channels = channels;
                  task.groups = groups;
                  Block state(S_F64, out.count());
                  expect(group_summarise(task, storage, images, pixels, state.as<double>(), threads), "no memory");
                  // Single precision sums: compared as such.
                  for (std::size_t i = 0; i < out.count(); ++i) {
                    const double value = state.get(i);
                    out.as<double>()[i] = storage == S_F64 ? value : std::round(value * 64) / 64;
                  }
                });
  on_every_path(name_of("group_apply", storage, {images, pixels, channels, groups}), storage, x.count(),
                [&](Block& out, std::size_t threads) {
                  GroupTask task{};
                  task.x = x.data();
                  task.out = out.data();
                  task.scale = scale.data();
                  task.mean = mean.data();
                  task.mean_rest = rest.data();
                  task.shift = shift.data();
                  task.channels = channels;
                  task.groups = 1;
                  task.silu = groups > 1;
                  expect(group_apply(task, storage, images, pixels, threads), "no memory");
                });
}

// --- pixels -------------------------------------------------------------------------------------------------------

void pixel_conversions(std::size_t count) {
  constexpr std::size_t pixel_bytes[PIXELS] = {1, 2, 2, 4, 4, 8};
  for (int pixel = 0; pixel < PIXELS; ++pixel) {
    for (const int value : {V32, V64}) {
      const Storage storage = value == V32 ? S_F32 : S_F64;
      const std::string kind = std::to_string(pixel) + " to " + std::to_string(value);
      std::vector<unsigned char> x(count * pixel_bytes[pixel], 0x3a);
      const std::size_t size = storage_bytes[storage];
      on_every_path("normalise " + kind, storage, count, [&](Block& out, std::size_t threads) {
        const NormaliseSpan span = active_path().normalise[pixel][value];
        split(count, threads, [&](std::size_t first, std::size_t last, std::size_t) {
          span(x.data() + first * pixel_bytes[pixel], 3, 0.25, out.as<unsigned char>() + first * size, last - first);
        });
      });
      Block before(storage, count), after(storage, count);
      before.fill(1);
      after.fill(2);
      on_every_path("apply_residual " + kind, S_F64, count, [&](Block& out, std::size_t threads) {
        std::vector<unsigned char> y(x.size());
        const ApplySpan span = active_path().apply_residual[pixel][value];
        split(count, threads, [&](std::size_t first, std::size_t last, std::size_t) {
          const std::size_t at = first * pixel_bytes[pixel];
          span(x.data() + at, before.as<unsigned char>() + first * size, after.as<unsigned char>() + first * size, 7,
               y.data() + at, last - first);
        });
        for (std::size_t i = 0; i < count; ++i) out.as<double>()[i] = y[i * pixel_bytes[pixel]];
      });
    }
  }
}

}  // namespace

int main() {
  for (const Storage storage : {S_F32, S_F16, S_BF16}) {
    scans<float>(storage, 1, 1, 1, 1, 1, 1);
    scans<float>(storage, 2, 3, 5, 7, 3, 2);
    scans<float>(storage, 1, 70, 3, 33, 2, 1);
    // Enough work for three threads.
    scans<float>(storage, 1, 37, 41, 50, 4, 3);
  }
  scans<double>(S_F64, 1, 5, 3, 13, 3, 2);
  scans<double>(S_F64, 1, 29, 31, 50, 4, 1);
  scan_gradients<float>(2, 5, 3, 1, 1, 1, 0);
  scan_gradients<float>(1, 4500, 50, 1, 4, 3, 0);
  scan_gradients<double>(2, 33, 13, 1, 5, 2, 0);
  for (const int order : {0, 1, 2}) {
    scans_1d<float>(2, 7, 10, 2, 3, order);
    scans_1d<float>(2, 997, 51, 3, 5, order);
    scans_1d<double>(1, 67, 9, 1, 64, order);
    scan_gradients<float>(2, 97, 10, 2, 3, 0, order);
    scan_gradients<double>(1, 67, 9, 1, 64, 0, order);
  }
  for (const Storage storage : {S_F32, S_F64, S_F16, S_BF16}) {
    for (const std::size_t channels : {1u, 5u, 16u, 31u, 33u, 96u}) {
      layer_norms(storage, 1, channels, 0, channels % 2 == 0);
      layer_norms(storage, 7, channels, 3, channels % 2 == 1);
      group_norms(storage, 2, 19, channels, channels % 3 == 0 ? 3 : 1);
    }
    layer_norms(storage, 1030, 97, 1, true);
    group_norms(storage, 2, 1030, 50, 2);
    for (const std::size_t kernel : {3u, 5u}) {
      for (const std::size_t dilation : {1u, 2u}) {
        depthwise_convolutions(storage, 1, 1, 1, 1, kernel, dilation, true);
        depthwise_convolutions(storage, 2, 3, 9, 17, kernel, dilation, false);
        depthwise_convolutions(storage, 1, 11, 2, 16, kernel, dilation, true);
      }
    }
    // Several tiles in width, several threads.
    depthwise_convolutions(storage, 1, 9, 261, 65, 3, 1, true);
  }
  pixel_conversions(33);
  pixel_conversions(200003);
  if (read_segments_at_once() != 0) {
    std::puts("windows of a TIFF file differ from what was written");
    ++failures;
  }
  if (write_segments_at_once() != 0) {
    std::puts("TIFF files that were written at once differ");
    ++failures;
  }
  if (failures == 0) std::puts("every kernel, on every path of this processor: no difference");
  return failures == 0 ? 0 : 1;
}
