// Connectivity: the best columns of each query, from coefficients and a basis. Torch-free; one copy
// per ISA.
//
// A work item is a row of coefficients. The basis is packed in tiles of columns that fit
// first-level cache, candidates only; a block of rows is combined tile by tile, then the columns of
// each row are chosen by a search for the threshold that as many reach as are wanted.
//
// Coefficients may also be made here, as the softmax of queries times few keys: R D more
// multiply-accumulates per row, and they are never stored.
//
// Cost per row, with R coefficients of which C count, and N columns: R C comparisons (of lanes that
// are rows), C N multiply-accumulates, and some five passes over N numbers. Scratch per thread:
// R N numbers for the basis and kChoiceRows N for the block.
#pragma once

#include "attention_rows.h"
#include "compact.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kTileBytes = 36 * 1024;  // of the basis, in first-level cache
constexpr int kTurns = 9;           // of a search, before the last candidates are ranked instead
constexpr int kWideVecs = 8;        // of a tile
constexpr int64_t kMostLanes = 32;  // coefficients that are ranked with rows as lanes

// ---- choosing from a row -----------------------------------------------------------------------

// How many lanes are set, of one mask or of the sum of several.
template <typename A>
inline int64_t count_lanes(Bits<A> masks) {
  return -static_cast<int64_t>(reduce_add<A>(__builtin_convertvector(masks, Vec<A>)));
}

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
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(set, at));
      count += __builtin_popcount(set);
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
template <typename A>
inline int64_t count_above(const A* x, int64_t padded, A t) {
  Bits<A> count = {};
  for (int64_t i = 0; i < padded; i += kLanes<A>) count += vec_load(x + i) > t;
  return count_lanes<A>(count);
}

// A value between two others, by the bits of their order.
inline float middle(float low, float high) {
  const uint64_t key = (uint64_t{order_key(low)} + order_key(high) + 1) / 2;
  const uint32_t bits = static_cast<uint32_t>(key);
  return bit_cast<float>(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}
inline double middle(double low, double high) {
  const uint64_t a = order_key(low), b = order_key(high), key = a + (b - a + 1) / 2;
  return bit_cast<double>(key ^ (key >> 63 ? uint64_t{1} << 63 : ~uint64_t{0}));
}

// Where the search for a row starts: neighbouring rows are alike, up to their size.
template <typename A>
struct Guess {
  A threshold = 0, step = 0;  // found in the last row, and how far apart values lie around it
  A size = 1;                 // of that row
  void resize(A now) {
    if (!(now > 0) || !(now / size > 0)) return;
    threshold *= now / size;
    step *= now / size;
    size = now;
  }
};

// The positions of the `keep` largest of the n numbers x, ascending, ties to the lower; 0 < keep <
// n, no NaN among them. Room for a vector behind the result.
template <typename A>
inline void choose(const A* x, int64_t n, int64_t keep, Guess<A>& guess, int32_t* out) {
  constexpr int kL = kLanes<A>;
  const int64_t padded = round_up(n, kL);
  // `below` of them reach `low`, `above` reach `high`: above < keep <= below. Without a high all of
  // those that reach low are left.
  A low = -static_cast<A>(__builtin_inff()), high = -low, t = guess.threshold;
  A stride = 2 * guess.step;
  int64_t below = n, above = 0, larger = -1;  // how many are known to exceed t
  bool has_low = false, has_high = false;
  for (int turn = 0; below - above > kL || turn < kTurns; ++turn) {
    // The middle of their order where a guess leads nowhere; late, every other time, so that it
    // comes to an end.
    if (!(t > low && t < high) || (turn >= kTurns && turn % 2)) t = middle(low, high);
    if (t == high && has_high) break;  // nothing between them
    const int64_t reach = count_reach(x, padded, t), before = below - above;
    if (reach == keep) {
      larger = keep;
      break;
    }
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
    if (has_low && has_high && 8 * (below - above) > 7 * before) {
      // Little was gained: many may be equal. From below there is nothing up to the least of them.
      const A least = least_reaching(x, padded, low);
      const int64_t rest = count_above(x, padded, least);
      if (rest < keep) {
        t = least;
        larger = rest;
        break;
      }
    }
    if (has_low && has_high) {
      t = low + (high - low) * (static_cast<A>(below - keep) / static_cast<A>(below - above));
    } else {
      stride *= 2;
      t = has_low ? low + guess.step * static_cast<A>(below - keep) + stride
                  : high - guess.step * static_cast<A>(keep - above) - stride;
    }
  }
  int64_t ties = larger < 0 ? 0 : keep - larger;  // of those equal to t, how many; 0 for all
  if (larger < 0 && below - above > kL) {
    t = low;  // all that are left are equal
    ties = keep - above;
  } else if (larger < 0) {
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
    int64_t equal = 0;
    larger = above;
    for (int64_t c = 0; c < count; ++c) {
      larger += few[c] > t;
      equal += few[c] == t;
    }
    ties = larger + equal == keep ? 0 : keep - larger;
  }
  if (has_low && has_high && below > above)
    guess.step = (high - low) / static_cast<A>(below - above);
  guess.threshold = t;
  if (ties == 0) {
    append_reaching(x, padded, t, out);
  } else {
    take_first(x, keep, t, ties, out);
  }
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

// ---- a block of rows ---------------------------------------------------------------------------

template <typename A>
struct ChoiceScratch {
  using Key = decltype(order_key(A{}));
  A *basis, *coefficients, *turned, *weights, *sums;
  A *queries, *made_of, *bias;  // what coefficients are made of
  int32_t *candidates, *places, *used, *chosen;
  Key* keys;
  int64_t* positions;
  RowState<A> state;
  ChoiceScratch(Pieces& memory, int64_t rank, int64_t columns, int64_t used_most, int64_t dim)
      : basis(memory.take<A>(rank * round_up(columns, kLanes<A>))),
        coefficients(memory.take<A>(kLanes<A> * round_up(rank, kLanes<A>))),
        turned(memory.take<A>(kLanes<A> * round_up(rank, kLanes<A>))),
        weights(memory.take<A>(kChoiceRows * used_most)),
        sums(memory.take<A>(kChoiceRows * round_up(columns, kLanes<A>))),
        queries(memory.take<A>(kLanes<A> * dim)),
        made_of(memory.take<A>(dim * round_up(rank, kLanes<A>))),
        bias(memory.take<A>(round_up(rank, kLanes<A>))),
        candidates(memory.take<int32_t>(columns)),
        places(memory.take<int32_t>(columns)),
        used(memory.take<int32_t>(kChoiceRows * used_most + kLanes<A>)),
        chosen(memory.take<int32_t>((columns > rank ? columns : rank) + kLanes<A>)),
        keys(memory.take<Key>(round_up(columns > rank ? columns : rank, kKeyLanes))),
        positions(memory.take<int64_t>(columns > rank ? columns : rank)),
        state(memory, kLanes<A>) {}
};

template <typename T>
class Chooser {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;

 public:
  explicit Chooser(const ConnectivityArgs& args)
      : a_(args),
        padded_rank_(round_up(args.rank, kL)),
        m_(in_scratch<ChoiceScratch<A>>(args.rank, args.num_columns, args.used, args.head_dim)) {}

  // Rows [first, first + rows), of one head of one image.
  void run(int64_t first, int64_t rows) {
    const int64_t b = first / (a_.num_heads * a_.num_queries);
    if (b != image_) pack(b);
    const int64_t at = first % (a_.num_heads * a_.num_queries);
    const int64_t h = at / a_.num_queries, q = at % a_.num_queries;
    for (int64_t r = 0; r < rows; r += kL) {  // so few that they stay in first-level cache
      const int64_t some = rows - r < kL ? rows - r : kL;
      if (a_.coefficients)
        read_coefficients(b, h, q + r, some);
      else
        make_coefficients(b, h, q + r, some);
      for (int64_t l = 0; l < some; ++l)
        for (int64_t c = a_.rank; c < padded_rank_; ++c)
          m_.coefficients[l * padded_rank_ + c] = static_cast<A>(__builtin_nanf(""));
      rank_coefficients(r, some);
    }
    ahead_ = {a_.index + first * a_.budget, 1, 0, rows * a_.budget * 4};
    combine(rows);
    for (int64_t r = 0; r < rows; ++r) emit(r, a_.index + (first + r) * a_.budget);
  }

 private:
  void read_coefficients(int64_t b, int64_t h, int64_t q, int64_t rows) {
    const int64_t* strides = a_.coefficients_strides;
    const T* data = static_cast<const T*>(a_.coefficients) + b * strides[0] + h * strides[1];
    for (int64_t r = 0; r < rows; ++r)
      stage_row(data + (q + r) * strides[2], strides[3], a_.rank,
                m_.coefficients + r * padded_rank_, padded_rank_);
  }

  // Softmax of queries times keys, plus bias.
  void make_coefficients(int64_t b, int64_t h, int64_t q, int64_t rows) {
    const int64_t dim = a_.head_dim, head = b * a_.num_heads + h;
    const A none = -static_cast<A>(__builtin_inff());
    if (head != head_) {
      head_ = head;
      const Rows<T> keys(a_.keys, b, h);
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t c = 0; c < padded_rank_; ++c)
          m_.made_of[d * padded_rank_ + c] =
              c < a_.rank ? static_cast<A>(load(keys.row(c)[d * keys.dim])) : A(0);
      const T* bias = static_cast<const T*>(a_.bias) + b * a_.rank * a_.num_heads + h;
      for (int64_t c = 0; c < padded_rank_; ++c)
        m_.bias[c] = c >= a_.rank ? none : a_.bias ? A(load(bias[c * a_.num_heads])) : A(0);
    }
    const Rows<T> queries(a_.queries, b, h);
    for (int64_t r = 0; r < rows; ++r)
      stage_row(queries.row(q + r), queries.dim, dim, m_.queries + r * dim, dim);
    const Panels panels(padded_rank_ / kL);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t c = panels.start(p) * kL;
      multiply(m_.queries, dim, rows, m_.made_of + c, padded_rank_, dim, panels.width(p),
               m_.coefficients + c, padded_rank_);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < padded_rank_; c += kL) {
        A* x = m_.coefficients + r * padded_rank_ + c;
        vec_store(x, vec_load(x) + vec_load(m_.bias + c));
      }
    for_groups(rows, [&](auto group, int64_t r) {
      exponentials<group.value>(m_.coefficients + r * padded_rank_, padded_rank_, padded_rank_ / kL,
                                padded_rank_, rows, kExpUnit<A>, m_.state, r, m_.coefficients);
    });
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < padded_rank_; c += kL) {
        const A factor = A(1) / m_.state.sum[r];
        A* x = m_.coefficients + r * padded_rank_ + c;
        vec_store(x, vec_load(x) * factor);
      }
  }

  // The basis at the candidates of image b, in tiles of columns.
  void pack(int64_t b) {
    image_ = b;
    const int64_t prefix = a_.num_columns - a_.num_queries;
    count_ = 0;
    for (int64_t c = 0; c < a_.num_columns; ++c) {
      m_.candidates[count_] = static_cast<int32_t>(c);
      m_.places[count_] = static_cast<int32_t>(a_.columns ? a_.columns[b * a_.num_columns + c] : c);
      count_ += c < prefix || !a_.keep || a_.keep[b * a_.num_queries + c - prefix];
    }
    padded_ = round_up(count_, kL);
    const int64_t fit =
        kTileBytes / (static_cast<int64_t>(sizeof(A)) * (a_.rank > 0 ? a_.rank : 1));
    tile_ = fit / kL < 1 ? kL : fit / kL > kWideVecs ? kWideVecs * kL : fit / kL * kL;
    const T* basis = static_cast<const T*>(a_.basis);
    A* to = m_.basis;
    for (int64_t first = 0; first < padded_; first += tile_) {
      const int64_t width = padded_ - first < tile_ ? padded_ - first : tile_;
      for (int64_t r = 0; r < a_.rank; ++r, to += width)
        pack_row(basis + r * a_.basis_row, first, width, to);
    }
    Vec<A> largest = {};
    Bits<A> odd = {};
    for (int64_t i = 0; i < a_.rank * padded_; i += kL) {
      const Vec<A> x = vec_load(m_.basis + i);
      largest = vec_max<A>(largest, x < 0 ? -x : x);
      odd |= x != x;
    }
    largest_ = reduce_max<A>(largest);
    // Of a NaN we know only that it is there; the padding is put back behind each sum.
    if (count_lanes<A>(odd) > 0) largest_ = static_cast<A>(__builtin_nanf(""));
  }

  // Columns [first, first + width) of a row of the basis, zero behind the last candidate.
  void pack_row(const T* row, int64_t first, int64_t width, A* to) const {
    const int64_t count = count_ - first < width ? count_ - first : width;
    const int32_t* places = m_.places + first;
    if (a_.basis_column == 1 && !a_.columns && count_ == a_.num_columns)
      for (int64_t c = 0; c < count; ++c) to[c] = load(row[first + c]);
    else
      for (int64_t c = 0; c < count; ++c) to[c] = load(row[places[c] * a_.basis_column]);
    for (int64_t c = count; c < width; ++c) to[c] = 0;
  }

  // The coefficients that count, ascending, of at most kL rows from `first` on.
  void rank_coefficients(int64_t first, int64_t rows) {
    const int64_t count = num_used();
    A least[kL];
    Bits<A> odd = {};  // rows with a NaN
    const bool all = count == a_.rank, by_lanes = !all && count <= kMostLanes;
    if (by_lanes) odd = least_counted(m_.coefficients, least);
    for (int64_t l = 0; l < rows; ++l) {
      const A* x = m_.coefficients + l * padded_rank_;
      int32_t* used = m_.used + (first + l) * count;
      if (all)
        for (int64_t c = 0; c < count; ++c) used[c] = static_cast<int32_t>(c);
      else if (by_lanes && !odd[l])
        take_reaching(x, least[l], used);
      else
        choose_any(x, a_.rank, count, m_.positions, m_.keys, used);
      for (int64_t u = 0; u < count; ++u) m_.weights[(first + l) * count + u] = x[used[u]];
    }
  }

  void take_reaching(const A* x, A least, int32_t* used) {
    const int64_t written = append_reaching(x, padded_rank_, least, m_.chosen);
    if (written == num_used())
      std::memcpy(used, m_.chosen, static_cast<std::size_t>(written) * sizeof(int32_t));
    else
      take_first(x, num_used(), least, num_used() - count_above(x, padded_rank_, least), used);
  }

  // Of kL rows the least coefficient that counts: the largest so far sink through `top`. Returns
  // which of the rows hold a NaN.
  Bits<A> least_counted(const A* block, A* least) {
    Bits<A> odd = {};
    for (int64_t c = 0; c < padded_rank_; c += kL)
      store_transposed(block + c, padded_rank_, kL, m_.turned + c * kL, kL);
    Vec<A> top[kMostLanes];
    for (int64_t u = 0; u < a_.used; ++u) top[u] = splat(-static_cast<A>(__builtin_inff()));
    const auto sink = [&](int64_t used) {
      for (int64_t c = 0; c < a_.rank; ++c) {
        Vec<A> x = vec_load(m_.turned + c * kL);
        odd |= x != x;
#pragma GCC unroll 8
        for (int64_t u = 0; u < used; ++u) {
          const Vec<A> more = vec_max<A>(top[u], x);
          x = top[u] < x ? top[u] : x;
          top[u] = more;
        }
      }
    };
    if (a_.used == 8)
      sink(8);  // as published: in registers
    else
      sink(a_.used);
    vec_store(least, top[a_.used - 1]);
    return odd;
  }

  int64_t num_used() const { return a_.used < a_.rank ? a_.used : a_.rank; }

  // sums [rows, candidates], NaN behind them.
  void combine(int64_t rows) {
    const A* tile = m_.basis;
    for (int64_t first = 0; first < padded_; first += tile_) {
      const int64_t width = padded_ - first < tile_ ? padded_ - first : tile_;
      with_count<kWideVecs>(static_cast<int>(width / kL), [&](auto n) {
        if (num_used() == 8)
          combine_tile<n.value, 8>(rows, tile, first);  // as published
        else
          combine_tile<n.value, 0>(rows, tile, first);
      });
      tile += a_.rank * width;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = count_; c < padded_; ++c)
        m_.sums[r * padded_ + c] = static_cast<A>(__builtin_nanf(""));
  }

  // With kCount known, the loop over the coefficients of a row is unrolled.
  template <int kVecs, int kCount>
  SPOT_NOINLINE void combine_tile(int64_t rows, const A* tile, int64_t first) {
    const int64_t count = kCount > 0 ? kCount : num_used();
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* used = m_.used + r * count;
      const A* weights = m_.weights + r * count;
      Vec<A> sum[kVecs] = {};
      const auto add = [&](int64_t u) {
        const Vec<A> c = splat(weights[u]);
        const A* row = tile + used[u] * (kVecs * kL);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[j] += c * vec_load(row + j * kL);
      };
      if constexpr (kCount > 0) {
#pragma GCC unroll 8
        for (int u = 0; u < kCount; ++u) add(u);
      } else {
        for (int64_t u = 0; u < count; ++u) add(u);
      }
      ahead_.step();
      A* to = m_.sums + r * padded_ + first;
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) vec_store(to + j * kL, sum[j]);
    }
  }

  // Whether the sums of row r cannot be NaN; tells the guess how large they are.
  bool sums_are_finite(int64_t r) {
    A size = 0;
    for (int64_t u = 0; u < num_used(); ++u) {
      const A c = m_.weights[r * num_used() + u];
      size += c < 0 ? -c : c;
    }
    if (!(size * largest_ < static_cast<A>(__builtin_inff()))) return false;
    guess_.resize(size);
    return true;
  }

  void emit(int64_t r, int32_t* index) {
    const A* x = m_.sums + r * padded_;
    int64_t keep = a_.budget < count_ ? a_.budget : count_;
    if (a_.has_threshold) {
      const int64_t above = count_above(x, padded_, static_cast<A>(a_.threshold));
      keep = keep < above ? keep : above;
    }
    int32_t* chosen = m_.chosen;
    if (keep == count_)
      for (int64_t c = 0; c < keep; ++c) chosen[c] = static_cast<int32_t>(c);
    else if (keep > 0 && sums_are_finite(r))
      choose(x, count_, keep, guess_, chosen);
    else if (keep > 0)
      choose_any(x, count_, keep, m_.positions, m_.keys, chosen);
    if (count_ == a_.num_columns)
      std::memcpy(index, chosen, static_cast<std::size_t>(keep) * sizeof(int32_t));
    else
      for (int64_t c = 0; c < keep; ++c) index[c] = m_.candidates[chosen[c]];
    for (int64_t c = keep; c < a_.budget; ++c) index[c] = -1;
  }

  const ConnectivityArgs& a_;
  const int64_t padded_rank_;
  const ChoiceScratch<A> m_;
  Guess<A> guess_;
  A largest_ = 0;                  // of the basis
  Lines ahead_{nullptr, 0, 0, 0};  // of the result
  int64_t head_ = -1, image_ = -1, count_ = 0, padded_ = 0, tile_ = 0;
};

// Blocks of kChoiceRows rows [begin, end) of all heads of all images.
template <typename T>
void connectivity(const ConnectivityArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.num_queries + kChoiceRows - 1) / kChoiceRows;
  Chooser<T> chooser(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item % blocks * kChoiceRows, left = a.num_queries - start;
    chooser.run(item / blocks * a.num_queries + start, left < kChoiceRows ? left : kChoiceRows);
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
