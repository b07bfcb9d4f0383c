// Kernel of token_evidence: a token is followed back through the cuts, and what its statistics were
// in each block is scaled, and averaged over the blocks. Torch-free; one copy per ISA.
//
// Cost per token: a lookup for each cut, and L H 6 logarithms (22 instructions a vector), sums and
// squares; each statistic is read once, and nothing is written but the result. Memory: about
// 18 L H numbers of scratch per thread, which stay in first-level cache.
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

// Of one token at a time: its rows in all blocks, and what is made of them. Rows are `stride`
// apart: dense where a vector fits in, so that few lanes are idle.
template <typename T>
struct Evidence {
  using A = Acc<T>;
  const EvidenceArgs& a;
  int64_t width, heads, row;    // elements of a block's row; heads and elements of a result's
  int64_t stride, mean_stride;  // of rows, and of their means over the heads
  int64_t padded;               // elements of all rows, in whole vectors
  A *scales, *raw, *rows;       // [L, stride] each
  A* means;                     // [L, mean_stride]

  explicit Evidence(const EvidenceArgs& args)
      : a(args),
        width(args.num_heads * kColumns),
        heads(args.mean_heads ? 1 : args.num_heads),
        row(heads * kColumns),
        stride(width < kLanes<A> ? kLanes<A> : width),
        mean_stride(a.mean_heads ? round_up(kColumns, kLanes<A>) : 0),
        padded(round_up(a.num_blocks * stride, kLanes<A>)) {
    const int64_t part = padded + round_up(kColumns, kLanes<A>);  // vectors may end behind a row
    const int64_t all = 3 * part + a.num_blocks * mean_stride;
    scales = static_cast<A*>(thread_scratch(static_cast<std::size_t>(all) * sizeof(A)));
    raw = scales + part;
    rows = raw + part;
    means = rows + part;
    for (int64_t i = 0; i < all; ++i) scales[i] = 0;
    for (int64_t i = 0; i < a.num_blocks; ++i) {
      const A n = a.scaling == kRawScaling ? A(1) : static_cast<A>(a.blocks[i].count);
      for (int64_t j = 0; j < width; ++j)
        scales[i * stride + j] = j % kColumns == 3 || j % kColumns == 5 ? n * n : n;
    }
  }

  // Reads the rows of token `t` of image `b`, newest first; false when a position is out of range.
  bool read(int64_t b, int64_t t) const {
    int64_t at = t, k = a.num_cuts;
    for (int64_t i = a.num_blocks - 1; i >= 0; --i) {
      const EvidenceBlock& block = a.blocks[i];
      while (k > block.followed) {
        const EvidenceCut& cut = a.cuts[--k];
        at = cut.index[b * cut.batch + at * cut.token];
        if (at < 0 || at >= cut.chosen) return false;
      }
      const T* from = static_cast<const T*>(block.stats) + b * block.batch + at * block.token;
      A* to = raw + i * stride;
      cover_row<A>(width,
                   [&](int64_t j, auto count) { vec_store(to + j, load_lanes(from + j, count)); });
    }
    return true;
  }

  void scale() const {
    if (a.scaling != kLogScaling) {
      for (int64_t j = 0; j < padded; j += kLanes<A>)
        vec_store(rows + j, vec_load(raw + j) * vec_load(scales + j));
      return;
    }
    Vec<A> low = {}, high = {};
    for (int64_t j = 0; j < padded; j += kLanes<A>) {
      const Vec<A> x = vec_load(raw + j) * vec_load(scales + j);
      low = x < low ? x : low;
      high = vec_max<A>(x, high);
      vec_store(rows + j, vec_log1p(x));
    }
    if (reduce_max<A>(-low) < 1 && reduce_max<A>(high) < kLog1pEnd<A>) return;
    for (int64_t j = 0; j < padded; ++j) {
      const A x = raw[j] * scales[j];
      if (x <= -1 || x >= kLog1pEnd<A>) rows[j] = exact_log1p(x);
    }
  }

  void average_heads() const {
    const A share = A(1) / static_cast<A>(a.num_heads);
    for (int64_t i = 0; i < a.num_blocks; ++i)
      for (int64_t c = 0; c < kColumns; c += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t h = 0; h < a.num_heads; ++h)
          sum += vec_load(rows + i * stride + h * kColumns + c);
        vec_store(means + i * mean_stride + c, sum * share);
      }
  }

  void write(T* out) const {
    const A* x = a.mean_heads ? means : rows;
    const int64_t step = a.mean_heads ? mean_stride : stride;
    const A* newest = x + (a.num_blocks - 1) * step;
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
    T* moments = out + heads * latest;
    const A share = A(1) / static_cast<A>(a.num_blocks);
    cover_row<A>(row, [&](int64_t j, auto count) {
      Vec<A> mean = {}, variance = {};
      for (int64_t i = 0; i < a.num_blocks; ++i) mean += vec_load(x + i * step + j);
      mean *= share;
      for (int64_t i = 0; i < a.num_blocks; ++i) {
        const Vec<A> apart = vec_load(x + i * step + j) - mean;
        variance += apart * apart;
      }
      store_lanes<T>(moments + j, count, mean);
      store_lanes<T>(moments + row + j, count, variance * share);
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
    if (!evidence.read(b, t)) return false;
    evidence.scale();
    if (a.mean_heads) evidence.average_heads();
    evidence.write(static_cast<T*>(a.out) + r * width);
    if (++t == a.num_tokens) t = 0, ++b;
  }
  return true;
}

}  // namespace SPOT_ISA
}  // namespace spot
