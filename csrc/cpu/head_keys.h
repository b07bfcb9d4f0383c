// The few keys of a head that queries meet in connectivity: its keys, added up with weights over
// the tokens. Torch-free; one copy per ISA.
//
// With W_k, W_q, b_k, b_q the projections, out[r] = scale * sum_j down[j, r] (W_k k[j] + b_k), for
// queries that are projected too; or, where that costs less (projects_first in
// connectivity.cpp), sums are projected instead, there and back, so that queries meet
// W_q^T out[r], and a last number b_q . out[r]. Without projections scale * sum_j down[j, r] k[j].
// Tokens are taken in blocks: their keys are copied next to each other, whatever the strides, and
// so are rows of `down`, unless all tokens are there and these can be read in place. Products stay
// in registers.
//
// Cost per head of N tokens, R sums, D channels of which c are left: N c (D + R), or N R D +
// 2 R D c multiply-accumulates, which bound it. Scratch per thread: R D numbers for the result,
// R c for its channels, 2 c D for the projections and kTokenBlock (R + D).
#pragma once

#include "attention_rows.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kTokenBlock = 64;

// Sizes of what is multiplied, in numbers.
template <typename A>
struct KeySizes {
  int64_t input;      // of a query or key: D, and a 1 that its bias is multiplied by
  int64_t input_row;  // in whole vectors, as below
  int64_t channels;   // c
  int64_t channel_row;
  int64_t summed;  // of what is added up: D, or c
  int64_t summed_row;
  int64_t depth;  // of what queries meet: c, or D and the bias
  int64_t depth_row;
  int64_t rank_row;  // R
  explicit KeySizes(const ConnectivityArgs& a)
      : input(a.head_dim + (a.projected ? 1 : 0)),
        input_row(round_up(input, kLanes<A>)),
        channels(a.channels),
        channel_row(round_up(channels, kLanes<A>)),
        summed(a.projects_first ? channels : a.head_dim),
        summed_row(round_up(summed, kLanes<A>)),
        depth(a.projects_first ? channels : input),
        depth_row(round_up(depth, kLanes<A>)),
        rank_row(round_up(a.rank, kLanes<A>)) {}
};

template <typename A>
struct KeyScratch {
  A* keys;           // [R, depth_row]: the result
  A** rows;          // [R], where those begin
  A *down, *tokens;  // [kTokenBlock, rank_row] and [kTokenBlock, input_row]
  A* channels;       // [kTokenBlock or R, channel_row]
  A* query_weight;   // [c, input_row]: W_q and b_q
  A* key_weight;     // [input, c] in panels: W_k and b_k, transposed
  A* mass;           // [rank_row], sums of `down`
  A* staged;         // kLanes rows of input_row
  KeyScratch(Pieces& memory, const ConnectivityArgs& a, const KeySizes<A>& s)
      : keys(memory.take<A>(a.rank * s.depth_row)),
        rows(memory.take<A*>(a.rank)),
        down(memory.take<A>(kTokenBlock * s.rank_row)),
        tokens(memory.take<A>(kTokenBlock * s.input_row)),
        channels(memory.take<A>((a.rank > kTokenBlock ? a.rank : kTokenBlock) * s.channel_row)),
        query_weight(memory.take<A>(s.channels * s.input_row)),
        key_weight(memory.take<A>(s.input * s.channel_row)),
        mass(memory.take<A>(s.rank_row)),
        staged(memory.take<A>(kLanes<A> * s.input_row)) {}
};

template <typename T>
class HeadKeys {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;

 public:
  HeadKeys(const ConnectivityArgs& args, const KeyScratch<A>& scratch)
      : a_(args), s_(args), m_(scratch) {
    if (a_.coefficients) return;
    for (int64_t r = 0; r < a_.rank; ++r) m_.rows[r] = m_.keys + r * s_.depth_row;
    if (!a_.projected) return;
    for (int64_t c = 0; c < s_.channels; ++c)
      stage_weights(a_.query_weight, a_.query_bias, c, m_.query_weight + c * s_.input_row);
    pack_columns(channel_panels(), s_.channels, s_.input, m_.key_weight, m_.staged,
                 [&](int64_t c, A* to) { stage_weights(a_.key_weight, a_.key_bias, c, to); });
  }

  const KeySizes<A>& sizes() const { return s_; }
  // [c, input_row].
  const A* query_weight() const { return m_.query_weight; }
  // Of head h of image b: [R, depth_row].
  const A* run(int64_t b, int64_t h) {
    add_up(b, h);
    if (a_.projected && !a_.projects_first) project_sums();
    const A scale = static_cast<A>(a_.scale);
    for (int64_t i = 0; i < a_.rank * s_.depth_row; i += kL)
      vec_store(m_.keys + i, vec_load(m_.keys + i) * splat(scale));
    return m_.keys;
  }

 private:
  Panels channel_panels() const { return Panels(s_.channel_row / kL); }

  // Row c of a projection, and its bias.
  void stage_weights(const void* weight, const void* bias, int64_t c, A* to) const {
    stage_row(static_cast<const T*>(weight) + c * a_.head_dim, 1, a_.head_dim, to, s_.input_row);
    to[a_.head_dim] = static_cast<A>(load(static_cast<const T*>(bias)[c]));
  }

  void add_up(int64_t b, int64_t h) {
    std::memset(static_cast<void*>(m_.keys), 0,
                static_cast<std::size_t>(a_.rank * s_.depth_row) * sizeof(A));
    for (int64_t i = 0; i < s_.rank_row; ++i) m_.mass[i] = 0;
    const Rows<T> keys(a_.k, b, h);
    if constexpr (std::is_same_v<T, A>) {
      if (a_.down_rank == 1 && !a_.columns && !a_.keep) return add_in_place(keys);
    }
    add_copies(keys, b);
  }

  // All tokens; rows of `down` are read where they are.
  void add_in_place(const Rows<T>& keys) {
    for (int64_t first = 0; first < a_.num_columns; first += kTokenBlock) {
      const int64_t left = a_.num_columns - first, count = left < kTokenBlock ? left : kTokenBlock;
      for (int64_t t = 0; t < count; ++t) copy_token(keys, first + t, t);
      add_block(static_cast<const A*>(a_.down) + first * a_.down_row, a_.down_row, count);
    }
  }

  // Those tokens of image b that are of the grid and not dropped.
  void add_copies(const Rows<T>& keys, int64_t b) {
    const int64_t prefix = a_.num_columns - a_.num_queries;
    int64_t count = 0;
    for (int64_t t = 0; t < a_.num_columns; ++t) {
      if (a_.keep && t >= prefix && !a_.keep[b * a_.num_queries + t - prefix]) continue;
      const int64_t place = a_.columns ? a_.columns[b * a_.num_columns + t] : t;
      if (place == a_.num_places) continue;
      stage_row(static_cast<const T*>(a_.down) + place * a_.down_row, a_.down_rank, a_.rank,
                m_.down + count * s_.rank_row, s_.rank_row);
      copy_token(keys, t, count);
      if (++count < kTokenBlock) continue;
      add_block(m_.down, s_.rank_row, count);
      count = 0;
    }
    if (count > 0) add_block(m_.down, s_.rank_row, count);
  }

  // Key t as the `slot`-th of the block; one of the next block is fetched meanwhile.
  void copy_token(const Rows<T>& keys, int64_t t, int64_t slot) const {
    A* to = m_.tokens + slot * s_.input_row;
    stage_row(keys.row(t), keys.dim, a_.head_dim, to, s_.input_row);
    if (a_.projects_first) to[a_.head_dim] = 1;
    if (t + kTokenBlock >= a_.num_columns) return;
    Lines ahead = keys.lines(t + kTokenBlock, 1, a_.head_dim);
    while (ahead.rows > 0) ahead.step();
  }

  // The first `count` tokens that were copied, with these rows of `down`.
  void add_block(const A* down, int64_t down_row, int64_t count) {
    const A* right = m_.tokens;
    int64_t right_row = s_.input_row;
    if (a_.projects_first) {
      project(m_.tokens, s_.input_row, count);
      right = m_.channels;
      right_row = s_.channel_row;
    } else if (a_.projected) {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < a_.rank; ++r) m_.mass[r] += down[t * down_row + r];
    }
    const Panels panels(s_.summed_row / kL);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t at = panels.start(p) * kL;
      add_transposed_product(down, down_row, a_.rank, right + at, right_row, count, panels.width(p),
                             m_.rows, at);
    }
  }

  // m_.channels [count, c] of rows of `input` numbers.
  void project(const A* rows, int64_t row, int64_t count) {
    const Panels panels = channel_panels();
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t at = panels.start(p) * kL;
      multiply(rows, row, count, m_.key_weight + at * s_.input, panels.width(p) * kL, s_.input,
               panels.width(p), m_.channels + at, s_.channel_row);
    }
  }

  // Sums to c channels and back.
  void project_sums() {
    for (int64_t r = 0; r < a_.rank; ++r) m_.rows[r][a_.head_dim] = m_.mass[r];
    project(m_.keys, s_.depth_row, a_.rank);
    const Panels panels(s_.input_row / kL);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t at = panels.start(p) * kL;
      multiply(m_.channels, s_.channel_row, a_.rank, m_.query_weight + at, s_.input_row,
               s_.channels, panels.width(p), m_.keys + at, s_.depth_row);
    }
  }

  const ConnectivityArgs& a_;
  const KeySizes<A> s_;
  const KeyScratch<A> m_;
};

}  // namespace SPOT_ISA
}  // namespace spot
