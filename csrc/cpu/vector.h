// Vectors as wide as the instruction set has them, through the compiler's vector types: one source
// for all. Include inside per-ISA code only (see numeric.h).
#pragma once

#include "numeric.h"

#include <utility>

// For large functions that many kernels share: inlined, each would carry copies.
#define SPOT_NOINLINE __attribute__((noinline))

namespace spot {
namespace SPOT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf {
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef Int bits __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorOf<A>::type;
template <typename A>
using Bits = typename VectorOf<A>::bits;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
inline Vec<A> vec_load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename A>
inline void vec_store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}
template <typename A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}
// b where either is NaN.
template <typename A>
inline Vec<A> vec_max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <typename A>
inline Vec<A> vec_and(Vec<A> v, Bits<A> mask) {
  return bit_cast<Vec<A>>(bit_cast<Bits<A>>(v) & mask);
}

// Lanes l and l ^ kStep exchanged.
template <int kStep, typename V, std::size_t... I>
inline V exchange_lanes(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, static_cast<int>(I ^ kStep)...);
}
template <typename A, int kStep = kLanes<A> / 2, typename Op>
inline A reduce(Vec<A> v, Op op) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    const Vec<A> other = exchange_lanes<kStep>(v, std::make_index_sequence<kLanes<A>>{});
    return reduce<A, kStep / 2>(op(v, other), op);
  }
}
// Fixed trees, so results do not depend on threads.
template <typename A>
inline A reduce_add(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return a + b; });
}
template <typename A>
inline A reduce_max(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return vec_max<A>(a, b); });
}

// One step of the transposition below: blocks of kStep x kStep elements change places.
template <int kStep, typename V, std::size_t... I>
inline void exchange_blocks(V& a, V& b, std::index_sequence<I...>) {
  constexpr int kN = sizeof...(I), kS = kStep;
  const V low = __builtin_shufflevector(
      a, b, (static_cast<int>(I) & kS ? kN + static_cast<int>(I) - kS : static_cast<int>(I))...);
  const V high = __builtin_shufflevector(
      a, b, (static_cast<int>(I) & kS ? kN + static_cast<int>(I) : static_cast<int>(I) + kS)...);
  a = low;
  b = high;
}
template <typename A, int kStep = kLanes<A> / 2>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if ((i & kStep) == 0)
        exchange_blocks<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes<A>>{});
    transpose<A, kStep / 2>(rows);
  }
}

// ---- rows of any dtype and length ---------------------------------------------------------------

// The number of lanes as a type, for which a loop over whole vectors is compiled. Not
// std::integral_constant: the ISAs would share its conversion in debug builds.
template <typename A>
struct AllLanes {
  constexpr operator int64_t() const { return kLanes<A>; }
};

// f(first, AllLanes) for the whole vectors of a row of n elements, then f(first, the rest).
template <typename A, typename F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, AllLanes<A>{});
  if (i < n) f(i, n - i);
}

// Elements [0, count) of at most kLanes; `fill` in the other lanes.
template <typename T>
inline Vec<Acc<T>> load_lanes(const T* p, int64_t count, Acc<T> fill = 0) {
  using A = Acc<T>;
  if (std::is_same_v<T, A> && count == kLanes<A>) return vec_load(reinterpret_cast<const A*>(p));
  A wide[kLanes<A>];
  if (count == kLanes<A>)
    for (int l = 0; l < kLanes<A>; ++l) wide[l] = load(p[l]);
  else
    for (int l = 0; l < kLanes<A>; ++l) wide[l] = l < count ? load(p[l]) : fill;
  return vec_load(wide);
}
// What `store` (numeric.h) does to a number, for all lanes; the compiler makes branches of a loop.
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
inline HalfWords narrow_lanes(Vec<float> v, BFloat16*) {
  const Words u = bit_cast<Words>(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v != v ? Words{} + 0x7fc0u : rounded, HalfWords);
}
inline HalfWords narrow_lanes(Vec<float> v, Half*) {
  const Words u = bit_cast<Words>(v), magnitude = u & 0x7fffffffu;
  const Words small = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Words half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((u >> 16) & 0x8000u), HalfWords);
}
template <typename T>
inline void store_lanes(T* p, int64_t count, Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    std::memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(T));
  } else {
    const HalfWords narrow = narrow_lanes(v, p);
    std::memcpy(p, &narrow, static_cast<std::size_t>(count) * sizeof(T));
  }
}

// ---- exponentials ------------------------------------------------------------------------------

template <typename A>
constexpr A kExpUnit = A(1);
template <>
inline constexpr float kExpUnit<float> = 0x1.715476p+0f;  // log2(e)

// e^(x u) with u = unit / kExpUnit; x unit at most a little above 0. Exactly 0 once float32 would
// be subnormal; NaN stays NaN. float32: 2^n times a polynomial of degree 6 (relative error 4e-8).
inline Vec<float> vec_exp(Vec<float> x, float unit) {
  const float magic = 0x1.8p23f + 127.0f;  // adding it rounds to integer and biases the exponent
  const Vec<float> t = vec_max<float>(splat(-127.0f), x * unit);
  const Vec<float> shifted = t + magic;
  const Vec<float> f = t - (shifted - magic);
  Vec<float> p = splat(0x1.41d2a8p-13f);
  p = p * f + 0x1.5f4569p-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return p * bit_cast<Vec<float>>(bit_cast<Words>(shifted) << 23);
}
inline Vec<double> vec_exp(Vec<double> x, double unit) {
  x *= unit;
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

template <typename A>
inline Vec<A> vec_sigmoid(Vec<A> x) {
  const Vec<A> e = vec_exp(x > 0 ? -x : x, kExpUnit<A>);
  return (x >= 0 ? splat(A(1)) : e) / (e + A(1));
}

// The standard normal distribution at x: P(X <= x), and the density.
template <typename A>
struct Normal {
  Vec<A> below, density;
};
// P(X <= -t) = e^(-t^2/2) R(t). R is u times a polynomial of degree 8 in u = 1 / (1 + 0.3447 t),
// fitted for the relative error (2e-8 up to t = 14): the tail keeps its digits.
inline Normal<float> normal(Vec<float> x) {
  const Vec<float> e = vec_exp(-0.5f * x * x, kExpUnit<float>);
  const Vec<float> t = x < 0.0f ? -x : x;
  const Vec<float> u = 1.0f / (1.0f + 0x1.61p-2f * t);
  Vec<float> p = splat(-0x1.cef0f4p-6f);
  p = p * u + 0x1.28e464p-3f;
  p = p * u - 0x1.15cd18p-2f;
  p = p * u + 0x1.81097p-3f;
  p = p * u - 0x1.3709b6p-5f;
  p = p * u + 0x1.cab0b2p-4f;
  p = p * u + 0x1.dfc3eep-4f;
  p = p * u + 0x1.1a73c2p-3f;
  p = p * u + 0x1.199ed8p-3f;
  const Vec<float> tail = e * (u * p);
  return {x > 0.0f ? 1.0f - tail : tail, e * 0x1.988454p-2f};
}
inline Normal<double> normal(Vec<double> x) {
  Normal<double> result;
  for (int l = 0; l < kLanes<double>; ++l) {
    result.below[l] = 0.5 * __builtin_erfc(-0x1.6a09e667f3bcdp-1 * x[l]);
    result.density[l] = 0x1.9884533d43651p-2 * __builtin_exp(-0.5 * x[l] * x[l]);
  }
  return result;
}

// x P(X <= x) with X standard normal: the erf form of GELU.
template <typename A>
inline Vec<A> gelu(Vec<A> x) {
  return x * normal(x).below;
}

// ---- logarithms ---------------------------------------------------------------------------------

// log(1 + x) for -1 < x < kLog1pEnd; NaN stays NaN. float32: with 1 + x near 2^e, log(1 + m) and
// e log 2, where m = x 2^-e + (2^-e - 1) is rounded once; error at most 2 units in the last place.
template <typename A>
constexpr A kLog1pEnd = static_cast<A>(0x1p+120);
inline Vec<float> vec_log1p(Vec<float> x) {
  // Unsigned, which wraps where x is out of range.
  const Words near_one = bit_cast<Words>(x + 1.0f) - 0x3f3504f3u;  // sqrt(1 / 2)
  const Words e = near_one & 0xff800000u;
  const Vec<float> shrink = bit_cast<Vec<float>>(0x3f800000u - e);  // 2^-e
  const Vec<float> m = x * shrink + (shrink - 1.0f);
  const Vec<float> m2 = m * m;  // not one chain of products, each of which would be waited for
  const Vec<float> low = (m * 0x1.5556d8p-2f - 0.5f) + m2 * (m * 0x1.98d7fp-3f - 0x1.000382p-2f);
  const Vec<float> high =
      (m * 0x1.317476p-3f - 0x1.538248p-3f) + m2 * (m * 0x1.645ep-4f - 0x1.2432cp-3f);
  const Vec<float> p = m2 * (low + m2 * m2 * high) + m;
  return __builtin_convertvector(bit_cast<Bits<float>>(e), Vec<float>) * 0x1.62e43p-24f + p;
}
inline Vec<double> vec_log1p(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_log1p(x[l]);
  return x;
}
inline float exact_log1p(float x) { return __builtin_log1pf(x); }
inline double exact_log1p(double x) { return __builtin_log1p(x); }

// Not std::log: its float overload is an inline function, which the ISAs would share.
inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }

}  // namespace SPOT_ISA
}  // namespace spot
