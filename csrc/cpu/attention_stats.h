// Attention with SPOT's statistics, forward and backward. Torch-free; one copy per ISA.
//
// A work item is one head of one image. Keys are packed into panels (tiles.h); a block of queries
// gets its complete rows of scores, which stay in cache for softmax, statistics and the product
// with the values. Dropped columns are not packed, so they cost nothing; the row of a dropped token
// sees itself besides (the self-loop), which is added by hand.
//
// Cost per head, with S columns seen by N rows: forward 2 N S D multiply-accumulates, N S
// exponentials and 4 N S for the statistics; backward 5 N S D. Scratch per thread: forward
// 2 S D + R S numbers, backward 3 S D + 2 R S (2 S D more unless the gradients of k and v can be
// summed in place), R = kBlockRows. Sums run in float32 (float64 for float64).
#pragma once

#include "isa.h"
#include "scratch.h"
#include "tiles.h"

namespace spot {
namespace SPOT_ISA {

constexpr int kBlockRows = 24;  // queries whose rows of scores are in cache together
constexpr int kGroup = 4;       // rows that share a pass over the columns

// ---- memory ------------------------------------------------------------------------------------

// Cuts pieces off a buffer, aligned to cache lines; with null it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : base_(static_cast<char*>(memory)) {}
  template <typename X>
  X* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(piece);
  }
  std::size_t used() const { return static_cast<std::size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Lays out a struct of pieces in this thread's scratch memory.
template <typename Layout, typename... Sizes>
inline Layout in_scratch(const Sizes&... sizes) {
  Pieces counted(nullptr);
  Layout(counted, sizes...);
  Pieces pieces(thread_scratch(counted.used()));
  return Layout(pieces, sizes...);
}

// ---- one head of one image ---------------------------------------------------------------------

template <typename T>
struct Rows {
  const T* data;
  int64_t token, dim;
  Rows(const HeadRows& x, int64_t b, int64_t h)
      : data(static_cast<const T*>(x.data) + b * x.batch + h * x.head), token(x.token), dim(x.dim) {}
  const T* row(int64_t t) const { return data + t * token; }
};

// Positions [0, seen) of `order` are the columns that all rows see: prefix, then kept patches.
// Rows are taken in another order: kept patches (those with statistics) first.
struct Head {
  int64_t b, h, n, seen;  // n kept patches
  const int32_t* order;
  const AttentionArgs& a;
  Head(const AttentionArgs& args, int64_t image, int64_t head) : b(image), h(head), a(args) {
    const int64_t list = args.one_order ? 0 : image;
    order = args.order + list * args.num_tokens;
    n = args.kept[list];
    seen = args.num_prefix + n;
  }
  // Position in `order` of the r-th row.
  int64_t position(int64_t r) const {
    return r < n ? a.num_prefix + r : r < seen ? r - n : r;
  }
  int64_t at(int64_t token) const { return (b * a.num_tokens + token) * a.num_heads + h; }
};

// Fetches what this thread will need next into cache, a few lines at a time between
// computations: the processor's own prefetching does not cross the pages that neighbouring tokens
// lie in, and more lines at once would wait for each other.
template <typename T>
class Ahead {
 public:
  Ahead(const AttentionArgs& a, int64_t b, int64_t h)
      : rows_{{a.q, b, h}, {a.k, b, h}, {a.v, b, h}},
        dim_(a.q.dim == 1 ? a.head_dim : 0) {}
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

// 1 / n; without patches it is not used.
template <typename A>
inline A inverse(int64_t n) {
  return n > 0 ? A(1) / static_cast<A>(n) : A(0);
}

template <typename A>
inline void add_bias(const AttentionArgs& a, const Head& head, int64_t token, int64_t first,
                     int64_t count, A scale, A* x) {
  const auto add = [&](auto* data) {
    const auto* row = data + head.b * a.bias_strides[0] + head.h * a.bias_strides[1] +
                      token * a.bias_strides[2];
    for (int64_t c = 0; c < count; ++c)
      x[c] = x[c] * scale + static_cast<A>(load(row[head.order[first + c] * a.bias_strides[3]]));
  };
  switch (a.bias_dtype) {
    case 0: return add(static_cast<const float*>(a.bias));
    case 1: return add(static_cast<const double*>(a.bias));
    case 2: return add(static_cast<const Half*>(a.bias));
    default: return add(static_cast<const BFloat16*>(a.bias));
  }
}

template <typename A, typename T>
inline A dot_rows(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t n) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += static_cast<A>(load(x[i * x_stride])) * static_cast<A>(load(y[i * y_stride]));
  return sum;
}

// ---- softmax of complete rows ------------------------------------------------------------------

// State of a block of rows: s holds scores, then exponentials; p = s / sum.
template <typename A>
struct RowState {
  A *max, *sum, *own;  // `own`: a dropped row's score with itself, then its exponential
  RowState(Pieces& memory)
      : max(memory.take<A>(kBlockRows)),
        sum(memory.take<A>(kBlockRows)),
        own(memory.take<A>(kBlockRows)) {}
};

// Rows [0, kRows) of s [.., vecs]: maximum, exponentials, sum. Columns from `seen` on become 0.
// Rows from `dropped` on have an entry of their own. `after(r, j, e)` sees every vector.
template <int kRows, typename A, typename After>
inline void exponentials(A* s, int64_t row, int64_t vecs, int64_t seen, int64_t dropped,
                         A unit, RowState<A> state, int64_t at, After&& after) {
  constexpr int kL = kLanes<A>;
  for (int r = 0; r < kRows; ++r)
    for (int64_t c = seen; c < vecs * kL; ++c) s[r * row + c] = -static_cast<A>(INFINITY);
  Vec<A> top[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) top[r] = splat(-static_cast<A>(INFINITY));
  for (int64_t j = 0; j < vecs; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) top[r] = vec_max<A>(top[r], vec_load(s + r * row + j * kL));
  A max[kRows];
  Vec<A> sum[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    max[r] = reduce_max<A>(top[r]);
    const bool alone = at + r >= dropped;
    if (alone && !(state.own[at + r] <= max[r])) max[r] = state.own[at + r];
  }
  for (int64_t j = 0; j < vecs; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      A* x = s + r * row + j * kL;
      const Vec<A> e = vec_exp(vec_load(x) - max[r], unit);
      vec_store(x, e);
      sum[r] += e;
      after(r, j, e);
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    state.max[at + r] = max[r];
    state.sum[at + r] = reduce_add<A>(sum[r]);
    if (at + r >= dropped) {
      state.own[at + r] = vec_exp(splat(state.own[at + r] - max[r]), unit)[0];
      state.sum[at + r] += state.own[at + r];
    }
  }
}

// Calls f(Int<rows>, first row) for groups of kGroup rows, then for the rest one by one.
template <typename F>
inline void for_groups(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + kGroup <= rows; r += kGroup) f(Int<kGroup>{}, r);
  for (; r < rows; ++r) f(Int<1>{}, r);
}

// Bits of the columns that count in the statistics: patches that all rows see.
template <typename A>
inline void mark_patches(const Head& head, int64_t vecs, A* live) {
  using Int = typename VectorOf<A>::Int;
  for (int64_t c = 0; c < vecs * kLanes<A>; ++c)
    live[c] = bit_cast<A>(c >= head.a.num_prefix && c < head.seen ? Int{-1} : Int{0});
}

// ---- forward -----------------------------------------------------------------------------------

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

template <typename T, typename E, typename A>
inline void pack_keys(const Head& head, const Rows<T>& keys, int64_t first, int64_t count,
                      const Panels& panels, int64_t depth, E* out, E* staged) {
  const int64_t dim = head.a.head_dim, padded = round_up(depth, kLanes<A>);
  pack_columns(panels, count, depth, out, staged, [&](int64_t c, E* to) {
    stage_row(keys.row(head.order[first + c]), keys.dim, dim, to, padded);
  });
}

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

template <typename E>
inline void negate(E* x, int64_t n) {
  if constexpr (std::is_same_v<E, Pair>)
    for (int64_t i = 0; i < n; ++i) x[i].bits ^= 0x80008000u;
  else
    for (int64_t i = 0; i < n; ++i) x[i] = -x[i];
}

// Means and summed squares of rows, and column sums, over kRows rows of exponentials. Entries are
// taken relative to something near them, so that small variances keep their digits whatever share
// the prefix takes: rows to their own mean, columns to `origin`, their entry in the first row.
template <int kRows, typename A>
inline void add_statistics(const A* s, int64_t row, int64_t vecs, const A* sum, A inv,
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

template <typename T>
inline void store_row(const Acc<T>* from, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = store<T>(from[i]);
}

// `next` is the head that this thread does after this one.
template <typename T, bool kStats>
void forward_head(const AttentionArgs& a, const Head& head, const Head& next) {
  using A = Acc<T>;
  using E = Element<T>;
  constexpr int kL = kLanes<A>;
  const int64_t dim = a.head_dim, seen = head.seen, num_prefix = a.num_prefix;
  const int64_t depth = ForwardScratch<T>::depth(dim), padded = round_up(dim, kL);
  const Panels panels((seen + kL - 1) / kL), channels(padded / kL);
  const int64_t row = panels.vecs * kL;
  const auto m = in_scratch<ForwardScratch<T>>(seen, dim);
  const Rows<T> q(a.q, head.b, head.h), k(a.k, head.b, head.h), v(a.v, head.b, head.h);
  Ahead<T> ahead(a, next.b, next.h);
  const A scale = static_cast<A>(a.scale < 0 ? -a.scale : a.scale), inv = inverse<A>(head.n);
  const A unit = kExpUnit<A> * (a.bias ? A(1) : scale);  // of the exponential
  T* out = static_cast<T*>(a.out);
  A* stats = kStats ? static_cast<A*>(a.stats) : nullptr;

  pack_keys<T, E, A>(head, k, 0, seen, panels, depth, m.keys, m.staged);
  pack_values<T, E>(head, v, m.values);
  if constexpr (kStats) {
    mark_patches(head, panels.vecs, m.live);
    for (int64_t c = 0; c < row; ++c) m.col[c] = m.col_square[c] = 0;
  }

  for (int64_t first = 0; first < a.num_tokens; first += kBlockRows) {
    const int64_t rows = a.num_tokens - first < kBlockRows ? a.num_tokens - first : kBlockRows;
    const auto token = [&](int64_t r) -> int64_t { return head.order[head.position(first + r)]; };
    for (int64_t r = 0; r < rows; ++r)
      stage_row(q.row(token(r)), q.dim, dim, m.queries + r * depth, depth);
    if (a.scale < 0) negate(m.queries, rows * depth);
    for (int64_t p = 0; p < panels.count; ++p) {
      multiply(m.queries, depth, rows, m.keys + panels.start(p) * kL * depth,
               panels.width(p) * kL, depth, panels.width(p), m.scores + panels.start(p) * kL, row);
      ahead.step(first + rows);
    }

    const int64_t dropped = seen - first;  // rows from here on see themselves besides
    for (int64_t r = dropped < 0 ? 0 : dropped; r < rows; ++r) {
      const int64_t t = token(r);
      m.rows.own[r] = dot_rows<A>(q.row(t), q.dim, k.row(t), k.dim, dim);
      if (a.scale < 0) m.rows.own[r] = -m.rows.own[r];
      if (a.bias) add_bias(a, head, t, head.position(first + r), 1, scale, m.rows.own + r);
    }
    if (a.bias)
      for (int64_t r = 0; r < rows; ++r)
        add_bias(a, head, token(r), 0, seen, scale, m.scores + r * row);
    for_groups(rows, [&](auto group, int64_t r) {
      ahead.step(first + rows);
      for (int i = 0; i < group.value; ++i) Ahead<T>::to_write(out + head.at(token(r + i)) * dim, dim);
      exponentials<group.value>(m.scores + r * row, row, panels.vecs, seen, dropped, unit, m.rows,
                                r, [&](int i, int64_t j, Vec<A> e) {
#ifdef __AVX512BF16__
                                  if constexpr (!std::is_same_v<E, A>) {
                                    const auto two = _mm512_cvtneps_pbh((__m512)e);
                                    std::memcpy(m.weights + ((r + i) * panels.vecs + j) * (kL / 2),
                                                &two, sizeof(two));
                                  }
#else
                                  (void)i, (void)j, (void)e;
#endif
                                });
    });

    if constexpr (kStats) {
      int64_t counted = head.n - first;  // rows of kept patches
      counted = counted < 0 ? 0 : counted < rows ? counted : rows;
      if (first == 0)
        for (int64_t c = 0; c < row; ++c) m.origin[c] = m.scores[c] / m.rows.sum[0];
      for_groups(counted, [&](auto group, int64_t r) {
        ahead.step(first + rows);
        add_statistics<group.value>(m.scores + r * row, row, panels.vecs, m.rows.sum + r, inv,
                                    m.live, m.origin, m.col, m.col_square, m.mean + r,
                                    m.square + r);
      });
      for (int64_t r = 0; r < rows; ++r) {
        A* s = stats + head.at(token(r)) * 6;
        const A factor = A(1) / m.rows.sum[r];
        if (r < counted) {
          s[1] = a.class_token ? m.scores[r * row] * factor : A(0);
          s[2] = m.mean[r];
          s[3] = head.n > 1 ? m.square[r] * inv : A(0);
          if (!a.class_token) s[0] = 0;
          continue;
        }
        for (int i = 0; i < 6; ++i) s[i] = 0;
        if (a.class_token && head.position(first + r) == 0)
          for (int64_t c = num_prefix; c < seen; ++c)
            stats[head.at(head.order[c]) * 6] = m.scores[r * row + c] * factor;
      }
    }

    for (int64_t p = 0; p < channels.count; ++p) {
      const int64_t c = channels.start(p) * kL;
      multiply(m.weights, row / Depth<E>::kPer, rows, m.values + c, padded,
               ForwardScratch<T>::depth(seen), channels.width(p), m.results + c, padded);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = token(r);
      A* o = m.results + r * padded;
      if (r >= dropped) {
        stage_row(v.row(t), v.dim, dim, m.value, padded);
        for (int64_t d = 0; d < dim; ++d) o[d] += m.rows.own[r] * m.value[d];
      }
      const A factor = A(1) / m.rows.sum[r];
      for (int64_t d = 0; d < padded; ++d) o[d] *= factor;
      store_row(o, dim, out + head.at(t) * dim);
      static_cast<A*>(a.lse)[head.at(t)] =
          m.rows.max[r] * (a.bias ? A(1) : scale) + std::log(m.rows.sum[r]);
    }
  }
  if constexpr (kStats)
    for (int64_t c = num_prefix; c < seen; ++c) {
      A* s = stats + head.at(head.order[c]) * 6;
      const A shift = m.col[c] * inv, mean = m.origin[c] + shift;
      const A variance = m.col_square[c] * inv - shift * shift;
      s[4] = mean < 0 ? A(0) : mean;
      s[5] = variance < 0 || head.n == 1 ? A(0) : variance;
    }
}

// Heads [begin, end) of all images, counted together.
template <typename T>
void attention_stats(const AttentionArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t after = item + 1 < end ? item + 1 : item;
    const Head head(a, item / a.num_heads, item % a.num_heads);
    const Head next(a, after / a.num_heads, after % a.num_heads);
    if (a.need_stats)
      forward_head<T, true>(a, head, next);
    else
      forward_head<T, false>(a, head, next);
  }
}

// ---- backward ----------------------------------------------------------------------------------
//
// With p the map and g = grad_out . v, the gradient of p is, between kept patches i and j,
//   g_ij + grad row_mean_i / n + 2/n grad row_var_i (p_ij - row_mean_i)
//        + grad col_mean_j / n + 2/n grad col_var_j (p_ij - col_mean_j),
// elsewhere g_ij; plus grad
// cls_out_j in the class token's row and grad cls_in_i in its column. That of the scores
// is p (that - the mean of that under p).

// A term f + slope (p - mean) of a row or of a column, as above.
template <typename A>
struct Terms {
  A *f, *slope, *mean;
  Terms(Pieces& memory, int64_t count)
      : f(memory.take<A>(count)), slope(memory.take<A>(count)), mean(memory.take<A>(count)) {}
};

template <typename T>
struct BackwardScratch {
  using A = Acc<T>;
  A *keys, *values, *key_rows, *key_grads, *value_grads;
  A *queries, *grads, *results, *staged, *row, *other_row;
  A *scores, *slopes, *live, *cls, *keep, *raw_mean;
  Terms<A> across, down;
  RowState<A> rows;
  // `packed` columns at most are in panels at once; `sums` rows of gradients are summed here.
  BackwardScratch(Pieces& memory, const Head& head, int64_t packed, int64_t sums)
      : keys(memory.take<A>(whole(packed) * head.a.head_dim)),
        values(memory.take<A>(whole(packed) * head.a.head_dim)),
        key_rows(memory.take<A>(head.seen * whole(head.a.head_dim))),
        key_grads(memory.take<A>(sums * whole(head.a.head_dim))),
        value_grads(memory.take<A>(sums * whole(head.a.head_dim))),
        queries(memory.take<A>(kBlockRows * whole(head.a.head_dim))),
        grads(memory.take<A>(kBlockRows * whole(head.a.head_dim))),
        results(memory.take<A>(kBlockRows * whole(head.a.head_dim))),
        staged(memory.take<A>(kLanes<A> * whole(head.a.head_dim))),
        row(memory.take<A>(whole(head.a.head_dim))),
        other_row(memory.take<A>(whole(head.a.head_dim))),
        scores(memory.take<A>(kBlockRows * whole(packed))),
        slopes(memory.take<A>(kBlockRows * whole(packed))),
        live(memory.take<A>(whole(packed))),
        cls(memory.take<A>(whole(packed))),
        keep(memory.take<A>(whole(packed))),
        raw_mean(memory.take<A>(head.a.num_tokens)),
        across(memory, kBlockRows),
        down(memory, whole(packed)),
        rows(memory) {}
  static int64_t whole(int64_t n) { return round_up(n, kLanes<A>); }
};

template <typename A>
struct StatsGrad {
  const A *grad, *stats;  // [B, N, H, 6]
  const Head& head;
  A inv;

  void columns(int64_t vecs, const Terms<A>& to, A* cls) const {
    for (int64_t j = 0; j < vecs * kLanes<A>; ++j) {
      const bool patch = j >= head.a.num_prefix && j < head.seen;
      const int64_t at = patch ? head.at(head.order[j]) * 6 : 0;
      to.f[j] = patch ? inv * grad[at + 4] : A(0);
      to.slope[j] = patch ? 2 * inv * grad[at + 5] : A(0);
      to.mean[j] = patch ? stats[at + 4] : A(0);
      cls[j] = patch && head.a.class_token ? grad[at] : A(0);
    }
  }
  void row(int64_t token, const Terms<A>& to, int64_t r) const {
    const int64_t at = head.at(token) * 6;
    to.f[r] = inv * grad[at + 2];
    to.slope[r] = 2 * inv * grad[at + 3];
    to.mean[r] = stats[at + 2];
  }
};

// s: exponentials -> p. g: gradient of p from `out` -> the whole of it. Returns its means under p.
template <int kRows, bool kStats, typename A>
inline void whole_slopes(A* s, A* g, int64_t row, int64_t vecs, const A* sum,
                         const Terms<A>& across, int64_t at, const Terms<A>& down, const A* live,
                         A* mean) {
  constexpr int kL = kLanes<A>;
  Vec<A> total[kRows] = {};
  A factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = A(1) / sum[r];
  for (int64_t j = 0; j < vecs * kL; j += kL) {
    Bits<A> mask = {};
    Vec<A> down_f = {}, down_slope = {}, down_mean = {};
    if constexpr (kStats) {
      mask = bit_cast<Bits<A>>(vec_load(live + j));
      down_f = vec_load(down.f + j);
      down_slope = vec_load(down.slope + j);
      down_mean = vec_load(down.mean + j);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> e = vec_load(s + r * row + j), p = e * factor[r];
      Vec<A> slope = vec_load(g + r * row + j);
      if constexpr (kStats) {
        const Vec<A> terms = down_f + across.f[at + r] +
                             (e * factor[r] - across.mean[at + r]) * across.slope[at + r] +
                             (e * factor[r] - down_mean) * down_slope;
        slope += vec_and<A>(terms, mask);
        vec_store(g + r * row + j, slope);
      }
      vec_store(s + r * row + j, p);
      total[r] += p * slope;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) mean[r] = reduce_add<A>(total[r]);
}

// g: gradient of p -> gradient of the scores.
template <typename A>
inline void score_slopes(const A* p, A* g, int64_t count, A mean) {
  for (int64_t j = 0; j < count; j += kLanes<A>)
    vec_store(g + j, vec_load(p + j) * (vec_load(g + j) - mean));
}

// keep += w (g - mean) over a row.
template <typename A>
inline void add_keep_row(const A* w, const A* g, int64_t count, A mean, A* keep) {
  for (int64_t j = 0; j < count; j += kLanes<A>)
    vec_store(keep + j, vec_load(keep + j) + vec_load(w + j) * (vec_load(g + j) - mean));
}

template <typename A>
inline Vec<A> vec_sigmoid(Vec<A> x) {
  const Vec<A> e = vec_exp(x > 0 ? -x : x, kExpUnit<A>);
  return (x >= 0 ? splat(A(1)) : e) / (e + A(1));
}

// The keep gradient of dropped columns, which the rest of the backward pass does not look at.
template <typename T>
void dropped_keep_gradient(const AttentionGradArgs& g, const Head& head,
                           const BackwardScratch<T>& m) {
  using A = Acc<T>;
  constexpr int kL = kLanes<A>;
  const AttentionArgs& a = g.forward;
  const int64_t dim = a.head_dim, padded = round_up(dim, kL), count = a.num_tokens - head.seen;
  const Panels panels((count + kL - 1) / kL);
  const int64_t row = panels.vecs * kL;
  const Rows<T> q(a.q, head.b, head.h), k(a.k, head.b, head.h), v(a.v, head.b, head.h),
      grad(g.grad_out, head.b, head.h);
  const A scale = static_cast<A>(a.scale), *lse = static_cast<const A*>(a.lse);
  pack_keys<T, A, A>(head, k, head.seen, count, panels, dim, m.keys, m.staged);
  pack_keys<T, A, A>(head, v, head.seen, count, panels, dim, m.values, m.staged);
  for (int64_t j = 0; j < row; ++j) m.keep[j] = 0;
  for (int64_t first = 0; first < a.num_tokens; first += kBlockRows) {
    const int64_t rows = a.num_tokens - first < kBlockRows ? a.num_tokens - first : kBlockRows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = head.order[head.position(first + r)];
      stage_row(q.row(t), q.dim, dim, m.queries + r * padded, padded);
      stage_row(grad.row(t), grad.dim, dim, m.grads + r * padded, padded);
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t c = panels.start(p) * kL;
      const int width = panels.width(p);
      multiply(m.queries, padded, rows, m.keys + c * dim, width * kL, dim, width, m.scores + c,
               row);
      multiply(m.grads, padded, rows, m.values + c * dim, width * kL, dim, width, m.slopes + c,
               row);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = head.order[head.position(first + r)];
      A* s = m.scores + r * row;
      if (a.bias)
        add_bias(a, head, t, head.seen, count, scale, s);
      else
        for (int64_t j = 0; j < row; ++j) s[j] *= scale;
      for (int64_t j = 0; j < row; j += kL)
        vec_store(s + j, vec_sigmoid<A>(vec_load(s + j) - lse[head.at(t)]));
      if (first + r >= head.seen) s[first + r - head.seen] = 0;  // not its own column
      add_keep_row(s, m.slopes + r * row, row, m.raw_mean[first + r], m.keep);
    }
  }
  A* keep = static_cast<A*>(g.keep) + (head.b * a.num_heads + head.h) * (a.num_tokens - a.num_prefix);
  for (int64_t j = 0; j < count; ++j)
    keep[head.order[head.seen + j] - a.num_prefix] = m.keep[j];
}

template <typename T, bool kStats>
void backward_head(const AttentionGradArgs& g, const Head& head) {
  using A = Acc<T>;
  constexpr int kL = kLanes<A>;
  const AttentionArgs& a = g.forward;
  const int64_t dim = a.head_dim, seen = head.seen, padded = round_up(dim, kL);
  const int64_t num_dropped = a.num_tokens - seen;
  const Panels panels((seen + kL - 1) / kL), channels(padded / kL);
  const int64_t row = panels.vecs * kL;
  const bool in_place = std::is_same_v<T, A> && padded == dim;
  const auto m = in_scratch<BackwardScratch<T>>(
      head, g.keep && num_dropped > seen ? num_dropped : seen, in_place ? 0 : seen);
  const Rows<T> q(a.q, head.b, head.h), k(a.k, head.b, head.h), v(a.v, head.b, head.h),
      grad(g.grad_out, head.b, head.h);
  const A scale = static_cast<A>(a.scale < 0 ? -a.scale : a.scale);
  const A unit = kExpUnit<A> * (a.bias ? A(1) : scale);
  T *q_grad = static_cast<T*>(g.q), *k_grad = static_cast<T*>(g.k), *v_grad = static_cast<T*>(g.v);
  const StatsGrad<A> terms{static_cast<const A*>(g.grad_stats), static_cast<const A*>(a.stats),
                           head, inverse<A>(head.n)};
  A* bias_grad = nullptr;
  if (g.bias)
    bias_grad = static_cast<A*>(g.bias) + ((g.one_bias ? 0 : head.b) * a.num_heads + head.h) *
                                              a.num_tokens * a.num_tokens;

  // Sums of the gradients of keys and values, a row per position.
  const auto sums = [&](A* scratch, T* out) {
    return [&head, scratch, out, in_place, padded, dim](int64_t c) -> A* {
      if constexpr (std::is_same_v<T, A>)
        if (in_place) return out + head.at(head.order[c]) * dim;
      return scratch + c * padded;
    };
  };
  const auto key_sums = sums(m.key_grads, k_grad), value_sums = sums(m.value_grads, v_grad);
  for (int64_t c = 0; c < seen; ++c)
    for (int64_t d = 0; d < padded; ++d) key_sums(c)[d] = value_sums(c)[d] = 0;

  pack_keys<T, A, A>(head, k, 0, seen, panels, dim, m.keys, m.staged);
  pack_keys<T, A, A>(head, v, 0, seen, panels, dim, m.values, m.staged);
  for (int64_t c = 0; c < seen; ++c)
    stage_row(k.row(head.order[c]), k.dim, dim, m.key_rows + c * padded, padded);
  if constexpr (kStats) {
    mark_patches(head, panels.vecs, m.live);
    terms.columns(panels.vecs, m.down, m.cls);
  }
  if (g.keep)
    for (int64_t c = 0; c < row; ++c) m.keep[c] = 0;

  for (int64_t first = 0; first < a.num_tokens; first += kBlockRows) {
    const int64_t rows = a.num_tokens - first < kBlockRows ? a.num_tokens - first : kBlockRows;
    const int64_t dropped = seen - first < 0 ? 0 : seen - first;  // rows that see themselves besides
    const auto token = [&](int64_t r) -> int64_t { return head.order[head.position(first + r)]; };
    for (int64_t r = 0; r < rows; ++r) {
      stage_row(q.row(token(r)), q.dim, dim, m.queries + r * padded, padded);
      stage_row(grad.row(token(r)), grad.dim, dim, m.grads + r * padded, padded);
    }
    if (a.scale < 0) negate(m.queries, rows * padded);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t c = panels.start(p) * kL;
      const int width = panels.width(p);
      multiply(m.queries, padded, rows, m.keys + c * dim, width * kL, dim, width, m.scores + c,
               row);
      multiply(m.grads, padded, rows, m.values + c * dim, width * kL, dim, width, m.slopes + c,
               row);
    }
    A own_slope[kBlockRows];
    for (int64_t r = dropped; r < rows; ++r) {
      const int64_t t = token(r);
      stage_row(k.row(t), k.dim, dim, m.row, padded);
      m.rows.own[r] = dot_rows<A>(m.queries + r * padded, 1, m.row, 1, dim);
      if (a.bias) add_bias(a, head, t, head.position(first + r), 1, scale, m.rows.own + r);
      stage_row(v.row(t), v.dim, dim, m.row, padded);
      own_slope[r] = dot_rows<A>(m.grads + r * padded, 1, m.row, 1, dim);
    }
    if (a.bias)
      for (int64_t r = 0; r < rows; ++r)
        add_bias(a, head, token(r), 0, seen, scale, m.scores + r * row);
    for_groups(rows, [&](auto group, int64_t r) {
      exponentials<group.value>(m.scores + r * row, row, panels.vecs, seen, dropped, unit, m.rows,
                                r, [](int, int64_t, Vec<A>) {});
    });

    A mean[kBlockRows];
    int64_t counted = kStats ? head.n - first : 0;  // rows with statistics
    counted = counted < 0 ? 0 : counted < rows ? counted : rows;
    if (g.keep) {
      for (int64_t r = 0; r < rows; ++r) {
        A *s = m.scores + r * row, *slope = m.slopes + r * row;
        const A factor = A(1) / m.rows.sum[r];
        Vec<A> total = {};
        for (int64_t j = 0; j < row; j += kL) total += vec_load(s + j) * factor * vec_load(slope + j);
        A raw = reduce_add<A>(total);
        if (r >= dropped) raw += m.rows.own[r] * factor * own_slope[r];
        m.raw_mean[first + r] = raw;
        const int64_t own = first + r < head.n ? a.num_prefix + first + r : -1;
        const A e = own >= 0 ? s[own] : A(0);
        if (own >= 0) s[own] = 0;  // a token's own row does not depend on its mask
        for (int64_t j = 0; j < row; j += kL)
          vec_store(m.keep + j, vec_load(m.keep + j) + vec_load(s + j) * factor *
                                                           (vec_load(slope + j) - raw));
        if (own >= 0) s[own] = e;
      }
    }
    if constexpr (kStats) {
      for (int64_t r = 0; r < counted; ++r) {
        terms.row(token(r), m.across, r);
        if (a.class_token) m.slopes[r * row] += terms.grad[head.at(token(r)) * 6 + 1];
      }
      for (int64_t r = counted; r < rows; ++r)
        if (a.class_token && head.position(first + r) == 0)
          for (int64_t c = 0; c < row; ++c) m.slopes[r * row + c] += m.cls[c];
      for_groups(counted, [&](auto group, int64_t r) {
        whole_slopes<group.value, true>(m.scores + r * row, m.slopes + r * row, row, panels.vecs,
                                        m.rows.sum + r, m.across, r, m.down, m.live, mean + r);
      });
    }
    for_groups(rows - counted, [&](auto group, int64_t r) {
      r += counted;
      whole_slopes<group.value, false>(m.scores + r * row, m.slopes + r * row, row, panels.vecs,
                                       m.rows.sum + r, m.across, r, m.down, m.live, mean + r);
    });
    for (int64_t r = dropped; r < rows; ++r) {
      m.rows.own[r] /= m.rows.sum[r];
      mean[r] += m.rows.own[r] * own_slope[r];
    }
    for (int64_t r = 0; r < rows; ++r) {
      score_slopes(m.scores + r * row, m.slopes + r * row, row, mean[r]);
      if (!bias_grad) continue;
      A* to = bias_grad + token(r) * a.num_tokens;
      for (int64_t c = 0; c < seen; ++c) to[head.order[c]] += m.slopes[r * row + c];
    }

    for (int64_t p = 0; p < channels.count; ++p) {
      const int64_t c = channels.start(p) * kL;
      const int width = channels.width(p);
      multiply(m.slopes, row, rows, m.key_rows + c, padded, seen, width, m.results + c, padded);
      add_transposed_product(m.slopes, row, seen, m.queries + c, padded, rows, width,
                             [&](int64_t at) { return key_sums(at) + c; });
      add_transposed_product(m.scores, row, seen, m.grads + c, padded, rows, width,
                             [&](int64_t at) { return value_sums(at) + c; });
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = token(r);
      A* x = m.results + r * padded;
      if (r >= dropped) {
        const A p = m.rows.own[r], slope = p * (own_slope[r] - mean[r]);
        if (bias_grad) bias_grad[t * (a.num_tokens + 1)] += slope;
        stage_row(k.row(t), k.dim, dim, m.row, padded);
        for (int64_t d = 0; d < dim; ++d) {
          x[d] += slope * m.row[d];
          m.row[d] = slope * m.queries[r * padded + d] * scale;
          m.other_row[d] = p * m.grads[r * padded + d];
        }
        store_row(m.row, dim, k_grad + head.at(t) * dim);
        store_row(m.other_row, dim, v_grad + head.at(t) * dim);
      }
      for (int64_t d = 0; d < dim; ++d) x[d] *= static_cast<A>(a.scale);
      store_row(x, dim, q_grad + head.at(t) * dim);
    }
  }

  for (int64_t c = 0; c < seen; ++c) {
    A *key = key_sums(c), *value = value_sums(c);
    for (int64_t d = 0; d < dim; ++d) key[d] *= scale;
    if (in_place) continue;
    store_row(key, dim, k_grad + head.at(head.order[c]) * dim);
    store_row(value, dim, v_grad + head.at(head.order[c]) * dim);
  }
  if (!g.keep) return;
  A* keep = static_cast<A*>(g.keep) + (head.b * a.num_heads + head.h) * (a.num_tokens - a.num_prefix);
  for (int64_t c = a.num_prefix; c < seen; ++c) keep[head.order[c] - a.num_prefix] = m.keep[c];
  if (num_dropped > 0) dropped_keep_gradient<T>(g, head, m);
}

// Heads [begin, end) of all images, counted together; with one_bias, heads of all images at once,
// so that each bias gradient is summed by one thread in order.
template <typename T>
void attention_stats_backward(const AttentionGradArgs& g, int64_t begin, int64_t end) {
  const AttentionArgs& a = g.forward;
  const int64_t slab = a.num_tokens * a.num_tokens;
  if (g.bias)
    std::memset(static_cast<Acc<T>*>(g.bias) + begin * slab, 0,
                static_cast<std::size_t>((end - begin) * slab) * sizeof(Acc<T>));
  const int64_t images = g.one_bias ? a.batch : 1;
  for (int64_t item = begin; item < end; ++item)
    for (int64_t i = 0; i < images; ++i) {
      const Head head(a, g.one_bias ? i : item / a.num_heads, item % a.num_heads);
      if (g.grad_stats)
        backward_head<T, true>(g, head);
      else
        backward_head<T, false>(g, head);
    }
}

}  // namespace SPOT_ISA
}  // namespace spot
