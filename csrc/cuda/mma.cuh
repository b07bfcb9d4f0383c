// Products of 16-row tiles, one warp each: tensor cores for 16-bit types, plain arithmetic for
// float and double. Both leave results in the fragment layout of ptx.cuh, so kernels are written
// once: lane = 4 g + t holds of tile n (8 columns) s[n][0], s[n][1] = (g, 8n + 2t), (g, 8n + 2t +
// 1) and s[n][2], s[n][3] = the same columns of row g + 8.
//
// A tile in shared memory is a number of rows, cut into panels of 32 columns (zero filled), one
// after the other. Rows of a panel are padded by 16 bytes, so that 8 consecutive ones start in
// different banks; their distance is a constant for all head dims, so addresses are too.
#pragma once

#include "block.cuh"
#include "ptx.cuh"

namespace spot {

template <typename T>
constexpr bool kTensorCores = sizeof(T) == 2;

// Values in 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

constexpr int kPanel = 32;

// From row to row of a panel.
template <typename T>
constexpr int kStride = kPanel + kVector<T>;

// Values of a tile of `columns` (a multiple of 32) columns.
template <typename T>
__host__ __device__ constexpr int tile_values(int rows, int columns) {
  return rows * (columns / kPanel) * kStride<T>;
}

struct Lane {
  int index, g, t;
};

__device__ inline Lane this_lane() {
  const int index = static_cast<int>(threadIdx.x) % kWarp;
  return {index, index / 4, index % 4};
}

// Two values side by side in one register, the first in the lower half.
template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(first, second);
    memcpy(&packed, &both, sizeof(packed));
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    memcpy(&packed, &both, sizeof(packed));
  }
  return packed;
}

template <int kTiles, typename A>
__device__ inline void clear(A (&s)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = A(0);
}

// f(tile, element, row, column) for what this lane holds.
template <int kTiles, typename F>
__device__ inline void each_element(F&& f) {
  const Lane lane = this_lane();
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) f(n, e, lane.g + 8 * (e / 2), 8 * n + 2 * lane.t + e % 2);
}

// Column tiles of a product are skipped in pairs of 16 columns. The check would split the code into
// short pieces that cannot overlap loads and products, so it is compiled away where all are needed.
template <bool kAll>
__device__ inline bool skipped(int tile, int columns) {
  return !kAll && 8 * tile >= columns;
}

template <typename T, int kRows, bool kAll, int kTiles>
__device__ inline void multiply_transposed_tiles(Acc<T> (&s)[kTiles][4], const T* a, const T* b,
                                                 int depth, int rows) {
  const Lane lane = this_lane();
  if constexpr (kTensorCores<T>) {
    // Matrices of a: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15: the order of a[0..3].
    a += (lane.index % 16) * kStride<T> + lane.index / 16 * 8;
    // Matrices of b: rows 0-7, columns 0-7 and 8-15 (b0, b1 of the even tile), then rows 8-15.
    b += (lane.index % 8 + lane.index / 16 * 8) * kStride<T> + lane.index / 8 % 2 * 8;
#pragma unroll 1
    for (int panel = 0; panel < depth; panel += kPanel) {
#pragma unroll
      for (int k = 0; k < kPanel; k += 16) {
        uint32_t af[4];
        load_matrices(af, a + k);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          if (skipped<kAll>(n, rows)) continue;
          uint32_t bf[4];
          load_matrices(bf, b + 8 * n * kStride<T> + k);
          mma<T>(s[n], af, bf[0], bf[1]);
          mma<T>(s[n + 1], af, bf[2], bf[3]);
        }
      }
      a += 16 * kStride<T>;
      b += kRows * kStride<T>;
    }
  } else {
    using V = Vector<T>;
    a += lane.g * kStride<T>;
    b += 2 * lane.t * kStride<T>;
#pragma unroll 1
    for (int panel = 0; panel < depth; panel += kPanel) {
      for (int k = 0; k < kPanel; k += kVector<T>) {
        const V a0 = *reinterpret_cast<const V*>(a + k);
        const V a1 = *reinterpret_cast<const V*>(a + 8 * kStride<T> + k);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (skipped<kAll>(n, rows)) continue;
          const V b0 = *reinterpret_cast<const V*>(b + 8 * n * kStride<T> + k);
          const V b1 = *reinterpret_cast<const V*>(b + (8 * n + 1) * kStride<T> + k);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            s[n][0] += a0.at[i] * b0.at[i];
            s[n][1] += a0.at[i] * b1.at[i];
            s[n][2] += a1.at[i] * b0.at[i];
            s[n][3] += a1.at[i] * b1.at[i];
          }
        }
      }
      a += 16 * kStride<T>;
      b += kRows * kStride<T>;
    }
  }
}

// s += a b^T over `depth` (a multiple of 32) columns. a: a tile of 16 rows; b: a tile of kRows
// rows, the first `rows` of them being the columns of s; others from the next multiple of 16 on are
// left alone.
template <typename T, int kRows, int kTiles>
__device__ inline void multiply_transposed(Acc<T> (&s)[kTiles][4], const T* a, const T* b,
                                           int depth, int rows) {
  static_assert(kTiles % 2 == 0 && 8 * kTiles <= kRows);
  if (rows > 8 * kTiles - 16)
    multiply_transposed_tiles<T, kRows, true>(s, a, b, depth, rows);
  else
    multiply_transposed_tiles<T, kRows, false>(s, a, b, depth, rows);
}

// Values of scratch per warp that `multiply` needs (none with tensor cores).
template <typename T, int kTiles>
constexpr int kProductScratch = kTensorCores<T> ? 0 : 16 * (8 * kTiles + kVector<T>);

// Results as the left side of a product: two tiles side by side are one operand, since columns 2t,
// 2t + 1 of tile k are a[0] (row g) and a[1] (row g + 8), and those of tile k + 1 are a[2] and
// a[3].
template <typename T, int kTiles>
__device__ inline void pack_tiles(uint32_t (&packed)[kTiles][2], const float (&p)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    packed[n][0] = pack<T>(p[n][0], p[n][1]);
    packed[n][1] = pack<T>(p[n][2], p[n][3]);
  }
}

template <typename T, int kRows, bool kAll, int kTiles, int kOutTiles>
__device__ inline void multiply_packed_tiles(float (&o)[kOutTiles][4],
                                             const uint32_t (&p)[kTiles][2], const T* b, int rows,
                                             int columns) {
  const Lane lane = this_lane();
  // Matrices of b, transposed on the way: rows 0-7 and 8-15 of columns 0-7 (b0, b1 of the even
  // tile), then of columns 8-15.
  b += (lane.index % 16) * kStride<T> + lane.index / 16 * 8;
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {
    if (skipped<kAll>(k, rows)) continue;
    const uint32_t af[4] = {p[k][0], p[k][1], p[k + 1][0], p[k + 1][1]};
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      if (skipped<kAll>(n, columns)) continue;
      uint32_t bf[4];
      load_matrices_transposed(bf,
                               b + (8 * n / kPanel * kRows + 8 * k) * kStride<T> + 8 * n % kPanel);
      mma<T>(o[n], af, bf[0], bf[1]);
      mma<T>(o[n + 1], af, bf[2], bf[3]);
    }
  }
}

// o += p b, with p (16 x `rows`) packed and b: the first `rows` rows and `columns` columns of a
// tile of kRows rows. p and b must be there, zero say, up to the next multiple of 16 rows.
template <typename T, int kRows, int kTiles, int kOutTiles>
__device__ inline void multiply_packed(float (&o)[kOutTiles][4], const uint32_t (&p)[kTiles][2],
                                       const T* b, int rows, int columns) {
  static_assert(kTiles % 2 == 0 && kOutTiles % 2 == 0 && 8 * kTiles <= kRows);
  if (rows > 8 * kTiles - 16 && columns >= 8 * kOutTiles)
    multiply_packed_tiles<T, kRows, true>(o, p, b, rows, columns);
  else
    multiply_packed_tiles<T, kRows, false>(o, p, b, rows, columns);
}

// The same with p as results, and for all types; tensor cores round it to T.
template <typename T, int kRows, int kTiles, int kOutTiles>
__device__ inline void multiply(Acc<T> (&o)[kOutTiles][4], const Acc<T> (&p)[kTiles][4], const T* b,
                                int rows, int columns, T* scratch) {
  if constexpr (kTensorCores<T>) {
    uint32_t packed[kTiles][2];
    pack_tiles<T>(packed, p);
    multiply_packed<T, kRows>(o, packed, b, rows, columns);
  } else {
    const Lane lane = this_lane();
    constexpr int kLength = 8 * kTiles + kVector<T>;
    __syncwarp();  // scratch may still be read from an earlier call
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scratch[(lane.g + 8 * (e / 2)) * kLength + 8 * n + 2 * lane.t + e % 2] = p[n][e];
    __syncwarp();
    for (int k = 0; k < rows; ++k) {
      const T p0 = scratch[lane.g * kLength + k], p1 = scratch[(lane.g + 8) * kLength + k];
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (8 * n >= columns) continue;
        const Pair<T> v = *reinterpret_cast<const Pair<T>*>(
            b + (8 * n / kPanel * kRows + k) * kStride<T> + 8 * n % kPanel + 2 * lane.t);
        o[n][0] += p0 * v.first;
        o[n][1] += p0 * v.second;
        o[n][2] += p1 * v.first;
        o[n][3] += p1 * v.second;
      }
    }
  }
}

// Over the four lanes that share rows g and g + 8.
template <typename A>
__device__ inline A row_sum(A x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
template <typename A>
__device__ inline A row_max(A x) {
  x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Sums v[0..7] over the eight lanes that share t; the lane of row g gets the sum of v[g]. Each step
// trades half of what is left with a lane of the other half.
template <typename A>
__device__ inline A column_sums(A (&v)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & (4 * half)) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
      v[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, 4 * half);
    }
  }
  return v[0];
}

// Stores columns `column` and `column + 1` of a dense row of `size` values, as far as they exist.
template <typename T>
__device__ inline void store_two(T* row, int column, int size, Acc<T> first, Acc<T> second) {
  if (size % 2 == 0) {
    if (column < size)
      *reinterpret_cast<Pair<T>*>(row + column) = {store<T>(first), store<T>(second)};
    return;
  }
  if (column < size) row[column] = store<T>(first);
  if (column + 1 < size) row[column + 1] = store<T>(second);
}

// Stores the rows g and g + 8 of o, times their factors, at columns column0.. (a multiple of 8) of
// the dense rows `to` of `size` values; null rows are left out.
template <typename T, int kTiles>
__device__ inline void store_rows(T* const (&to)[2], int column0, int size,
                                  const Acc<T> (&o)[kTiles][4], const Acc<T> (&factor)[2]) {
  const Lane lane = this_lane();
  if constexpr (kTensorCores<T>) {
    if (size % 4 == 0) {
      // Lanes with even and odd t trade a tile each, so that a lane has 4 columns side by side and
      // four lanes 32 bytes of a row.
      const int odd = lane.t % 2;
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t left = pack<T>(o[n][2 * r] * factor[r], o[n][2 * r + 1] * factor[r]);
          const uint32_t right =
              pack<T>(o[n + 1][2 * r] * factor[r], o[n + 1][2 * r + 1] * factor[r]);
          const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
          const int column = column0 + 8 * (n + odd) + 2 * (lane.t - odd);
          if (to[r] != nullptr && column < size)
            *reinterpret_cast<Pair<uint32_t>*>(to[r] + column) = {odd ? other : left,
                                                                  odd ? right : other};
        }
      }
      return;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (to[r] == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      store_two(to[r], column0 + 8 * n + 2 * lane.t, size, o[n][2 * r] * factor[r],
                o[n][2 * r + 1] * factor[r]);
  }
}

}  // namespace spot
