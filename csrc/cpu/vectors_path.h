// Vectors of the instruction set that the including source is compiled for, and maps' values in them. Included by the
// *_path.h files alone; all of it has internal linkage, as in pixels_path.h and for the same reason.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "storage.h"

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
typedef std::uint32_t BitVector __attribute__((vector_size(vector_bytes)));
typedef std::int64_t LongVector __attribute__((vector_size(vector_bytes)));
typedef std::uint16_t ShortVector __attribute__((vector_size(vector_bytes / 2)));

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
#if defined(__SSE2__)
inline FloatVector larger(FloatVector a, FloatVector b) { return _mm_max_ps(a, b); }
inline DoubleVector larger(DoubleVector a, DoubleVector b) { return _mm_max_pd(a, b); }
inline FloatVector smaller(FloatVector a, FloatVector b) { return _mm_min_ps(a, b); }
inline DoubleVector smaller(DoubleVector a, DoubleVector b) { return _mm_min_pd(a, b); }
#else
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
#endif
#endif

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using V = FloatVector;
  using I = IntVector;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to a whole number
  static constexpr int mantissa = 23;
  static constexpr float lowest = -126.0f, highest = 128.0f;
  static constexpr int degree = 5;
  // 2**f on [-1/2, 1/2], highest power first: to 1.1e-7, and to 2.6e-7 f near f = 0, so that slow decays stay slow.
  static constexpr float exponential[degree + 1] = {
      0.00132647669f, 0.00967151113f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
};

template <>
struct Lanes<double> {
  using V = DoubleVector;
  using I = LongVector;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2**52
  static constexpr int mantissa = 52;
  static constexpr double lowest = -1022.0, highest = 1024.0;
  static constexpr int degree = 13;
  // ln(2)**k / k!
  static constexpr double exponential[degree + 1] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.4455382718708101e-10, 7.0549116208011209e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441, 0.0096181291076284769, 0.055504108664821576, 0.24022650695910069,
      0.69314718055994529, 1.0};
};

template <typename T>
using Vector = typename Lanes<T>::V;

template <typename T>
constexpr std::int64_t lanes = vector_bytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> spread(T value) {
  return value - Vector<T>{};  // plus zero would not be a copy of -0, and so an addition
}

// --- values as they are stored ------------------------------------------------------------------------------------

struct Half {
  std::uint16_t bits;
};
struct Brain {
  std::uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

inline BitVector choose(BitVector mask, BitVector yes, BitVector no) { return (mask & yes) | (~mask & no); }

inline FloatVector load(const float* p) {
  FloatVector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline DoubleVector load(const double* p) {
  DoubleVector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline ShortVector load_bits(const void* p) {
  ShortVector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline FloatVector load(const Brain* p) {
  return (FloatVector)(__builtin_convertvector(load_bits(p), BitVector) << 16);
}
inline FloatVector load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa moved into place, then rebased by a product, which is exact and does subnormals too.
  const BitVector bits = __builtin_convertvector(load_bits(p), BitVector);
  const BitVector magnitude = (bits & 0x7fffu) << 13;
  const BitVector rebased = (BitVector)((FloatVector)magnitude * 0x1p112f);
  const BitVector special = (BitVector)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (FloatVector)(rebased | special | ((bits & 0x8000u) << 16));
#endif
}

inline void store(float* p, FloatVector v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, DoubleVector v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store_bits(void* p, BitVector v) {
  const ShortVector bits = __builtin_convertvector(v, ShortVector);
  __builtin_memcpy(p, &bits, sizeof bits);
}
inline void store(Brain* p, FloatVector v) {
  const BitVector bits = (BitVector)v;
  const BitVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_bits(p, choose((BitVector)(v == v), rounded, BitVector{} + 0x7fc0u));
}
inline void store(Half* p, FloatVector v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const BitVector bits = (BitVector)v;
  const BitVector magnitude = bits & 0x7fffffffu;
  // Below the smallest normal half the sum with 0.5 rounds to multiples of 2**-24, half to even, by itself.
  const BitVector subnormal = (BitVector)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
  const BitVector normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  BitVector half = choose((BitVector)(magnitude < 0x38800000u), subnormal, normal);
  half = choose((BitVector)(magnitude >= 0x47800000u), BitVector{} + 0x7c00u, half);
  half = choose((BitVector)(magnitude > 0x7f800000u), BitVector{} + 0x7e00u, half);
  store_bits(p, half | ((bits >> 16) & 0x8000u));
#endif
}

// `count` of a vector's values, which may be fewer than it has lanes (the others are 0) or more.
template <typename S>
inline Vector<Compute<S>> load_some(const S* p, std::int64_t count) {
  constexpr std::int64_t size = lanes<Compute<S>>;
  if (count >= size) return load(p);
  S values[size] = {};
  for (std::int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

template <typename S>
inline void store_some(S* p, Vector<Compute<S>> v, std::int64_t count) {
  constexpr std::int64_t size = lanes<Compute<S>>;
  if (count >= size) return store(p, v);
  S values[size];
  store(values, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// --- powers of two ------------------------------------------------------------------------------------------------

// 2**p for p from Lanes::lowest to 127 (1023), exact for p = 0.
template <typename T>
inline Vector<T> exp2_within(Vector<T> p) {
  using L = Lanes<T>;
  using V = Vector<T>;
  using I = typename L::I;
  const V shifted = p + L::magic;
  const V f = p - (shifted - L::magic);
  V power = spread<T>(L::exponential[0]);
#pragma GCC unroll 16
  for (int i = 1; i <= L::degree; ++i) power = madd(power, f, spread<T>(L::exponential[i]));
  return (V)((I)power + ((I)shifted << L::mantissa));
}

// 2**p; what is below the normal numbers comes out as the smallest of them, what is too large as infinity.
template <typename T>
inline Vector<T> exp2_of(Vector<T> p) {
  return exp2_within<T>(smaller(larger(p, spread<T>(Lanes<T>::lowest)), spread<T>(Lanes<T>::highest)));
}

}  // namespace
}  // namespace xrk::cpu
