// What the forward and the backward pass of sparse attention have in common: the keys that a block
// of rows names, dot products with them and sums of them. Torch-free; one copy per ISA.
//
// Keys and values lie packed, a padded row of numbers each. All rows of a block take their first
// few keys, then all the next, and so on: lists ascend, so what these touch stays in first-level
// cache, whatever each query names. A pair of query and key costs a load and a multiply-accumulate
// per vector for the dot product, and again for the sum.
#pragma once

#include "attention_rows.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kListRows = 128;         // rows of a block
constexpr int64_t kListEntries = 1 << 15;  // entries of a block, unless a single row has more
// Keys between loads of a query, and between loads and stores of a row's sum: the more the shorter
// vectors are, of which a row has more.
constexpr int kDotKeys = kVectorBytes == 64 ? 16 : 32, kSumKeys = 32;

inline int64_t list_rows(int64_t row) {
  const int64_t fit = kListEntries / (row > 0 ? row : 1);
  return fit < 1 ? 1 : fit < kListRows ? fit : kListRows;
}

// ---- lists -------------------------------------------------------------------------------------

// The keys of a block of rows: first those that a row sees, then those that are hidden from it.
struct Lists {
  int64_t row = 0;  // numbers from one row of weights to the next, whole vectors
  const int32_t** keys;
  int32_t *seen, *all;  // per row, how many
  bool* ascends;        // per row, whether its keys surely do
  int32_t* own;         // room for lists that are not those of the index
  // Room for blocks of rows with `most` or with `more` entries.
  Lists(Pieces& memory, int64_t most, int64_t more, int64_t lanes)
      : keys(memory.take<const int32_t*>(kListRows)),
        seen(memory.take<int32_t>(kListRows)),
        all(memory.take<int32_t>(kListRows)),
        ascends(memory.take<bool>(kListRows)),
        own(memory.take<int32_t>(entries(most, more, lanes))) {}
  static int64_t entries(int64_t most, int64_t more, int64_t lanes) {
    const int64_t a = round_up(most, lanes), b = round_up(more, lanes);
    const int64_t x = list_rows(a) * a, y = list_rows(b) * b;
    return x > y ? x : y;
  }
};

// Entries in front of the trailing -1, and whether they ascend; false when one is out of range or
// repeated. `marks` has N bytes, all zero, and is left so.
inline bool check_list(const int32_t* index, int64_t named, int64_t num_tokens, uint8_t* marks,
                       int64_t& count, bool& ascends) {
  count = named;
  ascends = true;
  while (count > 0 && index[count - 1] == -1) --count;
  if (count == 0) return true;
  int32_t falls = 0;
  for (int64_t t = 1; t < count; ++t) falls |= index[t] <= index[t - 1];
  // Ascending: then the ends tell that all are in range.
  if (!falls) return index[0] >= 0 && index[count - 1] < num_tokens;
  ascends = false;
  bool fine = true;
  int64_t marked = 0;
  for (; fine && marked < count; ++marked) {
    const int32_t at = index[marked];
    fine = at >= 0 && at < num_tokens && !marks[at];
    if (!fine) break;
    marks[at] = 1;
  }
  for (int64_t t = 0; t < marked; ++t) marks[index[t]] = 0;
  return fine;
}

// What is needed next, fetched between computations: index and queries of the next block, and where
// the results of this one go.
struct Fetch {
  static constexpr int64_t kRows = 16;  // that are computed between fetches
  Lines index{nullptr, 0, 0, 0}, queries{nullptr, 0, 0, 0}, out{nullptr, 0, 0, 0};
  template <typename F>
  void between(int64_t rows, F&& f) {
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int i = 0; i < kRows; ++i) {
        index.step();
        out.step();
        queries.step();
      }
      f(r, r + kRows < rows ? r + kRows : rows);
    }
  }
};

// ---- products with named rows ------------------------------------------------------------------

// Neighbouring runs of kStep lanes are added: those of `a`, then those of `b`. Runs shorter than 16
// bytes stay within 16 bytes, which processors move lanes in at least cost.
template <int kStep, int kWithin>
constexpr int run_lane(int lane, int odd, int lanes) {
  constexpr bool kInside = kStep < kWithin;
  const int block = kInside ? kWithin : lanes, at = lane % block, half = block / 2;
  const int from = at % half / kStep * 2 * kStep + at % kStep + odd * kStep;
  return (at < half ? 0 : lanes) + lane - at + from;
}
template <typename A, int kStep, std::size_t... I>
inline Vec<A> add_runs(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  constexpr int kWithin = 16 / sizeof(A), kN = kLanes<A>;
  const Vec<A> even =
      __builtin_shufflevector(a, b, run_lane<kStep, kWithin>(static_cast<int>(I), 0, kN)...);
  const Vec<A> odd =
      __builtin_shufflevector(a, b, run_lane<kStep, kWithin>(static_cast<int>(I), 1, kN)...);
  return even + odd;
}

// Lane l of the result is the sum of the lanes of vector(l); the tree is fixed. Depth first, so
// that its shuffles go between the loads of the vectors.
template <typename A, int kStep = 1, typename F>
__attribute__((always_inline)) inline Vec<A> sum_each(F&& vector, int first = 0) {
  constexpr int kL = kLanes<A>, kWithin = 16 / sizeof(A);
  if constexpr (kStep == kL) {
    return vector(first);
  } else {
    constexpr int kNext = kStep < kWithin ? kWithin / (2 * kStep) : kL / (2 * kStep) * kWithin;
    const Vec<A> a = sum_each<A, 2 * kStep>(vector, first);
    const Vec<A> b = sum_each<A, 2 * kStep>(vector, first + kNext);
    return add_runs<A, kStep>(a, b, std::make_index_sequence<kL>{});
  }
}

template <int kVecs, typename A>
struct Row {
  Vec<A> x[kVecs];
  explicit Row(const A* p) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) x[j] = vec_load(p + j * kLanes<A>);
  }
  Vec<A> multiply(const A* p) const {
    Vec<A> sum = x[0] * vec_load(p);
#pragma GCC unroll 8
    for (int j = 1; j < kVecs; ++j) sum += x[j] * vec_load(p + j * kLanes<A>);
    return sum;
  }
};

// Rows [r, end): out[r, t] (+)= x[r] . table[keys[r][t]] for whole vectors of t, of the kDotKeys
// from g on. A function of its own: with a call in its loop, registers are short and it is slower
// by a tenth.
template <int kVecs, bool kAdd, typename A>
SPOT_NOINLINE void dot_keys(const A* x, const A* table, int64_t width, const Lists& lists,
                            int64_t g, int64_t r, int64_t end, A* out) {
  constexpr int kL = kLanes<A>;
  for (; r < end; ++r) {
    int64_t left = lists.all[r] - g;
    if (left < kL) continue;
    const int32_t* keys = lists.keys[r] + g;
    A* to = out + r * lists.row + g;
    const Row<kVecs, A> own(x + r * width);
    for (int v = 0; v < kDotKeys / kL && left >= kL; ++v, left -= kL, keys += kL, to += kL) {
      const Vec<A> dots = sum_each<A>([&](int l) __attribute__((always_inline)) {
        return own.multiply(table + keys[l] * width);
      });
      vec_store(to, kAdd ? vec_load(to) + dots : dots);
    }
  }
}

// The same for what is left behind whole vectors.
template <int kVecs, bool kAdd, typename A>
SPOT_NOINLINE void dot_rest(const A* x, const A* table, int64_t width, const Lists& lists,
                            int64_t rows, A* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t all = lists.all[r];
    const Row<kVecs, A> own(x + r * width);
    for (int64_t t = all / kLanes<A> * kLanes<A>; t < all; ++t) {
      A* to = out + r * lists.row + t;
      const A dot = reduce_add<A>(own.multiply(table + lists.keys[r][t] * width));
      *to = kAdd ? *to + dot : dot;
    }
  }
}

// Rows [0, rows): out[r, t] (+)= x[r] . table[keys[r][t]] over kVecs vectors.
template <int kVecs, bool kAdd, typename A>
inline void dot_named_vecs(const A* x, const A* table, int64_t width, const Lists& lists,
                           int64_t rows, A* out, Fetch& fetch) {
  for (int64_t g = 0; g < lists.row; g += kDotKeys)
    fetch.between(rows, [&](int64_t r, int64_t end) {
      dot_keys<kVecs, kAdd>(x, table, width, lists, g, r, end, out);
    });
  dot_rest<kVecs, kAdd>(x, table, width, lists, rows, out);
}

constexpr int kMostVecs = 8;  // of a row at once

template <typename A>
inline void dot_named(const A* x, const A* table, int64_t width, const Lists& lists, int64_t rows,
                      A* out, Fetch& fetch) {
  int64_t left = width / kLanes<A>, at = 0;
  for (; left > 0; left -= kMostVecs, at += kMostVecs * kLanes<A>)
    with_count<kMostVecs>(static_cast<int>(left < kMostVecs ? left : kMostVecs), [&](auto n) {
      if (at == 0)
        dot_named_vecs<n.value, false>(x, table, width, lists, rows, out, fetch);
      else
        dot_named_vecs<n.value, true>(x + at, table + at, width, lists, rows, out, fetch);
    });
}

// Lane kLane of x in all lanes.
template <int kLane, typename V, std::size_t... I>
inline V splat_lane(V x, std::index_sequence<I...>) {
  // Through the quarter with that lane: both steps are one instruction that names the lane.
  static_assert(sizeof...(I) == 16, "four lanes a quarter");
  constexpr int kFirst = kLane / 4 * 4;
  const V quarter = __builtin_shufflevector(x, x, (kFirst + static_cast<int>(I) % 4)...);
  return __builtin_shufflevector(quarter, quarter, (static_cast<int>(I) / 4 * 4 + kLane % 4)...);
}

// f(l, weight l in all lanes) for the lanes l in order. Where loads are what is short, that is
// with vectors of 64 bytes, a broadcast comes from a register.
template <typename A, typename F, std::size_t... I>
__attribute__((always_inline)) inline void for_weights(const A* weights, F&& f,
                                                       std::index_sequence<I...> lanes) {
  if constexpr (sizeof...(I) == 16) {
    const Vec<A> x = vec_load(weights);
    (f(I, splat_lane<I>(x, lanes)), ...);
  } else {
    (f(I, splat(weights[I])), ...);
  }
}

// Rows [r, end): out[r] = sum of weights[r, t] table[keys[r][t]] over the kSumKeys from g on that r
// sees; added to what is there, but for the first.
template <int kVecs, typename A>
SPOT_NOINLINE void sum_keys(const A* weights, const A* table, int64_t width, const Lists& lists,
                            int64_t g, int64_t r, int64_t end, A* out) {
  constexpr int kL = kLanes<A>;
  for (; r < end; ++r) {
    int64_t left = lists.seen[r] - g;
    if (left < kSumKeys && g > 0) continue;
    if (left >= 2 * kSumKeys) left = kSumKeys;  // less goes with the last
    const int32_t* keys = lists.keys[r] + g;
    const A* weight = weights + r * lists.row + g;
    A* to = out + r * width;
    Vec<A> sum[kVecs] = {};
    if (g > 0)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[j] = vec_load(to + j * kL);
    const auto add = [&](int64_t l, Vec<A> w) __attribute__((always_inline)) {
      const A* row = table + keys[l] * width;
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[j] += w * vec_load(row + j * kL);
    };
    for (; left >= kL; left -= kL, keys += kL, weight += kL)
      for_weights(weight, add, std::make_index_sequence<kL>{});
    for (int64_t l = 0; l < left; ++l) add(l, splat(weight[l]));
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) vec_store(to + j * kL, sum[j]);
  }
}

// Rows [0, rows): out[r] = sum over the keys that r sees of weights[r, t] table[keys[r][t]].
template <int kVecs, typename A>
inline void sum_named_vecs(const A* weights, const A* table, int64_t width, const Lists& lists,
                           int64_t rows, A* out, Fetch& fetch) {
  for (int64_t g = 0; g == 0 || g < lists.row; g += kSumKeys)
    fetch.between(rows, [&](int64_t r, int64_t end) {
      sum_keys<kVecs>(weights, table, width, lists, g, r, end, out);
    });
}

template <typename A>
inline void sum_named(const A* weights, const A* table, int64_t width, const Lists& lists,
                      int64_t rows, A* out, Fetch& fetch) {
  int64_t left = width / kLanes<A>, at = 0;
  for (; left > 0; left -= kMostVecs, at += kMostVecs * kLanes<A>)
    with_count<kMostVecs>(static_cast<int>(left < kMostVecs ? left : kMostVecs), [&](auto n) {
      sum_named_vecs<n.value>(weights, table + at, width, lists, rows, out + at, fetch);
    });
}

// ---- one head of one image ---------------------------------------------------------------------

// Keys of the rows of a head, block by block. Prefix rows see all that are not dropped.
template <typename A>
class HeadLists {
 public:
  // `hidden_too`: whether keys that a row names but does not see are listed behind the others.
  HeadLists(const SparseArgs& args, const Head& head, const Lists& lists, uint8_t* dropped,
            uint8_t* marks, bool hidden_too)
      : a_(args),
        head_(head),
        lists_(lists),
        dropped_(dropped),
        marks_(marks),
        hidden_too_(hidden_too),
        tokens_(args.attention.num_tokens),
        prefix_(args.attention.num_prefix) {
    for (int64_t t = 0; t < tokens_; ++t) dropped_[t] = marks_[t] = 0;
    for (int64_t c = head.seen; c < tokens_; ++c) dropped_[head.order[c]] = 1;
  }

  bool dropped(int64_t token) const { return dropped_[token]; }

  // Lines of the index behind that of the rows before `token`, of as many rows.
  Lines index_lines(int64_t token, int64_t rows) const {
    const int64_t patches = a_.attention.batch * a_.attention.num_heads * (tokens_ - prefix_);
    const int64_t first = row_of(token < prefix_ ? prefix_ : token);
    const int64_t left = patches - first < rows ? patches - first : rows;
    return {a_.index + first * a_.num_named, 1, 0, left * a_.num_named * 4};
  }

  // Lists the keys of the rows from token `first` on, `end` excluded; how many rows, or -1 when the
  // index is bad.
  int64_t fill(int64_t first, int64_t end) {
    const bool dense = first < prefix_;
    const int64_t most = dense ? tokens_ : a_.num_named,
                  stop = dense && end > prefix_ ? prefix_ : end;
    lists_.row = round_up(most, kLanes<A>);
    const int64_t fit = list_rows(lists_.row), rows = stop - first < fit ? stop - first : fit;
    for (int64_t r = 0; r < rows; ++r)
      if (dense)
        list_all(r);
      else if (!list_named(r, first + r))
        return -1;
    return rows;
  }
  const Lists& lists() const { return lists_; }

 private:
  // Which row of the index belongs to a token.
  int64_t row_of(int64_t token) const {
    const int64_t head = head_.b * a_.attention.num_heads + head_.h;
    return head * (tokens_ - prefix_) + token - prefix_;
  }

  void list_all(int64_t r) {
    lists_.ascends[r] = false;
    lists_.keys[r] = head_.order;
    lists_.seen[r] = static_cast<int32_t>(head_.seen);
    lists_.all[r] = static_cast<int32_t>(hidden_too_ ? tokens_ : head_.seen);
  }

  bool list_named(int64_t r, int64_t token) {
    const int32_t* index = a_.index + row_of(token) * a_.num_named;
    int64_t count;
    if (!check_list(index, a_.num_named, tokens_, marks_, count, lists_.ascends[r])) return false;
    lists_.keys[r] = index;
    lists_.seen[r] = lists_.all[r] = static_cast<int32_t>(count);
    if (head_.seen < tokens_) filter(r, token, count);
    return true;
  }

  // Takes out the keys that the row does not see, or moves them behind the others.
  void filter(int64_t r, int64_t token, int64_t count) {
    const int32_t* index = lists_.keys[r];
    int32_t* keys = lists_.own + r * lists_.row;
    const auto hidden = [&](int32_t key) { return dropped_[key] && key != token; };
    int64_t seen = 0;
    for (int64_t t = 0; t < count; ++t)
      if (!hidden(index[t])) keys[seen++] = index[t];
    int64_t all = seen;
    for (int64_t t = 0; hidden_too_ && t < count; ++t)
      if (hidden(index[t])) keys[all++] = index[t];
    lists_.keys[r] = keys;
    lists_.seen[r] = static_cast<int32_t>(seen);
    lists_.all[r] = static_cast<int32_t>(all);
  }

  const SparseArgs& a_;
  const Head& head_;
  Lists lists_;
  uint8_t *const dropped_, *const marks_;
  const bool hidden_too_;
  const int64_t tokens_, prefix_;
};

// Scores of the keys that each row sees become exponentials, zero behind them; maximum and sum of
// row r are in `state`, the sum 0 where it sees nothing. scale >= 0.
template <typename A>
inline void softmax_rows(A* x, const Lists& lists, int64_t rows, A scale, RowState<A> state) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = x + r * lists.row;
    if (scale == 0)  // all scores are 0 (or NaN), and -inf of the padding must not meet it
      for (int64_t t = 0; t < lists.seen[r]; ++t) row[t] *= A(0);
    for (int64_t t = lists.seen[r]; t < lists.row; ++t) row[t] = -static_cast<A>(__builtin_inff());
  }
  const A unit = scale == 0 ? A(1) : kExpUnit<A> * scale;
  for_groups(rows, [&](auto group, int64_t r) {
    exponentials<group.value>(x + r * lists.row, lists.row, lists.row / kLanes<A>, lists.row, rows,
                              unit, state, r, x);
  });
  for (int64_t r = 0; r < rows; ++r)
    if (lists.seen[r] == 0) {
      state.max[r] = -static_cast<A>(__builtin_inff());
      state.sum[r] = 0;
    }
}

// Rows of all tokens as padded rows of numbers.
template <typename T>
inline void pack_rows(const Rows<T>& from, int64_t tokens, int64_t dim, int64_t width,
                      Acc<T>* out) {
  constexpr int64_t kAhead = 16;  // rows lie apart: the processor's own prefetching stops at pages
  for (int64_t t = 0; t < tokens; ++t) {
    Lines ahead = from.lines(t + kAhead, t + kAhead < tokens ? 1 : 0, dim);
    while (ahead.rows > 0) ahead.step();
    stage_row(from.row(t), from.dim, dim, out + t * width, width);
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
