// Backward kernels of attention_stats. With dP_ij = dO_i . v_j + T_ij, where T is what the
// statistics add, dS = p (dP - delta) and delta_i = sum_j p_ij dP_ij = dO_i . out_i + sum_j p_ij
// T_ij.
//
// - prepare_kernel, per token and head: lse, dO . out, and the factors of T (below).
// - attention_query_kernel, per query tile, a loop over key tiles: delta (with statistics a pass of
//   its own, which needs scores only) and dq = scale dS k.
// - attention_key_kernel, per key tile, a loop over query tiles: dk = scale dS^T q, dv = p^T dO and
//   the gradient of keep per head, which keep_gradient_kernel adds up in order.
// - attention_bias_kernel, per tile of the bias: dS, summed over the batch in order where shared.
//
// Scratch: 5 numbers per token and head, 13 with statistics, and one for keep. One warp works on 16
// rows.
//
// For kept patches i and j: T_ij = A_i + C_j + c_ij (R_i + Q_j), c_ij = p_ij - 1/n, with
// - R_i = 2 g_row_var / n, A_i = g_row_mean / n - R_i (row_mean_i - 1/n),
// - Q_j = 2 g_col_var / n, C_j = g_col_mean / n - Q_j (col_mean_j - 1/n),
// and with a class token T_0j = g_cls_out[j], T_i0 = g_cls_in[i]. All other T are 0.
#pragma once

#include "attention.cuh"

namespace spot {

// One side of T. Of a query: shift = A, slope = R, cls = g_cls_in; of a key: C, Q, g_cls_out.
// weight is 1 for kept patches.
template <typename A>
struct alignas(16) Side {
  A weight, shift, slope, cls;
};

// lse in the unit of the logits; own = dO . out.
template <typename A>
struct alignas(16) QueryEntry {
  A lse, delta, own, unused;
};

// Tables [B, H, M] of M = tokens rounded up to kTableTokens, so that tiles of them are whole. A
// token beyond the last has lse = inf, is hidden, and is 0 elsewhere: its row and column of the map
// are 0.
constexpr int kTableTokens = 64;
constexpr int kEntryValues = 5;  // a QueryEntry and what hides a key
constexpr int kSideValues = 8;   // with statistics

template <typename T>
struct BackwardArgs : AttentionArgs {
  HeadRows grad_out, out;    // [B, N, H, D]
  const Acc<T>* lse;         // [B, N, H]
  const Acc<T>* stats;       // [B, N, H, 6], with statistics
  const Acc<T>* grad_stats;  // [B, N, H, 6] with strides, null without statistics
  int64_t grad_stats_batch, grad_stats_token, grad_stats_head, grad_stats_entry;
  int table_tokens;  // M
  QueryEntry<Acc<T>>* entries;
  Acc<T>* hides;  // added to the logits of a key
  Side<Acc<T>>*query_sides, *key_sides;
  T *dq, *dk, *dv;       // [B, N, H, D]
  Acc<T>* keep_partial;  // [B, H, N] or null
  Acc<T>* dbias;         // [bias_images, H, N, N]
  int64_t bias_images;
};

template <typename T>
__device__ inline int64_t table_index(const BackwardArgs<T>& a, Slice slice, int token) {
  return slice_index(a, slice) * a.table_tokens + token;
}

constexpr int kBackwardWarps = 4;

constexpr int kBackwardBlocks = 2;  // that are to run side by side, which bounds registers

// Tokens per tile of the inner loop. The kernel for keys has two products to add to.
template <typename T, int kOut>
constexpr int kQueryInner = kTensorCores<T> ? (kOut > 64 ? 32 : 64) : (sizeof(T) == 8 ? 16 : 32);
template <typename T, int kOut>
constexpr int kKeyInner = sizeof(T) == 8 || kOut > 64 ? 16 : 32;
template <typename T>
constexpr int kBiasInner = sizeof(T) == 8 ? 16 : 32;
template <typename T>
constexpr int kBackwardStages = kTensorCores<T> ? 2 : 1;

template <typename A>
__device__ inline A statistic_gradient(A p, A inverse, const Side<A>& query, const Side<A>& key,
                                       bool class_row, bool class_column) {
  const A both = query.weight * key.weight;
  A t = both * (query.shift + key.shift + (p - inverse) * (query.slope + key.slope));
  if (class_row) t += key.cls;
  if (class_column) t += query.cls;
  return t;
}

// ---- per token and head -------------------------------------------------------------------------

// Part of x . y for one of kGroup lanes; the same terms in the same order for all strides.
constexpr int kGroup = 8;

template <typename T>
__device__ inline Acc<T> part_of_dot(const T* x, const HeadRows& x_view, const T* y,
                                     const HeadRows& y_view, int dim, int part) {
  const bool wide = x_view.wide && y_view.wide;
  Acc<T> sum = Acc<T>(0);
  for (int d = kVector<T> * part; d < dim; d += kVector<T> * kGroup) {
    Vector<T> x_values, y_values;
    if (wide) {
      x_values = *reinterpret_cast<const Vector<T>*>(x + d);
      y_values = *reinterpret_cast<const Vector<T>*>(y + d);
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        x_values.at[i] = d + i < dim ? x[(d + i) * x_view.dim] : store<T>(0);
        y_values.at[i] = d + i < dim ? y[(d + i) * y_view.dim] : store<T>(0);
      }
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum += load(x_values.at[i]) * load(y_values.at[i]);
  }
  return sum;
}

// kGroup lanes per entry of the tables; their number is a multiple of kTableTokens.
template <typename T>
__global__ void __launch_bounds__(256) prepare_kernel(const BackwardArgs<T> a, int64_t items) {
  using A = Acc<T>;
  const int part = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / kGroup);
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x / kGroup);
  // Whole warps stay or go: both bounds are multiples of the groups in a warp.
  for (int64_t item = first + threadIdx.x / kGroup; item < items; item += groups) {
    const Slice slice = slice_at(a, item / a.table_tokens);
    const int token = static_cast<int>(item % a.table_tokens);
    const bool there = token < a.tokens;
    const int role = role_of(a, slice, token);
    A own = A(0);
    if (there)
      own = part_of_dot(origin<T>(a.grad_out, slice) + token * a.grad_out.token, a.grad_out,
                        origin<T>(a.out, slice) + token * a.out.token, a.out, a.dim, part);
#pragma unroll
    for (int step = kGroup / 2; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
    if (part != 0) continue;
    const A lse = there ? a.lse[token_index(a, slice, token)] * kLogitUnit<T> : infinity<A>();
    a.entries[item] = {lse, own, own, A(0)};
    a.hides[item] = hiding<A>(role);
    if (a.grad_stats == nullptr) continue;
    Side<A> query{A(0), A(0), A(0), A(0)}, key = query;
    if (role == kPatch) {
      const A inverse = inverse_count<A>(a, slice);
      const A* mean = a.stats + token_index(a, slice, token) * 6;
      const A* from = a.grad_stats + slice.image * a.grad_stats_batch + token * a.grad_stats_token +
                      slice.head * a.grad_stats_head;
      const auto gradient = [&](int entry) { return from[entry * a.grad_stats_entry]; };
      const auto side = [&](int moments, int cls) {
        const A slope = A(2) * gradient(moments + 1) * inverse;
        return Side<A>{A(1), gradient(moments) * inverse - slope * (mean[moments] - inverse), slope,
                       a.class_token ? gradient(cls) : A(0)};
      };
      query = side(2, 1);
      key = side(4, 0);
    }
    a.query_sides[item] = query;
    a.key_sides[item] = key;
  }
}

// ---- what a block knows of its tokens -----------------------------------------------------------

// The two rows of a lane, where rows are queries.
template <typename A>
struct QueryRows {
  QueryEntry<A> entry[2];
  Side<A> side[2];
};

template <typename T, bool kStats>
__device__ inline QueryRows<Acc<T>> query_rows(const BackwardArgs<T>& a, Slice slice, int row0) {
  QueryRows<Acc<T>> rows{};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t at = table_index(a, slice, row0 + this_lane().g + 8 * r);
    rows.entry[r] = a.entries[at];
    if constexpr (kStats) rows.side[r] = a.query_sides[at];
  }
  return rows;
}

// The tables of an inner tile, in shared memory: sides first, then what hides keys, or the entries
// of queries.
constexpr int kTableValues = 8;  // per token

template <typename A>
__device__ inline Side<A>* table_sides(A* table) {
  return reinterpret_cast<Side<A>*>(table);
}
template <typename A>
__device__ inline A* table_hides(A* table, int size) {
  return table + 4 * size;
}
template <typename A>
__device__ inline QueryEntry<A>* table_entries(A* table, int size) {
  return reinterpret_cast<QueryEntry<A>*>(table + 4 * size);
}

// Part of a table to shared memory; bytes are a multiple of 16. Complete as load_tile.
__device__ inline void load_table(void* to, const void* from, int bytes) {
  for (int i = 16 * static_cast<int>(threadIdx.x); i < bytes;
       i += 16 * static_cast<int>(blockDim.x))
    copy_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, true);
}

template <typename T, bool kStats, int kSize>
__device__ inline void load_key_table(Acc<T>* table, const BackwardArgs<T>& a, Slice slice,
                                      int first) {
  using A = Acc<T>;
  const int64_t at = table_index(a, slice, first);
  load_table(table_hides(table, kSize), a.hides + at, kSize * sizeof(A));
  if constexpr (kStats) load_table(table_sides(table), a.key_sides + at, kSize * sizeof(Side<A>));
}

template <typename T, bool kStats, int kSize>
__device__ inline void load_query_table(Acc<T>* table, const BackwardArgs<T>& a, Slice slice,
                                        int first) {
  using A = Acc<T>;
  const int64_t at = table_index(a, slice, first);
  load_table(table_entries(table, kSize), a.entries + at, kSize * sizeof(QueryEntry<A>));
  if constexpr (kStats) load_table(table_sides(table), a.query_sides + at, kSize * sizeof(Side<A>));
}

// ---- shared memory ------------------------------------------------------------------------------

// Per warp two tiles of its own rows; per stage two inner tiles; per warp scratch of the product;
// per stage a table.
template <typename T, int kSize>
size_t backward_shared(int depth, int warps) {
  constexpr int kStages = kBackwardStages<T>;
  const size_t values = tile_values<T>(2 * 16 * warps + 2 * kStages * kSize, depth) +
                        warps * kProductScratch<T, kSize / 8>;
  return values * sizeof(T) + kStages * kTableValues * kSize * sizeof(Acc<T>);
}

template <typename T, int kSize>
struct BackwardTiles {
  static constexpr int kStages = kBackwardStages<T>, kTiles = kSize / 8;
  int depth;
  T *own, *inner, *scratch;
  Acc<T>* tables;

  __device__ BackwardTiles(unsigned char* memory, int depth) : depth(depth) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    inner = reinterpret_cast<T*>(memory);
    own = inner + tile_values<T>(2 * kStages * kSize + 2 * 16 * warp, depth);
    scratch = inner + tile_values<T>(2 * kStages * kSize + 2 * 16 * warps, depth);
    tables = reinterpret_cast<Acc<T>*>(scratch + warps * kProductScratch<T, kTiles>);
    scratch += warp * kProductScratch<T, kTiles>;
  }
  __device__ T* rows(int which) const { return own + tile_values<T>(16 * which, depth); }
  __device__ T* tile(int which, int stage) const {
    return inner + tile_values<T>((2 * stage + which) * kSize, depth);
  }
  __device__ Acc<T>* table(int stage) const { return tables + stage * kTableValues * kSize; }
  __device__ const Acc<T>* hide(int stage) const { return table_hides(table(stage), kSize); }
  __device__ const Side<Acc<T>>& side(int stage, int at) const {
    return table_sides(table(stage))[at];
  }

  // Tokens row0.. of a tensor into this warp's rows; called by all its lanes.
  __device__ void load_rows(int which, const AttentionArgs& a, const HeadRows& view, Slice slice,
                            int row0) const {
    load_tile<16>(rows(which), a, view, slice, row0, 0, depth, this_lane().index, kWarp);
  }
  // Tokens first.. of a tensor into an inner tile; called by the whole block.
  __device__ void load_inner(int which, int stage, const AttentionArgs& a, const HeadRows& view,
                             Slice slice, int first) const {
    load_tile<kSize>(tile(which, stage), a, view, slice, first, 0, depth,
                     static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }
  // s += rows b^T, with an inner tile of which `count` tokens are there.
  __device__ void scores(Acc<T> (&s)[kTiles][4], int which, int stage, int count) const {
    multiply_transposed<T, kSize>(s, rows(which), tile(which, stage), depth, count);
  }
  // o += p b, with the columns column0.. of an inner tile.
  template <int kOutTiles>
  __device__ void product(Acc<T> (&o)[kOutTiles][4], const Acc<T> (&p)[kTiles][4], int which,
                          int stage, int column0, int count) const {
    multiply<T, kSize>(o, p, tile(which, stage) + tile_values<T>(kSize, column0), count,
                       depth - column0, scratch);
  }

  // Calls f(tile, stage) for `count` inner tiles in order, each loaded by fill(tile, stage) before.
  // At each call all warps are done with the call before.
  template <typename Fill, typename F>
  __device__ void each(int count, Fill&& fill, F&& f) const {
    __syncthreads();
    if (kStages == 2) fill(0, 0);
    for (int i = 0; i < count; ++i) {
      if (kStages == 1) {
        __syncthreads();
        fill(i, 0);
      }
      copy_async_wait();
      __syncthreads();
      if (kStages == 2 && i + 1 < count) fill(i + 1, (i + 1) % 2);
      f(i, i % kStages);
    }
  }
};

// ---- dq -----------------------------------------------------------------------------------------

template <typename T, int kOut, bool kStats>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, kBackwardBlocks)
    attention_query_kernel(const BackwardArgs<T> a, int tiles, int pieces) {
  using A = Acc<T>;
  constexpr int kSize = kQueryInner<T, kOut>, kTiles = kSize / 8;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const BackwardTiles<T, kSize> m(shared_memory, a.depth);
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Place place = place_of(a, pieces, tiles);
  const Slice slice = place.slice;
  const int row0 = 16 * (place.tile * (threads / kWarp) + thread / kWarp);
  const int column0 = place.piece * kOut;
  const bool active = row0 < a.tokens;
  const int key_tiles = (a.tokens + kSize - 1) / kSize;
  m.load_rows(0, a, a.q, slice, row0);
  m.load_rows(1, a, a.grad_out, slice, row0);
  QueryRows<A> rows = query_rows<T, kStats>(a, slice, row0);

  A s[kTiles][4];
  const auto map = [&](int key_tile, int stage) {
    clear(s);
    m.scores(s, 0, stage, min(kSize, a.tokens - key_tile * kSize));
    to_logits<T>(s, a, row0, key_tile * kSize, m.hide(stage));
    if (a.bias != nullptr) add_bias<T, false>(s, a, slice, row0, key_tile * kSize);
    each_element<kTiles>(
        [&](int n, int e, int, int) { s[n][e] = exponential<T>(s[n][e] - rows.entry[e / 2].lse); });
  };
  const A inverse = kStats ? inverse_count<A>(a, slice) : A(0);
  const auto from_statistics = [&](int key_tile, int stage, int e, int r, int c, A p) {
    return statistic_gradient(p, inverse, rows.side[e / 2], m.side(stage, c),
                              a.class_token && row0 + r == 0,
                              a.class_token && key_tile == 0 && c == 0);
  };

  if constexpr (kStats) {
    A extra[2] = {A(0), A(0)};
    m.each(
        key_tiles,
        [&](int key_tile, int stage) {
          m.load_inner(0, stage, a, a.k, slice, key_tile * kSize);
          load_key_table<T, kStats, kSize>(m.table(stage), a, slice, key_tile * kSize);
        },
        [&](int key_tile, int stage) {
          if (!active) return;
          map(key_tile, stage);
          each_element<kTiles>([&](int n, int e, int r, int c) {
            extra[e / 2] += s[n][e] * from_statistics(key_tile, stage, e, r, c, s[n][e]);
          });
        });
    if (active) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Not what is in the table: blocks of other pieces of the head dim write it too.
        rows.entry[r].delta = rows.entry[r].own + row_sum(extra[r]);
        const int row = row0 + lane.g + 8 * r;
        if (place.piece == 0 && lane.t == 0 && row < a.tokens)
          a.entries[table_index(a, slice, row)].delta = rows.entry[r].delta;
      }
    }
  }

  A dq[kOut / 8][4];
  clear(dq);
  m.each(
      key_tiles,
      [&](int key_tile, int stage) {
        m.load_inner(0, stage, a, a.k, slice, key_tile * kSize);
        m.load_inner(1, stage, a, a.v, slice, key_tile * kSize);
        load_key_table<T, kStats, kSize>(m.table(stage), a, slice, key_tile * kSize);
      },
      [&](int key_tile, int stage) {
        if (!active) return;
        const int keys = min(kSize, a.tokens - key_tile * kSize);
        map(key_tile, stage);
        A d[kTiles][4];
        clear(d);
        m.scores(d, 1, stage, keys);
        each_element<kTiles>([&](int n, int e, int r, int c) {
          A gradient = d[n][e] - rows.entry[e / 2].delta;
          if constexpr (kStats) gradient += from_statistics(key_tile, stage, e, r, c, s[n][e]);
          s[n][e] *= gradient;
        });
        m.product(dq, s, 0, stage, column0, keys);
      });
  const A scale = static_cast<A>(a.scale), factor[2] = {scale, scale};
  if (active) write_rows(a.dq, a, slice, row0, column0, dq, factor);
}

// ---- dk, dv, keep -------------------------------------------------------------------------------

// Rows are keys and columns are queries here.
template <typename T, int kOut, bool kStats>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, kBackwardBlocks)
    attention_key_kernel(const BackwardArgs<T> a, int tiles, int pieces) {
  using A = Acc<T>;
  constexpr int kSize = kKeyInner<T, kOut>, kTiles = kSize / 8;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const BackwardTiles<T, kSize> m(shared_memory, a.depth);
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Place place = place_of(a, pieces, tiles);
  const Slice slice = place.slice;
  const int row0 = 16 * (place.tile * (threads / kWarp) + thread / kWarp);
  const int column0 = place.piece * kOut;
  const bool active = row0 < a.tokens;
  const bool keep_wanted = a.keep_partial != nullptr && place.piece == 0;
  m.load_rows(0, a, a.k, slice, row0);
  m.load_rows(1, a, a.v, slice, row0);

  A hide[2];
  Side<A> side[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t at = table_index(a, slice, row0 + lane.g + 8 * r);
    hide[r] = a.hides[at];
    if constexpr (kStats) side[r] = a.key_sides[at];
  }
  const A inverse = kStats ? inverse_count<A>(a, slice) : A(0);
  const A scale = static_cast<A>(a.scale) * kLogitUnit<T>;
  A dk[kOut / 8][4], dv[kOut / 8][4], dkeep[2] = {A(0), A(0)};
  clear(dk);
  clear(dv);
  m.each((a.tokens + kSize - 1) / kSize,
         [&](int query_tile, int stage) {
           m.load_inner(0, stage, a, a.q, slice, query_tile * kSize);
           m.load_inner(1, stage, a, a.grad_out, slice, query_tile * kSize);
           load_query_table<T, kStats, kSize>(m.table(stage), a, slice, query_tile * kSize);
         },
         [&](int query_tile, int stage) {
           if (!active) return;
           const int first = query_tile * kSize, queries = min(kSize, a.tokens - first);
           A s[kTiles][4], d[kTiles][4];
           clear(s);
           m.scores(s, 0, stage, queries);
           clear(d);
           m.scores(d, 1, stage, queries);
           const QueryEntry<A>* entries = table_entries(m.table(stage), kSize);
           // Scaled dot products to logits minus lse of the query.
           each_element<kTiles>(
               [&](int n, int e, int, int c) { s[n][e] = s[n][e] * scale - entries[c].lse; });
           if (a.bias != nullptr) add_bias<T, true>(s, a, slice, row0, first);
           const bool diagonal = row0 < first + kSize && first < row0 + 16;
           if (keep_wanted)
             each_element<kTiles>([&](int n, int e, int r, int c) {
               const bool kept = hide[e / 2] == A(0);
               const A power = exponential<T>(kept ? s[n][e] : -s[n][e]);
               const A w = kept ? power : quotient<T>(A(1), A(1) + power);
               if (!(diagonal && row0 + r == first + c))
                 dkeep[e / 2] += w * (d[n][e] - entries[c].own);
             });
           if (diagonal) {
             each_element<kTiles>([&](int n, int e, int r, int c) {
               s[n][e] = exponential<T>(row0 + r == first + c ? s[n][e] : s[n][e] + hide[e / 2]);
             });
           } else {
             each_element<kTiles>(
                 [&](int n, int e, int, int) { s[n][e] = exponential<T>(s[n][e] + hide[e / 2]); });
           }
           each_element<kTiles>([&](int n, int e, int r, int c) {
             A gradient = d[n][e] - entries[c].delta;
             if constexpr (kStats)
               gradient += statistic_gradient(s[n][e], inverse, m.side(stage, c), side[e / 2],
                                              a.class_token && first + c == 0,
                                              a.class_token && row0 + r == 0);
             d[n][e] = s[n][e] * gradient;
           });
           m.product(dv, s, 1, stage, column0, queries);
           m.product(dk, d, 0, stage, column0, queries);
         });
  if (!active) return;
  const A dk_scale = static_cast<A>(a.scale);
  const A dk_factor[2] = {dk_scale, dk_scale}, dv_factor[2] = {A(1), A(1)};
  write_rows(a.dk, a, slice, row0, column0, dk, dk_factor);
  write_rows(a.dv, a, slice, row0, column0, dv, dv_factor);
  if (!keep_wanted) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const A total = row_sum(dkeep[r]);
    const int row = row0 + lane.g + 8 * r;
    if (lane.t == 0 && row < a.tokens)
      a.keep_partial[slice_index(a, slice) * a.tokens + row] = total;
  }
}

// dkeep [B, N-P]: heads in order; one thread per patch token.
template <typename T>
__global__ void __launch_bounds__(256)
    keep_gradient_kernel(const BackwardArgs<T> a, Acc<T>* dkeep, int64_t items) {
  const int patches = a.tokens - a.prefix;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < items;
       i += step) {
    const int64_t image = i / patches, token = a.prefix + i % patches;
    const Acc<T>* from = a.keep_partial + image * a.heads * a.tokens + token;
    Acc<T> total = Acc<T>(0);
    for (int64_t head = 0; head < a.heads; ++head) total += from[head * a.tokens];
    dkeep[i] = total;
  }
}

// ---- bias ---------------------------------------------------------------------------------------

// Place: tile = key tile + key tiles * query tile; image counts images of the bias.
template <typename T, bool kStats>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2)
    attention_bias_kernel(const BackwardArgs<T> a, int query_tiles, int key_tiles) {
  using A = Acc<T>;
  constexpr int kSize = kBiasInner<T>, kTiles = kSize / 8;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const BackwardTiles<T, kSize> m(shared_memory, a.depth);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Place place = place_of(a, 1, query_tiles * key_tiles);
  const int first = place.tile % key_tiles * kSize;
  const int row0 = 16 * (place.tile / key_tiles * (threads / kWarp) + thread / kWarp);
  const int keys = min(kSize, a.tokens - first);
  const bool shared_bias = a.bias_images != a.batch;
  Slice slice{shared_bias ? 0 : place.slice.image, place.slice.head};
  const int64_t images = shared_bias ? a.batch : 1;

  A total[kTiles][4];
  clear(total);
  for (int64_t i = 0; i < images; ++i, ++slice.image) {
    __syncthreads();
    m.load_rows(0, a, a.q, slice, row0);
    m.load_rows(1, a, a.grad_out, slice, row0);
    m.load_inner(0, 0, a, a.k, slice, first);
    m.load_inner(1, 0, a, a.v, slice, first);
    load_key_table<T, kStats, kSize>(m.table(0), a, slice, first);
    copy_async_wait();
    __syncthreads();
    if (row0 >= a.tokens) continue;
    const QueryRows<A> rows = query_rows<T, kStats>(a, slice, row0);
    const A inverse = kStats ? inverse_count<A>(a, slice) : A(0);
    A s[kTiles][4], d[kTiles][4];
    clear(s);
    m.scores(s, 0, 0, keys);
    to_logits<T>(s, a, row0, first, m.hide(0));
    if (a.bias != nullptr) add_bias<T, false>(s, a, slice, row0, first);
    clear(d);
    m.scores(d, 1, 0, keys);
    each_element<kTiles>([&](int n, int e, int r, int c) {
      const A p = exponential<T>(s[n][e] - rows.entry[e / 2].lse);
      A gradient = d[n][e] - rows.entry[e / 2].delta;
      if constexpr (kStats)
        gradient +=
            statistic_gradient(p, inverse, rows.side[e / 2], m.side(0, c),
                               a.class_token && row0 + r == 0, a.class_token && first + c == 0);
      total[n][e] += p * gradient;
    });
  }
  A* to = a.dbias + slice_index(a, place.slice) * a.tokens * a.tokens;
  each_element<kTiles>([&](int n, int e, int r, int c) {
    if (row0 + r < a.tokens && first + c < a.tokens)
      to[static_cast<int64_t>(row0 + r) * a.tokens + first + c] = total[n][e];
  });
}

}  // namespace spot
