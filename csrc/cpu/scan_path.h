// The scans' kernels over vectors of channels. Each scan_<path>.cpp includes this file once and is compiled for its own
// instruction set; all of it has internal linkage, as in pixels_path.h and for the same reason.
//
// Every lane does the same operations wherever its channel lies, so no result depends on how channels are shared out.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "scan.h"

namespace xrk::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(vector_bytes)));
typedef double DoubleVector __attribute__((vector_size(vector_bytes)));
typedef std::int32_t IntVector __attribute__((vector_size(vector_bytes)));
typedef std::int64_t LongVector __attribute__((vector_size(vector_bytes)));

// Intrinsics where the language has no operator that is one instruction: contraction is off in this build, and a
// comparison with a choice is not turned into a maximum.
#if defined(__AVX512F__)
inline FloatVector madd(FloatVector a, FloatVector b, FloatVector c) { return _mm512_fmadd_ps(a, b, c); }
inline DoubleVector madd(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm512_fmadd_pd(a, b, c); }
inline FloatVector larger(FloatVector a, FloatVector b) { return _mm512_max_ps(a, b); }
inline DoubleVector larger(DoubleVector a, DoubleVector b) { return _mm512_max_pd(a, b); }
inline FloatVector smaller(FloatVector a, FloatVector b) { return _mm512_min_ps(a, b); }
inline DoubleVector smaller(DoubleVector a, DoubleVector b) { return _mm512_min_pd(a, b); }
#elif defined(__AVX2__)
inline FloatVector madd(FloatVector a, FloatVector b, FloatVector c) { return _mm256_fmadd_ps(a, b, c); }
inline DoubleVector madd(DoubleVector a, DoubleVector b, DoubleVector c) { return _mm256_fmadd_pd(a, b, c); }
inline FloatVector larger(FloatVector a, FloatVector b) { return _mm256_max_ps(a, b); }
inline DoubleVector larger(DoubleVector a, DoubleVector b) { return _mm256_max_pd(a, b); }
inline FloatVector smaller(FloatVector a, FloatVector b) { return _mm256_min_ps(a, b); }
inline DoubleVector smaller(DoubleVector a, DoubleVector b) { return _mm256_min_pd(a, b); }
#else
template <typename V>
inline V madd(V a, V b, V c) {
  return a * b + c;
}
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
#endif

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using V = FloatVector;
  using I = IntVector;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to a whole number
  static constexpr int mantissa = 23;
  static constexpr float lowest = -126.0f, highest = 128.0f, negligible = 25.0f;
  static constexpr int log_terms = 7;
  static constexpr int degree = 6;
  // 2**f on [-1/2, 1/2] to 2e-9 (least maximum of the relative error), highest power first.
  static constexpr float exponential[degree + 1] = {
      0.000153458124f, 0.00133999309f, 0.00961848907f, 0.0555032864f,
      0.240226462f, 0.693147182f, 1.0f};
};

template <>
struct Lanes<double> {
  using V = DoubleVector;
  using I = LongVector;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2**52
  static constexpr int mantissa = 52;
  static constexpr double lowest = -1022.0, highest = 1024.0, negligible = 45.0;
  static constexpr int log_terms = 16;
  static constexpr int degree = 13;
  // ln(2)**k / k!
  static constexpr double exponential[degree + 1] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.4455382718708101e-10, 7.0549116208011209e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441, 0.0096181291076284769, 0.055504108664821576, 0.24022650695910069,
      0.69314718055994529, 1.0};
};

template <typename T>
inline typename Lanes<T>::V load(const T* p) {
  typename Lanes<T>::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, typename Lanes<T>::V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename T>
constexpr std::int64_t lanes = vector_bytes / static_cast<int>(sizeof(T));

// `count` of a vector's channels, which may be fewer than it has lanes (the others are 0) or more.
template <typename T>
inline typename Lanes<T>::V load_some(const T* p, std::int64_t count) {
  if (count >= lanes<T>) return load(p);
  typename Lanes<T>::V v = {};
  for (std::int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <typename T>
inline void store_some(T* p, typename Lanes<T>::V v, std::int64_t count) {
  if (count >= lanes<T>) return store(p, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = v[i];
}

template <typename T>
inline typename Lanes<T>::V spread(T value) {
  return typename Lanes<T>::V{} + value;
}

// 2**p; what is below the normal numbers comes out as the smallest of them, what is too large as infinity.
template <typename T>
inline typename Lanes<T>::V exp2_of(typename Lanes<T>::V p) {
  using L = Lanes<T>;
  using V = typename L::V;
  using I = typename L::I;
  p = smaller(larger(p, spread<T>(L::lowest)), spread<T>(L::highest));
  const V shifted = p + L::magic;
  const V f = p - (shifted - L::magic);
  V power = spread<T>(L::exponential[0]);
#pragma GCC unroll 16
  for (int i = 1; i <= L::degree; ++i) power = madd(power, f, spread<T>(L::exponential[i]));
  return (V)((I)power + ((I)shifted << L::mantissa));
}

// log(1 + exp(z)), to a few roundings of the result however small it is: log(1 + e) = 2 artanh(e / (2 + e)).
template <typename T>
inline typename Lanes<T>::V softplus_of(typename Lanes<T>::V z) {
  using V = typename Lanes<T>::V;
  const V zero = {};
  const V away = larger(z, zero - z);
  const V e = exp2_of<T>(away * static_cast<T>(-1.4426950408889634074));
  const V s = e / (e + static_cast<T>(2));
  const V q = s * s;
  V sum = spread<T>(static_cast<T>(1) / (2 * Lanes<T>::log_terms + 1));
#pragma GCC unroll 16
  for (int k = Lanes<T>::log_terms - 1; k >= 0; --k) sum = madd(sum, q, spread<T>(static_cast<T>(1) / (2 * k + 1)));
  // NaN: `larger` may return either argument, so z itself is added where it is not a number.
  const V positive = z > zero ? z : (z == z ? zero : z);
  return madd(s + s, sum, positive);
}

inline std::int64_t position(const Steps& steps, std::int64_t t) {
  return steps.order ? steps.order[t] : steps.first + t * steps.stride;
}

// dt of one vector of channels, at step t and position p.
template <typename T>
inline typename Lanes<T>::V delta_of(const Walk<T>& w, const T* row, std::int64_t p, std::int64_t channel) {
  typename Lanes<T>::V z = load(w.bias + channel);
  if (w.delta) {
    z = z + load_some(w.delta + p * w.pitch + channel, w.width - channel);
  } else {
    for (std::int64_t r = 0; r < w.rank; ++r) {
      z = madd(spread<T>(row[r]), load(w.dt_weight + r * w.padded + channel), z);
    }
  }
  return w.softplus ? softplus_of<T>(z) : z;
}

// How many steps ahead the next position's values are asked for: a column's pixels are a row apart.
constexpr std::int64_t ahead = 3;

template <typename T, int G>
void walk_group(const Walk<T>& given, std::int64_t channel) {
  using V = typename Lanes<T>::V;
  // A copy, which no store to the state can change: what it holds stays in registers.
  const Walk<T> w = given;
  V skip[G];
  for (int g = 0; g < G; ++g) skip[g] = load(w.skip + channel + g * lanes<T>);
  for (std::int64_t t = 0; t < w.steps.count; ++t) {
    const std::int64_t p = position(w.steps, t);
    if (t + ahead < w.steps.count) {
      const std::int64_t next = position(w.steps, t + ahead) * w.pitch + channel;
      __builtin_prefetch(w.u + next);
      if (w.y) __builtin_prefetch(w.y + next, 1);
    }
    const std::int64_t line = w.rows_by_step ? t : p;
    const T* b = w.b + line * w.row_pitch;
    const T* c = w.c + line * w.row_pitch;
    V dt[G], x[G], y[G];
    for (int g = 0; g < G; ++g) {
      const std::int64_t first = channel + g * lanes<T>;
      const V u = load_some(w.u + p * w.pitch + first, w.width - first);
      dt[g] = delta_of(w, w.rows + t * w.row_pitch, p, first);
      x[g] = dt[g] * u;
      y[g] = skip[g] * u;
    }
    for (std::int64_t n = 0; n < w.states; ++n) {
      const V bn = spread<T>(b[n]);
      const V cn = spread<T>(c[n]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const std::int64_t at = n * w.padded + channel + g * lanes<T>;
        const V h = madd(exp2_of<T>(dt[g] * load(w.a2 + at)), load(w.state + at), x[g] * bn);
        store(w.state + at, h);
        y[g] = madd(h, cn, y[g]);
      }
    }
    if (!w.y) continue;
    for (int g = 0; g < G; ++g) {
      const std::int64_t first = channel + g * lanes<T>;
      T* target = w.y + p * w.pitch + first;
      const V before = w.accumulate ? load_some(target, w.width - first) : V{};
      store_some(target, w.accumulate ? before + y[g] : y[g], w.width - first);
    }
  }
}

constexpr int group_vectors = 2;

template <typename T>
void walk_channels(const Walk<T>& w, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t together = group_vectors * lanes<T>;
  std::int64_t channel = first;
  for (; channel + lanes<T> < last; channel += together) walk_group<T, group_vectors>(w, channel);
  for (; channel < last; channel += lanes<T>) walk_group<T, 1>(w, channel);
}

template <typename T>
void summarise_channels(const Walk<T>& given, std::int64_t first, std::int64_t last) {
  using V = typename Lanes<T>::V;
  const Walk<T> w = given;
  const V zero = {};
  for (std::int64_t channel = first; channel < last; channel += lanes<T>) {
    V slowest = load(w.a2 + channel);
    for (std::int64_t n = 0; n < w.states; ++n) {
      slowest = larger(slowest, load(w.a2 + n * w.padded + channel));
      store(w.state + n * w.padded + channel, zero);
    }
    V sum = zero;
    bool decayed = false;
    for (std::int64_t t = w.steps.count - 1; t >= 0; --t) {
      const std::int64_t p = position(w.steps, t);
      const V dt = delta_of(w, w.rows + t * w.row_pitch, p, channel);
      if (!decayed) {
        const V x = dt * load_some(w.u + p * w.pitch + channel, w.width - channel);
        const T* b = w.b + (w.rows_by_step ? t : p) * w.row_pitch;
        for (std::int64_t n = 0; n < w.states; ++n) {
          const std::int64_t at = n * w.padded + channel;
          const V decay = exp2_of<T>(sum * load(w.a2 + at));
          store(w.state + at, madd(decay, x * spread<T>(b[n]), load(w.state + at)));
        }
      }
      sum = sum + dt;
      if (!decayed && t % 8 == 0) {
        decayed = true;
        const V exponent = sum * slowest * static_cast<T>(0.69314718055994530942);
        for (std::int64_t i = 0; i < lanes<T> && channel + i < w.width; ++i) {
          // Written so that a NaN never counts as decayed.
          if (!(exponent[i] < -Lanes<T>::negligible)) decayed = false;
        }
      }
    }
    store(w.delta_sum + channel, sum);
  }
}

template <typename T, int VECTORS>
inline void project_tile(const T* const* x, std::int64_t channels, const T* weight, std::int64_t outputs,
                         T* const* rows) {
  using V = typename Lanes<T>::V;
  V sum[4][VECTORS] = {};
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
void project_steps(const T* x, std::int64_t channels, const Steps& steps, const T* weight, std::int64_t outputs,
                   T* rows) {
  for (std::int64_t t = 0; t < steps.count; t += 4) {
    const T* source[4];
    T* target[4];
    for (int i = 0; i < 4; ++i) {
      // Beyond the end the last position is done again, into the same row.
      const std::int64_t step = t + i < steps.count ? t + i : steps.count - 1;
      source[i] = x + position(steps, step) * channels;
      target[i] = rows + step * outputs;
    }
    std::int64_t q = 0;
    while (q < outputs) {
      const std::int64_t left = (outputs - q) / lanes<T>;
      T* place[4] = {target[0] + q, target[1] + q, target[2] + q, target[3] + q};
      if (left >= 3) {
        project_tile<T, 3>(source, channels, weight + q, outputs, place);
        q += 3 * lanes<T>;
      } else if (left == 2) {
        project_tile<T, 2>(source, channels, weight + q, outputs, place);
        q += 2 * lanes<T>;
      } else {
        project_tile<T, 1>(source, channels, weight + q, outputs, place);
        q += lanes<T>;
      }
    }
  }
}

template <typename T>
constexpr ScanKernels<T> make_scan_kernels() {
  return {lanes<T>, group_vectors * lanes<T>, walk_channels<T>, summarise_channels<T>, project_steps<T>};
}

constexpr ScanPath make_scan_path() { return {make_scan_kernels<float>(), make_scan_kernels<double>()}; }

}  // namespace
}  // namespace xrk::cpu
