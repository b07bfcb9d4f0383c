// Kernels that make the coefficients of predict_connectivity: R keys a head from those of the
// tokens, then the softmax over them of what each query gives; and one that makes its basis. Every
// product is a tile of 32 rows in shared memory, 4 rows a thread in registers, without tensor
// cores: operands are not rounded.
//
// - keys_kernel adds keys up: sums[r] = sum over tokens j of down[column of j, r] k[j], and the
//   mass of each sum, that of the rows of down. A block per 32 sums and 64 dims of a head. Tokens
//   in ascending order, so that dropping one gives the bits of leaving it out. Cost: N R D
//   multiply-accumulates a head; k is read once for 32 sums, down once for 64 dims of a head.
// - projection_kernel, with projections: keys = scale W_q^T (W_k sums + mass b_k), and what the
//   bias of the queries adds to the logit of each, scale b_q . (W_k sums + mass b_k). A block per
//   32 keys and 64 dims of a head. Cost: 2 R c D a head; the first half again for each 64 dims.
// - coefficients_kernel: a block per 64 queries of a head. Logits are written, and made
//   coefficients by the block that wrote them. Cost: (N-P) R D a head; q is read once for 32 keys.
// - basis_kernel: up, or 0 and its magnitudes above a threshold, transposed, and behind it a column
//   of zeros. A block per 32 coefficients and 32 columns. Cost: up read once, the basis written.
//
// All that is in between is float32 (float64 for float64), and sums, keys and biases have the R
// numbers of a head and dim side by side: [B, H, D, R] and [B, H, R]; mass [B, R]; coefficients
// [B, H, N-P, R]. The basis is in the dtype of up, columns side by side.
//
// A dropped token, and one whose column is no row of down, takes no part: neither its key nor a row
// of down is read for it. That is column n, which means none, and any out of range.
#pragma once

#include "mask.cuh"

namespace spot {

constexpr int kTileThreads = 128;
constexpr int kTileRows = 32;  // of the left operand; columns of the right one are a parameter
constexpr int kTileDepth = 32;

// ---- products of tiles --------------------------------------------------------------------------

// One operand, [depth, rows or columns]; padded, so that filling it along the depth meets different
// banks.
template <typename A, int kWide>
struct alignas(16) Operand {
  A at[kTileDepth][kWide + 4];
};

// Neighbours in shared memory, read together.
template <typename A, int kCount>
struct alignas(kCount * sizeof(A) < 16 ? kCount * sizeof(A) : 16) Run {
  A at[kCount];
};

// Thread t has rows 4 (t / 16) + m and columns n0 + n of a product, n0 = kCount (t % 16).
template <typename A, int kWide>
struct Product {
  static constexpr int kCount = kWide / 16;
  A at[4][kCount] = {};

  __device__ static int row(int m) { return static_cast<int>(threadIdx.x) / 16 * 4 + m; }
  __device__ static int column(int n) { return static_cast<int>(threadIdx.x) % 16 * kCount + n; }

  // Adds left^T right. The caller synchronises.
  __device__ void add(const Operand<A, kTileRows>& left, const Operand<A, kWide>& right) {
#pragma unroll 4
    for (int i = 0; i < kTileDepth; ++i) {
      const auto l = *reinterpret_cast<const Run<A, 4>*>(&left.at[i][row(0)]);
      const auto r = *reinterpret_cast<const Run<A, kCount>*>(&right.at[i][column(0)]);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < kCount; ++n) at[m][n] += l.at[m] * r.at[n];
    }
  }
};

// operand[i][n] = get(i, n), by the whole block. Lanes run along n; with kAlongDepth 8 of them
// along i, for memory that does. kAtOnce: loads of a thread that are under way together.
template <bool kAlongDepth, int kAtOnce, typename A, int kWide, typename Get>
__device__ inline void fill(Operand<A, kWide>& operand, Get&& get) {
  constexpr int kCount = kTileDepth * kWide / kTileThreads;
  const auto place = [](int c, int& i, int& n) {
    const int e = c * kTileThreads + static_cast<int>(threadIdx.x);
    i = kAlongDepth ? e / (8 * kWide) * 8 + e % 8 : e / kWide;
    n = kAlongDepth ? e / 8 % kWide : e % kWide;
  };
  static_assert(kCount % kAtOnce == 0, "whole groups of loads");
#pragma unroll 1
  for (int first = 0; first < kCount; first += kAtOnce) {
    A values[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      int i, n;
      place(first + c, i, n);
      values[c] = get(i, n);
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      int i, n;
      place(first + c, i, n);
      operand.at[i][n] = values[c];
    }
  }
}

// Which tile of which head a block has: `wide` runs fastest, then `rows`, heads and images.
struct TilePlace {
  int64_t head, image;  // head of all images
  int rows, wide;       // first row, first column
  __device__ TilePlace(int heads, int num_rows, int num_wide, int width) {
    const unsigned across = tiles(num_wide, width), down = tiles(num_rows, kTileRows);
    wide = static_cast<int>(blockIdx.x % across) * width;
    rows = static_cast<int>(blockIdx.x / across % down) * kTileRows;
    head = blockIdx.x / across / down;
    image = head / heads;
  }
  // One where there is nothing to cover: its block still has masses and biases to write.
  __host__ __device__ static unsigned tiles(int count, int width) {
    return count <= width ? 1u : (static_cast<unsigned>(count) - 1u) / width + 1u;
  }
};

// ---- keys, added up -----------------------------------------------------------------------------

template <typename T>
struct KeyArgs {
  const T* k;  // [B, N, H, D], strides
  int64_t k_strides[4];
  const T* down;  // [n, R], strides
  int64_t down_token, down_rank, num_down;
  const int64_t* columns;  // [B, N] dense, or null
  const uint8_t* roles;    // [B, N], or null: all take part
  Acc<T>* sums;            // [B, H, D, R]
  Acc<T>* mass;            // [B, R], or null
  Acc<T> factor;           // of the sums
  int64_t tokens;
  int heads, dim, rank;
};

// The row of down of token j of an image, -1 where it takes no part.
template <typename T>
__device__ inline int64_t row_of_down(const KeyArgs<T>& a, int64_t image, int64_t j) {
  if (j >= a.tokens) return -1;
  const int64_t at = image * a.tokens + j;
  if (a.roles != nullptr && a.roles[at] == kDropped) return -1;
  const int64_t row = a.columns == nullptr ? j : a.columns[at];
  return row >= 0 && row < a.num_down ? row : -1;
}

constexpr int kKeyDims = 64;

template <typename T>
__global__ void __launch_bounds__(kTileThreads) keys_kernel(const KeyArgs<T> a) {
  using A = Acc<T>;
  __shared__ Operand<A, kTileRows> down;
  __shared__ Operand<A, kKeyDims> keys;
  __shared__ int64_t rows[2][kTileDepth];  // of down, of this step and the next
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace place(a.heads, a.rank, a.dim, kKeyDims);
  const int64_t head = place.head % a.heads;
  const T* k = a.k + place.image * a.k_strides[0] + head * a.k_strides[2];
  const bool weighs = a.mass != nullptr && head == 0 && place.wide == 0 && thread < kTileRows;
  Product<A, kKeyDims> sums;
  A mass = 0;
  if (thread < kTileDepth) rows[0][thread] = row_of_down(a, place.image, thread);
  __syncthreads();
  int now = 0;
  for (int64_t first = 0; first < a.tokens; first += kTileDepth, now ^= 1) {
    fill<false, 8>(down, [&](int i, int m) {
      const int64_t row = rows[now][i];
      const int r = place.rows + m;
      return row >= 0 && r < a.rank ? load(a.down[row * a.down_token + r * a.down_rank]) : A(0);
    });
    fill<false, 8>(keys, [&](int i, int n) {
      const int d = place.wide + n;
      return rows[now][i] >= 0 && d < a.dim
                 ? load(k[(first + i) * a.k_strides[1] + d * a.k_strides[3]])
                 : A(0);
    });
    if (thread < kTileDepth)
      rows[now ^ 1][thread] = row_of_down(a, place.image, first + kTileDepth + thread);
    __syncthreads();
    sums.add(down, keys);
    if (weighs)
      for (int i = 0; i < kTileDepth; ++i) mass += down.at[i][thread];
    __syncthreads();
  }
  A* to = a.sums + place.head * a.dim * static_cast<int64_t>(a.rank);
#pragma unroll
  for (int n = 0; n < sums.kCount; ++n)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int r = place.rows + sums.row(m), d = place.wide + sums.column(n);
      if (r < a.rank && d < a.dim)
        to[d * static_cast<int64_t>(a.rank) + r] = sums.at[m][n] * a.factor;
    }
  if (weighs && place.rows + thread < a.rank)
    a.mass[place.image * a.rank + place.rows + thread] = mass;
}

// ---- keys, projected ----------------------------------------------------------------------------

template <typename T>
struct ProjectionArgs {
  const Acc<T>*sums, *mass;  // [B, H, D, R], [B, R]
  // [c, D], [c]; strides
  const T *query_weight, *query_bias, *key_weight, *key_bias;
  int64_t query_weight_strides[2], query_bias_stride, key_weight_strides[2], key_bias_stride;
  Acc<T>*keys, *bias;  // [B, H, D, R], [B, H, R]
  Acc<T> scale;
  int heads, dim, rank, channels;
};

// A step is 32 channels: of the sums, then back.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) projection_kernel(const ProjectionArgs<T> a) {
  using A = Acc<T>;
  __shared__ Operand<A, kTileRows> sums, projected;
  __shared__ Operand<A, kTileDepth> there;
  __shared__ Operand<A, kKeyDims> back;
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace place(a.heads, a.rank, a.dim, kKeyDims);
  const int64_t rank = a.rank, of_head = place.head * a.dim * rank;
  const bool biases = place.wide == 0 && thread < kTileRows;
  Product<A, kKeyDims> keys;
  A bias = 0;
  for (int first = 0; first < a.channels; first += kTileDepth) {
    const int channels = min(a.channels - first, kTileDepth);
    Product<A, kTileDepth> step;
    for (int start = 0; start < a.dim; start += kTileDepth) {
      fill<false, 4>(sums, [&](int i, int m) {
        const int d = start + i, r = place.rows + m;
        return d < a.dim && r < a.rank ? a.sums[of_head + d * rank + r] : A(0);
      });
      fill<true, 4>(there, [&](int i, int n) {
        const int d = start + i;
        return d < a.dim && n < channels ? load(a.key_weight[(first + n) * a.key_weight_strides[0] +
                                                             d * a.key_weight_strides[1]])
                                         : A(0);
      });
      __syncthreads();
      step.add(sums, there);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < step.kCount; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int channel = step.column(n), r = place.rows + step.row(m);
        // What is no channel must be 0 even beside a NaN.
        projected.at[channel][step.row(m)] =
            channel < channels && r < a.rank
                ? step.at[m][n] + a.mass[place.image * rank + r] *
                                      load(a.key_bias[(first + channel) * a.key_bias_stride])
                : A(0);
      }
    fill<false, 4>(back, [&](int i, int n) {
      const int d = place.wide + n;
      return i < channels && d < a.dim
                 ? load(a.query_weight[(first + i) * a.query_weight_strides[0] +
                                       d * a.query_weight_strides[1]])
                 : A(0);
    });
    __syncthreads();
    keys.add(projected, back);
    if (biases)
      for (int i = 0; i < channels; ++i)
        bias += load(a.query_bias[(first + i) * a.query_bias_stride]) * projected.at[i][thread];
    __syncthreads();  // with no dims the only one before `projected` is written again
  }
#pragma unroll
  for (int n = 0; n < keys.kCount; ++n)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int r = place.rows + keys.row(m), d = place.wide + keys.column(n);
      if (r < a.rank && d < a.dim) a.keys[of_head + d * rank + r] = keys.at[m][n] * a.scale;
    }
  if (biases && place.rows + thread < a.rank)
    a.bias[place.head * rank + place.rows + thread] = bias * a.scale;
}

// ---- coefficients -------------------------------------------------------------------------------

template <typename T>
struct CoefficientArgs {
  const T* q;  // [B, N-P, H, D], strides
  int64_t q_strides[4];
  const Acc<T>*keys, *bias;  // [B, H, D, R], [B, H, R] or null
  Acc<T>* out;               // [B, H, N-P, R]
  int heads, queries, rank, dim;
};

__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// Logits become their softmax, by one warp; a lane has every 32nd.
template <typename A>
__device__ inline void softmax_row(A* row, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  A top = -static_cast<A>(INFINITY), total = 0;
  for (int r = lane; r < count; r += kWarp) top = row[r] > top ? row[r] : top;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, top, step);
    top = other > top ? other : top;
  }
  for (int r = lane; r < count; r += kWarp) {
    const A x = exponential(row[r] - top);
    row[r] = x;
    total += x;
  }
  total = warp_sum(total);
  for (int r = lane; r < count; r += kWarp) row[r] /= total;
}

constexpr int kTileQueries = 64;

template <typename T>
__global__ void __launch_bounds__(kTileThreads) coefficients_kernel(const CoefficientArgs<T> a) {
  using A = Acc<T>;
  __shared__ Operand<A, kTileRows> keys;
  __shared__ Operand<A, kTileQueries> queries;
  const TilePlace place(a.heads, 0, a.queries, kTileQueries);
  const int64_t rank = a.rank;
  const int count = min(a.queries - place.wide, kTileQueries);
  const T* q = a.q + place.image * a.q_strides[0] + place.wide * a.q_strides[1] +
               place.head % a.heads * a.q_strides[2];
  A* out = a.out + (place.head * a.queries + place.wide) * rank;
  for (int rows = 0; rows < a.rank; rows += kTileRows) {
    Product<A, kTileQueries> logits;
    for (int start = 0; start < a.dim; start += kTileDepth) {
      fill<false, 8>(keys, [&](int i, int m) {
        const int d = start + i, r = rows + m;
        return d < a.dim && r < a.rank ? a.keys[(place.head * a.dim + d) * rank + r] : A(0);
      });
      fill<true, 8>(queries, [&](int i, int n) {
        const int d = start + i;
        return d < a.dim && n < count ? load(q[n * a.q_strides[1] + d * a.q_strides[3]]) : A(0);
      });
      __syncthreads();
      logits.add(keys, queries);
      __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int r = rows + logits.row(m);
      if (r >= a.rank) continue;
      const A bias = a.bias != nullptr ? a.bias[place.head * rank + r] : A(0);
#pragma unroll
      for (int n = 0; n < logits.kCount; ++n)
        if (logits.column(n) < count) out[logits.column(n) * rank + r] = logits.at[m][n] + bias;
    }
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < count; row += kTileThreads / kWarp)
    softmax_row(out + row * rank, a.rank);
}

// ---- the basis ----------------------------------------------------------------------------------

template <typename T>
struct BasisArgs {
  const T* up;  // [n, R], strides
  int64_t up_token, up_rank, num_up;
  T* basis;         // [R, columns]
  int64_t columns;  // n, or n + 1: the last is of zeros
  int rank;
  bool magnitudes;  // |up| where that exceeds `least`, else 0
  Acc<T> least;
};

// Reads along the coefficients, writes along the columns.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) basis_kernel(const BasisArgs<T> a) {
  using A = Acc<T>;
  __shared__ Operand<A, kTileRows> tile;
  const unsigned down = TilePlace::tiles(a.rank, kTileDepth);
  const int first_rank = static_cast<int>(blockIdx.x % down) * kTileDepth;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x / down) * kTileRows;
  fill<true, 8>(tile, [&](int i, int n) {
    const int r = first_rank + i;
    const int64_t column = first_column + n;
    if (r >= a.rank || column >= a.num_up) return A(0);
    const A x = load(a.up[column * a.up_token + r * a.up_rank]);
    if (!a.magnitudes) return x;
    const A size = x < 0 ? -x : x;
    return size <= a.least ? A(0) : size;  // NaN stays
  });
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kTileDepth * kTileRows; e += kTileThreads) {
    const int i = e / kTileRows, n = e % kTileRows, r = first_rank + i;
    const int64_t column = first_column + n;
    if (r < a.rank && column < a.columns) a.basis[r * a.columns + column] = store<T>(tile.at[i][n]);
  }
}

}  // namespace spot
