// What the forward and the backward pass of attention have in common: a head of an image as rows,
// its order of tokens, packing, and the softmax of complete rows. Torch-free; one copy per ISA.
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

// ---- memory ahead ------------------------------------------------------------------------------

// Cache lines of rows of memory, fetched one by one.
struct Lines {
  const char* base;
  int64_t rows, stride, bytes;  // strides and sizes in bytes
  int64_t at = 0;
  Lines(const void* data, int64_t num_rows, int64_t row_stride, int64_t row_bytes)
      : base(static_cast<const char*>(data)),
        rows(num_rows),
        stride(row_stride),
        bytes(row_bytes) {}
  void step() {
    if (rows <= 0) return;
    __builtin_prefetch(base + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    base += stride;
    --rows;
  }
};

// ---- one head of one image ---------------------------------------------------------------------

template <typename T>
struct Rows {
  const T* data;
  int64_t token, dim;
  Rows(const HeadRows& x, int64_t b, int64_t h)
      : data(static_cast<const T*>(x.data) + b * x.batch + h * x.head),
        token(x.token),
        dim(x.dim) {}
  const T* row(int64_t t) const { return data + t * token; }
  // Of `count` rows of n numbers from t on; none where their numbers do not lie together.
  Lines lines(int64_t t, int64_t count, int64_t n) const {
    constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));
    return {row(t), dim == 1 ? count : 0, token * kBytes, n * kBytes};
  }
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
  int64_t position(int64_t r) const { return r < n ? a.num_prefix + r : r < seen ? r - n : r; }
  int64_t at(int64_t token) const { return (b * a.num_tokens + token) * a.num_heads + h; }
};

// Spans [begin, end) of all heads of all images, counted together, by head: f(head, its first span,
// one behind its last).
template <typename F>
inline void for_heads(const AttentionArgs& a, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t head = begin / a.num_spans, first = head * a.num_spans;
    const int64_t stop = end < first + a.num_spans ? end : first + a.num_spans;
    f(head, begin - first, stop - first);
    begin = stop;
  }
}

// How many of the rows [begin, end) have statistics: kept patches come first.
inline int64_t counted_rows(const Head& head, int64_t begin, int64_t end) {
  return head.n < begin ? 0 : head.n < end ? head.n - begin : end - begin;
}

// 1 / n; without patches it is not used.
template <typename A>
inline A inverse(int64_t n) {
  return n > 0 ? A(1) / static_cast<A>(n) : A(0);
}

// Of a single entry: exactly zero, unless it is NaN.
template <typename A>
inline A variance_of_one(A entry) {
  return entry - entry;
}

// x = x scale + bias, over `count` columns from position `first` on, in the row of `token`.
template <typename A>
inline void add_bias(const AttentionArgs& a, const Head& head, int64_t token, int64_t first,
                     int64_t count, A scale, A* x) {
  const auto add = [&](auto* data) {
    const auto* row =
        data + head.b * a.bias_strides[0] + head.h * a.bias_strides[1] + token * a.bias_strides[2];
    if (a.one_order && a.bias_strides[3] == 1) {
      for (int64_t c = 0; c < count; ++c)
        x[c] = x[c] * scale + static_cast<A>(load(row[first + c]));
      return;
    }
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
  explicit RowState(Pieces& memory, int64_t rows = kBlockRows)
      : max(memory.take<A>(rows)), sum(memory.take<A>(rows)), own(memory.take<A>(rows)) {}
};

// Rows [0, kRows) of s [.., vecs]: maximum, exponentials, sum. Columns from `seen` on become 0.
// Rows from `dropped` on have an entry of their own. If E is Pair, exponentials go to `pairs` as
// well, rounded to bfloat16.
template <int kRows, typename E, typename A>
SPOT_NOINLINE void exponentials(A* s, int64_t row, int64_t vecs, int64_t seen, int64_t dropped,
                                A unit, RowState<A> state, int64_t at, [[maybe_unused]] E* pairs) {
  constexpr int kL = kLanes<A>;
  if (unit == 0) {  // scale 0: all scores are 0 (or NaN), and -inf of the padding must not meet it
    unit = 1;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < seen; ++c) s[r * row + c] *= A(0);
      if (at + r >= dropped) state.own[at + r] *= A(0);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int64_t c = seen; c < vecs * kL; ++c) s[r * row + c] = -static_cast<A>(__builtin_inff());
  Vec<A> top[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) top[r] = splat(-static_cast<A>(__builtin_inff()));
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
      if constexpr (!std::is_same_v<E, A>) store_pairs(pairs + (r * row + j * kL) / 2, e);
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

// ---- rows in and out ---------------------------------------------------------------------------

template <typename E>
inline void negate(E* x, int64_t n) {
  if constexpr (std::is_same_v<E, Pair>)
    for (int64_t i = 0; i < n; ++i) x[i].bits ^= 0x80008000u;
  else
    for (int64_t i = 0; i < n; ++i) x[i] = -x[i];
}

template <typename T, typename E, typename A>
inline void pack_keys(const Head& head, const Rows<T>& keys, int64_t first, int64_t count,
                      const Panels& panels, int64_t depth, E* out, E* staged) {
  const int64_t dim = head.a.head_dim, padded = round_up(depth, kLanes<A>);
  pack_columns(panels, count, depth, out, staged, [&](int64_t c, E* to) {
    stage_row(keys.row(head.order[first + c]), keys.dim, dim, to, padded);
  });
}

template <typename T>
inline void store_row(const Acc<T>* from, int64_t n, T* out) {
  using A = Acc<T>;
  for_vectors<A>(
      n, [&](int64_t i, auto count) { store_lanes(out + i, count, load_lanes(from + i, count)); });
}

template <typename T>
inline void store_scaled_row(const Acc<T>* from, int64_t n, Acc<T> scale, T* out) {
  for_vectors<Acc<T>>(
      n, [&](int64_t i, auto count) { store_lanes(out + i, count, vec_load(from + i) * scale); });
}

}  // namespace SPOT_ISA
}  // namespace spot
