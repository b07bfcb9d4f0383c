// The coefficients that connectivity combines: those of each query that count, and how large they
// are. Torch-free; one copy per ISA.
//
// Coefficients are read, or made as the softmax of queries times few keys (head_keys.h). The rows
// of a block are lanes, so that a row's largest coefficients sink through registers. Of a softmax
// only those that count become exponentials; it is divided by its sum where a threshold asks for
// that, as otherwise columns are only compared with each other.
//
// Cost per row of R coefficients: R D multiply-accumulates to make them, or c (D + R) where queries
// are projected to c channels; 9 operations on a lane for each to find the 8 largest, 2 C for the C
// largest. Scratch per thread: kChoiceRows (R + D + c) numbers, and that of the keys.
#pragma once

#include "choose.h"
#include "head_keys.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kMostLanes = 32;  // coefficients that are ranked with rows as lanes
constexpr int64_t kPublished = 8;   // coefficients that count, as published

// ---- the eight largest --------------------------------------------------------------------------

template <typename V>
inline void order(V& more, V& less) {
  const V a = more, b = less;
  more = a > b ? a : b;
  less = a > b ? b : a;
}

// Descending in each lane.
template <typename V>
inline void sort_eight(V (&x)[8]) {
  constexpr int kPairs[][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                               {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                               {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
  for (int i = 0; i < 19; ++i) order(x[kPairs[i][0]], x[kPairs[i][1]]);
}

// The eight largest of both, descending.
template <typename V>
inline void merge_eight(V (&top)[8], const V (&x)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) top[i] = top[i] > x[7 - i] ? top[i] : x[7 - i];
#pragma GCC unroll 3
  for (int step = 4; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if ((i & step) == 0) order(top[i], top[i + step]);
}

// ---- a block of rows ---------------------------------------------------------------------------

// Bits, one for each coefficient.
template <typename A>
using Word = std::make_unsigned_t<typename VectorOf<A>::Int>;
template <typename A>
constexpr int64_t kWordBits = 8 * sizeof(A);

template <typename A>
struct CoefficientScratch {
  using Key = decltype(order_key(A{}));
  A* lanes;                        // [R, kChoiceRows] coefficients or logits
  A *queries, *projected_queries;  // [input, kChoiceRows] and [c, kChoiceRows] in panels
  A *staged, *row;                 // kLanes rows, one row
  Word<A>* reaching;         // [.., kLanes], coefficients that reach a row's least that counts
  A* weights;                // [used, kChoiceRows], those that count
  A *size, *total, *square;  // per row: sums of their magnitudes, of them and of their squares
  int32_t* used;             // [kChoiceRows, used]
  Key* order;                // of one row
  int64_t* positions;
  KeyScratch<A> keys;
  CoefficientScratch(Pieces& memory, const ConnectivityArgs& a, const KeySizes<A>& s)
      : lanes(memory.take<A>(a.rank * kChoiceRows)),
        queries(memory.take<A>(s.input * kChoiceRows)),
        projected_queries(memory.take<A>(a.projects_first ? s.channels * kChoiceRows : 0)),
        staged(memory.take<A>(kLanes<A> * (s.input_row > s.rank_row ? s.input_row : s.rank_row))),
        row(memory.take<A>(round_up(a.rank, kLanes<A>))),
        reaching(memory.take<Word<A>>(round_up(a.rank, 64) / kWordBits<A> * kLanes<A>)),
        weights(memory.take<A>(a.used * kChoiceRows)),
        size(memory.take<A>(kChoiceRows)),
        total(memory.take<A>(kChoiceRows)),
        square(memory.take<A>(kChoiceRows)),
        used(memory.take<int32_t>(kChoiceRows * a.used + kLanes<A>)),
        order(memory.take<Key>(round_up(a.rank, kKeyLanes))),
        positions(memory.take<int64_t>(a.rank)),
        keys(memory, a, s) {}
};

template <typename T>
class Coefficients {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;
  static_assert(kChoiceRows % kL == 0, "lanes are rows of one block");

 public:
  Coefficients(const ConnectivityArgs& args, const CoefficientScratch<A>& scratch)
      : a_(args), m_(scratch), head_keys_(args, scratch.keys) {}

  // Rows [q, q + rows) of a head of an image; rows <= kChoiceRows.
  void run(int64_t b, int64_t h, int64_t q, int64_t rows) {
    if (a_.coefficients)
      read(b, h, q, rows);
    else
      make(b, h, q, rows);
    for (int64_t first = 0; first < rows; first += kL)
      rank(first, rows - first < kL ? rows - first : kL);
  }

  // Lines of the queries behind those `rows`, of as many rows.
  Lines query_lines(int64_t b, int64_t h, int64_t q, int64_t rows) const {
    if (a_.coefficients) return {nullptr, 0, 0, 0};
    const int64_t first = q + rows, left = a_.num_queries - first;
    return Rows<T>(a_.q, b, h).lines(first, left < rows ? left : rows, a_.head_dim);
  }

  // Those that count, by row: [used, kChoiceRows], and which they are: [kChoiceRows, used],
  // ascending.
  const A* weights() const { return m_.weights; }
  const int32_t* used() const { return m_.used; }
  // Of row r, all of those: sums of their magnitudes, of them, and of their squares.
  A size(int64_t r) const { return m_.size[r]; }
  A total(int64_t r) const { return m_.total[r]; }
  A square(int64_t r) const { return m_.square[r]; }

 private:
  void read(int64_t b, int64_t h, int64_t q, int64_t rows) {
    const int64_t* strides = a_.coefficients_strides;
    const T* data = static_cast<const T*>(a_.coefficients) + b * strides[0] + h * strides[1];
    const int64_t padded = round_up(a_.rank, kL);
    for (int64_t first = 0; first < rows; first += kL) {
      for (int64_t l = 0; l < kL; ++l) {
        const int64_t r = first + l < rows ? first + l : rows - 1;
        stage_row(data + (q + r) * strides[2], strides[3], a_.rank, m_.staged + l * padded, padded);
      }
      for (int64_t c = 0; c < a_.rank; c += kL)
        store_transposed(m_.staged + c, padded, a_.rank - c < kL ? a_.rank - c : kL,
                         m_.lanes + c * kChoiceRows + first, kChoiceRows);
    }
  }

  // Logits: queries times the keys of their head.
  void make(int64_t b, int64_t h, int64_t q, int64_t rows) {
    const KeySizes<A>& s = head_keys_.sizes();
    const int64_t head = b * a_.num_heads + h;
    if (head != head_) keys_ = head_keys_.run(b, h);
    head_ = head;
    const Rows<T> queries(a_.q, b, h);
    const Panels panels(kChoiceRows / kL);
    pack_columns(panels, rows, s.input, m_.queries, m_.staged, [&](int64_t r, A* to) {
      stage_row(queries.row(q + r), queries.dim, a_.head_dim, to, s.input_row);
      if (a_.projected) to[a_.head_dim] = 1;
    });
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t at = panels.start(p) * kL, row = panels.width(p) * kL;
      const A* panel = m_.queries + at * s.input;
      if (a_.projects_first) {
        A* projected = m_.projected_queries + at * s.channels;
        multiply(head_keys_.query_weight(), s.input_row, s.channels, panel, row, s.input,
                 panels.width(p), projected, row);
        panel = projected;
      }
      multiply(keys_, s.depth_row, a_.rank, panel, row, s.depth, panels.width(p), m_.lanes + at,
               kChoiceRows);
    }
  }

  // The coefficients that count of rows [first, first + rows), rows <= kL.
  void rank(int64_t first, int64_t rows) {
    const A* x = m_.lanes + first;
    const bool all = a_.used == a_.rank, by_lanes = !all && a_.used <= kMostLanes;
    Bits<A> odd = {};  // rows with a NaN
    Vec<A> most = splat(-static_cast<A>(__builtin_inff())), least = most;
    if (by_lanes)
      odd = a_.used == kPublished ? largest_eight(x, most, least) : largest(x, most, least);
    else
      for (int64_t c = 0; c < a_.rank; ++c) {
        const Vec<A> v = vec_load(x + c * kChoiceRows);
        odd |= v != v;
        most = vec_max<A>(most, v);
      }
    if (by_lanes) mark_reaching(x, least);
    for (int64_t l = 0; l < rows; ++l) {
      int32_t* used = m_.used + (first + l) * a_.used;
      if (all)
        for (int64_t c = 0; c < a_.used; ++c) used[c] = static_cast<int32_t>(c);
      else if (!by_lanes || odd[l] || !list_reaching(l, used))
        choose_used(x + l, by_lanes && !odd[l], least[l], used);
      for (int64_t u = 0; u < a_.used; ++u)
        m_.weights[u * kChoiceRows + first + l] = x[used[u] * kChoiceRows + l];
    }
    weigh(first, odd, most);
  }

  // Which coefficients of kL rows reach `least`.
  void mark_reaching(const A* x, Vec<A> least) {
    Word<A>* words = m_.reaching;
    for (int64_t c = 0; c < round_up(a_.rank, 64); c += kWordBits<A>, words += kL) {
      const int64_t end = c + kWordBits<A> < a_.rank ? c + kWordBits<A> : a_.rank;
      Bits<A> set = {}, bit = Bits<A>{} + 1;
      for (int64_t i = c; i < end; ++i, bit <<= 1)
        set |= (vec_load(x + i * kChoiceRows) >= least) & bit;
      std::memcpy(words, &set, sizeof(set));
    }
  }
  // Those of row l, ascending; false where they are not as many as count.
  bool list_reaching(int64_t l, int32_t* used) {
    int64_t count = 0;
    for (int64_t c = 0; c < a_.rank; c += 64) count += __builtin_popcountll(reaching(l, c));
    if (count != a_.used) return false;
    for (int64_t c = 0; count > 0; c += 64)
      for (uint64_t set = reaching(l, c); set != 0; set &= set - 1, --count)
        *used++ = static_cast<int32_t>(c + __builtin_ctzll(set));
    return true;
  }
  // Coefficients c to c + 63 of row l.
  uint64_t reaching(int64_t l, int64_t c) const {
    const Word<A>* at = m_.reaching + c / kWordBits<A> * kL + l;
    if constexpr (sizeof(A) == 8) return *at;
    return at[0] | uint64_t{at[kL]} << 32;
  }

  // One row where numbers tie or are NaN; `known` says that its least that counts is.
  void choose_used(const A* x, bool known, A least, int32_t* used) {
    const int64_t padded = round_up(a_.rank, kL);
    for (int64_t c = 0; c < a_.rank; ++c) m_.row[c] = x[c * kChoiceRows];
    for (int64_t c = a_.rank; c < padded; ++c) m_.row[c] = static_cast<A>(__builtin_nanf(""));
    if (known)
      take_first(m_.row, a_.used, least, a_.used - count_above(m_.row, padded, least), used);
    else
      choose_any(m_.row, a_.rank, a_.used, m_.positions, m_.order, used);
  }

  // Of kL rows the largest coefficient and the least that counts. Returns which of the rows hold a
  // NaN.
  Bits<A> largest_eight(const A* x, Vec<A>& most, Vec<A>& least) {
    const Vec<A> none = splat(-static_cast<A>(__builtin_inff()));
    Bits<A> odd = {};
    Vec<A> top[8], next[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) top[i] = none;
    for (int64_t c = 0; c < a_.rank; c += 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        next[i] = c + i < a_.rank ? vec_load(x + (c + i) * kChoiceRows) : none;
        odd |= next[i] != next[i];
      }
      sort_eight(next);
      merge_eight(top, next);
    }
    most = top[0];
    least = top[7];
    return odd;
  }
  // The same for any number: the largest so far sink through `top`.
  Bits<A> largest(const A* x, Vec<A>& most, Vec<A>& least) {
    Bits<A> odd = {};
    Vec<A> top[kMostLanes];
    for (int64_t u = 0; u < a_.used; ++u) top[u] = splat(-static_cast<A>(__builtin_inff()));
    for (int64_t c = 0; c < a_.rank; ++c) {
      Vec<A> v = vec_load(x + c * kChoiceRows);
      odd |= v != v;
      for (int64_t u = 0; u < a_.used; ++u) order(top[u], v);
    }
    most = top[0];
    least = top[a_.used - 1];
    return odd;
  }

  // Logits that count become exponentials; then their sums.
  void weigh(int64_t first, Bits<A> odd, Vec<A> most) {
    Vec<A> factor = splat(A(1));
    if (!a_.coefficients) {
      most = odd ? splat(static_cast<A>(__builtin_nanf(""))) : most;
      if (a_.has_threshold) {
        Vec<A> sum = {};
        for (int64_t c = 0; c < a_.rank; ++c)
          sum += vec_exp(vec_load(m_.lanes + c * kChoiceRows + first) - most, kExpUnit<A>);
        factor /= sum;
      }
    }
    Vec<A> size = {}, total = {}, square = {};
    for (int64_t u = 0; u < a_.used; ++u) {
      A* at = m_.weights + u * kChoiceRows + first;
      Vec<A> w = vec_load(at);
      if (!a_.coefficients) {
        w = vec_exp(w - most, kExpUnit<A>) * factor;
        vec_store(at, w);
      }
      size += w < 0 ? -w : w;
      total += w;
      square += w * w;
    }
    vec_store(m_.size + first, size);
    vec_store(m_.total + first, total);
    vec_store(m_.square + first, square);
  }

  const ConnectivityArgs& a_;
  const CoefficientScratch<A> m_;
  HeadKeys<T> head_keys_;
  int64_t head_ = -1;  // whose keys these are
  const A* keys_ = nullptr;
};

}  // namespace SPOT_ISA
}  // namespace spot
