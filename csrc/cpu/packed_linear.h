// A linear layer whose weights are packed: panels of kPanel outputs, depth-major, which are read in
// the order of memory. Torch-free; one copy per ISA.
//
// Input rows are copied into scratch whose rows are a constant apart, so that one register
// addresses a tile and no two of its rows share a set of the cache. The sum of an output runs over
// the depth in order, block by block, and the blocks are added up in order: it depends on nothing
// but the depth.
#pragma once

#include "isa.h"
#include "scratch.h"
#include "vector.h"

namespace spot {
namespace SPOT_ISA {

constexpr int kLinearVecs = 2;                                // vectors of a tile's row
constexpr int kLinearRows = kVectorBytes == 64 ? 14 : 6;      // of 32 or 16 registers
constexpr int64_t kDepthBlock = 384;                          // most of a block
constexpr int64_t kStagedRow = kDepthBlock + kVectorBytes / 4;  // elements between staged rows

// f(std::integral_constant<int, n>) for the n in [1, kMost] at hand.
template <int kMost, typename F>
inline void with_rows(int64_t n, F&& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_rows<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Equal parts of [0, total), of at most `most`.
struct Parts {
  int64_t total, count;
  Parts(int64_t n, int64_t most) : total(n), count((n + most - 1) / most) {}
  int64_t start(int64_t part) const { return total * part / count; }
};

// sums [kM, kPanel] = left [kM, depth] panel [depth, kPanel], or more by that.
template <typename A, int kM>
SPOT_NOINLINE void linear_tile(const A* left, const A* panel, int64_t depth, bool more, A* sums) {
  constexpr int kL = kLanes<A>;
  for (int64_t c = 0; c < kPanel; c += kLinearVecs * kL) {
    Vec<A> sum[kM][kLinearVecs] = {};
    const A *a = left, *b = panel + c;
    for (int64_t d = 0; d < depth; ++d, ++a, b += kPanel) {
      Vec<A> right[kLinearVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kLinearVecs; ++j) right[j] = vec_load(b + j * kL);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        const Vec<A> x = splat(a[i * kStagedRow]);
#pragma GCC unroll 2
        for (int j = 0; j < kLinearVecs; ++j) sum[i][j] += x * right[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kLinearVecs; ++j) {
        A* at = sums + i * kPanel + c + j * kL;
        vec_store(at, more ? vec_load(at) + sum[i][j] : sum[i][j]);
      }
  }
}

// 2 x P(X <= x) - 1 by the hyperbolic tangent: the other form of GELU.
template <typename A>
inline Vec<A> gelu_tanh(Vec<A> x) {
  const A twice = A(1.5957691216057308), cubic = A(0.044715);  // 2 sqrt(2 / pi)
  return x * vec_sigmoid<A>(twice * x * (A(1) + cubic * x * x));
}

// out = activation(sums + bias) + residual, of `rows` rows and the columns [first, first + count).
template <typename T, typename Act>
SPOT_NOINLINE void finish_rows(const PackedLinearArgs& a, const Acc<T>* sums, int64_t row,
                               int64_t rows, int64_t first, int64_t columns, Act&& activation) {
  using A = Acc<T>;
  const T* bias = static_cast<const T*>(a.bias);
  const T* residual = static_cast<const T*>(a.residual);
  for_vectors<A>(columns, [&](int64_t i, auto count) {
    const Vec<A> shift = bias ? load_lanes(bias + first + i, count) : Vec<A>{};
    for (int64_t r = 0; r < rows; ++r) {
      Vec<A> y = activation(vec_load(sums + r * kPanel + i) + shift);
      if (residual) y += load_lanes(residual + (row + r) * a.residual_row + first + i, count);
      store_lanes(static_cast<T*>(a.out) + (row + r) * a.out_features + first + i, count, y);
    }
  });
}

template <typename T>
void packed_linear(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Parts depths(a.in_features, kDepthBlock);
  const Parts blocks(a.rows, a.block_rows);
  const int64_t panels = (a.out_features + kPanel - 1) / kPanel;
  const int64_t room = a.block_rows * kStagedRow;  // of the staged rows of a block of the depth
  const int64_t widened = std::is_same_v<T, A> ? 0 : kDepthBlock * kPanel;
  A* staged = static_cast<A*>(thread_scratch(
      static_cast<std::size_t>(depths.count * room + a.block_rows * kPanel + widened) * sizeof(A)));
  A* sums = staged + depths.count * room;
  A* wide = sums + a.block_rows * kPanel;
  int64_t staged_block = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / panels, panel = item % panels;
    const int64_t row = blocks.start(block), rows = blocks.start(block + 1) - row;
    if (block != staged_block) {
      for (int64_t k = 0; k < depths.count; ++k)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t start = depths.start(k);
          const T* from = static_cast<const T*>(a.input) + (row + r) * a.input_row + start;
          for_vectors<A>(depths.start(k + 1) - start, [&](int64_t i, auto count) {
            store_lanes(staged + k * room + r * kStagedRow + i, count,
                        load_lanes(from + i, count));
          });
        }
      staged_block = block;
    }
    const Parts tiles(rows, kLinearRows);
    for (int64_t k = 0; k < depths.count; ++k) {
      const int64_t start = depths.start(k), depth = depths.start(k + 1) - start;
      const T* weights =
          static_cast<const T*>(a.packed) + (panel * a.in_features + start) * kPanel;
      const A* right;
      if constexpr (std::is_same_v<T, A>) {
        right = weights;
      } else {
        for (int64_t i = 0; i < depth * kPanel; ++i) wide[i] = load(weights[i]);
        right = wide;
      }
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t r = tiles.start(t);
        with_rows<kLinearRows>(tiles.start(t + 1) - r, [&](auto m) {
          linear_tile<A, m.value>(staged + k * room + r * kStagedRow, right, depth, k > 0,
                                  sums + r * kPanel);
        });
      }
    }
    const int64_t first = panel * kPanel;
    const int64_t columns = a.out_features - first < kPanel ? a.out_features - first : kPanel;
    const auto finish = [&](auto activation) {
      finish_rows<T>(a, sums, row, rows, first, columns, activation);
    };
    switch (a.activation) {
      case kGelu: finish([](Vec<A> x) { return gelu<A>(x); }); break;
      case kGeluTanh: finish([](Vec<A> x) { return gelu_tanh<A>(x); }); break;
      default: finish([](Vec<A> x) { return x; });
    }
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
        out[d * kPanel + c] = o < a.out_features ? weight[o * a.weight_row + d * a.weight_column] : T{};
      }
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
