// The scans' kernels over vectors of channels. Each scan_<path>.cpp includes this file once, by way of
// scan_backward_path.h, and is compiled for its own
// instruction set; all of it has internal linkage, as in pixels_path.h and for the same reason.
//
// Every lane does the same operations wherever its channel lies, so no result depends on how channels are shared out.
#pragma once

#include "scan.h"
#include "vectors_path.h"

namespace xrk::cpu {
namespace {

// log(1 + e) = 2 artanh(s), s = e / (2 + e): artanh(s) / s in powers of s * s, up to 1/9, highest first.
template <typename T>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr int degree = 4;
  // Least maximum of the error, 4e-9.
  static constexpr float terms[degree + 1] = {0.140957737f, 0.13978833f, 0.200125571f, 0.333331551f, 1.0f};
  static constexpr float negligible = 25.0f;
};
template <>
struct Logarithm<double> {
  static constexpr int degree = 16;
  // 1 / (2 k + 1)
  static constexpr double terms[degree + 1] = {1.0 / 33, 1.0 / 31, 1.0 / 29, 1.0 / 27, 1.0 / 25, 1.0 / 23,
                                               1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11,
                                               1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
  static constexpr double negligible = 45.0;
};

// log(1 + exp(z)), to a few roundings of the result however small it is, from e = exp(-|z|).
template <typename T>
inline Vector<T> softplus_from(Vector<T> z, Vector<T> e) {
  using V = Vector<T>;
  using L = Logarithm<T>;
  const V zero = {};
  const V s = e / (e + static_cast<T>(2));
  const V q = s * s;
  V sum = spread<T>(L::terms[0]);
#pragma GCC unroll 16
  for (int k = 1; k <= L::degree; ++k) sum = madd(sum, q, spread<T>(L::terms[k]));
  // NaN: `larger` may return either argument, so z itself is added where it is not a number.
  const V positive = z > zero ? z : (z == z ? zero : z);
  return madd(s + s, sum, positive);
}

template <typename T>
inline Vector<T> exp_of_minus_size(Vector<T> z) {
  return exp2_of<T>(larger(z, Vector<T>{} - z) * static_cast<T>(-1.4426950408889634074));
}

template <typename T>
inline Vector<T> softplus_of(Vector<T> z) {
  return softplus_from<T>(z, exp_of_minus_size<T>(z));
}

inline std::int64_t position(const Steps& steps, std::int64_t t) {
  return steps.order ? steps.order[t] : steps.first + t * steps.stride;
}

// A walk's steps are taken in chunks: a chunk's u, dt and y lie packed in a core's first cache, whatever the strides of
// the map are, and all its dt are computed before the states, which wait for each other.
constexpr std::int64_t chunk_steps = 64;

// G vectors of channels of u (or of delta), packed step by step.
template <typename T, typename S, int G>
void gather(const Walk<T>& w, const S* from, std::int64_t t, std::int64_t count, std::int64_t channel, T* to) {
  const std::int64_t here = w.width - channel;
  for (std::int64_t i = 0; i < count; ++i, to += G * lanes<T>) {
    const S* p = from + position(w.steps, t + i) * w.pitch + channel;
    for (int g = 0; g < G; ++g) store(to + g * lanes<T>, load_some(p + g * lanes<T>, here - g * lanes<T>));
  }
}

template <typename T, int G>
void gather_u(const Walk<T>& w, std::int64_t t, std::int64_t count, std::int64_t channel, T* to) {
  if constexpr (sizeof(T) == 4) {
    if (w.u_storage == S_F16) return gather<T, Half, G>(w, static_cast<const Half*>(w.u), t, count, channel, to);
    if (w.u_storage == S_BF16) return gather<T, Brain, G>(w, static_cast<const Brain*>(w.u), t, count, channel, to);
  }
  gather<T, T, G>(w, static_cast<const T*>(w.u), t, count, channel, to);
}

template <typename T, int G>
void put_whole(const Walk<T>& w, std::int64_t t, std::int64_t count, std::int64_t channel, const T* y) {
  const std::int64_t here = w.width - channel;
  for (std::int64_t i = 0; i < count; ++i, y += G * lanes<T>) {
    T* target = static_cast<T*>(w.y) + position(w.steps, t + i) * w.pitch + channel;
    for (int g = 0; g < G; ++g, target += lanes<T>) {
      const std::int64_t left = here - g * lanes<T>;
      Vector<T> value = load(y + g * lanes<T>);
      if (w.put != Put::set) value = load_some(target, left) + value;
      store_some(target, value, left);
    }
  }
}

// The sum so far lies in two planes of 16 bits until the last put rounds it.
template <typename S, int G>
void put_halves(const Walk<float>& w, std::int64_t t, std::int64_t count, std::int64_t channel, const float* y) {
  const auto join = [](const void* upper, const void* lower) {
    return (FloatVector)((__builtin_convertvector(load_bits(upper), BitVector) << 16) |
                         __builtin_convertvector(load_bits(lower), BitVector));
  };
  constexpr std::int64_t size = lanes<float>;
  for (std::int64_t i = 0; i < count; ++i, y += G * size) {
    const std::int64_t at = position(w.steps, t + i) * w.pitch + channel;
    for (int g = 0; g < G; ++g) {
      S* target = static_cast<S*>(w.y) + at + g * size;
      std::uint16_t* rest = w.rest + at + g * size;
      std::int64_t left = w.width - channel - g * size;
      left = left < size ? left : size;
      // Fewer channels than lanes: by way of whole vectors of their own.
      S upper[size] = {};
      std::uint16_t lower[size] = {};
      const bool whole = left == size;
      if (!whole && w.put != Put::set) {
        for (std::int64_t j = 0; j < left; ++j) upper[j] = target[j], lower[j] = rest[j];
      }
      S* const high = whole ? target : upper;
      std::uint16_t* const low = whole ? rest : lower;
      FloatVector value = load(y + g * size);
      if (w.put != Put::set) value = join(high, low) + value;
      if (w.put == Put::last) {
        store(high, value);
      } else {
        store_bits(high, (BitVector)value >> 16);
        store_bits(low, (BitVector)value & 0xffffu);
      }
      if (whole) continue;
      for (std::int64_t j = 0; j < left; ++j) target[j] = upper[j];
      for (std::int64_t j = 0; j < left && w.put != Put::last; ++j) rest[j] = lower[j];
    }
  }
}

template <typename T, int G>
void put(const Walk<T>& w, std::int64_t t, std::int64_t count, std::int64_t channel, const T* y) {
  if constexpr (sizeof(T) == 4) {
    if (w.y_storage == S_F16) return put_halves<Half, G>(w, t, count, channel, y);
    if (w.y_storage == S_BF16) return put_halves<Brain, G>(w, t, count, channel, y);
  }
  put_whole<T, G>(w, t, count, channel, y);
}

// dt of G vectors of channels at `count` steps from t on, packed step by step. most: each lane's largest |dt|, not a
// number where one of them is not finite.
template <typename T, int G>
void take_deltas(const Walk<T>& w, std::int64_t t, std::int64_t count, std::int64_t channel, T* dt, Vector<T>* most) {
  using V = Vector<T>;
  V bias[G], doubt[G] = {};
  for (int g = 0; g < G; ++g) {
    bias[g] = load(w.bias + channel + g * lanes<T>);
    most[g] = V{};
  }
  if (w.delta) gather<T, T, G>(w, w.delta, t, count, channel, dt);
  for (std::int64_t i = 0; i < count; ++i, dt += G * lanes<T>) {
    V z[G];
    for (int g = 0; g < G; ++g) z[g] = bias[g];
    if (w.delta) {
      for (int g = 0; g < G; ++g) z[g] = z[g] + load(dt + g * lanes<T>);
    } else {
      const T* row = w.rows + (t + i) * w.row_pitch;
      const T* weight = w.dt_weight + channel;
      for (std::int64_t r = 0; r < w.rank; ++r, weight += w.padded) {
        for (int g = 0; g < G; ++g) z[g] = madd(spread<T>(row[r]), load(weight + g * lanes<T>), z[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      if (w.softplus) z[g] = softplus_of<T>(z[g]);
      store(dt + g * lanes<T>, z[g]);
      most[g] = larger(most[g], larger(z[g], V{} - z[g]));
      doubt[g] = doubt[g] + (z[g] - z[g]);
    }
  }
  for (int g = 0; g < G; ++g) most[g] = most[g] + doubt[g];
}

// The states of G vectors of channels over one chunk; u becomes y. LIMITED: dt * A may leave exp2_within's range.
template <typename T, int G, bool LIMITED>
void walk_chunk(const Walk<T>& w, std::int64_t t, std::int64_t count, std::int64_t channel, const T* a2, T* state,
                const T* dt_, T* u_) {
  using V = Vector<T>;
  const std::int64_t states = w.states, steps = w.steps.count;
  const auto u_bytes = static_cast<std::int64_t>(storage_bytes[w.u_storage]);
  const auto y_bytes = static_cast<std::int64_t>(storage_bytes[w.y_storage]);
  // Within the map for channels beyond its width too.
  const std::int64_t last_value = (w.width - channel < G * lanes<T> ? w.width - channel : G * lanes<T>) - 1;
  V skip[G];
  for (int g = 0; g < G; ++g) skip[g] = load(w.skip + channel + g * lanes<T>);
  for (std::int64_t i = 0; i < count; ++i) {
    // The next chunk's pixels, which may be a row of the image apart.
    const std::int64_t later = t + i + chunk_steps;
    if (later < steps || later - steps < w.next.count) {
      const std::int64_t next = later < steps ? position(w.steps, later) : position(w.next, later - steps);
      const char* const u = static_cast<const char*>(w.u) + (next * w.pitch + channel) * u_bytes;
      const char* const y = static_cast<const char*>(w.y) + (next * w.pitch + channel) * y_bytes;
      __builtin_prefetch(u);
      __builtin_prefetch(u + last_value * u_bytes);
      __builtin_prefetch(y, 1);
      __builtin_prefetch(y + last_value * y_bytes, 1);
    }
    const std::int64_t row = w.rows_by_step ? t + i : position(w.steps, t + i);
    const T* const b = w.b + row * w.row_pitch;
    const T* const c = w.c + row * w.row_pitch;
    V dt[G], x[G], y[G];
    for (int g = 0; g < G; ++g) {
      const std::int64_t at = (i * G + g) * lanes<T>;
      const V u = load(u_ + at);
      dt[g] = load(dt_ + at);
      x[g] = dt[g] * u;
      y[g] = skip[g] * u;
    }
    for (std::int64_t n = 0; n < states; ++n) {
      const V bn = spread<T>(b[n]);
      const V cn = spread<T>(c[n]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const std::int64_t at = (n * G + g) * lanes<T>;
        const V exponent = dt[g] * load(a2 + at);
        const V decay = LIMITED ? exp2_of<T>(exponent) : exp2_within<T>(exponent);
        const V h = madd(decay, load(state + at), x[g] * bn);
        store(state + at, h);
        y[g] = madd(h, cn, y[g]);
      }
    }
    for (int g = 0; g < G; ++g) store(u_ + (i * G + g) * lanes<T>, y[g]);
  }
}

template <typename T, int G>
void walk_group(const Walk<T>& w, std::int64_t channel) {
  using V = Vector<T>;
  constexpr std::int64_t size = G * lanes<T>;
  alignas(64) T u[chunk_steps * size];
  alignas(64) T dt[chunk_steps * size];
  alignas(64) T a2[most_states * size];
  alignas(64) T state[most_states * size];
  V steepest[G] = {};
  for (std::int64_t n = 0; n < w.states; ++n) {
    for (int g = 0; g < G; ++g) {
      const std::int64_t from = n * w.padded + channel + g * lanes<T>, to = n * size + g * lanes<T>;
      const V a = load(w.a2 + from);
      store(a2 + to, a);
      store(state + to, load(w.state + from));
      steepest[g] = larger(steepest[g], larger(a, V{} - a));
    }
  }
  for (std::int64_t t = 0; t < w.steps.count; t += chunk_steps) {
    const std::int64_t count = w.steps.count - t < chunk_steps ? w.steps.count - t : chunk_steps;
    V most[G];
    take_deltas<T, G>(w, t, count, channel, dt, most);
    gather_u<T, G>(w, t, count, channel, u);
    bool within = true;
    for (int g = 0; g < G; ++g) {
      const V exponent = most[g] * steepest[g];
      for (std::int64_t j = 0; j < lanes<T>; ++j) within = within && exponent[j] < -Lanes<T>::lowest;
    }
    if (within) {
      walk_chunk<T, G, false>(w, t, count, channel, a2, state, dt, u);
    } else {
      walk_chunk<T, G, true>(w, t, count, channel, a2, state, dt, u);
    }
    put<T, G>(w, t, count, channel, u);
  }
  for (std::int64_t n = 0; n < w.states; ++n) {
    for (int g = 0; g < G; ++g) {
      store(w.state + n * w.padded + channel + g * lanes<T>, load(state + n * size + g * lanes<T>));
    }
  }
}

constexpr int group_vectors = 2;

template <typename T>
void walk_channels(const Walk<T>& given, std::int64_t first, std::int64_t last) {
  // A copy, which no store can change: what it holds may stay in registers.
  const Walk<T> w = given;
  constexpr std::int64_t together = group_vectors * lanes<T>;
  std::int64_t channel = first;
  for (; channel + lanes<T> < last; channel += together) walk_group<T, group_vectors>(w, channel);
  for (; channel < last; channel += lanes<T>) walk_group<T, 1>(w, channel);
}

template <typename T>
void summarise_channels(const Walk<T>& given, std::int64_t first, std::int64_t last) {
  using V = Vector<T>;
  const Walk<T> w = given;
  const V zero = {};
  alignas(64) T u[chunk_steps * lanes<T>];
  alignas(64) T dt[chunk_steps * lanes<T>];
  for (std::int64_t channel = first; channel < last; channel += lanes<T>) {
    V slowest = load(w.a2 + channel);
    for (std::int64_t n = 0; n < w.states; ++n) {
      slowest = larger(slowest, load(w.a2 + n * w.padded + channel));
      store(w.state + n * w.padded + channel, zero);
    }
    V sum = zero;
    bool decayed = false;
    for (std::int64_t end = w.steps.count; end > 0;) {
      const std::int64_t start = (end - 1) / chunk_steps * chunk_steps;
      V most;
      take_deltas<T, 1>(w, start, end - start, channel, dt, &most);
      if (!decayed) gather_u<T, 1>(w, start, end - start, channel, u);
      for (std::int64_t t = end - 1; t >= start; --t) {
        const V step = load(dt + (t - start) * lanes<T>);
        if (!decayed) {
          const V x = step * load(u + (t - start) * lanes<T>);
          const T* b = w.b + (w.rows_by_step ? t : position(w.steps, t)) * w.row_pitch;
          for (std::int64_t n = 0; n < w.states; ++n) {
            const std::int64_t at = n * w.padded + channel;
            const V decay = exp2_of<T>(sum * load(w.a2 + at));
            store(w.state + at, madd(decay, x * spread<T>(b[n]), load(w.state + at)));
          }
        }
        sum = sum + step;
        if (!decayed && t % 8 == 0) {
          decayed = true;
          const V exponent = sum * slowest * static_cast<T>(0.69314718055994530942);
          for (std::int64_t i = 0; i < lanes<T> && channel + i < w.width; ++i) {
            // Written so that a NaN never counts as decayed.
            if (!(exponent[i] < -Logarithm<T>::negligible)) decayed = false;
          }
        }
      }
      end = start;
    }
    store(w.delta_sum + channel, sum);
  }
}

// --- projection ---------------------------------------------------------------------------------------------------

// rows[i] (+)= x[i] . weight for four pixels and some vectors of outputs.
template <typename T, int VECTORS>
inline void project_tile(const T* const* x, std::int64_t channels, const T* weight, std::int64_t outputs,
                         T* const* rows, bool more) {
  using V = Vector<T>;
  V sum[4][VECTORS] = {};
  if (more) {
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = load(rows[i] + v * lanes<T>);
    }
  }
  for (std::int64_t d = 0; d < channels; ++d) {
    V column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load(weight + d * outputs + v * lanes<T>);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V value = spread<T>(x[i][d]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = madd(value, column[v], sum[i][v]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < VECTORS; ++v) store(rows[i] + v * lanes<T>, sum[i][v]);
  }
}

template <typename T>
inline void project_pixels(const T* const* x, std::int64_t channels, const T* weight, std::int64_t outputs,
                           T* const* rows, bool more) {
  for (std::int64_t q = 0; q < outputs;) {
    const std::int64_t left = (outputs - q) / lanes<T>;
    T* const place[4] = {rows[0] + q, rows[1] + q, rows[2] + q, rows[3] + q};
    if (left >= 3) {
      project_tile<T, 3>(x, channels, weight + q, outputs, place, more);
      q += 3 * lanes<T>;
    } else if (left == 2) {
      project_tile<T, 2>(x, channels, weight + q, outputs, place, more);
      q += 2 * lanes<T>;
    } else {
      project_tile<T, 1>(x, channels, weight + q, outputs, place, more);
      q += lanes<T>;
    }
  }
}

// Channels that are unpacked from 16 bits at a time.
constexpr std::int64_t block_channels = 256;

template <typename T, typename S>
void project_steps(const S* x, std::int64_t channels, const Steps& steps, const T* weight, std::int64_t outputs,
                   T* rows) {
  for (std::int64_t t = 0; t < steps.count; t += 4) {
    const S* source[4];
    T* target[4];
    for (int i = 0; i < 4; ++i) {
      // Beyond the end the last position is done again, into the same row.
      const std::int64_t step = t + i < steps.count ? t + i : steps.count - 1;
      source[i] = x + position(steps, step) * channels;
      target[i] = rows + step * outputs;
    }
    if constexpr (sizeof(S) == sizeof(T)) {
      project_pixels<T>(source, channels, weight, outputs, target, false);
    } else {
      for (std::int64_t d = 0; d < channels; d += block_channels) {
        const std::int64_t here = channels - d < block_channels ? channels - d : block_channels;
        alignas(64) T block[4][block_channels];
        const T* const values[4] = {block[0], block[1], block[2], block[3]};
        for (int i = 0; i < 4; ++i) {
          for (std::int64_t j = 0; j < here; j += lanes<T>) {
            store(block[i] + j, load_some(source[i] + d + j, here - j));
          }
        }
        project_pixels<T>(values, here, weight + d * outputs, outputs, target, d > 0);
      }
    }
  }
}

template <typename T>
void project(const void* x, Storage storage, std::int64_t channels, const Steps& steps, const T* weight,
             std::int64_t outputs, T* rows) {
  if constexpr (sizeof(T) == 4) {
    if (storage == S_F16) {
      return project_steps<T>(static_cast<const Half*>(x), channels, steps, weight, outputs, rows);
    }
    if (storage == S_BF16) {
      return project_steps<T>(static_cast<const Brain*>(x), channels, steps, weight, outputs, rows);
    }
  }
  project_steps<T>(static_cast<const T*>(x), channels, steps, weight, outputs, rows);
}

}  // namespace
}  // namespace xrk::cpu
