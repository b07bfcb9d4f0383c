// Backward pass of attention with statistics. Torch-free; one copy per ISA.
//
// As the forward pass (attention_stats.h), with complete rows of scores and of slopes side by side;
// the scores are computed again. Per head, with S columns seen by N rows: 5 N S D
// multiply-accumulates and N S exponentials. Scratch per thread: 3 S D + 2 R S numbers,
// R = kBlockRows, and 2 S D more unless the gradients of k and v can be summed in place.
//
// With p the map and g = grad_out . v, the gradient of p is, between kept patches i and j,
//   g_ij + grad row_mean_i / n + 2/n grad row_var_i (p_ij - row_mean_i)
//        + grad col_mean_j / n + 2/n grad col_var_j (p_ij - col_mean_j),
// elsewhere g_ij; plus grad cls_out_j in the class token's row and grad cls_in_i in its column. The
// gradient of the scores is p times (that less its mean under p).
#pragma once

#include "attention_rows.h"

namespace spot {
namespace SPOT_ISA {

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
  A **key_sums, **value_sums;  // where the gradient of each position is summed
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
        key_sums(memory.take<A*>(head.seen)),
        value_sums(memory.take<A*>(head.seen)),
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
SPOT_NOINLINE void whole_slopes(A* s, A* g, int64_t row, int64_t vecs, const A* sum,
                                const Terms<A>& across, int64_t at, const Terms<A>& down,
                                const A* live, A* mean) {
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

// Rows first.. as queries and gradients, and their products with the packed keys and values: scores
// (of |scale|, whose sign goes to the queries) and slopes.
template <typename T>
inline void scores_and_slopes(const AttentionGradArgs& g, const Head& head, int64_t first,
                              int64_t rows, const Panels& panels, const BackwardScratch<T>& m) {
  const AttentionArgs& a = g.forward;
  const int64_t dim = a.head_dim, padded = BackwardScratch<T>::whole(dim);
  const int64_t lanes = kLanes<Acc<T>>, row = panels.vecs * lanes;
  const Rows<T> q(a.q, head.b, head.h), grad(g.grad_out, head.b, head.h);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = head.order[head.position(first + r)];
    stage_row(q.row(t), q.dim, dim, m.queries + r * padded, padded);
    stage_row(grad.row(t), grad.dim, dim, m.grads + r * padded, padded);
  }
  if (a.scale < 0) negate(m.queries, rows * padded);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t c = panels.start(p) * lanes;
    const int width = panels.width(p);
    multiply(m.queries, padded, rows, m.keys + c * dim, width * lanes, dim, width, m.scores + c,
             row);
    multiply(m.grads, padded, rows, m.values + c * dim, width * lanes, dim, width, m.slopes + c,
             row);
  }
}

// The keep gradient of dropped columns, which the rest of the backward pass does not look at.
template <typename T>
void dropped_keep_gradient(const AttentionGradArgs& g, const Head& head,
                           const BackwardScratch<T>& m) {
  using A = Acc<T>;
  constexpr int kL = kLanes<A>;
  const AttentionArgs& a = g.forward;
  const int64_t dim = a.head_dim, count = a.num_tokens - head.seen;
  const Panels panels((count + kL - 1) / kL);
  const int64_t row = panels.vecs * kL;
  const Rows<T> k(a.k, head.b, head.h), v(a.v, head.b, head.h);
  const A scale = static_cast<A>(a.scale < 0 ? -a.scale : a.scale);
  const A* lse = static_cast<const A*>(a.lse);
  pack_keys<T, A, A>(head, k, head.seen, count, panels, dim, m.keys, m.staged);
  pack_keys<T, A, A>(head, v, head.seen, count, panels, dim, m.values, m.staged);
  for (int64_t j = 0; j < row; ++j) m.keep[j] = 0;
  for (int64_t first = 0; first < a.num_tokens; first += kBlockRows) {
    const int64_t rows = a.num_tokens - first < kBlockRows ? a.num_tokens - first : kBlockRows;
    scores_and_slopes(g, head, first, rows, panels, m);
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
  A* keep =
      static_cast<A*>(g.keep) + (head.b * a.num_heads + head.h) * (a.num_tokens - a.num_prefix);
  for (int64_t j = 0; j < count; ++j) keep[head.order[head.seen + j] - a.num_prefix] = m.keep[j];
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
  const Rows<T> k(a.k, head.b, head.h), v(a.v, head.b, head.h);
  const A scale = static_cast<A>(a.scale < 0 ? -a.scale : a.scale);
  const A unit = kExpUnit<A> * (a.bias ? A(1) : scale);
  T *q_grad = static_cast<T*>(g.q), *k_grad = static_cast<T*>(g.k), *v_grad = static_cast<T*>(g.v);
  const StatsGrad<A> terms{static_cast<const A*>(g.grad_stats), static_cast<const A*>(a.stats),
                           head, inverse<A>(head.n)};
  A* bias_grad = nullptr;
  if (g.bias)
    bias_grad = static_cast<A*>(g.bias) +
                ((g.one_bias ? 0 : head.b) * a.num_heads + head.h) * a.num_tokens * a.num_tokens;

  for (int64_t c = 0; c < seen; ++c) {
    m.key_sums[c] = m.key_grads + c * padded;
    m.value_sums[c] = m.value_grads + c * padded;
    if constexpr (std::is_same_v<T, A>)
      if (in_place) {
        m.key_sums[c] = k_grad + head.at(head.order[c]) * dim;
        m.value_sums[c] = v_grad + head.at(head.order[c]) * dim;
      }
    for (int64_t d = 0; d < padded; ++d) m.key_sums[c][d] = m.value_sums[c][d] = 0;
  }

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
    const int64_t dropped =
        seen - first < 0 ? 0 : seen - first;  // rows that see themselves besides
    const auto token = [&](int64_t r) -> int64_t { return head.order[head.position(first + r)]; };
    scores_and_slopes(g, head, first, rows, panels, m);
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
                                r, m.scores);
    });

    A mean[kBlockRows];
    const int64_t counted = kStats ? counted_rows(head, first, first + rows) : 0;
    if (g.keep) {
      for (int64_t r = 0; r < rows; ++r) {
        A *s = m.scores + r * row, *slope = m.slopes + r * row;
        const A factor = A(1) / m.rows.sum[r];
        Vec<A> total = {};
        for (int64_t j = 0; j < row; j += kL)
          total += vec_load(s + j) * factor * vec_load(slope + j);
        A raw = reduce_add<A>(total);
        if (r >= dropped) raw += m.rows.own[r] * factor * own_slope[r];
        m.raw_mean[first + r] = raw;
        const int64_t own = first + r < head.n ? a.num_prefix + first + r : -1;
        const A e = own >= 0 ? s[own] : A(0);
        if (own >= 0) s[own] = 0;  // a token's own row does not depend on its mask
        for (int64_t j = 0; j < row; j += kL)
          vec_store(m.keep + j,
                    vec_load(m.keep + j) + vec_load(s + j) * factor * (vec_load(slope + j) - raw));
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
      add_transposed_product(m.slopes, row, seen, m.queries + c, padded, rows, width, m.key_sums,
                             c);
      add_transposed_product(m.scores, row, seen, m.grads + c, padded, rows, width, m.value_sums,
                             c);
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
    A *key = m.key_sums[c], *value = m.value_sums[c];
    for (int64_t d = 0; d < dim; ++d) key[d] *= scale;
    if (in_place) continue;
    store_row(key, dim, k_grad + head.at(head.order[c]) * dim);
    store_row(value, dim, v_grad + head.at(head.order[c]) * dim);
  }
  if (!g.keep) return;
  A* keep =
      static_cast<A*>(g.keep) + (head.b * a.num_heads + head.h) * (a.num_tokens - a.num_prefix);
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
