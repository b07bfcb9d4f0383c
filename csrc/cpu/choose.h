// The largest numbers of a row: a search for the threshold that as many reach as are wanted.
// Torch-free; one copy per ISA.
//
// Cost: where the first thresholds are good, two or three passes of a load, a comparison and a
// count each, and one that writes; more where many are equal. None depends on how many are wanted.
// Memory: none.
#pragma once

#include "compact.h"
#include "vector.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace spot {
namespace SPOT_ISA {

constexpr int kTurns = 9;  // of a search, before the last candidates are ranked instead
constexpr int kStuck = 3;  // turns before equal numbers are suspected

// How many lanes are set, of one mask or of the sum of several.
template <typename A>
inline int64_t count_lanes(Bits<A> masks) {
  return -static_cast<int64_t>(reduce_add<A>(__builtin_convertvector(masks, Vec<A>)));
}

// How many of the numbers in some vectors reach t.
template <typename A, int kVecs>
inline int64_t count_reach(const Vec<A> (&x)[kVecs], A t) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == 4) {
    int64_t count = 0;
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      count += __builtin_popcount(_mm512_cmp_ps_mask((__m512)x[j], _mm512_set1_ps(t), _CMP_GE_OQ));
    return count;
  }
#endif
  Bits<A> count = {};
#pragma GCC unroll 8
  for (int j = 0; j < kVecs; ++j) count += x[j] >= t;
  return count_lanes<A>(count);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The bits of a byte, ascending.
struct SetBits {
  uint8_t of[256][8] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, count = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte][count++] = static_cast<uint8_t>(bit);
  }
};
inline constexpr SetBits kSetBits;
#endif

// Appends first + l for the lanes l in `mask`; may write a whole vector behind them.
template <typename A>
inline int64_t append_lanes(Bits<A> mask, int32_t first, int32_t* out) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == 4) {
    const __mmask16 set = _mm512_movepi32_mask((__m512i)mask);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(set, at));
    return __builtin_popcount(set);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    const int set = _mm256_movemask_ps((__m256)mask);
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of[set]));
    const __m256i at = _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes), _mm256_set1_epi32(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), at);
    return __builtin_popcount(static_cast<unsigned>(set));
  }
#endif
  int64_t count = 0;
  for (int l = 0; l < kLanes<A>; ++l) {
    out[count] = first + l;
    count -= mask[l];
  }
  return count;
}

// Appends the positions of the numbers that reach t; x has whole vectors, NaN behind its end.
template <typename A>
inline int64_t append_reaching(const A* x, int64_t padded, A t, int32_t* out) {
  int64_t count = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(A) == 4) {
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i next = _mm512_set1_epi32(16);
    const __m512 least = _mm512_set1_ps(t);
#pragma GCC unroll 4
    for (int64_t i = 0; i < padded; i += 16) {
      const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), least, _CMP_GE_OQ);
      const __m512i reaching = _mm512_maskz_compress_epi32(set, at);
      const int some = __builtin_popcount(set);
      // Mostly few: half a vector rarely crosses a cache line.
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count),
                          _mm512_castsi512_si256(reaching));
      if (__builtin_expect(some > 8, 0)) _mm512_storeu_si512(out + count, reaching);
      count += some;
      at = _mm512_add_epi32(at, next);
    }
    return count;
  }
#endif
  for (int64_t i = 0; i < padded; i += kLanes<A>)
    count += append_lanes<A>(vec_load(x + i) >= t, static_cast<int32_t>(i), out + count);
  return count;
}

// How many of x reach t; x has whole vectors, NaN behind its end.
template <typename A>
inline int64_t count_reach(const A* x, int64_t padded, A t) {
#ifdef __AVX512F__
  if constexpr (sizeof(A) == 4) {
    int64_t count = 0;
#pragma GCC unroll 4
    for (int64_t i = 0; i < padded; i += 16)
      count += __builtin_popcount(
          _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(t), _CMP_GE_OQ));
    return count;
  }
#endif
  Bits<A> count = {};
  for (int64_t i = 0; i < padded; i += kLanes<A>) count += vec_load(x + i) >= t;
  return count_lanes<A>(count);
}

// The positions of the numbers above t, and of the first `ties` of those that are t; `keep` in all.
// Room for a vector behind the result.
template <typename A>
inline void take_first(const A* x, int64_t keep, A t, int64_t ties, int32_t* out) {
  int64_t written = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(A) == 4) {
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; written < keep; i += 16) {
      const __m512 v = _mm512_loadu_ps(x + i);
      const unsigned equal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(t), _CMP_EQ_OQ);
      const unsigned few = ties < 16 ? _pdep_u32((1u << ties) - 1, equal) : equal;
      ties -= __builtin_popcount(few);
      const unsigned set = _mm512_cmp_ps_mask(v, _mm512_set1_ps(t), _CMP_GT_OQ) | few;
      _mm512_storeu_si512(out + written,
                          _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), at));
      written += __builtin_popcount(set);
      at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    return;
  }
#endif
  for (int64_t i = 0; written < keep; ++i) {
    const bool tied = x[i] == t;
    out[written] = static_cast<int32_t>(i);
    written += (x[i] > t) | (tied & (ties > 0));
    ties -= tied;
  }
}

// The least number that reaches t; NaN behind the end does not.
template <typename A>
inline A least_reaching(const A* x, int64_t padded, A t) {
  const Vec<A> inf = splat(static_cast<A>(__builtin_inff()));
  Vec<A> least = inf;
  for (int64_t i = 0; i < padded; i += kLanes<A>) {
    const Vec<A> v = vec_load(x + i);
    const Vec<A> reaching = v >= t ? v : inf;
    least = reaching < least ? reaching : least;
  }
  return -reduce_max<A>(-least);
}
// The greatest number that does not.
template <typename A>
inline A greatest_below(const A* x, int64_t padded, A t) {
  const Vec<A> none = splat(-static_cast<A>(__builtin_inff()));
  Vec<A> greatest = none;
  for (int64_t i = 0; i < padded; i += kLanes<A>) {
    const Vec<A> v = vec_load(x + i);
    const Vec<A> under = v < t ? v : none;
    greatest = under > greatest ? under : greatest;
  }
  return reduce_max<A>(greatest);
}
template <typename A>
inline int64_t count_above(const A* x, int64_t padded, A t) {
  Bits<A> count = {};
  for (int64_t i = 0; i < padded; i += kLanes<A>) count += vec_load(x + i) > t;
  return count_lanes<A>(count);
}

// The number of a key of `order_key`.
inline float of_key(uint32_t key) {
  return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
inline double of_key(uint64_t key) {
  return bit_cast<double>(key ^ (key >> 63 ? uint64_t{1} << 63 : ~uint64_t{0}));
}
// A value between two others, by the bits of their order.
inline float middle(float low, float high) {
  const uint64_t key = (uint64_t{order_key(low)} + order_key(high) + 1) / 2;
  return of_key(static_cast<uint32_t>(key));
}
inline double middle(double low, double high) {
  const uint64_t a = order_key(low), b = order_key(high);
  return of_key(a + (b - a + 1) / 2);
}
template <typename A>
inline A next_above(A x) {
  return of_key(order_key(x) + 1);
}

// A threshold, and how many numbers of a row reach it.
template <typename A>
struct Probe {
  A at;
  int64_t reach;
};

// Where the search for a row starts: two thresholds around the expected one. The numbers of a row
// lie about a `centre` and spread by some `unit`; in these terms rows are alike.
template <typename A>
class Guess {
 public:
  void place(A centre, A unit, Probe<A>* probes) const {
    probes[0].at = centre + (offset_ - miss_) * unit;
    probes[1].at = centre + (offset_ + miss_) * unit;
  }
  void learn(A centre, A unit, A found) {
    const A now = (found - centre) / unit, off = now - offset_;
    if (!(off - off == 0)) return;
    offset_ += off / 16;
    miss_ += ((off < 0 ? -off : off) - miss_) / 16;
  }

 private:
  A offset_ = 0, miss_ = A(0.5);  // and by how much it was missed
};

// The positions of the `keep` largest of the n numbers x, ascending, ties to the lower; 0 < keep <
// n, no NaN among them. Two `probes` are known, the lower one first. Room for a vector behind the
// result, and for all n. Returns the threshold.
template <typename A>
inline A choose(const A* x, int64_t n, int64_t keep, const Probe<A>* probes, int32_t* out) {
  constexpr int kL = kLanes<A>;
  const int64_t padded = round_up(n, kL);
  // `below` of them reach `low`, `above` reach `high`: above < keep <= below. Without a high all of
  // those that reach low are left.
  A low = -static_cast<A>(__builtin_inff()), high = -low, t = low;
  int64_t below = n, above = 0;
  bool has_low = false, has_high = false;
  const A apart = probes[1].at - probes[0].at;
  const A gap = apart / static_cast<A>(probes[0].reach - probes[1].reach + 1);
  A stride = gap;
  for (int turn = -2; below - above > kL || turn < kTurns; ++turn) {
    int64_t reach;
    if (turn < 0) {
      t = probes[-1 - turn].at;  // the higher one first
      reach = probes[-1 - turn].reach;
      if (!(t > low && t < high)) continue;
    } else {
      if (has_low && has_high) {
        t = low + (high - low) * (static_cast<A>(below - keep) / static_cast<A>(below - above));
      } else {
        stride *= 2;
        t = has_low ? low + gap * static_cast<A>(below - keep) + stride
                    : high - gap * static_cast<A>(keep - above) - stride;
      }
      // The middle of their order where this leads nowhere; late, every other time, so that it
      // comes to an end.
      if (!(t > low && t < high) || (turn >= kTurns && turn % 2)) t = middle(low, high);
      if (t == high && has_high) break;  // nothing between them
      reach = count_reach(x, padded, t);
    }
    if (reach == keep) {
      append_reaching(x, padded, t, out);
      return t;
    }
    const int64_t before = below - above;
    if (reach > keep) {
      low = t;
      below = reach;
      has_low = true;
    } else {
      high = t;
      above = reach;
      has_high = true;
    }
    if (low == high) break;
    if (reach == keep + 1 || reach == keep - 1) {
      // The number nearest to t is the cut, or was if it is one too many; or several equal it.
      const A nearest = reach < keep ? greatest_below(x, padded, t) : least_reaching(x, padded, t);
      const A cut = reach < keep ? nearest : next_above(nearest);
      if (append_reaching(x, padded, cut, out) != keep)
        take_first(x, keep, nearest, keep - count_above(x, padded, nearest), out);
      return cut;
    }
    if (turn >= kStuck && has_low && has_high && 8 * (below - above) > 7 * before) {
      // Little was gained: many may be equal. From below there is nothing up to the least of them.
      const A least = least_reaching(x, padded, low);
      const int64_t more = count_above(x, padded, least);
      if (more < keep) {
        take_first(x, keep, least, keep - more, out);
        return least;
      }
    }
  }
  int64_t ties;  // of those equal to t, how many; 0 for all
  if (below - above > kL) {
    t = low;  // all that are left are equal
    ties = keep - above;
  } else {
    A few[kL];
    int32_t where[2 * kL];
    int64_t count = 0;
    for (int64_t i = 0; i < padded; i += kL) {
      const Vec<A> v = vec_load(x + i);
      Bits<A> left = v >= low;
      if (has_high) left &= v < high;
      count += append_lanes<A>(left, static_cast<int32_t>(i), where + count);
    }
    for (int64_t c = 0; c < kL; ++c) few[c] = x[where[c < count ? c : 0]];
    const Vec<A> all = vec_load(few);
    Bits<A> more = {};
    for (int64_t c = 0; c < count; ++c) more += all < few[c];
    // The least of those that fewer than `keep` exceed.
    t = static_cast<A>(__builtin_inff());
    for (int64_t c = 0; c < count; ++c)
      if (above - more[c] < keep && few[c] <= t) t = few[c];
    int64_t equal = 0, larger = above;
    for (int64_t c = 0; c < count; ++c) {
      larger += few[c] > t;
      equal += few[c] == t;
    }
    ties = larger + equal == keep ? 0 : keep - larger;
  }
  if (ties == 0)
    append_reaching(x, padded, t, out);
  else
    take_first(x, keep, t, ties, out);
  return t;
}

// The same for any numbers and any `keep`: NaN ranks below -inf.
template <typename A>
inline void choose_any(const A* x, int64_t n, int64_t keep, int64_t* positions,
                       decltype(order_key(A{}))* keys, int32_t* out) {
  const int64_t padded = round_up(n, kKeyLanes);
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(x[i]);
  for (int64_t i = n; i < padded; ++i) keys[i] = 0;
  largest_positions(keys, n, keep, positions);
  for (int64_t i = 0; i < keep; ++i) out[i] = static_cast<int32_t>(positions[i]);
}

}  // namespace SPOT_ISA
}  // namespace spot
