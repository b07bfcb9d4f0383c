// Kernel of token_evidence: a token is followed back through the cuts, and what its statistics were
// in each block is scaled, and averaged over the blocks. Torch-free; one copy per ISA.
//
// Cost per token: a lookup for each cut, and L H 6 logarithms (22 instructions a vector), sums and
// squares; each statistic is read once, and nothing is written but the result. Memory: 3 L H 6 and
// some numbers of scratch per thread, which stay in first-level cache.
#pragma once

#include "isa.h"
#include "scratch.h"
#include "vector.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kColumns = 6;  // statistics of a head

// f(first, AllLanes) for whole vectors that cover a row of n elements, of which the last two may
// overlap; f(0, n) for a row shorter than a vector. Nothing outside of the row is touched.
template <typename A, typename F>
inline void cover_row(int64_t n, F&& f) {
  if (n < kLanes<A>) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, AllLanes<A>{});
  if (i < n) f(n - kLanes<A>, AllLanes<A>{});
}

template <typename T>
struct Evidence {
  using A = Acc<T>;
  const EvidenceArgs& a;
  int64_t width, heads, row;  // elements of a block's row; heads and elements behind the mean
  A* scales;                  // [L, width], as values and logs; vectors may end behind them
  A* values;
  A* logs;

  explicit Evidence(const EvidenceArgs& args)
      : a(args),
        width(args.num_heads * kColumns),
        heads(args.mean_heads ? 1 : args.num_heads),
        row(heads * kColumns) {
    const int64_t part =
        round_up(a.num_blocks * (width > row ? width : row), kLanes<A>) + kLanes<A>;
    scales = static_cast<A*>(thread_scratch(static_cast<std::size_t>(3 * part) * sizeof(A)));
    values = scales + part;
    logs = values + part;
    for (int64_t i = 0; i < 3 * part; ++i) scales[i] = 0;
    for (int64_t i = 0; i < a.num_blocks; ++i) {
      const A n = static_cast<A>(a.blocks[i].count);
      for (int64_t j = 0; j < width; ++j)
        scales[i * width + j] = j % kColumns == 3 || j % kColumns == 5 ? n * n : n;
    }
  }

  // Reads the rows of token `t` of image `b`, newest first; false when a position is out of range.
  bool follow(int64_t b, int64_t t) const {
    int64_t at = t, k = a.num_cuts;
    for (int64_t i = a.num_blocks - 1; i >= 0; --i) {
      const EvidenceBlock& block = a.blocks[i];
      while (k > block.followed) {
        const EvidenceCut& cut = a.cuts[--k];
        at = cut.index[b * cut.batch + at * cut.token];
        if (at < 0 || at >= cut.chosen) return false;
      }
      const T* from = static_cast<const T*>(block.stats) + b * block.batch + at * block.token;
      A* to = values + i * width;
      cover_row<A>(width, [&](int64_t j, auto count) {
        if (count == kLanes<A>)
          vec_store(to + j, load_lanes(from + j, kLanes<A>));
        else
          for (int64_t l = 0; l < count; ++l) to[j + l] = load(from[j + l]);
      });
    }
    return true;
  }

  // The scaled rows.
  A* scale() const {
    if (a.scaling == kRawScaling) return values;
    const int64_t all = a.num_blocks * width;
    if (a.scaling == kScaleByCount) {
      for (int64_t j = 0; j < all; j += kLanes<A>)
        vec_store(values + j, vec_load(values + j) * vec_load(scales + j));
      return values;
    }
    Vec<A> low = splat(A(0)), high = splat(A(0));
    for (int64_t j = 0; j < all; j += kLanes<A>) {
      const Vec<A> x = vec_load(values + j) * vec_load(scales + j);
      low = x < low ? x : low;
      high = vec_max<A>(x, high);
      vec_store(logs + j, vec_log1p(x));
    }
    low = -low;
    if (reduce_max<A>(low) >= 1 || reduce_max<A>(high) >= kLog1pEnd<A>)
      for (int64_t j = 0; j < all; ++j) {
        const A x = values[j] * scales[j];
        if (x <= -1 || x >= kLog1pEnd<A>) logs[j] = exact_log1p(x);
      }
    return logs;
  }

  // Rows of one head, the mean of all; beside the scaled ones, whose place they may take.
  A* mean_heads(const A* x) const {
    A* out = x == values ? logs : values;
    const A share = A(1) / static_cast<A>(a.num_heads);
    for (int64_t i = 0; i < a.num_blocks; ++i)
      for (int64_t c = 0; c < kColumns; ++c) {
        A sum = 0;
        for (int64_t h = 0; h < a.num_heads; ++h) sum += x[i * width + h * kColumns + c];
        out[i * row + c] = sum * share;
      }
    return out;
  }

  void write(const A* x, T* out) const {
    const A* newest = x + (a.num_blocks - 1) * row;
    const int64_t latest = a.last - a.first;
    if (latest == kColumns)
      cover_row<A>(row, [&](int64_t j, auto count) {
        store_lanes<T>(out + j, count, vec_load(newest + j));
      });
    else
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t c = 0; c < latest; ++c)
          out[h * latest + c] = store<T>(newest[h * kColumns + a.first + c]);
    if (!a.moments) return;
    T* mean_out = out + heads * latest;
    const A share = A(1) / static_cast<A>(a.num_blocks);
    cover_row<A>(row, [&](int64_t j, auto count) {
      Vec<A> mean = {}, variance = {};
      for (int64_t i = 0; i < a.num_blocks; ++i) mean += vec_load(x + i * row + j);
      mean *= share;
      for (int64_t i = 0; i < a.num_blocks; ++i) {
        const Vec<A> apart = vec_load(x + i * row + j) - mean;
        variance += apart * apart;
      }
      store_lanes<T>(mean_out + j, count, mean);
      store_lanes<T>(mean_out + row + j, count, variance * share);
    });
  }
};

// Rows [begin, end) of the results of all images; false when a position is out of range.
template <typename T>
bool token_evidence(const EvidenceArgs& a, int64_t begin, int64_t end) {
  const Evidence<T> evidence(a);
  const int64_t width = evidence.heads * (a.last - a.first + (a.moments ? 2 * kColumns : 0));
  int64_t b = begin / a.num_tokens, t = begin % a.num_tokens;
  for (int64_t r = begin; r < end; ++r) {
    if (!evidence.follow(b, t)) return false;
    const Acc<T>* x = evidence.scale();
    if (a.mean_heads) x = evidence.mean_heads(x);
    evidence.write(x, static_cast<T*>(a.out) + r * width);
    if (++t == a.num_tokens) t = 0, ++b;
  }
  return true;
}

}  // namespace SPOT_ISA
}  // namespace spot
