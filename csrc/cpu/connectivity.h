// Connectivity: the best columns of each query, from coefficients and a basis. Torch-free; one copy
// per ISA.
//
// A work item is a block of rows, one for each query. The basis is packed in tiles of columns about
// as large as first-level cache, candidates only; all rows of the block are combined tile by tile,
// and the sums counted that reach two thresholds; then the columns of each row are chosen
// (choose.h). Coefficients are read, or made of queries and keys (coefficients.h).
//
// Cost per row, with R coefficients of which C count, and N columns: those of coefficients.h, C N
// multiply-accumulates, and some four passes over N numbers, of which one writes. Scratch per
// thread: R N numbers for the basis and kChoiceRows N for the block.
#pragma once

#include "coefficients.h"

namespace spot {
namespace SPOT_ISA {

constexpr int64_t kTileBytes = 48 * 1024;  // of the basis
constexpr int kWideVecs = 8;               // of a tile

template <typename A>
struct ChoiceScratch {
  using Key = decltype(order_key(A{}));
  A *basis, *sums;
  Probe<A>* probes;  // two for each row of the block
  int32_t *candidates, *places, *chosen;
  Key* order;
  int64_t* positions;
  CoefficientScratch<A> coefficients;
  ChoiceScratch(Pieces& memory, const ConnectivityArgs& a, const KeySizes<A>& sizes)
      : basis(memory.take<A>(a.rank * round_up(a.num_columns, kLanes<A>))),
        sums(memory.take<A>(kChoiceRows * round_up(a.num_columns, kLanes<A>))),
        probes(memory.take<Probe<A>>(2 * kChoiceRows)),
        candidates(memory.take<int32_t>(a.num_columns)),
        places(memory.take<int32_t>(a.num_columns)),
        chosen(memory.take<int32_t>(a.num_columns + kLanes<A>)),
        order(memory.take<Key>(round_up(a.num_columns, kKeyLanes))),
        positions(memory.take<int64_t>(a.num_columns)),
        coefficients(memory, a, sizes) {}
};

// What is needed next, fetched between computations: queries of the next block, and where the
// results of this one go.
struct NextLines {
  Lines queries{nullptr, 0, 0, 0}, index{nullptr, 0, 0, 0};
  void step() {
    queries.step();
    index.step();
  }
};

template <typename T>
class Chooser {
  using A = Acc<T>;
  static constexpr int kL = kLanes<A>;

 public:
  explicit Chooser(const ConnectivityArgs& args)
      : a_(args),
        m_(in_scratch<ChoiceScratch<A>>(args, KeySizes<A>(args))),
        coefficients_(args, m_.coefficients) {}

  // Queries [q, q + rows) of head h of image b; rows <= kChoiceRows.
  void run(int64_t b, int64_t h, int64_t q, int64_t rows) {
    if (image_ < 0 || (b != image_ && (a_.columns || a_.keep))) pack(b);
    coefficients_.run(b, h, q, rows);
    int32_t* index = a_.index + ((b * a_.num_heads + h) * a_.num_queries + q) * a_.budget;
    ahead_ = {coefficients_.query_lines(b, h, q, rows), {index, 1, 0, rows * a_.budget * 4}};
    for (int64_t r = 0; r < rows; ++r) place_probes(r);
    combine(rows);
    for (int64_t r = 0; r < rows; ++r) emit(r, rows, index + r * a_.budget);
  }

 private:
  // The basis at the candidates of image b, in tiles of columns.
  void pack(int64_t b) {
    image_ = b;
    const int64_t prefix = a_.num_columns - a_.num_queries;
    count_ = 0;
    for (int64_t c = 0; c < a_.num_columns; ++c) {
      m_.candidates[count_] = static_cast<int32_t>(c);
      m_.places[count_] = static_cast<int32_t>(a_.columns ? a_.columns[b * a_.num_columns + c] : c);
      count_ += c < prefix || !a_.keep || a_.keep[b * a_.num_queries + c - prefix];
    }
    padded_ = round_up(count_, kL);
    pack_columns(tiles(), count_, a_.rank, m_.basis, m_.coefficients.staged,
                 [&](int64_t c, A* to) { stage_basis(m_.places[c], to); });
    measure();
  }

  // One column of the basis, as a row of whole vectors.
  void stage_basis(int64_t place, A* to) const {
    const int64_t padded = round_up(a_.rank, kL);
    const bool none = place == a_.num_places;
    const T* column = static_cast<const T*>(a_.basis) + (none ? 0 : place * a_.basis_column);
    stage_row(column, a_.basis_row, none ? 0 : a_.rank, to, padded);
    if (!a_.magnitudes) return;
    const Vec<A> least = splat(static_cast<A>(a_.basis_threshold)), zero = {};
    for (int64_t r = 0; r < padded; r += kL) {
      const Vec<A> x = vec_load(to + r), size = x < 0 ? -x : x;
      vec_store(to + r, size <= least ? zero : size);
    }
  }

  // Columns that are combined together.
  Panels tiles() const {
    const int64_t vec_bytes = kVectorBytes * (a_.rank > 0 ? a_.rank : 1),
                  fit = kTileBytes / vec_bytes;
    return Panels(padded_ / kL, fit < 1 ? 1 : fit > kWideVecs ? kWideVecs : fit);
  }

  // How large the entries of the packed basis are, and how they spread.
  void measure() {
    Vec<A> largest = {}, total = {}, square = {};
    Bits<A> odd = {};
    for (int64_t i = 0; i < a_.rank * padded_; i += kL) {
      const Vec<A> x = vec_load(m_.basis + i);
      largest = vec_max<A>(largest, x < 0 ? -x : x);
      total += x;
      square += x * x;
      odd |= x != x;
    }
    largest_ = reduce_max<A>(largest);
    // Of a NaN we know only that it is there; the padding is put back behind each sum.
    if (count_lanes<A>(odd) > 0) largest_ = static_cast<A>(__builtin_nanf(""));
    const A entries = static_cast<A>(a_.rank * count_);
    mean_ = reduce_add<A>(total) / entries;
    const A variance = reduce_add<A>(square) / entries - mean_ * mean_;
    spread_ = variance > 0 ? __builtin_sqrtf(static_cast<float>(variance)) : A(0);
  }

  // Where the sums of row r are expected, and how far they spread.
  A centre(int64_t r) const { return coefficients_.total(r) * mean_; }
  A unit(int64_t r) const {
    return static_cast<A>(__builtin_sqrtf(static_cast<float>(coefficients_.square(r)))) * spread_;
  }

  // Of the zeros behind the candidates none is to be counted.
  void place_probes(int64_t r) {
    Probe<A>* probes = m_.probes + 2 * r;
    guess_.place(centre(r), unit(r), probes);
    for (int i = 0; i < 2; ++i) probes[i].reach = probes[i].at <= 0 ? count_ - padded_ : 0;
  }

  // sums [rows, candidates], NaN behind them.
  void combine(int64_t rows) {
    const Panels tiles = this->tiles();
    for (int64_t p = 0; p < tiles.count; ++p) {
      const int64_t first = tiles.start(p) * kL;
      with_count<kWideVecs>(tiles.width(p), [&](auto n) {
        if (a_.used == kPublished)
          combine_tile<n.value, kPublished>(rows, first);
        else
          combine_tile<n.value, 0>(rows, first);
      });
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = count_; c < padded_; ++c)
        m_.sums[r * padded_ + c] = static_cast<A>(__builtin_nanf(""));
  }

  // With kCount known, the loop over the coefficients of a row is unrolled. What the loop reads is
  // copied: members would be read again after each store.
  template <int kVecs, int kCount>
  SPOT_NOINLINE void combine_tile(int64_t rows, int64_t first) {
    const int64_t count = kCount > 0 ? kCount : a_.used, row = padded_;
    const A *tile = m_.basis + first * a_.rank, *weights = coefficients_.weights();
    const int32_t* used = coefficients_.used();
    A* to = m_.sums + first;
    Probe<A>* probes = m_.probes;
    NextLines ahead = ahead_;
    for (int64_t r = 0; r < rows; ++r, used += count, to += row, probes += 2) {
      Vec<A> sum[kVecs] = {};
      const auto add = [&](int64_t u) {
        const Vec<A> c = splat(weights[u * kChoiceRows + r]);
        const A* from = tile + used[u] * (kVecs * kL);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[j] += c * vec_load(from + j * kL);
      };
      if constexpr (kCount > 0) {
#pragma GCC unroll 8
        for (int u = 0; u < kCount; ++u) add(u);
      } else {
        for (int64_t u = 0; u < count; ++u) add(u);
      }
      probes[0].reach += count_reach<A>(sum, probes[0].at);
      probes[1].reach += count_reach<A>(sum, probes[1].at);
      ahead.step();
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) vec_store(to + j * kL, sum[j]);
    }
    ahead_ = ahead;
  }

  bool sums_are_finite(int64_t r) const {
    return coefficients_.size(r) * largest_ < static_cast<A>(__builtin_inff());
  }

  void choose_row(int64_t r, int64_t keep, int32_t* chosen) {
    const A* x = m_.sums + r * padded_;
    guess_.learn(centre(r), unit(r), choose(x, count_, keep, m_.probes + 2 * r, chosen));
  }

  void emit(int64_t r, int64_t last, int32_t* index) {
    const A* x = m_.sums + r * padded_;
    int64_t keep = a_.budget < count_ ? a_.budget : count_;
    if (a_.has_threshold) {
      const int64_t above = count_above(x, padded_, static_cast<A>(a_.threshold));
      keep = keep < above ? keep : above;
    }
    // In place where a vector behind the result is only that of later rows.
    const bool in_place =
        count_ == a_.num_columns && (last - r - 1) * a_.budget >= count_ - keep + kL;
    int32_t* chosen = in_place ? index : m_.chosen;
    if (keep == count_)
      for (int64_t c = 0; c < keep; ++c) chosen[c] = static_cast<int32_t>(c);
    else if (keep > 0 && sums_are_finite(r))
      choose_row(r, keep, chosen);
    else if (keep > 0)
      choose_any(x, count_, keep, m_.positions, m_.order, chosen);
    if (!in_place && count_ == a_.num_columns)
      std::memcpy(index, chosen, static_cast<std::size_t>(keep) * sizeof(int32_t));
    else if (!in_place)
      for (int64_t c = 0; c < keep; ++c) index[c] = m_.candidates[chosen[c]];
    for (int64_t c = keep; c < a_.budget; ++c) index[c] = -1;
  }

  const ConnectivityArgs& a_;
  const ChoiceScratch<A> m_;
  Coefficients<T> coefficients_;
  Guess<A> guess_;
  A largest_ = 0, mean_ = 0, spread_ = 0;  // of the basis
  NextLines ahead_;
  int64_t image_ = -1, count_ = 0, padded_ = 0;
};

// Blocks of kChoiceRows rows [begin, end) of all heads of all images.
template <typename T>
void connectivity(const ConnectivityArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.num_queries + kChoiceRows - 1) / kChoiceRows;
  Chooser<T> chooser(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, q = item % blocks * kChoiceRows, left = a.num_queries - q;
    chooser.run(head / a.num_heads, head % a.num_heads, q, left < kChoiceRows ? left : kChoiceRows);
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
