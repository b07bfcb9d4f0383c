// Backward pass of sparse attention. Torch-free; one copy per ISA.
//
// As the forward pass (sparse_attention.h), with scores and slopes side by side; scores are
// computed again. Gradients of keys and values go through transposed lists: for a block of rows,
// the entries of each key in the order of the rows, so that no sum depends on threads. Per head,
// with K keys named by each of N queries: 5 N K D multiply-accumulates and N K exponentials.
// Scratch per thread: 4 N D numbers and 5 of 2^15 entries (of N if that is more).
//
// The gradient of the map is that of attention_stats_backward.h at the entries that are seen.
#pragma once

#include "sparse_rows.h"

namespace spot {
namespace SPOT_ISA {

// An entry of a block: its row, and where its weights are.
struct Entry {
  int32_t row, at;
};

template <typename A>
struct SparseGradScratch {
  A *keys, *values, *key_sums, *value_sums, *queries, *grads, *results, *scores, *slopes;
  A *hidden, *keep;
  uint8_t *dropped, *marks;
  RowState<A> state;
  int32_t* ends;  // [N + 1], behind the entries of each key
  Entry* entries;
  Lists lists;
  SparseGradScratch(Pieces& memory, const AttentionArgs& a, int64_t named, int64_t width,
                    bool keep_grad)
      : keys(memory.take<A>(a.num_tokens * width)),
        values(memory.take<A>(a.num_tokens * width)),
        key_sums(memory.take<A>(a.num_tokens * width)),
        value_sums(memory.take<A>(a.num_tokens * width)),
        queries(memory.take<A>(kListRows * width)),
        grads(memory.take<A>(kListRows * width)),
        results(memory.take<A>(kListRows * width)),
        scores(memory.take<A>(count(a, named))),
        slopes(memory.take<A>(count(a, named))),
        hidden(memory.take<A>(keep_grad ? count(a, named) : 0)),
        keep(memory.take<A>(a.num_tokens)),
        dropped(memory.take<uint8_t>(a.num_tokens)),
        marks(memory.take<uint8_t>(a.num_tokens)),
        state(memory, kListRows),
        ends(memory.take<int32_t>(a.num_tokens + 1)),
        entries(memory.take<Entry>(count(a, named))),
        lists(memory, named, a.num_prefix > 0 ? a.num_tokens : 0, kLanes<A>) {}
  static int64_t count(const AttentionArgs& a, int64_t named) {
    return Lists::entries(named, a.num_prefix > 0 ? a.num_tokens : 0, kLanes<A>);
  }
};

template <typename A>
inline A dot_row(const A* x, const A* y, int64_t n) {
  Vec<A> sum = {};
  for_vectors<A>(n, [&](int64_t i, auto count) {
    sum += load_lanes(x + i, count) * load_lanes(y + i, count);
  });
  return reduce_add<A>(sum);
}

// Sums, for the keys [0, count), of their entries' rows: keys += slope query, values += p grad.
template <int kVecs, typename A>
SPOT_NOINLINE void add_entries_vecs(const int32_t* ends, const Entry* entries, int64_t count,
                                    const A* slopes, const A* queries, const A* scores,
                                    const A* grads, int64_t width, A* key_sums, A* value_sums) {
  constexpr int kL = kLanes<A>;
  int64_t e = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (e == ends[c]) continue;
    A *to_key = key_sums + c * width, *to_value = value_sums + c * width;
    Vec<A> key[kVecs], value[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      key[j] = vec_load(to_key + j * kL);
      value[j] = vec_load(to_value + j * kL);
    }
    for (; e < ends[c]; ++e) {
      const Entry entry = entries[e];
      const Vec<A> slope = splat(slopes[entry.at]), p = splat(scores[entry.at]);
      const A *query = queries + entry.row * width, *grad = grads + entry.row * width;
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        key[j] += slope * vec_load(query + j * kL);
        value[j] += p * vec_load(grad + j * kL);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      vec_store(to_key + j * kL, key[j]);
      vec_store(to_value + j * kL, value[j]);
    }
  }
}

template <typename T, bool kStats>
class SparseBackward {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;

 public:
  SparseBackward(const SparseGradArgs& args, const Head& head)
      : g_(args),
        a_(args.forward.attention),
        head_(head),
        dim_(a_.head_dim),
        width_(round_up(dim_, kL)),
        m_(in_scratch<SparseGradScratch<A>>(a_, args.forward.num_named, width_,
                                            args.keep != nullptr)),
        lists_(args.forward, head, m_.lists, m_.dropped, m_.marks, args.keep != nullptr),
        scale_(static_cast<A>(a_.scale < 0 ? -a_.scale : a_.scale)),
        inv_(inverse<A>(head.n)),
        grad_stats_(static_cast<const A*>(args.grad_stats)),
        stats_(static_cast<const A*>(a_.stats)),
        lse_(static_cast<const A*>(a_.lse)) {}

  // False when the index is bad.
  bool run() {
    const Rows<T> q(a_.q, head_.b, head_.h), grad(g_.grad_out, head_.b, head_.h);
    pack_rows(Rows<T>(a_.k, head_.b, head_.h), a_.num_tokens, dim_, width_, m_.keys);
    pack_rows(Rows<T>(a_.v, head_.b, head_.h), a_.num_tokens, dim_, width_, m_.values);
    for (int64_t i = 0; i < a_.num_tokens * width_; ++i) m_.key_sums[i] = m_.value_sums[i] = 0;
    for (int64_t t = 0; t < a_.num_tokens; ++t) m_.keep[t] = 0;
    const Lists& lists = lists_.lists();
    T* q_grad = static_cast<T*>(g_.q);
    for (int64_t first = 0; first < a_.num_tokens;) {
      const int64_t rows = lists_.fill(first, a_.num_tokens);
      if (rows < 0) return false;
      for (int64_t r = 0; r < rows; ++r) {
        stage_row(q.row(first + r), q.dim, dim_, m_.queries + r * width_, width_);
        stage_row(grad.row(first + r), grad.dim, dim_, m_.grads + r * width_, width_);
      }
      if (a_.scale < 0) negate(m_.queries, rows * width_);
      fetch_.index = lists_.index_lines(first + rows, rows);
      dot_named(m_.queries, m_.keys, width_, lists, rows, m_.scores, fetch_);
      dot_named(m_.grads, m_.values, width_, lists, rows, m_.slopes, fetch_);
      for (int64_t r = 0; r < rows; ++r) weigh_hidden(first + r, r);
      softmax_rows(m_.scores, lists, rows, scale_, m_.state);
      for (int64_t r = 0; r < rows; ++r) differentiate(first + r, r);
      sum_named(m_.slopes, m_.keys, width_, lists, rows, m_.results, fetch_);
      for (int64_t r = 0; r < rows; ++r) {
        store_scaled_row(m_.results + r * width_, dim_, static_cast<A>(a_.scale),
                         q_grad + head_.at(first + r) * dim_);
      }
      transpose_lists(rows);
      add_entries();
      first += rows;
    }
    T *k_grad = static_cast<T*>(g_.k), *v_grad = static_cast<T*>(g_.v);
    for (int64_t t = 0; t < a_.num_tokens; ++t) {
      store_scaled_row(m_.key_sums + t * width_, dim_, scale_, k_grad + head_.at(t) * dim_);
      store_row(m_.value_sums + t * width_, dim_, v_grad + head_.at(t) * dim_);
    }
    if (g_.keep)
      std::memcpy(static_cast<A*>(g_.keep) +
                      (head_.b * a_.num_heads + head_.h) * (a_.num_tokens - a_.num_prefix),
                  m_.keep + a_.num_prefix,
                  static_cast<std::size_t>(a_.num_tokens - a_.num_prefix) * sizeof(A));
    return true;
  }

 private:
  // The weights that keys hidden from row r have in the keep gradient.
  void weigh_hidden(int64_t token, int64_t r) {
    const Lists& lists = lists_.lists();
    for (int64_t t = lists.seen[r]; t < lists.all[r]; ++t) {
      const int64_t at = r * lists.row + t;
      m_.hidden[at] = vec_sigmoid<A>(splat(m_.scores[at] * scale_ - lse_[head_.at(token)]))[0];
    }
  }

  // Row r of the block: exponentials become the map, slopes (of the map) those of the scores.
  void differentiate(int64_t token, int64_t r) {
    const Lists& lists = lists_.lists();
    const int64_t seen = lists.seen[r];
    A *p = m_.scores + r * lists.row, *slope = m_.slopes + r * lists.row;
    const A factor = seen > 0 ? A(1) / m_.state.sum[r] : A(0);
    for (int64_t t = 0; t < seen; ++t) p[t] *= factor;
    if (g_.keep) keep_gradient(token, r);
    if constexpr (kStats) add_statistics(token, lists.keys[r], seen, p, slope);
    const A mean = dot_row(p, slope, seen);
    for (int64_t t = 0; t < seen; ++t) slope[t] = p[t] * (slope[t] - mean);
  }

  // A token's own row does not depend on its mask.
  void keep_gradient(int64_t token, int64_t r) {
    const Lists& lists = lists_.lists();
    const int32_t* keys = lists.keys[r];
    const int64_t seen = lists.seen[r], all = lists.all[r], at = r * lists.row;
    const A *p = m_.scores + at, *slope = m_.slopes + at, *hidden = m_.hidden + at;
    const A mean = dot_row(p, slope, seen);
    for (int64_t t = 0; t < seen; ++t)
      if (keys[t] != token) m_.keep[keys[t]] += p[t] * (slope[t] - mean);
    for (int64_t t = seen; t < all; ++t) m_.keep[keys[t]] += hidden[t] * (slope[t] - mean);
  }

  void add_statistics(int64_t token, const int32_t* keys, int64_t seen, const A* p, A* slope) {
    const int32_t prefix = static_cast<int32_t>(a_.num_prefix);
    if (token < prefix) {
      if (!a_.class_token || token > 0) return;
      for (int64_t t = 0; t < seen; ++t)
        if (keys[t] >= prefix) slope[t] += grad_stats_[head_.at(keys[t]) * 6];
      return;
    }
    if (lists_.dropped(token)) return;
    const A *own = grad_stats_ + head_.at(token) * 6, own_mean = stats_[head_.at(token) * 6 + 2];
    for (int64_t t = 0; t < seen; ++t) {
      if (keys[t] < prefix) {
        if (keys[t] == 0 && a_.class_token) slope[t] += own[1];
        continue;
      }
      const int64_t at = head_.at(keys[t]) * 6;
      slope[t] +=
          inv_ * (own[2] + grad_stats_[at + 4]) +
          2 * inv_ * (own[3] * (p[t] - own_mean) + grad_stats_[at + 5] * (p[t] - stats_[at + 4]));
    }
  }

  // Entries of the block by key, rows in order.
  void transpose_lists(int64_t rows) {
    const Lists& lists = lists_.lists();
    int32_t* ends = m_.ends + 1;
    for (int64_t t = 0; t <= a_.num_tokens; ++t) m_.ends[t] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < lists.seen[r]; ++t) ++ends[lists.keys[r][t]];
    for (int64_t t = 0; t < a_.num_tokens; ++t) ends[t] += ends[t - 1];
    // ends[t - 1], where the entries of t begin, moves on to their end.
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < lists.seen[r]; ++t) {
        const int64_t at = r * lists.row + t;
        m_.entries[m_.ends[lists.keys[r][t]]++] = {static_cast<int32_t>(r),
                                                   static_cast<int32_t>(at)};
      }
  }

  void add_entries() {
    constexpr int kMost = 4;  // vectors of a row at once, twice
    int64_t left = width_ / kL, at = 0;
    for (; left > 0; left -= kMost, at += kMost * kL)
      with_count<kMost>(static_cast<int>(left < kMost ? left : kMost), [&](auto n) {
        add_entries_vecs<n.value>(m_.ends, m_.entries, a_.num_tokens, m_.slopes, m_.queries + at,
                                  m_.scores, m_.grads + at, width_, m_.key_sums + at,
                                  m_.value_sums + at);
      });
  }

  const SparseGradArgs& g_;
  const AttentionArgs& a_;
  const Head& head_;
  Fetch fetch_;
  const int64_t dim_, width_;
  const SparseGradScratch<A> m_;
  HeadLists<A> lists_;
  const A scale_, inv_;
  const A *const grad_stats_, *const stats_, *const lse_;
};

// Heads [begin, end) of all images, counted together; false when the index is bad.
template <typename T>
bool sparse_attention_backward(const SparseGradArgs& g, int64_t begin, int64_t end) {
  const int64_t heads = g.forward.attention.num_heads;
  for (int64_t item = begin; item < end; ++item) {
    const Head head(g.forward.attention, item / heads, item % heads);
    if (!(g.grad_stats ? SparseBackward<T, true>(g, head).run()
                       : SparseBackward<T, false>(g, head).run()))
      return false;
  }
  return true;
}

}  // namespace SPOT_ISA
}  // namespace spot
