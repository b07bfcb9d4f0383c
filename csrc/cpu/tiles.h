// Matrix products of small blocks in first- and second-level cache, for attention kernels.
//
// The right operand is packed: depth-major rows of whole vectors. The left one is read an element
// at a time, broadcast. A tile of kTileRows x kTileVecs accumulators stays in registers; its cost
// is one multiply-accumulate per vector and depth step, which is what bounds it.
#pragma once

#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace spot {
namespace SPOT_ISA {

constexpr int kTileRows = 6;
constexpr int kTileVecs = kVectorBytes == 64 ? 4 : 2;  // of 32 or 16 registers

// What a product reads along its depth: numbers, or with dot-product instructions pairs of
// bfloat16.
struct Pair {
  uint32_t bits;
};
template <typename E>
struct Depth {
  using Acc = E;
  static constexpr int kPer = 1;
  using Packed = Vec<E>;
  static Packed load(const E* p) { return vec_load(p); }
  static Packed broadcast(E x) { return splat(x); }
  static void multiply_add(Vec<E>& sum, Packed a, Packed b) { sum += a * b; }
};
#ifdef __AVX512BF16__
template <>
struct Depth<Pair> {
  using Acc = float;
  static constexpr int kPer = 2;
  using Packed = __m512i;
  static Packed load(const Pair* p) { return _mm512_loadu_si512(p); }
  static Packed broadcast(Pair x) { return _mm512_set1_epi32(static_cast<int>(x.bits)); }
  static void multiply_add(Vec<float>& sum, Packed a, Packed b) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

// Numbers next to each other, rounded to bfloat16.
inline void store_pairs(Pair* out, Vec<float> x) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(static_cast<void*>(out), &half, sizeof(half));
}
#endif

// What a kernel for tensors of T packs for the products of its forward pass.
template <typename T>
struct ElementOf {
  using type = Acc<T>;
};
#ifdef __AVX512BF16__
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif
template <typename T>
using Element = typename ElementOf<T>::type;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// f(Int<n>) for the n in [1, kMax] at hand.
template <int kMax, typename F>
inline void with_count(int n, F&& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_count<kMax - 1>(n, f);
  }
  f(Int<kMax>{});
}

// f(Int<kTileRows>, first row) as long as a tile is full, then tiles of 2 rows and of 1: few sizes,
// since each is compiled for itself.
template <typename F>
inline void for_tiles(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f(Int<kTileRows>{}, r);
  for (; r + 2 <= rows; r += 2) f(Int<2>{}, r);
  if (r < rows) f(Int<1>{}, r);
}

// Columns are cut into panels of at most `most` vectors, as even as they can be.
struct Panels {
  int64_t vecs, count;
  explicit Panels(int64_t vectors, int64_t most = kTileVecs)
      : vecs(vectors), count((vectors + most - 1) / most) {}
  int64_t start(int64_t panel) const { return vecs * panel / count; }
  int width(int64_t panel) const { return static_cast<int>(start(panel + 1) - start(panel)); }
};

template <typename E, int kM, int kN, typename Left>
inline void tile(Vec<typename Depth<E>::Acc> (&sum)[kM][kN], Left&& left, const E* right,
                 int64_t right_row, int64_t depth) {
  constexpr int kL = kLanes<typename Depth<E>::Acc>;
  for (int64_t d = 0; d < depth; ++d) {
    typename Depth<E>::Packed b[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) b[j] = Depth<E>::load(right + d * right_row + j * kL);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      const auto a = Depth<E>::broadcast(left(i, d));
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) Depth<E>::multiply_add(sum[i][j], a, b[j]);
    }
  }
}

// out [rows, vecs] = left [rows, depth] right [depth, vecs]; `vecs` at most kTileVecs.
template <typename E, typename A>
SPOT_NOINLINE void multiply(const E* left, int64_t left_row, int64_t rows, const E* right,
                            int64_t right_row, int64_t depth, int vecs, A* out, int64_t out_row) {
  constexpr int kL = kLanes<A>;
  with_count<kTileVecs>(vecs, [&](auto n) {
    for_tiles(rows, [&](auto m, int64_t r) {
      Vec<A> sum[m.value][n.value] = {};
      const E* block = left + r * left_row;
      tile<E, m.value, n.value>(
          sum, [=](int i, int64_t d) { return block[i * left_row + d]; }, right, right_row, depth);
#pragma GCC unroll 8
      for (int i = 0; i < m.value; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < n.value; ++j) vec_store(out + (r + i) * out_row + j * kL, sum[i][j]);
    });
  });
}

// out [rows, vecs] += left^T right with left [depth, rows] and right [depth, vecs]; row r of the
// result is at out[r] + column.
template <typename A>
SPOT_NOINLINE void add_transposed_product(const A* left, int64_t left_row, int64_t rows,
                                          const A* right, int64_t right_row, int64_t depth,
                                          int vecs, A* const* out, int64_t column) {
  constexpr int kL = kLanes<A>;
  with_count<kTileVecs>(vecs, [&](auto n) {
    for_tiles(rows, [&](auto m, int64_t r) {
      Vec<A> sum[m.value][n.value];
      A* at[m.value];
#pragma GCC unroll 8
      for (int i = 0; i < m.value; ++i) {
        at[i] = out[r + i] + column;
#pragma GCC unroll 4
        for (int j = 0; j < n.value; ++j) sum[i][j] = vec_load(at[i] + j * kL);
      }
      const A* block = left + r;
      tile<A, m.value, n.value>(
          sum, [=](int i, int64_t d) { return block[d * left_row + i]; }, right, right_row, depth);
#pragma GCC unroll 8
      for (int i = 0; i < m.value; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < n.value; ++j) vec_store(at[i] + j * kL, sum[i][j]);
    });
  });
}

// ---- packing -----------------------------------------------------------------------------------

// Copies a row of n numbers and pads it with zeros to `padded` elements.
template <typename T, typename A>
inline void stage_row(const T* row, int64_t stride, int64_t n, A* out, int64_t padded) {
  if constexpr (std::is_same_v<T, A>)
    if (stride == 1) {
      constexpr int kL = kLanes<A>;
      int64_t i = 0;
      for (; i + kL <= n; i += kL) vec_store(out + i, vec_load(row + i));
      if (i < n) std::memcpy(out + i, row + i, static_cast<std::size_t>(n - i) * sizeof(A));
      if (n < padded) std::memset(out + n, 0, static_cast<std::size_t>(padded - n) * sizeof(A));
      return;
    }
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = load(row[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = load(row[i * stride]);
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}
// The same, as pairs of neighbours.
inline void stage_row(const BFloat16* row, int64_t stride, int64_t n, Pair* out, int64_t padded) {
  uint16_t* half = reinterpret_cast<uint16_t*>(out);
  if (stride == 1)
    std::memcpy(half, row, static_cast<std::size_t>(n) * sizeof(uint16_t));
  else
    for (int64_t i = 0; i < n; ++i) std::memcpy(half + i, row + i * stride, sizeof(uint16_t));
  std::memset(half + n, 0, static_cast<std::size_t>(2 * padded - n) * sizeof(uint16_t));
}

// The first `count` columns of kLanes rows of kLanes elements, as rows.
template <typename E>
SPOT_NOINLINE void store_transposed(const E* rows, int64_t row, int64_t count, E* out,
                                    int64_t out_row) {
  using A = typename Depth<E>::Acc;
  Vec<A> block[kLanes<A>];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<A>; ++l) std::memcpy(&block[l], rows + l * row, sizeof(block[l]));
  transpose<A>(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    if (i < count) std::memcpy(static_cast<void*>(out + i * out_row), &block[i], sizeof(block[i]));
}

// Rows of a matrix as columns of packed panels: panel p is [depth][width(p) vectors] at
// out + start(p) * kLanes * depth. row(c, to) writes row c as `depth` elements, padded to whole
// vectors; columns from `count` on are zero. `staged` holds kLanes rows of padded depth.
template <typename E, typename StageRow>
inline void pack_columns(const Panels& panels, int64_t count, int64_t depth, E* out, E* staged,
                         StageRow&& row) {
  using A = typename Depth<E>::Acc;  // as wide as E: the transposition only moves it
  static_assert(sizeof(E) == sizeof(A), "panels hold elements as wide as accumulators");
  constexpr int kL = kLanes<A>;
  const int64_t padded = round_up(depth, kL);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p), width = panels.width(p) * kL;
    E* panel = out + first * kL * depth;
    for (int64_t v = 0; v < panels.width(p); ++v) {
      for (int64_t l = 0; l < kL; ++l) {
        const int64_t c = (first + v) * kL + l;
        if (c < count)
          row(c, staged + l * padded);
        else
          std::memset(static_cast<void*>(staged + l * padded), 0,
                      static_cast<std::size_t>(padded) * sizeof(E));
      }
      for (int64_t d = 0; d < depth; d += kL)
        store_transposed(staged + d, padded, depth - d < kL ? depth - d : kL,
                         panel + d * width + v * kL, width);
    }
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
