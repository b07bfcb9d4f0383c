// Attention with SPOT's statistics, forward. Torch-free; one copy per ISA.
//
// A work item is a span of the queries of one head of one image. Keys are packed into panels
// (tiles.h), once for the spans of a head that a thread does; a block of queries gets its complete
// rows of scores, which stay in cache for softmax, statistics and the product with the values.
// Dropped columns are not packed, so they cost nothing; the row of a dropped token sees itself
// besides (the self-loop), which is added by hand.
//
// Cost per head, with S columns seen by N rows: 2 N S D multiply-accumulates, N S exponentials and
// 4 N S for the statistics. Scratch per thread: 2 S D + R S numbers, R = kBlockRows. Sums run in
// float32 (float64 for float64).
#pragma once

#include "attention_rows.h"

namespace spot {
namespace SPOT_ISA {

// Fetches what this thread will need next into cache, a few lines at a time between computations:
// the processor's own prefetching does not cross the pages that neighbouring tokens lie in, and
// more lines at once would wait for each other.
template <typename T>
class Ahead {
 public:
  Ahead(const AttentionArgs& a, int64_t b, int64_t h)
      : rows_{{a.q, b, h}, {a.k, b, h}, {a.v, b, h}}, dim_(a.q.dim == 1 ? a.head_dim : 0) {}
  // Up to two tokens more, of `count` in all.
  void step(int64_t count) {
    for (int i = 0; i < 2 && token_ < count; ++i, ++token_)
      for (const Rows<T>& x : rows_)
        for (int64_t d = 0; d < dim_; d += kLine) __builtin_prefetch(x.row(token_) + d, 0, 3);
  }
  static void to_write(const T* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 1, 3);
  }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const Rows<T> rows_[3];
  const int64_t dim_;
  int64_t token_ = 0;
};

template <typename T>
struct ForwardScratch {
  using A = Acc<T>;
  using E = Element<T>;
  E *keys, *values, *queries, *staged;
  A *scores, *results, *live, *origin, *col, *col_square, *mean, *square, *value;
  E* weights;  // the rows of p as the product with the values wants them
  RowState<A> rows;
  ForwardScratch(Pieces& memory, int64_t seen, int64_t dim)
      : keys(memory.take<E>(round_up(seen, kLanes<A>) * depth(dim))),
        values(memory.take<E>(depth(seen) * round_up(dim, kLanes<A>))),
        queries(memory.take<E>(kBlockRows * depth(dim))),
        staged(memory.take<E>(kLanes<A> * round_up(depth(dim), kLanes<A>))),
        scores(memory.take<A>(kBlockRows * round_up(seen, kLanes<A>))),
        results(memory.take<A>(kBlockRows * round_up(dim, kLanes<A>))),
        live(memory.take<A>(round_up(seen, kLanes<A>))),
        origin(memory.take<A>(round_up(seen, kLanes<A>))),
        col(memory.take<A>(round_up(seen, kLanes<A>))),
        col_square(memory.take<A>(round_up(seen, kLanes<A>))),
        mean(memory.take<A>(kBlockRows)),
        square(memory.take<A>(kBlockRows)),
        value(memory.take<A>(round_up(dim, kLanes<A>))),
        weights(reinterpret_cast<E*>(scores)),
        rows(memory) {
    if constexpr (!std::is_same_v<E, A>)
      weights = memory.take<E>(kBlockRows * round_up(depth(seen), kLanes<A>));
  }
  static int64_t depth(int64_t n) { return (n + Depth<E>::kPer - 1) / Depth<E>::kPer; }
};

// Values [seen, D], padded to whole vectors; for pairs two rows are woven together.
template <typename T, typename E>
inline void pack_values(const Head& head, const Rows<T>& values, E* out) {
  using A = typename Depth<E>::Acc;
  const int64_t dim = head.a.head_dim, padded = round_up(dim, kLanes<A>);
  if constexpr (std::is_same_v<E, A>) {
    for (int64_t c = 0; c < head.seen; ++c)
      stage_row(values.row(head.order[c]), values.dim, dim, out + c * padded, padded);
  } else {
    for (int64_t c = 0; c < head.seen; c += 2) {
      const T* even = values.row(head.order[c]);
      const T* odd = c + 1 < head.seen ? values.row(head.order[c + 1]) : nullptr;
      E* to = out + c / 2 * padded;
      if (odd != nullptr && values.dim == 1)
        for (int64_t d = 0; d < dim; ++d)
          to[d].bits = even[d].bits | static_cast<uint32_t>(odd[d].bits) << 16;
      else
        for (int64_t d = 0; d < dim; ++d)
          to[d].bits = even[d * values.dim].bits |
                       (odd ? static_cast<uint32_t>(odd[d * values.dim].bits) << 16 : 0u);
      for (int64_t d = dim; d < padded; ++d) to[d].bits = 0;
    }
  }
}

// Means and summed squares of rows, and column sums, over kRows rows of exponentials. Entries are
// taken relative to something near them, so that small variances keep their digits whatever share
// the prefix takes: rows to their own mean, columns to `origin`, their mean in the first block.
template <int kRows, typename A>
SPOT_NOINLINE void add_statistics(const A* s, int64_t row, int64_t vecs, const A* sum, A inv,
                                  const A* live, const A* origin, A* col, A* col_square, A* mean,
                                  A* square) {
  constexpr int kL = kLanes<A>;
  A factor[kRows];
  Vec<A> total[kRows] = {}, squares[kRows] = {};
  for (int64_t j = 0; j < vecs * kL; j += kL) {
    const Bits<A> mask = bit_cast<Bits<A>>(vec_load(live + j));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r] += vec_and<A>(vec_load(s + r * row + j), mask);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    factor[r] = A(1) / sum[r];
    mean[r] = reduce_add<A>(total[r]) * inv * factor[r];
  }
  for (int64_t j = 0; j < vecs * kL; j += kL) {
    const Bits<A> mask = bit_cast<Bits<A>>(vec_load(live + j));
    const Vec<A> from = vec_load(origin + j);
    Vec<A> down = vec_load(col + j), down_square = vec_load(col_square + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> e = vec_load(s + r * row + j);
      const Vec<A> across = vec_and<A>(e * factor[r] - mean[r], mask), c = e * factor[r] - from;
      squares[r] += across * across;
      down += c;
      down_square += c * c;
    }
    vec_store(col + j, down);
    vec_store(col_square + j, down_square);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) square[r] = reduce_add<A>(squares[r]);
}

// Count, means and summed squared distances of the columns of a span, [2, N] numbers at `mean`.
template <typename A>
struct ColumnSums {
  int64_t count;
  A *mean, *square;
};

template <typename A>
inline ColumnSums<A> column_sums(const AttentionArgs& a, const Head& head, int64_t span) {
  const int64_t item = (head.b * a.num_heads + head.h) * a.num_spans + span;
  A* mean = static_cast<A*>(a.column_sums) + item * 2 * a.num_tokens;
  const int64_t begin = span * a.span_rows;
  const int64_t end = begin + a.span_rows < a.num_tokens ? begin + a.span_rows : a.num_tokens;
  return {counted_rows(head, begin, end), mean, mean + a.num_tokens};
}

template <typename A>
inline void store_column(const Head& head, int64_t c, A mean, A square, A* stats) {
  A* s = stats + head.at(head.order[c]) * 6;
  s[4] = mean < 0 ? A(0) : mean;
  s[5] = head.n == 1 ? variance_of_one(mean) : square < 0 ? A(0) : square / static_cast<A>(head.n);
}

template <typename T, bool kStats>
class Forward {
  using A = Acc<T>;
  using E = Element<T>;
  using Scratch = ForwardScratch<T>;
  static constexpr int kL = kLanes<A>;

 public:
  // Packs keys and values. `next` is the head that this thread does after this one.
  Forward(const AttentionArgs& args, const Head& head, const Head& next)
      : a_(args),
        head_(head),
        ahead_(args, next.b, next.h),
        dim_(args.head_dim),
        seen_(head.seen),
        depth_(Scratch::depth(dim_)),
        padded_(round_up(dim_, kL)),
        panels_((seen_ + kL - 1) / kL),
        channels_(padded_ / kL),
        row_(panels_.vecs * kL),
        m_(in_scratch<Scratch>(seen_, dim_)),
        q_(args.q, head.b, head.h),
        k_(args.k, head.b, head.h),
        v_(args.v, head.b, head.h),
        scale_(static_cast<A>(args.scale < 0 ? -args.scale : args.scale)),
        inv_(inverse<A>(head.n)),
        out_(static_cast<T*>(args.out)),
        stats_(static_cast<A*>(args.stats)) {
    pack_keys<T, E, A>(head_, k_, 0, seen_, panels_, depth_, m_.keys, m_.staged);
    pack_values<T, E>(head_, v_, m_.values);
    if constexpr (kStats) mark_patches(head_, panels_.vecs, m_.live);
  }

  void run(int64_t span) {
    const int64_t begin = span * a_.span_rows;
    const int64_t end = begin + a_.span_rows < a_.num_tokens ? begin + a_.span_rows : a_.num_tokens;
    if constexpr (kStats)
      for (int64_t c = 0; c < row_; ++c) m_.col[c] = m_.col_square[c] = 0;
    for (first_ = begin; first_ < end; first_ += kBlockRows) {
      rows_ = end - first_ < kBlockRows ? end - first_ : kBlockRows;
      dropped_ = seen_ - first_ < 0 ? 0 : seen_ - first_;
      scores();
      softmax();
      if constexpr (kStats) statistics(first_ == begin);
      results();
    }
    if constexpr (kStats) columns(span);
  }

 private:
  int64_t token(int64_t r) const { return head_.order[head_.position(first_ + r)]; }

  void scores() {
    for (int64_t r = 0; r < rows_; ++r)
      stage_row(q_.row(token(r)), q_.dim, dim_, m_.queries + r * depth_, depth_);
    if (a_.scale < 0) negate(m_.queries, rows_ * depth_);
    for (int64_t p = 0; p < panels_.count; ++p) {
      const int64_t c = panels_.start(p) * kL;
      const int width = panels_.width(p);
      multiply(m_.queries, depth_, rows_, m_.keys + c * depth_, width * kL, depth_, width,
               m_.scores + c, row_);
      ahead_.step(first_ + rows_);
    }
    for (int64_t r = dropped_; r < rows_; ++r) {
      const int64_t t = token(r);
      const A own = dot_rows<A>(q_.row(t), q_.dim, k_.row(t), k_.dim, dim_);
      m_.rows.own[r] = a_.scale < 0 ? -own : own;
      if (a_.bias) add_bias(a_, head_, t, head_.position(first_ + r), 1, scale_, m_.rows.own + r);
    }
    if (a_.bias)
      for (int64_t r = 0; r < rows_; ++r)
        add_bias(a_, head_, token(r), 0, seen_, scale_, m_.scores + r * row_);
  }

  void softmax() {
    const A unit = kExpUnit<A> * (a_.bias ? A(1) : scale_);
    for_groups(rows_, [&](auto group, int64_t r) {
      ahead_.step(first_ + rows_);
      for (int i = 0; i < group.value; ++i)
        ahead_.to_write(out_ + head_.at(token(r + i)) * dim_, dim_);
      exponentials<group.value>(m_.scores + r * row_, row_, panels_.vecs, seen_, dropped_, unit,
                                m_.rows, r, m_.weights + r * row_ / Depth<E>::kPer);
    });
  }

  void statistics(bool start) {
    const int64_t counted = counted_rows(head_, first_, first_ + rows_);
    if (start) {
      for (int64_t c = 0; c < row_; ++c) m_.origin[c] = 0;
      for (int64_t r = 0; r < counted; ++r) {
        const A factor = A(1) / (m_.rows.sum[r] * static_cast<A>(counted));
        for (int64_t c = 0; c < row_; ++c) m_.origin[c] += m_.scores[r * row_ + c] * factor;
      }
    }
    for_groups(counted, [&](auto group, int64_t r) {
      ahead_.step(first_ + rows_);
      add_statistics<group.value>(m_.scores + r * row_, row_, panels_.vecs, m_.rows.sum + r, inv_,
                                  m_.live, m_.origin, m_.col, m_.col_square, m_.mean + r,
                                  m_.square + r);
    });
    for (int64_t r = 0; r < rows_; ++r) {
      A* s = stats_ + head_.at(token(r)) * 6;
      const A factor = A(1) / m_.rows.sum[r];
      if (r < counted) {
        s[1] = a_.class_token ? m_.scores[r * row_] * factor : A(0);
        s[2] = m_.mean[r];
        s[3] = head_.n > 1 ? m_.square[r] * inv_ : variance_of_one(m_.mean[r]);
        if (!a_.class_token) s[0] = 0;
        continue;
      }
      for (int i = 0; i < 6; ++i) s[i] = 0;
      if (a_.class_token && head_.position(first_ + r) == 0)
        for (int64_t c = a_.num_prefix; c < seen_; ++c)
          stats_[head_.at(head_.order[c]) * 6] = m_.scores[r * row_ + c] * factor;
    }
  }

  void results() {
    for (int64_t p = 0; p < channels_.count; ++p) {
      const int64_t c = channels_.start(p) * kL;
      multiply(m_.weights, row_ / Depth<E>::kPer, rows_, m_.values + c, padded_,
               Scratch::depth(seen_), channels_.width(p), m_.results + c, padded_);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t t = token(r);
      A* o = m_.results + r * padded_;
      if (r >= dropped_) {
        stage_row(v_.row(t), v_.dim, dim_, m_.value, padded_);
        for (int64_t d = 0; d < dim_; ++d) o[d] += m_.rows.own[r] * m_.value[d];
      }
      const A factor = A(1) / m_.rows.sum[r];
      for (int64_t d = 0; d < padded_; ++d) o[d] *= factor;
      store_row(o, dim_, out_ + head_.at(t) * dim_);
      static_cast<A*>(a_.lse)[head_.at(t)] =
          m_.rows.max[r] * (a_.bias ? A(1) : scale_) + natural_log(m_.rows.sum[r]);
    }
  }

  void columns(int64_t span) {
    const ColumnSums<A> sums = a_.num_spans > 1 ? column_sums<A>(a_, head_, span) : ColumnSums<A>{};
    const A share = a_.num_spans > 1 ? inverse<A>(sums.count) : inv_;
    for (int64_t c = a_.num_prefix; c < seen_; ++c) {
      const A shift = m_.col[c] * share;
      const A mean = m_.origin[c] + shift, square = m_.col_square[c] - m_.col[c] * shift;
      if (a_.num_spans == 1) {
        store_column(head_, c, mean, square, stats_);
      } else {
        sums.mean[c] = mean;
        sums.square[c] = square;
      }
    }
  }

  const AttentionArgs& a_;
  const Head& head_;
  Ahead<T> ahead_;
  const int64_t dim_, seen_, depth_, padded_;  // depth: of packed keys; padded: of rows of values
  const Panels panels_, channels_;
  const int64_t row_;  // of scores
  const Scratch m_;
  const Rows<T> q_, k_, v_;
  const A scale_, inv_;
  T* const out_;
  A* const stats_;
  int64_t first_ = 0, rows_ = 0;  // the block at hand, and where
  int64_t dropped_ = 0;           // its rows that see themselves besides begin
};

// Spans [begin, end) of all heads of all images, counted together.
template <typename T>
void attention_stats(const AttentionArgs& a, int64_t begin, int64_t end) {
  const auto head_at = [&a](int64_t head) {
    return Head(a, head / a.num_heads, head % a.num_heads);
  };
  for_heads(a, begin, end, [&](int64_t at, int64_t first, int64_t last) {
    const Head head = head_at(at), next = head_at((at + 1) * a.num_spans < end ? at + 1 : at);
    const auto run = [&](auto&& forward) {
      for (int64_t span = first; span < last; ++span) forward.run(span);
    };
    if (a.need_stats)
      run(Forward<T, true>(a, head, next));
    else
      run(Forward<T, false>(a, head, next));
  });
}

// Column statistics of heads [begin, end) from those of their spans (the pairwise update of Chan,
// Golub and LeVeque, spans in order).
template <typename T>
void attention_stats_columns(const AttentionArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t item = begin; item < end; ++item) {
    const Head head(a, item / a.num_heads, item % a.num_heads);
    for (int64_t c = a.num_prefix; c < head.seen; ++c) {
      A count = 0, mean = 0, square = 0;
      for (int64_t span = 0; span < a.num_spans; ++span) {
        const ColumnSums<A> part = column_sums<A>(a, head, span);
        if (part.count == 0) continue;
        const A more = static_cast<A>(part.count), both = count + more;
        const A step = part.mean[c] - mean;
        mean += step * (more / both);
        square += part.square[c] + step * step * (count * more / both);
        count = both;
      }
      store_column(head, c, mean, square, static_cast<A*>(a.stats));
    }
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
