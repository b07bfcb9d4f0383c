// What the forward and the backward pass of sparse attention have in common: the keys that a block
// of rows names, dot products with them and sums of them. Torch-free; one copy per ISA.
//
// Keys and values lie packed, a padded row of numbers each. All rows of a block take their first
// group of keys, then all the second, and so on: lists ascend, so the rows that a group touches
// stay in first-level cache, whatever each query names. A pair of query and key costs a load and a
// multiply-accumulate per vector for the dot product, and again for the sum.
#pragma once

#include "attention_rows.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kListRows = 64;          // rows of a block
constexpr int64_t kListEntries = 1 << 14;  // entries of a block, unless a single row has more

inline int64_t list_rows(int64_t row) {
  const int64_t fit = kListEntries / (row > 0 ? row : 1);
  return fit < 1 ? 1 : fit < kListRows ? fit : kListRows;
}

// ---- lists -------------------------------------------------------------------------------------

// The keys of a block of rows: first those that a row sees, then those that are hidden from it.
struct Lists {
  int64_t row = 0;  // entries from one row to the next, whole vectors
  int32_t* keys;
  int32_t *seen, *all;  // per row, how many
  // Room for blocks of rows with `most` or with `more` entries.
  Lists(Pieces& memory, int64_t most, int64_t more, int64_t lanes)
      : keys(memory.take<int32_t>(entries(most, more, lanes))),
        seen(memory.take<int32_t>(kListRows)),
        all(memory.take<int32_t>(kListRows)) {}
  static int64_t entries(int64_t most, int64_t more, int64_t lanes) {
    const int64_t a = round_up(most, lanes), b = round_up(more, lanes);
    const int64_t x = list_rows(a) * a, y = list_rows(b) * b;
    return x > y ? x : y;
  }
};

// Entries in front of the trailing -1; false when one is out of range or repeated. `marks` has N
// bytes, all zero, and is left so.
inline bool check_list(const int32_t* index, int64_t named, int64_t num_tokens, uint8_t* marks,
                       int64_t& count) {
  count = named;
  while (count > 0 && index[count - 1] == -1) --count;
  if (count == 0) return true;
  int32_t falls = 0;
  for (int64_t t = 1; t < count; ++t) falls |= index[t] <= index[t - 1];
  // Ascending: then the ends tell that all are in range.
  if (!falls) return index[0] >= 0 && index[count - 1] < num_tokens;
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

// ---- products with named rows ------------------------------------------------------------------

// Lanes l of `a` and l of `b` alternate in runs of kStep: a's where the bit is 0.
template <int kStep, typename V, std::size_t... I>
inline V add_alternating(V a, V b, std::index_sequence<I...>) {
  constexpr int kN = sizeof...(I);
  const V own = __builtin_shufflevector(
      a, b, (static_cast<int>(I) & kStep ? kN + static_cast<int>(I) : static_cast<int>(I))...);
  const V other =
      __builtin_shufflevector(a, b,
                              (static_cast<int>(I) & kStep ? kN + static_cast<int>(I ^ kStep)
                                                           : static_cast<int>(I ^ kStep))...);
  return own + other;
}

// Lane l of the result is the sum of the lanes of x[l]; the tree is fixed.
template <typename A, int kStep = kLanes<A> / 2>
inline Vec<A> sum_each(Vec<A>* x) {
  if constexpr (kStep == 0) {
    return x[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
      x[i] = add_alternating<kStep>(x[i], x[i + kStep], std::make_index_sequence<kLanes<A>>{});
    return sum_each<A, kStep / 2>(x);
  }
}

// Rows [0, rows): out[r, t] (+)= x[r] . table[keys[r, t]] over kVecs vectors. Entries behind
// `all`, up to a whole vector, are dot products with some row.
template <int kVecs, bool kAdd, typename A>
SPOT_NOINLINE void dot_named_vecs(const A* x, const A* table, int64_t width, const Lists& lists,
                                  int64_t rows, A* out) {
  constexpr int kL = kLanes<A>;
  for (int64_t g = 0; g < lists.row; g += kL)
    for (int64_t r = 0; r < rows; ++r) {
      if (g >= lists.all[r]) continue;
      const int32_t* keys = lists.keys + r * lists.row + g;
      Vec<A> own[kVecs], sum[kL];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) own[j] = vec_load(x + r * width + j * kL);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) {
        const A* key = table + keys[l] * width;
        sum[l] = own[0] * vec_load(key);
#pragma GCC unroll 8
        for (int j = 1; j < kVecs; ++j) sum[l] += own[j] * vec_load(key + j * kL);
      }
      A* to = out + r * lists.row + g;
      const Vec<A> dots = sum_each<A>(sum);
      vec_store(to, kAdd ? vec_load(to) + dots : dots);
    }
}

constexpr int kMostVecs = 8;  // of a row at once

template <typename A>
inline void dot_named(const A* x, const A* table, int64_t width, const Lists& lists, int64_t rows,
                      A* out) {
  int64_t left = width / kLanes<A>, at = 0;
  for (; left > 0; left -= kMostVecs, at += kMostVecs * kLanes<A>)
    with_count<kMostVecs>(static_cast<int>(left < kMostVecs ? left : kMostVecs), [&](auto n) {
      if (at == 0)
        dot_named_vecs<n.value, false>(x, table, width, lists, rows, out);
      else
        dot_named_vecs<n.value, true>(x + at, table + at, width, lists, rows, out);
    });
}

// Rows [0, rows): out[r] += sum over the keys that r sees of weights[r, t] table[keys[r, t]].
template <int kVecs, typename A>
SPOT_NOINLINE void add_named_vecs(const A* weights, const A* table, int64_t width,
                                  const Lists& lists, int64_t rows, A* out) {
  constexpr int kL = kLanes<A>;
  for (int64_t g = 0; g < lists.row; g += kL)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t left = lists.seen[r] - g;
      if (left <= 0) continue;
      const int32_t* keys = lists.keys + r * lists.row + g;
      const A* weight = weights + r * lists.row + g;
      Vec<A> sum[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[j] = vec_load(out + r * width + j * kL);
      const auto add = [&](int64_t l) {
        const A* row = table + keys[l] * width;
        const Vec<A> w = splat(weight[l]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[j] += w * vec_load(row + j * kL);
      };
      if (left >= kL)
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l) add(l);
      else
        for (int64_t l = 0; l < left; ++l) add(l);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) vec_store(out + r * width + j * kL, sum[j]);
    }
}

template <typename A>
inline void add_named(const A* weights, const A* table, int64_t width, const Lists& lists,
                      int64_t rows, A* out) {
  int64_t left = width / kLanes<A>, at = 0;
  for (; left > 0; left -= kMostVecs, at += kMostVecs * kLanes<A>)
    with_count<kMostVecs>(static_cast<int>(left < kMostVecs ? left : kMostVecs), [&](auto n) {
      add_named_vecs<n.value>(weights, table + at, width, lists, rows, out + at);
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

  // Lists the keys of the rows from token `first` on, `end` excluded; how many rows, or -1 when the
  // index is bad.
  int64_t fill(int64_t first, int64_t end) {
    const bool dense = first < prefix_;
    const int64_t most = dense ? tokens_ : a_.num_named,
                  stop = dense && end > prefix_ ? prefix_ : end;
    lists_.row = round_up(most, kLanes<A>);
    const int64_t fit = list_rows(lists_.row), rows = stop - first < fit ? stop - first : fit;
    for (int64_t r = 0; r < rows; ++r) {
      int32_t* keys = lists_.keys + r * lists_.row;
      if (dense)
        list_all(r, keys);
      else if (!list_named(r, first + r, keys))
        return -1;
      for (int64_t t = lists_.all[r]; t < round_up(lists_.all[r], kLanes<A>); ++t) keys[t] = 0;
    }
    return rows;
  }
  const Lists& lists() const { return lists_; }

 private:
  void list_all(int64_t r, int32_t* keys) {
    const int64_t count = hidden_too_ ? tokens_ : head_.seen;
    for (int64_t c = 0; c < count; ++c) keys[c] = head_.order[c];
    lists_.seen[r] = static_cast<int32_t>(head_.seen);
    lists_.all[r] = static_cast<int32_t>(count);
  }

  bool list_named(int64_t r, int64_t token, int32_t* keys) {
    const int64_t patches = tokens_ - prefix_;
    const int64_t at = (head_.b * a_.attention.num_heads + head_.h) * patches + token - prefix_;
    const int32_t* index = a_.index + at * a_.num_named;
    int64_t count, seen = 0;
    if (!check_list(index, a_.num_named, tokens_, marks_, count)) return false;
    if (head_.seen == tokens_) {
      std::memcpy(keys, index, static_cast<std::size_t>(count) * sizeof(int32_t));
      seen = count;
    } else {
      for (int64_t t = 0; t < count; ++t) {
        keys[seen] = index[t];
        seen += !dropped_[index[t]] || index[t] == token;
      }
      int64_t all = seen;
      if (hidden_too_)
        for (int64_t t = 0; t < count; ++t)
          if (dropped_[index[t]] && index[t] != token) keys[all++] = index[t];
      count = all;
    }
    lists_.seen[r] = static_cast<int32_t>(seen);
    lists_.all[r] = static_cast<int32_t>(count);
    return true;
  }

  const SparseArgs& a_;
  const Head& head_;
  Lists lists_;
  uint8_t *const dropped_, *const marks_;
  const bool hidden_too_;
  const int64_t tokens_, prefix_;
};

// Scores x of the keys that a row sees become exponentials, zero from there up to a whole vector;
// lse is that of the scores times scale (>= 0). Returns their sum, 0 where the row sees nothing.
template <typename A>
inline A softmax_row(A* x, int64_t seen, A scale, A& lse) {
  constexpr int kL = kLanes<A>;
  const A none = -static_cast<A>(__builtin_inff());
  const int64_t whole = round_up(seen, kL);
  lse = none;
  if (seen == 0) return 0;
  const A unit = scale == 0 ? A(1) : kExpUnit<A> * scale;
  if (scale == 0)  // all scores are 0 (or NaN), and -inf of the padding must not meet it
    for (int64_t c = 0; c < seen; ++c) x[c] *= A(0);
  for (int64_t c = seen; c < whole; ++c) x[c] = none;
  Vec<A> top = splat(none), sum = {};
  for (int64_t c = 0; c < whole; c += kL) top = vec_max<A>(top, vec_load(x + c));
  const A max = reduce_max<A>(top);
  for (int64_t c = 0; c < whole; c += kL) {
    const Vec<A> e = vec_exp(vec_load(x + c) - max, unit);
    vec_store(x + c, e);
    sum += e;
  }
  const A total = reduce_add<A>(sum);
  lse = max * scale + natural_log(total);
  return total;
}

// Rows of all tokens as padded rows of numbers.
template <typename T>
inline void pack_rows(const Rows<T>& from, int64_t tokens, int64_t dim, int64_t width,
                      Acc<T>* out) {
  for (int64_t t = 0; t < tokens; ++t)
    stage_row(from.row(t), from.dim, dim, out + t * width, width);
}

}  // namespace SPOT_ISA
}  // namespace spot
