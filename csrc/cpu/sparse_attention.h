// Attention of each query to the keys that an index names, forward. Torch-free; one copy per ISA.
//
// A work item is a span of the queries of one head of one image. Keys and values are packed as
// rows, once for the spans of a head that a thread does; a block of queries lists its keys
// (sparse_rows.h), and its scores, one per key, stay in cache for softmax, statistics and the sum
// of values.
//
// Cost per head, with K keys named by each of N queries: 2 N K D multiply-accumulates and N K
// exponentials; for statistics, sums by column in double precision. Scratch per thread: 2 N D
// numbers, and 2^15 keys and scores (N of each if that is more).
#pragma once

#include "sparse_rows.h"

namespace spot {
namespace SPOT_ISA {

// Sums of entries and of their squares, in a type in which their difference keeps its digits.
template <typename A>
struct ColumnSum {
  using Wide = std::conditional_t<std::is_same_v<A, float>, double, long double>;
  Wide sum, square;
};

template <typename A>
inline void add_to_columns(const A* x, A factor, const int32_t* keys, int64_t count,
                           ColumnSum<A>* columns) {
  for (int64_t t = 0; t < count; ++t) {
    const auto p = static_cast<typename ColumnSum<A>::Wide>(x[t] * factor);
    columns[keys[t]].sum += p;
    columns[keys[t]].square += p * p;
  }
}

// The same for a whole vector. Both sums of a column are one vector of 16 bytes: an entry costs
// one load, addition and store, not two.
template <std::size_t... I>
inline void add_vector_to_columns(Vec<float> p, const int32_t* keys, ColumnSum<float>* columns,
                                  std::index_sequence<I...>) {
  typedef double Both __attribute__((vector_size(16)));
  constexpr int kHalf = sizeof...(I);
  const auto add = [&](Vec<float> low, const int32_t* names) __attribute__((always_inline)) {
    const auto half = __builtin_shufflevector(low, low, static_cast<int>(I)...);
    const Vec<double> wide = __builtin_convertvector(half, Vec<double>), square = wide * wide;
    // Pairs of entry and square: of even lanes, and of odd ones.
    const Vec<double> pairs[2] = {
        __builtin_shufflevector(
            wide, square,
            (static_cast<int>(I) & 1 ? kHalf + static_cast<int>(I) - 1 : static_cast<int>(I))...),
        __builtin_shufflevector(
            wide, square,
            (static_cast<int>(I) & 1 ? kHalf + static_cast<int>(I) : static_cast<int>(I) + 1)...)};
    const auto add_lane = [&](auto lane) __attribute__((always_inline)) {
      constexpr int kLane = lane.value, kFrom = kLane / 2 * 2;
      ColumnSum<float>& column = columns[names[kLane]];
      const Both both =
          __builtin_shufflevector(pairs[kLane % 2], pairs[kLane % 2], kFrom, kFrom + 1);
      column = bit_cast<ColumnSum<float>>(bit_cast<Both>(column) + both);
    };
    (add_lane(Int<static_cast<int>(I)>{}), ...);
  };
  add(p, keys);
  add(__builtin_shufflevector(p, p, (kHalf + static_cast<int>(I))..., static_cast<int>(I)...),
      keys + kHalf);
}

inline void add_to_columns(const float* x, float factor, const int32_t* keys, int64_t count,
                           ColumnSum<float>* columns) {
  constexpr int kL = kLanes<float>;
  for (; count >= kL; count -= kL, x += kL, keys += kL)
    add_vector_to_columns(vec_load(x) * factor, keys, columns, std::make_index_sequence<kL / 2>{});
  add_to_columns<float>(x, factor, keys, count, columns);
}

template <typename A>
struct SparseScratch {
  A *keys, *values, *queries, *scores, *results, *live;
  ColumnSum<A>* columns;
  uint8_t *dropped, *marks;
  RowState<A> state;
  Lists lists;
  SparseScratch(Pieces& memory, const AttentionArgs& a, int64_t named, int64_t width)
      : keys(memory.take<A>(a.num_tokens * width)),
        values(memory.take<A>(a.num_tokens * width)),
        queries(memory.take<A>(kListRows * width)),
        scores(memory.take<A>(entries(a, named))),
        results(memory.take<A>(kListRows * width)),
        live(memory.take<A>(round_up(a.num_tokens, kLanes<A>))),
        columns(memory.take<ColumnSum<A>>(a.need_stats ? a.num_tokens : 0)),
        dropped(memory.take<uint8_t>(a.num_tokens)),
        marks(memory.take<uint8_t>(a.num_tokens)),
        state(memory, kListRows),
        lists(memory, named, dense(a), kLanes<A>) {}
  static int64_t dense(const AttentionArgs& a) { return a.num_prefix > 0 ? a.num_tokens : 0; }
  static int64_t entries(const AttentionArgs& a, int64_t named) {
    return Lists::entries(named, dense(a), kLanes<A>);
  }
};

// Column statistics of a kept patch from the sums over the n kept rows.
template <typename A>
inline void store_sparse_column(const ColumnSum<A>& c, int64_t n, A* stats) {
  using Wide = typename ColumnSum<A>::Wide;
  const Wide mean = c.sum / static_cast<Wide>(n);
  const Wide var = c.square / static_cast<Wide>(n) - mean * mean;
  stats[4] = static_cast<A>(mean);
  stats[5] = n == 1 ? variance_of_one(stats[4]) : var < 0 ? A(0) : static_cast<A>(var);
}

template <typename T, bool kStats>
class SparseForward {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;

 public:
  SparseForward(const SparseArgs& args, const Head& head)
      : a_(args.attention),
        head_(head),
        dim_(a_.head_dim),
        width_(round_up(dim_, kL)),
        m_(in_scratch<SparseScratch<A>>(a_, args.num_named, width_)),
        lists_(args, head, m_.lists, m_.dropped, m_.marks, false),
        q_(a_.q, head.b, head.h),
        scale_(static_cast<A>(a_.scale < 0 ? -a_.scale : a_.scale)),
        inv_(inverse<A>(head.n)),
        out_(static_cast<T*>(a_.out)),
        stats_(static_cast<A*>(a_.stats)) {
    pack_rows(Rows<T>(a_.k, head_.b, head_.h), a_.num_tokens, dim_, width_, m_.keys);
    pack_rows(Rows<T>(a_.v, head_.b, head_.h), a_.num_tokens, dim_, width_, m_.values);
  }

  // False when the index is bad.
  bool run(int64_t span) {
    const int64_t begin = span * a_.span_rows;
    const int64_t end = begin + a_.span_rows < a_.num_tokens ? begin + a_.span_rows : a_.num_tokens;
    if constexpr (kStats)
      for (int64_t t = 0; t < a_.num_tokens; ++t) m_.columns[t] = {0, 0};
    for (int64_t first = begin; first < end;) {
      const int64_t rows = lists_.fill(first, end);
      if (rows < 0) return false;
      for (int64_t r = 0; r < rows; ++r)
        stage_row(q_.row(first + r), q_.dim, dim_, m_.queries + r * width_, width_);
      if (a_.scale < 0) negate(m_.queries, rows * width_);
      fetch_.index = lists_.index_lines(first + rows, rows);
      fetch_.queries =
          q_.lines(first + rows, end - first < 2 * rows ? end - first - rows : rows, dim_);
      fetch_.out = {out_ + head_.at(first) * dim_, rows,
                    a_.num_heads * dim_ * static_cast<int64_t>(sizeof(T)),
                    dim_ * static_cast<int64_t>(sizeof(T))};
      dot_named(m_.queries, m_.keys, width_, lists_.lists(), rows, m_.scores, fetch_);
      softmax_rows(m_.scores, lists_.lists(), rows, scale_, m_.state);
      if constexpr (kStats)
        for (int64_t r = 0; r < rows; ++r) statistics(first + r, r);
      sum_named(m_.scores, m_.values, width_, lists_.lists(), rows, m_.results, fetch_);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = head_.at(first + r);
        store_scaled_row(m_.results + r * width_, dim_, factor(r), out_ + at * dim_);
        // A row that sees nothing: not the maximum times scale, which may be 0.
        static_cast<A*>(a_.lse)[at] = m_.state.sum[r] == 0
                                          ? m_.state.max[r]
                                          : m_.state.max[r] * scale_ + natural_log(m_.state.sum[r]);
      }
      first += rows;
    }
    if constexpr (kStats) columns(span);
    return true;
  }

 private:
  A factor(int64_t r) const { return m_.state.sum[r] == 0 ? A(0) : A(1) / m_.state.sum[r]; }

  // Row statistics, and what the row adds to its columns.
  void statistics(int64_t token, int64_t r) {
    A* s = stats_ + head_.at(token) * 6;
    const Lists& lists = lists_.lists();
    const int32_t* keys = lists.keys[r];
    const A* x = m_.scores + r * lists.row;
    const int64_t seen = lists.seen[r];
    const A factor = this->factor(r);
    if (token < a_.num_prefix || lists_.dropped(token)) {
      for (int i = 0; i < 6; ++i) s[i] = 0;
      if (a_.class_token && token == 0)
        for (int64_t t = a_.num_prefix; t < seen; ++t)
          stats_[head_.at(keys[t]) * 6] = x[t] * factor;
      return;
    }
    int64_t class_key = -1;
    const int64_t patches = mark_patch_keys(r, class_key);
    Vec<A> total = {}, square = {};
    for (int64_t t = 0; t < seen; t += kL)
      total += vec_and<A>(vec_load(x + t), bit_cast<Bits<A>>(vec_load(m_.live + t)));
    const A mean = reduce_add<A>(total) * factor * inv_;
    for (int64_t t = 0; t < seen; t += kL) {
      const Vec<A> c =
          vec_and<A>(vec_load(x + t) * factor - mean, bit_cast<Bits<A>>(vec_load(m_.live + t)));
      square += c * c;
    }
    const A absent = static_cast<A>(head_.n - patches) * mean * mean;
    if (!a_.class_token) s[0] = 0;
    s[1] = a_.class_token && class_key >= 0 ? x[class_key] * factor : A(0);
    s[2] = mean;
    s[3] = head_.n > 1 ? (reduce_add<A>(square) + absent) * inv_ : variance_of_one(mean);
    add_to_columns(x, factor, keys, seen, m_.columns);
  }

  // Bits of the entries of row r that count, whole vectors of them; how many, and which entry is
  // the class token's.
  int64_t mark_patch_keys(int64_t r, int64_t& class_key) {
    using I = typename VectorOf<A>::Int;
    const Lists& lists = lists_.lists();
    const int32_t* keys = lists.keys[r];
    const int64_t seen = lists.seen[r], prefix = a_.num_prefix;
    // Where keys of the prefix may be: in front, if they ascend.
    const int64_t scan = lists.ascends[r] && prefix < seen ? prefix : seen;
    int64_t t = 0, patches = seen;
    for (; prefix > 0 && t < scan; ++t) {
      const bool live = keys[t] >= prefix;
      m_.live[t] = bit_cast<A>(live ? I{-1} : I{0});
      patches -= !live;
      if (keys[t] == 0) class_key = t;
    }
    for (; t < seen; ++t) m_.live[t] = bit_cast<A>(I{-1});
    for (; t < round_up(seen, kL); ++t) m_.live[t] = 0;
    return patches;
  }

  void columns(int64_t span) {
    if (a_.num_spans > 1) {
      const int64_t item = (head_.b * a_.num_heads + head_.h) * a_.num_spans + span;
      std::memcpy(static_cast<ColumnSum<A>*>(a_.column_sums) + item * a_.num_tokens, m_.columns,
                  static_cast<std::size_t>(a_.num_tokens) * sizeof(ColumnSum<A>));
      return;
    }
    for (int64_t c = a_.num_prefix; c < head_.seen; ++c) {
      const int64_t t = head_.order[c];
      store_sparse_column(m_.columns[t], head_.n, stats_ + head_.at(t) * 6);
    }
  }

  const AttentionArgs& a_;
  const Head& head_;
  Fetch fetch_;
  const int64_t dim_, width_;
  const SparseScratch<A> m_;
  HeadLists<A> lists_;
  const Rows<T> q_;
  const A scale_, inv_;
  T* const out_;
  A* const stats_;
};

// Spans [begin, end) of all heads of all images, counted together; false when the index is bad.
template <typename T>
bool sparse_attention(const SparseArgs& args, int64_t begin, int64_t end) {
  const AttentionArgs& a = args.attention;
  bool fine = true;
  for_heads(a, begin, end, [&](int64_t at, int64_t first, int64_t last) {
    const Head head(a, at / a.num_heads, at % a.num_heads);
    const auto run = [&](auto&& forward) {
      for (int64_t span = first; fine && span < last; ++span) fine = forward.run(span);
    };
    if (a.need_stats)
      run(SparseForward<T, true>(args, head));
    else
      run(SparseForward<T, false>(args, head));
  });
  return fine;
}

// Column statistics of heads [begin, end) from the sums of their spans.
template <typename T>
void sparse_attention_columns(const SparseArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const AttentionArgs& a = args.attention;
  for (int64_t item = begin; item < end; ++item) {
    const Head head(a, item / a.num_heads, item % a.num_heads);
    const ColumnSum<A>* sums =
        static_cast<const ColumnSum<A>*>(a.column_sums) + item * a.num_spans * a.num_tokens;
    for (int64_t c = a.num_prefix; c < head.seen; ++c) {
      const int64_t t = head.order[c];
      ColumnSum<A> total = {0, 0};
      for (int64_t span = 0; span < a.num_spans; ++span) {
        total.sum += sums[span * a.num_tokens + t].sum;
        total.square += sums[span * a.num_tokens + t].square;
      }
      store_sparse_column(total, head.n, static_cast<A*>(a.stats) + head.at(t) * 6);
    }
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
