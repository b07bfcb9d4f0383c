// Forward kernels of attention_stats. One warp works on 16 query rows.
//
// - attention_rows_kernel (with statistics; 16-bit types, at most 272 tokens, no bias): one block
//   per image and head holds all keys and values in shared memory, a warp complete rows of the map,
//   16 at a time, in registers. Column sums stay in the block. Reads q, k, v once, writes each
//   result once; no scratch.
//   With kNamed rows see named keys only (sparse_attention).
// - attention_loop_kernel (all types and lengths): one block per query tile loops over key tiles,
//   with statistics twice: the first pass finds the maximum and sum of each row, the second has
//   final values of the map, from which it takes the product with v, row statistics and, per query
//   tile, moments of the columns, [B, H, tiles, 2 N + 1] with the number of rows, which
//   column_statistics_kernel combines in order. Without statistics one pass with a running maximum
//   is enough.
//
// Entries are summed relative to something near them, so that small variances keep their digits
// whatever share the prefix takes: rows to their mean, which is known before, columns to `origin`,
// their entry in the first counted row that a warp sees. Moments of several warps or query tiles
// are combined pairwise.
#pragma once

#include "attention.cuh"

namespace spot {

template <typename T>
struct ForwardArgs : AttentionArgs {
  T* out;                // [B, N, H, D]
  Acc<T>* stats;         // [B, N, H, 6]
  Acc<T>* lse;           // [B, N, H]
  Acc<T>* partial;       // [B, H, tiles, 2 N + 1], loop with statistics
  const uint32_t* seen;  // [B, H, N, words + 1], with kNamed: what each row sees (RowState)
};

constexpr int kLoopWarps = 4;
// Blocks that are to run side by side, which bounds registers.
template <typename T, int kOut, bool kStats>
constexpr int kLoopBlocks = kTensorCores<T> && kOut <= 64 && !kStats ? 3 : 2;

// Keys per tile of the loop kernel.
template <typename T>
constexpr int kForwardKeys = kTensorCores<T> ? 64 : (sizeof(T) == 8 ? 16 : 32);
// Buffers for tiles: copies of the next tile run under the products of this one.
template <typename T>
constexpr int kStages = kTensorCores<T> ? 2 : 1;

// What a warp needs to know of its rows g and g + 8.
template <typename A>
struct RowTerms {
  A per_row[2];  // 1 / row sum for kept patch rows, 0 for others
  A counted[2];  // 1 for kept patch rows, 0 for others
  A mean[2];     // of the row's patches; 0 for rows that do not count
  A square[2];   // of distances from it, this lane's columns

  // `prefix`: sum of the exponentials of prefix columns, of `sum` in all.
  __device__ void set(int r, bool kept, A sum, A prefix, A inverse_sum, A inverse) {
    per_row[r] = kept ? inverse_sum : A(0);
    counted[r] = kept ? A(1) : A(0);
    mean[r] = (sum - prefix) * per_row[r] * inverse;
    square[r] = A(0);
  }
  // The first counted one of the 16 rows, or -1; and how many there are. The same in all lanes.
  __device__ int first() const {
    const unsigned low = __ballot_sync(0xffffffffu, counted[0] != A(0));
    const unsigned high = __ballot_sync(0xffffffffu, counted[1] != A(0));
    return low != 0 ? (__ffs(low) - 1) / 4 : high != 0 ? (__ffs(high) - 1) / 4 + 8 : -1;
  }
  __device__ int count() const {
    const unsigned low = __ballot_sync(0xffffffffu, counted[0] != A(0));
    return (__popc(low) + __popc(__ballot_sync(0xffffffffu, counted[1] != A(0)))) / 4;
  }
};

// Writes what row `row` of the warp's 16 has in the columns of the tiles: their origin.
template <typename A, int kTiles>
__device__ inline void write_origin(A* origin, const A (&e)[kTiles][4], const RowTerms<A>& rows,
                                    int row) {
  const Lane lane = this_lane();
  if (row >= 0 && lane.g == row % 8) {
    const bool high = row >= 8;
    const A scale = high ? rows.per_row[1] : rows.per_row[0];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      *reinterpret_cast<Pair<A>*>(origin + 8 * n + 2 * lane.t) = {
          (high ? e[n][2] : e[n][0]) * scale, (high ? e[n][3] : e[n][1]) * scale};
  }
  __syncwarp();
}

// Adds the exponentials of prefix columns of tiles that start at `column0` to the rows' sums.
template <typename A, int kTiles>
__device__ inline void add_prefix(A (&sum)[2], const A (&e)[kTiles][4], int prefix, int column0) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (column0 + 8 * n >= prefix) break;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column0 + 8 * n + 2 * this_lane().t + i % 2 < prefix) sum[i / 2] += e[n][i];
  }
}

// Statistics of one pair of result tiles (16 columns): adds to rows.square, and returns sums
// over the counted rows of one column: lane (g, t) gets column 8 (g / 4) + 2t + g % 2 of the pair,
// the sum of c where g / 2 % 2 == 0, of c^2 where it is 1, with c = p - origin. e: unnormalised
// map; weight: 1 for columns that are kept patches, 0 for others.
template <typename A>
__device__ inline A pair_statistics(const A (&even)[4], const A (&odd)[4], RowTerms<A>& rows,
                                    const A* weight, const A* origin) {
  const int t = this_lane().t;
  A v[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const A(&e)[4] = half ? odd : even;
    const Pair<A> w = *reinterpret_cast<const Pair<A>*>(weight + 8 * half + 2 * t);
    const Pair<A> from = *reinterpret_cast<const Pair<A>*>(origin + 8 * half + 2 * t);
    A c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const A across = (e[i] * rows.per_row[r] - rows.mean[r]) * (i % 2 ? w.second : w.first);
      rows.square[r] += across * across;
      // Chosen, not multiplied: rows that do not count may hold NaN.
      c[i] = rows.counted[r] != A(0) ? e[i] * rows.per_row[r] - (i % 2 ? from.second : from.first)
                                     : A(0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[4 * half + i] = c[i] + c[2 + i];
      v[4 * half + 2 + i] = c[i] * c[i] + c[2 + i] * c[2 + i];
    }
  }
  return column_sums(v);
}

// Mean and sum of squared distances from it over `count` rows.
template <typename A>
struct Moments {
  A count = A(0), mean = A(0), square = A(0);

  // From sums of c = p - origin and of c^2.
  __device__ static Moments of(A count, A origin, A sum, A squares) {
    const A shift = count > A(0) ? sum / count : A(0);
    return {count, origin + shift, squares - sum * shift};
  }
  __device__ void add(const Moments& more) {
    if (more.count == A(0)) return;
    const A both = count + more.count, step = more.mean - mean;
    mean += step * (more.count / both);
    square += more.square + step * step * (count * more.count / both);
    count = both;
  }
};

// Where the value that pair_statistics returned belongs among 32: 16 sums, then 16 squares.
__device__ inline int statistic_slot() {
  const Lane lane = this_lane();
  return lane.g / 2 % 2 * 16 + lane.g / 4 * 8 + 2 * lane.t + lane.g % 2;
}
// Its inverse: slot of the sum of column c; the squares are 16 further.
__device__ inline int column_slot(int column) { return column / 16 * 32 + column % 16; }

// The statistics row of a token.
template <typename T>
__device__ inline Acc<T>* stats_row(const ForwardArgs<T>& a, Slice slice, int token) {
  return a.stats + token_index(a, slice, token) * 6;
}

// Mean and variance, from the sum of squared distances; inverse: 1 / n.
template <typename A>
__device__ inline void write_moments(A* mean_and_variance, bool counted, A mean, A square,
                                     A inverse) {
  mean_and_variance[0] = counted ? not_below_zero(mean) : A(0);
  // Of a single entry: exactly zero, unless it is NaN.
  const A variance = inverse != A(1) ? not_below_zero(square * inverse) : mean - mean;
  mean_and_variance[1] = counted ? variance : A(0);
}

// Entries 0 to 3 of the statistics that a warp knows of the rows and columns it has seen. cls_in
// and the moments of rows row0.. come from the four lanes of a row.
template <typename T>
__device__ inline void write_row_statistics(const ForwardArgs<T>& a, Slice slice, int row0,
                                            const RowTerms<Acc<T>>& rows, const Acc<T> (&cls_in)[2],
                                            Acc<T> inverse) {
  using A = Acc<T>;
  const Lane lane = this_lane();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const A square = row_sum(rows.square[r]);
    const int row = row0 + lane.g + 8 * r;
    if (lane.t != 0 || row >= a.tokens) continue;
    A* to = stats_row(a, slice, row);
    const bool counted = rows.counted[r] != A(0);
    to[1] = counted && a.class_token ? cls_in[r] : A(0);
    write_moments(to + 2, counted, rows.mean[r], square, inverse);
  }
}

// What the class token takes from the tokens of a tile: row 0, in the lanes with g == 0 of the warp
// that has it. `weight` is per column of the tile.
template <typename T, int kTiles>
__device__ inline void write_cls_out(const ForwardArgs<T>& a, Slice slice, int column0,
                                     const Acc<T> (&e)[kTiles][4], Acc<T> inverse_sum,
                                     const Acc<T>* weight) {
  using A = Acc<T>;
  const Lane lane = this_lane();
  if (lane.g != 0) return;
  const int64_t step = a.heads * 6;
  A* to = stats_row(a, slice, column0 + 2 * lane.t);
#pragma unroll
  for (int n = 0; n < kTiles; ++n, to += 8 * step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = 8 * n + 2 * lane.t + i;
      const bool counted = a.class_token && weight[c] != A(0);
      if (column0 + c < a.tokens) to[i * step] = counted ? e[n][i] * inverse_sum : A(0);
    }
  }
}

template <typename T>
__device__ inline void write_lse(const ForwardArgs<T>& a, Slice slice, int row0,
                                 const Acc<T> (&top)[2], const Acc<T> (&sum)[2]) {
  const Lane lane = this_lane();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + lane.g + 8 * r;
    if (lane.t == 0 && row < a.tokens)
      a.lse[token_index(a, slice, row)] = (top[r] + logarithm<T>(sum[r])) / kLogitUnit<T>;
  }
}

// ---- rows that see named keys only --------------------------------------------------------------

// Bits of the keys that a row sees, then what is to become of the row as a whole.
enum RowState : uint32_t { kSees = 0, kBlind = 1, kBad = 2 };

template <int kKeys>
constexpr int kSeenBits = (kKeys + 31) / 32;  // words

// Dot products of the rows g and g + 8 -> logits; what a row does not see is -inf.
template <int kKeys, typename T, int kTiles>
__device__ inline void to_named_logits(float (&s)[kTiles][4], const ForwardArgs<T>& a,
                                       const uint32_t* const (&seen)[2]) {
  const float scale = static_cast<float>(a.scale) * kLogitUnit<T>;
#pragma unroll
  for (int n = 0; n < kTiles; n += 4) {
    const uint32_t words[2] = {seen[0][n / 4] >> 2 * this_lane().t,
                               seen[1][n / 4] >> 2 * this_lane().t};
#pragma unroll
    for (int i = n; i < min(n + 4, kTiles); ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[i][e] = words[e / 2] >> (8 * (i - n) + e % 2) & 1u ? s[i][e] * scale : -infinity<float>();
  }
}

// A row without a softmax: the columns that it sees have no moments. Out of line, as what follows:
// it is rare, and registers are short.
__device__ __noinline__ inline void spoil_columns(const uint32_t* seen, int tokens, float* sums) {
  __syncwarp();
  for (int j = this_lane().index; j < tokens; j += kWarp)
    if (seen[j / 32] >> j % 32 & 1u) sums[column_slot(j)] = not_a_number<float>();
  __syncwarp();
}

// Values that are not finite must not meet the zeros of rows that do not see them: makes them zero
// in the tile of v, and marks their tokens. Whether this thread found some.
template <int kKeys, typename T>
__device__ inline bool set_odd_aside(T* tile, float* marks, int depth, int thread, int threads) {
  bool found = false;
#pragma unroll 1
  for (int i = thread; i < kKeys * depth; i += threads) {
    const int row = i / kPanel % kKeys;
    T* at = tile + (i / kPanel / kKeys * kKeys + row) * kStride<T> + i % kPanel;
    const float value = load(*at);
    if (value - value == 0.0f) continue;
    *at = store<T>(0);
    marks[row] = 1.0f;
    found = true;
  }
  return found;
}
// Adds them to what was stored for the 16 rows from row0 on, where these see them.
template <typename T>
__device__ __noinline__ void add_odd(const ForwardArgs<T>& a, Slice slice, int row0,
                                     const float* marks, int words) {
  const T* source = origin<T>(a.v, slice);
  const uint32_t* seen = a.seen + slice_index(a, slice) * a.tokens * words;
  __syncwarp();
  for (int row = row0; row < min(row0 + 16, a.tokens); ++row)
    for (int j = 0; j < a.tokens; ++j) {
      if (marks[j] == 0.0f || (seen[row * words + j / 32] >> j % 32 & 1u) == 0) continue;
      T* out = a.out + token_index(a, slice, row) * a.dim;
      for (int c = this_lane().index; c < a.dim; c += kWarp) {
        const float value = load(source[j * a.v.token + c * a.v.dim]);
        if (value - value != 0.0f) out[c] = store<T>(load(out[c]) + value);
      }
    }
}

// ---- all keys in one block ----------------------------------------------------------------------

// Shared memory: tiles of k and v, one of q per warp, hide and weight [kKeys], column sums [warps,
// 2 kKeys], their origins [warps, kKeys] and counted rows [warps].
template <typename T, int kKeys>
size_t rows_shared(int depth, int warps) {
  const size_t values = tile_values<T>(2 * kKeys + 16 * warps, depth);
  const size_t tables = (2 + 3 * warps) * kKeys + warps;
  return values * sizeof(T) + tables * sizeof(float);
}

// Most threads of a block; this bounds registers, so that at least two blocks of 4 warps (3 up to
// 144 keys, 4 up to 80) run side by side, one loading while another computes.
template <int kKeys>
constexpr int kRowsThreads = kKeys > 144  ? 256
                             : kKeys > 80 ? 384
                                          : 512;

// kNamed: rows see what a.seen says, which knows the mask too.
template <typename T, int kKeys, bool kStats, bool kNamed>
__global__ void __launch_bounds__(kRowsThreads<kKeys>)
    attention_rows_kernel(const ForwardArgs<T> a) {
  static_assert(kTensorCores<T> && kKeys % 16 == 0);
  constexpr int kTiles = kKeys / 8, kWords = kSeenBits<kKeys>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Lane lane = this_lane();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const Slice slice = slice_at(a, blockIdx.x);
  T* k_tile = reinterpret_cast<T*>(shared_memory);
  T* v_tile = k_tile + tile_values<T>(kKeys, a.depth);
  T* q_tile = v_tile + tile_values<T>(kKeys + 16 * warp, a.depth);
  float* hide = reinterpret_cast<float*>(v_tile + tile_values<T>(kKeys + 16 * warps, a.depth));
  float* weight = hide + kKeys;
  float* sums = weight + kKeys;               // [warps, 2 kKeys]
  float* origins = sums + warps * 2 * kKeys;  // [warps, kKeys]
  float* counts = origins + warps * kKeys;    // [warps]
  float* own_sums = sums + warp * 2 * kKeys;
  float* own_origin = origins + warp * kKeys;

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  load_tile<kKeys>(k_tile, a, a.k, slice, 0, 0, a.depth, thread, threads);
  load_tile<16>(q_tile, a, a.q, slice, 16 * warp, 0, a.depth, lane.index, kWarp);
  load_tile<kKeys>(v_tile, a, a.v, slice, 0, 0, a.depth, thread, threads);
  for (int j = thread; j < kKeys; j += threads) {
    const int role = role_of(a, slice, j);
    hide[j] = kNamed ? 0.0f : hiding<float>(role);  // with kNamed: marks of odd values
    weight[j] = role == kPatch ? 1.0f : 0.0f;
  }
  for (int j = thread; kStats && j < warps * 3 * kKeys; j += threads) sums[j] = 0.0f;
  const float inverse = inverse_count<float>(a, slice);
  bool has_origin = false;
  copy_async_wait();
  __syncthreads();
  bool odd = false;
  if constexpr (kNamed)
    odd = __syncthreads_or(set_odd_aside<kKeys>(v_tile, hide, a.depth, thread, threads));

  for (int row0 = 16 * warp; row0 < a.tokens; row0 += 16 * warps) {
    copy_async_wait();
    __syncwarp();
    float s[kTiles][4];
    clear(s);
    multiply_transposed<T, kKeys>(s, q_tile, k_tile, a.depth, kKeys);
    __syncwarp();  // all lanes have read q: the next rows may come in
    if (row0 + 16 * warps < a.tokens)
      load_tile<16>(q_tile, a, a.q, slice, row0 + 16 * warps, 0, a.depth, lane.index, kWarp);
    uint32_t states[2] = {kSees, kSees};
    bool sees_class[2] = {true, true};
    if constexpr (kNamed) {
      const uint32_t* seen[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = slice_index(a, slice) * a.tokens;
        seen[r] = a.seen + (row + min(row0 + lane.g + 8 * r, a.tokens - 1)) * (kWords + 1);
        states[r] = seen[r][kWords];
        sees_class[r] = (seen[r][0] & 1u) != 0;
      }
      to_named_logits<kKeys>(s, a, seen);
    } else {
      to_logits<T>(s, a, row0, 0, hide);
    }

    float top[2] = {-infinity<float>(), -infinity<float>()}, sum[2] = {0.0f, 0.0f};
    each_element<kTiles>([&](int n, int e, int, int) { top[e / 2] = max(top[e / 2], s[n][e]); });
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = finite_top(row_max(top[r]));
    each_element<kTiles>([&](int n, int e, int, int) {
      s[n][e] = exp2_fast(s[n][e] - top[e / 2]);
      sum[e / 2] += s[n][e];
    });
    float inverse_sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = row_sum(sum[r]);
      if (states[r] == kBad) sum[r] = not_a_number<float>();
      const bool sees = row0 + lane.g + 8 * r < a.tokens && states[r] != kBlind;
      inverse_sum[r] = sees ? 1.0f / sum[r] : 0.0f;
    }
    write_lse(a, slice, row0, top, sum);

    if constexpr (kStats) {
      RowTerms<float> rows;
      float prefix[2] = {0.0f, 0.0f};
      add_prefix(prefix, s, a.prefix, 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row0 + lane.g + 8 * r;
        rows.set(r, row < a.tokens && weight[row] != 0.0f, sum[r], row_sum(prefix[r]),
                 inverse_sum[r], inverse);
        // What it does not see is not to become NaN; what it does, see below.
        if (kNamed && isnan(sum[r])) rows.per_row[r] = 0.0f;
      }
      if (!has_origin) {
        const int first = rows.first();
        write_origin(own_origin, s, rows, first);
        has_origin = first >= 0;
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2)
        own_sums[8 * n * 2 + statistic_slot()] +=
            pair_statistics(s[n], s[n + 1], rows, weight + 8 * n, own_origin + 8 * n);
      if constexpr (kNamed) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool odd_row = rows.counted[r] != 0.0f && isnan(sum[r]);
          unsigned odd_rows = __ballot_sync(0xffffffffu, odd_row && lane.t == 0);
          for (; odd_rows != 0; odd_rows &= odd_rows - 1) {
            const int64_t row = row0 + 8 * r + (__ffs(odd_rows) - 1) / 4;
            spoil_columns(a.seen + (slice_index(a, slice) * a.tokens + row) * (kWords + 1),
                          a.tokens, own_sums);
          }
        }
      }
      const float cls_in[2] = {sees_class[0] ? s[0][0] * inverse_sum[0] : 0.0f,  // where t == 0
                               sees_class[1] ? s[0][2] * inverse_sum[1] : 0.0f};
      write_row_statistics(a, slice, row0, rows, cls_in, inverse);
      if (row0 == 0) write_cls_out<T>(a, slice, 0, s, inverse_sum[0], weight);
    }

    uint32_t packed[kTiles][2];
    pack_tiles<T>(packed, s);
    for (int column = 0; column < a.depth; column += 64) {
      float o[8][4];
      clear(o);
      multiply_packed<T, kKeys>(o, packed, v_tile + tile_values<T>(kKeys, column), kKeys,
                                a.depth - column);
      write_rows(a.out, a, slice, row0, column, o, inverse_sum);
    }
    if (odd) add_odd<T>(a, slice, row0, hide, kWords + 1);
  }

  if constexpr (!kStats) return;
  float count = 0.0f;
  for (int row0 = 16 * warp; row0 < a.tokens; row0 += 16 * warps)
    count += lane.index < 16 && row0 + lane.index < kKeys ? weight[row0 + lane.index] : 0.0f;
  count = warp_sum(count);
  if (lane.index == 0) counts[warp] = count;
  __syncthreads();
  for (int j = thread; j < a.tokens; j += threads) {
    Moments<float> column;
    for (int w = 0; w < warps; ++w)
      column.add(Moments<float>::of(counts[w], origins[w * kKeys + j],
                                    sums[w * 2 * kKeys + column_slot(j)],
                                    sums[w * 2 * kKeys + column_slot(j) + 16]));
    write_moments(stats_row(a, slice, j) + 4, weight[j] != 0.0f, column.mean, column.square,
                  inverse);
  }
}

// False where a block has no room for all keys.
template <typename T, int kKeys, bool kStats, bool kNamed>
bool launch_rows(const char* op, const Tensor& q, const ForwardArgs<T>& a, cudaStream_t stream) {
  const int64_t blocks = a.batch * a.heads;
  // Few blocks: more warps in each.
  const int row_tiles = static_cast<int>(ceil_div(a.tokens, 16));
  const int full = blocks < 2 * device_attribute(q, cudaDevAttrMultiProcessorCount) ? 8 : 4;
  const int warps = std::min(full, row_tiles);
  const size_t shared = rows_shared<T, kKeys>(a.depth, warps);
  if (shared > max_shared(q)) return false;
  launch(op, attention_rows_kernel<T, kKeys, kStats, kNamed>, blocks, warps * kWarp, shared, stream,
         a);
  return true;
}

// f(integral constant of the keys that a block of attention_rows_kernel holds), where there is one
// for that many tokens: sizes of common ViTs, whole and after cuts: 197 tokens, 138, 98, 69; 257 to
// 261.
constexpr int kMostRowsKeys = 272;

template <typename F>
bool dispatch_keys(int tokens, F&& f) {
  if (tokens <= 80) return f(std::integral_constant<int, 80>{});
  if (tokens <= 112) return f(std::integral_constant<int, 112>{});
  if (tokens <= 144) return f(std::integral_constant<int, 144>{});
  if (tokens <= 208) return f(std::integral_constant<int, 208>{});
  if (tokens <= kMostRowsKeys) return f(std::integral_constant<int, kMostRowsKeys>{});
  return false;
}

// ---- loop over keys -----------------------------------------------------------------------------

// Shared memory: a tile of q per warp; per stage a tile of k and one of v, kOut columns wide; per
// warp scratch of the product; per stage hide, weight [keys] and, with statistics, column sums
// [warps, 2 keys] and their origins [warps, keys]; counted rows [warps].
template <typename T, int kOut, bool kStats>
size_t loop_shared(int depth, int warps) {
  constexpr int kKeys = kForwardKeys<T>;
  const size_t values = tile_values<T>(16 * warps + kStages<T> * kKeys, depth) +
                        tile_values<T>(kStages<T> * kKeys, kOut) +
                        warps * kProductScratch<T, kKeys / 8>;
  const size_t tables = kStages<T> * kKeys * (2 + (kStats ? 3 * warps : 0)) + (kStats ? warps : 0);
  return values * sizeof(T) + tables * sizeof(Acc<T>);
}

template <typename T, int kOut, bool kStats>
__global__ void __launch_bounds__(kLoopWarps* kWarp, (kLoopBlocks<T, kOut, kStats>))
    attention_loop_kernel(const ForwardArgs<T> a, int tiles, int pieces) {
  using A = Acc<T>;
  constexpr int kKeys = kForwardKeys<T>, kTiles = kKeys / 8, kOutTiles = kOut / 8;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, warps = threads / kWarp;
  const Place place = place_of(a, pieces, tiles);
  const Slice slice = place.slice;
  const int piece = place.piece, tile = place.tile;
  const int column0 = piece * kOut, out_columns = min(kOut, a.depth - column0);
  const int k_values = tile_values<T>(kKeys, a.depth);
  constexpr int kValues = tile_values<T>(kKeys, kOut);
  T* k_tiles = reinterpret_cast<T*>(shared_memory);
  T* v_tiles = k_tiles + kStages<T> * k_values;
  T* q_tile = v_tiles + kStages<T> * kValues + tile_values<T>(16 * warp, a.depth);
  T* scratch = v_tiles + kStages<T> * kValues + tile_values<T>(16 * warps, a.depth);
  A* hides = reinterpret_cast<A*>(scratch + warps * kProductScratch<T, kTiles>);
  A* weights = hides + kStages<T> * kKeys;
  A* sums = weights + kStages<T> * kKeys;                  // [stages, warps, 2 keys]
  A* origins = sums + kStages<T> * warps * 2 * kKeys;      // [stages, warps, keys]
  A* counted_rows = origins + kStages<T> * warps * kKeys;  // [warps]
  scratch += warp * kProductScratch<T, kTiles>;

  const int key_tiles = (a.tokens + kKeys - 1) / kKeys;
  const int row0 = 16 * (tile * warps + warp);
  const bool active = row0 < a.tokens;  // others still load and meet at barriers

  const auto load_stage = [&](int key_tile, bool with_values) {
    const int stage = key_tile % kStages<T>, first = key_tile * kKeys;
    load_tile<kKeys>(k_tiles + stage * k_values, a, a.k, slice, first, 0, a.depth, thread, threads);
    if (with_values)
      load_tile<kKeys>(v_tiles + stage * kValues, a, a.v, slice, first, column0, out_columns,
                       thread, threads);
    for (int j = thread; j < kKeys; j += threads) {
      const int role = role_of(a, slice, first + j);
      hides[stage * kKeys + j] = hiding<A>(role);
      weights[stage * kKeys + j] = role == kPatch ? A(1) : A(0);
    }
  };
  // Calls f(key tile, stage) for all tiles in order. At each call the tile is there, and all warps
  // are done with the call before.
  const auto each_key_tile = [&](bool with_values, auto&& f) {
    __syncthreads();
    if (kStages<T> == 2) load_stage(0, with_values);
    for (int key_tile = 0; key_tile < key_tiles; ++key_tile) {
      if (kStages<T> == 1) {
        __syncthreads();
        load_stage(key_tile, with_values);
      }
      copy_async_wait();
      __syncthreads();
      if (kStages<T> == 2 && key_tile + 1 < key_tiles) load_stage(key_tile + 1, with_values);
      f(key_tile, key_tile % kStages<T>);
    }
  };
  A s[kTiles][4];
  const auto logits = [&](int key_tile, int stage) {
    const int columns = min(kKeys, a.tokens - key_tile * kKeys);
    clear(s);
    multiply_transposed<T, kKeys>(s, q_tile, k_tiles + stage * k_values, a.depth, columns);
    to_logits<T>(s, a, row0, key_tile * kKeys, hides + stage * kKeys);
    if (a.bias != nullptr) add_bias<T, false>(s, a, slice, row0, key_tile * kKeys);
  };

  load_tile<16>(q_tile, a, a.q, slice, row0, 0, a.depth, lane.index, kWarp);
  A top[2] = {-infinity<A>(), -infinity<A>()}, sum[2] = {A(0), A(0)};
  // Takes a tile of logits into the running maximum and sum (this lane's columns); returns in
  // `factor` what earlier sums are to be multiplied with, and leaves exponentials in s.
  const auto running = [&](A(&factor)[2]) {
    A highest[2] = {top[0], top[1]};
    each_element<kTiles>(
        [&](int n, int e, int, int) { highest[e / 2] = max(highest[e / 2], s[n][e]); });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = row_max(highest[r]);
      factor[r] = exponential<T>(top[r] - finite_top(highest[r]));
      top[r] = highest[r];
      sum[r] *= factor[r];
    }
    each_element<kTiles>([&](int n, int e, int, int) {
      s[n][e] = exponential<T>(s[n][e] - finite_top(top[e / 2]));
      sum[e / 2] += s[n][e];
    });
  };
  A inverse_sum[2] = {A(0), A(0)};
  // The sums of whole rows, once all keys were seen.
  const auto finish_rows = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = row_sum(sum[r]);
      top[r] = finite_top(top[r]);
      inverse_sum[r] = row0 + lane.g + 8 * r < a.tokens ? A(1) / sum[r] : A(0);
    }
    if (piece == 0) write_lse(a, slice, row0, top, sum);
  };

  A o[kOutTiles][4];
  clear(o);
  const auto add_values = [&](int key_tile, int stage) {
    multiply<T, kKeys>(o, s, v_tiles + stage * kValues, min(kKeys, a.tokens - key_tile * kKeys),
                       out_columns, scratch);
  };

  if constexpr (!kStats) {
    each_key_tile(true, [&](int key_tile, int stage) {
      if (!active) return;
      logits(key_tile, stage);
      A factor[2];
      running(factor);
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] *= factor[e / 2];
      add_values(key_tile, stage);
    });
    if (active) finish_rows();
  } else {
    A prefix[2] = {A(0), A(0)};
    each_key_tile(false, [&](int key_tile, int stage) {
      if (!active) return;
      logits(key_tile, stage);
      A factor[2];
      running(factor);
      prefix[0] *= factor[0];
      prefix[1] *= factor[1];
      add_prefix(prefix, s, a.prefix, key_tile * kKeys);
    });
    const A inverse = inverse_count<A>(a, slice);
    A cls_in[2] = {A(0), A(0)};
    RowTerms<A> rows{};
    if (active) {
      finish_rows();
#pragma unroll
      for (int r = 0; r < 2; ++r)
        rows.set(r, role_of(a, slice, row0 + lane.g + 8 * r) == kPatch, sum[r], row_sum(prefix[r]),
                 inverse_sum[r], inverse);
    }
    const int first = rows.first(), count = rows.count();
    if (lane.index == 0) counted_rows[warp] = static_cast<A>(count);
    // Columns of a key tile, over the warps in order; all warps have written theirs.
    const int64_t tile_size = 2 * static_cast<int64_t>(a.tokens) + 1;
    A* partial = a.partial + (slice_index(a, slice) * tiles + tile) * tile_size;
    const auto flush = [&](int key_tile) {
      const int at = key_tile % kStages<T> * warps;
      for (int j = thread; j < kKeys; j += threads) {
        const int column = key_tile * kKeys + j;
        if (piece != 0 || column >= a.tokens) continue;
        Moments<A> total;
        for (int w = 0; w < warps; ++w) {
          if (16 * (tile * warps + w) >= a.tokens) continue;
          const A* from = sums + (at + w) * 2 * kKeys + column_slot(j);
          total.add(
              Moments<A>::of(counted_rows[w], origins[(at + w) * kKeys + j], from[0], from[16]));
        }
        partial[column] = total.mean;
        partial[a.tokens + column] = total.square;
        if (column == 0) partial[2 * static_cast<int64_t>(a.tokens)] = total.count;
      }
    };
    each_key_tile(true, [&](int key_tile, int stage) {
      // With two stages the sums of the tile before are complete, and this tile has its own.
      if (kStages<T> == 2 && key_tile > 0) flush(key_tile - 1);
      if (active) {
        logits(key_tile, stage);
        each_element<kTiles>(
            [&](int n, int e, int, int) { s[n][e] = exponential<T>(s[n][e] - top[e / 2]); });
        A* own_sums = sums + (stage * warps + warp) * 2 * kKeys;
        A* own_origin = origins + (stage * warps + warp) * kKeys;
        const A* weight = weights + stage * kKeys;
        write_origin(own_origin, s, rows, first);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2)
          own_sums[8 * n * 2 + statistic_slot()] =
              pair_statistics(s[n], s[n + 1], rows, weight + 8 * n, own_origin + 8 * n);
        if (piece == 0 && row0 == 0)
          write_cls_out<T>(a, slice, key_tile * kKeys, s, inverse_sum[0], weight);
        if (key_tile == 0) {
          cls_in[0] = s[0][0] * inverse_sum[0];  // where t == 0
          cls_in[1] = s[0][2] * inverse_sum[1];
        }
        add_values(key_tile, stage);
      }
      if (kStages<T> == 1) {
        __syncthreads();
        flush(key_tile);
      }
    });
    if (kStages<T> == 2) {
      __syncthreads();
      flush(key_tiles - 1);
    }
    if (active && piece == 0) write_row_statistics(a, slice, row0, rows, cls_in, inverse);
  }
  if (active) write_rows(a.out, a, slice, row0, column0, o, inverse_sum);
}

// Entries 4 and 5 of the statistics from the moments of all query tiles; one thread per column.
template <typename T>
__global__ void __launch_bounds__(256)
    column_statistics_kernel(const ForwardArgs<T> a, int tiles, int64_t columns) {
  using A = Acc<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < columns;
       i += step) {
    const int64_t index = i / a.tokens;
    const Slice slice = slice_at(a, index);
    const int token = static_cast<int>(i % a.tokens);
    const int64_t tokens = a.tokens, tile_size = 2 * tokens + 1;
    const A* from = a.partial + index * tiles * tile_size;
    Moments<A> column;
    for (int tile = 0; tile < tiles; ++tile, from += tile_size)
      column.add({from[2 * tokens], from[token], from[tokens + token]});
    write_moments(stats_row(a, slice, token) + 4, role_of(a, slice, token) == kPatch, column.mean,
                  column.square, inverse_count<A>(a, slice));
  }
}

}  // namespace spot
