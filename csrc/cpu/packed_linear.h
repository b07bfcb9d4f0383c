// A linear layer whose weights are packed: panels of kPanel outputs, depth-major, which are read in
// the order of memory. Torch-free; one copy per ISA.
//
// A tile of kLinearRows rows and kLinearVecs vectors of outputs stays in registers over a block of
// the depth; input is read an element at a time, broadcast. The sum of an output runs over a block
// of the depth in order, and blocks are added up in order: what it is depends on nothing but the
// depth, neither on threads nor on other rows.
#pragma once

#include "isa.h"
#include "scratch.h"
#include "vector.h"

namespace spot {
namespace SPOT_ISA {

constexpr int kLinearVecs = 2;                                  // vectors of a tile's row
constexpr int kLinearRows = kVectorBytes == 64 ? 14 : 6;        // of 32 or 16 registers
constexpr int64_t kDepthBlock = 384;                            // at most
constexpr int64_t kStagedRow = kDepthBlock + kVectorBytes / 4;  // between staged rows

// f(std::integral_constant<int, n>) for the n in [1, kMost] at hand.
template <int kMost, typename F>
inline void with_rows(int64_t n, F&& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_rows<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Equal parts of [0, total), of at most `most`; one at least.
struct Parts {
  int64_t total, count;
  Parts(int64_t n, int64_t most) : total(n), count(n > most ? (n + most - 1) / most : 1) {}
  int64_t start(int64_t part) const { return total * part / count; }
};

// Rows of the input and a block of the depth of a panel, and what becomes of their product.
template <typename A>
struct LinearTile {
  const A* left;  // [rows, depth]
  int64_t left_row;
  const A* right;  // [depth, kPanel]
  int64_t depth;
  A* sums;    // [rows, kPanel], of this block and of those before
  bool more;  // whether there were any
  A* out;     // [rows, kPanel] of the result, if the product is all but added to: instead of sums
  int64_t out_row;
  const A* bias;      // [kPanel], or null
  const A* residual;  // [rows, kPanel], or null
  int64_t residual_row;
  const char* ahead;  // weights that come next, fetched to second-level cache step by step
  int64_t ahead_step;
};

template <typename A, int kM>
SPOT_NOINLINE void linear_tile(const LinearTile<A>& t) {
  constexpr int kL = kLanes<A>;
  const int64_t left_row = t.left_row;
  const char* ahead = t.ahead;
  for (int64_t c = 0; c < kPanel; c += kLinearVecs * kL) {
    Vec<A> sum[kM][kLinearVecs] = {};
    // Three bases: few registers then reach every row, as an address may scale one. An array, since
    // GCC may load through both sides of a choice between pointers, which AddressSanitizer reports.
    const A* base[3] = {t.left, t.left + 5 * left_row, t.left + 10 * left_row};
    const A* b = t.right + c;
    for (int64_t d = 0; d < t.depth; ++d, ++base[0], ++base[1], ++base[2], b += kPanel) {
      // With few rows the loop waits for memory as it is.
      if constexpr (kM > 3) __builtin_prefetch(ahead, 0, 2);
      ahead += t.ahead_step;
      Vec<A> right[kLinearVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kLinearVecs; ++j) right[j] = vec_load(b + j * kL);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        const Vec<A> x = splat(base[i / 5][i % 5 * left_row]);
#pragma GCC unroll 2
        for (int j = 0; j < kLinearVecs; ++j) sum[i][j] += x * right[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kLinearVecs; ++j) {
        const int64_t column = c + j * kL;
        A* at = t.sums + i * kPanel + column;
        Vec<A> y = sum[i][j];
        if (t.more) y += vec_load(at);
        if (t.out) {
          if (t.bias) y += vec_load(t.bias + column);
          if (t.residual) y += vec_load(t.residual + i * t.residual_row + column);
          at = t.out + i * t.out_row + column;
        }
        vec_store(at, y);
      }
  }
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): the other form of GELU.
template <typename A>
inline Vec<A> gelu_tanh(Vec<A> x) {
  const A twice = A(1.5957691216057308), cubic = A(0.044715);  // 2 sqrt(2 / pi)
  return x * vec_sigmoid<A>(twice * x * (A(1) + cubic * x * x));
}

// What becomes of the sums of a panel.
template <typename T>
struct LinearPanel {
  using A = Acc<T>;
  const PackedLinearArgs& args;
  int64_t first, columns;  // of the outputs

  T* out(int64_t row) const { return static_cast<T*>(args.out) + row * args.out_features + first; }
  const T* bias() const { return args.bias ? static_cast<const T*>(args.bias) + first : nullptr; }
  const T* residual(int64_t row) const {
    if (!args.residual) return nullptr;
    return static_cast<const T*>(args.residual) + row * args.residual_row + first;
  }

  // Whether a tile may write results itself.
  bool plain() const {
    return std::is_same_v<T, A> && args.activation == kNoActivation && columns == kPanel;
  }
  void set_results(LinearTile<A>& tile, int64_t row) const {
    if constexpr (std::is_same_v<T, A>) {
      tile.out = out(row);
      tile.out_row = args.out_features;
      tile.bias = bias();
      tile.residual = residual(row);
      tile.residual_row = args.residual_row;
    }
  }

  // Asks for the memory of results, which is then there when they are.
  void fetch_out(int64_t row, int64_t rows) const {
    const T* to = out(row);
    for (int64_t r = 0; r < rows; ++r, to += args.out_features)
      for (int64_t i = 0; i < columns; i += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(to + i, 1, 3);
  }

  // out = activation(sums + bias) + residual, of rows [row, row + rows).
  template <typename Act>
  SPOT_NOINLINE void finish(const A* sums, int64_t row, int64_t rows, Act activation) const {
    const T* shift = bias();
    for (int64_t r = row; r < row + rows; ++r, sums += kPanel) {
      T* to = out(r);
      const T* added = residual(r);
      for_vectors<A>(columns, [&](int64_t i, auto count) {
        Vec<A> y = vec_load(sums + i);
        if (shift) y += load_lanes(shift + i, count);
        y = activation(y);
        if (added) y += load_lanes(added + i, count);
        store_lanes(to + i, count, y);
      });
    }
  }
  void finish(const A* sums, int64_t row, int64_t rows) const {
    switch (args.activation) {
      case kGelu: return finish(sums, row, rows, [](Vec<A> x) { return gelu<A>(x); });
      case kGeluTanh: return finish(sums, row, rows, [](Vec<A> x) { return gelu_tanh<A>(x); });
      default: return finish(sums, row, rows, [](Vec<A> x) { return x; });
    }
  }
};

// A block of rows and of the depth, staged: rows kStagedRow apart.
template <typename T>
SPOT_NOINLINE void stage_rows(const T* from, int64_t from_row, int64_t rows, int64_t depth,
                              Acc<T>* out) {
  using A = Acc<T>;
  for (int64_t r = 0; r < rows; ++r, from += from_row, out += kStagedRow)
    for_vectors<A>(depth, [&](int64_t i, auto count) {
      store_lanes(out + i, count, load_lanes(from + i, count));
    });
}

// Whether tiles read the input where it is: rows whose distance is a multiple of 4096 bytes share
// the sets of first-level cache, and would push each other out.
template <typename T>
inline bool reads_in_place(const PackedLinearArgs& a) {
  const int64_t bytes = a.input_row * static_cast<int64_t>(sizeof(T));
  return std::is_same_v<T, Acc<T>> && (a.rows == 1 || bytes % 4096 != 0);
}

template <typename T>
void packed_linear(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  // Without depth there is a block of none, which gives sums of zero.
  const Parts depths(a.in_features, kDepthBlock), blocks(a.rows, a.block_rows);
  const int64_t panels = (a.out_features + kPanel - 1) / kPanel;
  const bool direct = reads_in_place<T>(a);
  const int64_t room = direct ? 0 : a.block_rows * kStagedRow;
  const int64_t widened = std::is_same_v<T, A> ? 0 : kDepthBlock * kPanel;
  const int64_t all = depths.count * room + a.block_rows * kPanel + widened;
  A* staged = static_cast<A*>(thread_scratch(static_cast<std::size_t>(all) * sizeof(A)));
  A* sums = staged + depths.count * room;  // [rows, kPanel]
  A* wide = sums + a.block_rows * kPanel;
  int64_t staged_block = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / panels, first = item % panels * kPanel;
    const int64_t row = blocks.start(block), rows = blocks.start(block + 1) - row;
    const int64_t left = a.out_features - first;
    const LinearPanel<T> panel{a, first, left < kPanel ? left : kPanel};
    const Parts tiles(rows, kLinearRows);
    const int64_t step = kPanel * static_cast<int64_t>(sizeof(T)) / tiles.count;
    for (int64_t k = 0; k < depths.count; ++k) {
      const int64_t start = depths.start(k), depth = depths.start(k + 1) - start;
      const T* weights = static_cast<const T*>(a.packed) + first * a.in_features + start * kPanel;
      const A* right;
      if constexpr (std::is_same_v<T, A>) {
        right = weights;
      } else {
        for (int64_t i = 0; i < depth * kPanel; ++i) wide[i] = load(weights[i]);
        right = wide;
      }
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t r = tiles.start(t), count = tiles.start(t + 1) - r;
        const bool last = k == depths.count - 1;
        const T* input = static_cast<const T*>(a.input) + (row + r) * a.input_row + start;
        LinearTile<A> tile{};
        if (direct) {
          tile.left = reinterpret_cast<const A*>(input);
          tile.left_row = a.input_row;
        } else {
          A* copy = staged + k * room + r * kStagedRow;
          if (block != staged_block) stage_rows(input, a.input_row, count, depth, copy);
          tile.left = copy;
          tile.left_row = kStagedRow;
        }
        tile.right = right;
        tile.depth = depth;
        tile.sums = depths.count > 1 ? sums + r * kPanel : sums;
        tile.more = k > 0;
        tile.ahead = reinterpret_cast<const char*>(weights + depth * kPanel) + t * depth * step;
        tile.ahead_step = step;
        if (last) panel.fetch_out(row + r, count);
        if (last && panel.plain()) panel.set_results(tile, row + r);
        with_rows<kLinearRows>(count, [&](auto m) { linear_tile<A, m.value>(tile); });
        if (last && !panel.plain()) panel.finish(tile.sums, row + r, count);
      }
    }
    staged_block = block;
  }
}

// Panels [begin, end) of a weight, padded with zeros. T only says how wide an element is.
template <typename T>
void pack_linear(const PackLinearArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(a.out) + panel * a.in_features * kPanel;
    for (int64_t d = 0; d < a.in_features; ++d)
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t o = panel * kPanel + c;
        out[d * kPanel + c] =
            o < a.out_features ? weight[o * a.weight_row + d * a.weight_column] : T{};
      }
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
