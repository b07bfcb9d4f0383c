// What the kernels of attention_stats share: arguments, tiles in shared memory, logits, results.
#pragma once

#include "mask.cuh"
#include "mma.cuh"

namespace spot {

// A [B, N, H, D] tensor; strides in elements.
struct HeadRows {
  const void* data;
  int64_t batch, token, head, dim;
  bool wide;  // rows are dense, and 16-byte pieces of them aligned
};

// Columns of results a block of the plain kernels has at most: registers hold no more float64.
template <typename T>
constexpr int plain_columns() {
  return sizeof(T) == 8 ? 32 : 64;
}

struct AttentionArgs {
  HeadRows q, k, v;
  int64_t batch, heads;
  int tokens, prefix, dim;
  int depth;  // dim rounded up to a multiple of 32
  bool class_token;
  double scale;
  const uint8_t* roles;   // [B, N], null: all kept
  const int32_t* counts;  // [B] kept patch tokens, null: all
  const void* bias;       // [1|B, H, N, N] or null
  int64_t bias_batch, bias_head, bias_row, bias_column;
  int bias_type;  // 0 float32, 1 float64, 2 float16, 3 bfloat16
};

// ---- numbers ------------------------------------------------------------------------------------

// With tensor cores logits are kept in units of 1 / log2(e), so that exp is one instruction.
template <typename T>
constexpr Acc<T> kLogitUnit = kTensorCores<T> ? Acc<T>(1.4426950408889634) : Acc<T>(1);

template <typename T>
__device__ inline Acc<T> exponential(Acc<T> x) {
  if constexpr (kTensorCores<T>)
    return exp2_fast(x);
  else
    return exp(x);
}
template <typename T>
__device__ inline Acc<T> logarithm(Acc<T> x) {
  if constexpr (kTensorCores<T>)
    return log2f(x);
  else
    return log(x);
}

// 1 ulp more with tensor cores; x / inf = 0.
template <typename T>
__device__ inline Acc<T> quotient(Acc<T> x, Acc<T> y) {
  if constexpr (kTensorCores<T>)
    return __fdividef(x, y);
  else
    return x / y;
}

template <typename A>
__device__ inline A infinity() {
  return static_cast<A>(__int_as_float(0x7f800000));
}

// Keeps NaN.
template <typename A>
__device__ inline A not_below_zero(A x) {
  return x < A(0) ? A(0) : x;
}

// The largest logit, or 0 where none can be seen, so that differences to it are never inf - inf. A
// row of N that sees -inf only has sum 0 and becomes NaN, as in the definition.
template <typename A>
__device__ inline A finite_top(A top) {
  return top == -infinity<A>() ? A(0) : top;
}

// ---- tokens -------------------------------------------------------------------------------------

// One image and head. Slices, and tokens of slices, are numbered as [B, H] and [B, N, H].
struct Slice {
  int image, head;
};

__device__ inline Slice slice_at(const AttentionArgs& a, int64_t index) {
  const int heads = static_cast<int>(a.heads);
  return {static_cast<int>(index / heads), static_cast<int>(index % heads)};
}
__device__ inline int64_t slice_index(const AttentionArgs& a, Slice slice) {
  return slice.image * a.heads + slice.head;
}
__device__ inline int64_t token_index(const AttentionArgs& a, Slice slice, int token) {
  return (static_cast<int64_t>(slice.image) * a.tokens + token) * a.heads + slice.head;
}

__device__ inline int role_of(const AttentionArgs& a, Slice slice, int token) {
  if (token >= a.tokens) return kDropped;
  if (a.roles != nullptr) return a.roles[static_cast<int64_t>(slice.image) * a.tokens + token];
  return token < a.prefix ? kPrefix : kPatch;
}

// Kept patch tokens, or 1 where there are none.
template <typename A>
__device__ inline A patch_count(const AttentionArgs& a, Slice slice) {
  const int count = a.counts != nullptr ? a.counts[slice.image] : a.tokens - a.prefix;
  return A(count > 1 ? count : 1);
}
template <typename A>
__device__ inline A inverse_count(const AttentionArgs& a, Slice slice) {
  return A(1) / patch_count<A>(a, slice);
}

// Added to the logits of a column: hides it unless it is seen by all rows.
template <typename A>
__device__ inline A hiding(int role) {
  return role == kDropped ? -infinity<A>() : A(0);
}

// First element of one image and head.
template <typename T>
__device__ inline const T* origin(const HeadRows& view, Slice slice) {
  return static_cast<const T*>(view.data) + slice.image * view.batch + slice.head * view.head;
}

// ---- tiles --------------------------------------------------------------------------------------

// Tokens [first, first + kRows) of one image and head, columns [column, column + columns), into a
// tile; zeros beyond the tensor. Called by `threads` threads, this one being `thread`; complete
// after copy_async_wait and a barrier.
template <int kRows, typename T>
__device__ inline void load_tile(T* tile, const AttentionArgs& a, const HeadRows& view, Slice slice,
                                 int first, int column, int columns, int thread, int threads) {
  const T* source = origin<T>(view, slice);
#pragma unroll 1
  for (int panel = 0; panel < columns; panel += kPanel, tile += kRows * kStride<T>) {
    const auto each = [&](auto width, auto&& copy) {
      constexpr unsigned kPieces = kPanel / decltype(width)::value;
#pragma unroll 1
      for (unsigned i = thread; i < kRows * kPieces; i += threads) {
        const int r = static_cast<int>(i / kPieces);
        const int c = static_cast<int>(i % kPieces) * decltype(width)::value;
        const int from = column + panel + c;
        copy(tile + r * kStride<T> + c, first + r, from, first + r < a.tokens && from < a.dim);
      }
    };
    if (view.wide)
      each(std::integral_constant<int, kVector<T>>{}, [&](T* to, int token, int from, bool there) {
        copy_async(to, there ? source + token * view.token + from : source, there);
      });
    else
      each(std::integral_constant<int, 1>{}, [&](T* to, int token, int from, bool there) {
        *to = there ? source[token * view.token + from * view.dim] : store<T>(0);
      });
  }
}

// ---- logits -------------------------------------------------------------------------------------

// s += bias, in the unit of the logits, where an entry is not hidden. Rows of s are queries row0..
// and columns keys column0.., or the other way round with kTransposed.
template <typename T, bool kTransposed, int kTiles>
__device__ inline void add_bias(Acc<T> (&s)[kTiles][4], const AttentionArgs& a, Slice slice,
                                int row0, int column0) {
  using A = Acc<T>;
  const Lane lane = this_lane();
  const int64_t start = slice.image * a.bias_batch + slice.head * a.bias_head;
  const auto add = [&](const auto* bias) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Loads what is there in any case, so that nothing branches; entries beyond the last key
        // are hidden, and rows beyond the last are not used.
        const int64_t row = min(row0 + lane.g + 8 * (e / 2), a.tokens - 1);
        const int64_t column = min(column0 + 8 * n + 2 * lane.t + e % 2, a.tokens - 1);
        const int64_t at = kTransposed ? column * a.bias_row + row * a.bias_column
                                       : row * a.bias_row + column * a.bias_column;
        const A value = kLogitUnit<T> * static_cast<A>(load(bias[start + at]));
        s[n][e] += s[n][e] == -infinity<A>() ? A(0) : value;
      }
      // Keeps the compiler from holding the loads of all tiles.
      asm volatile("" ::: "memory");
    }
  };
  switch (a.bias_type) {
    case 0: return add(static_cast<const float*>(a.bias));
    case 1: return add(static_cast<const double*>(a.bias));
    case 2: return add(static_cast<const __half*>(a.bias));
    default: return add(static_cast<const __nv_bfloat16*>(a.bias));
  }
}

// Dot products of rows row0.. with columns column0.. -> logits without bias; hidden entries are
// -inf. `hide` has one value per column of the tile. A row always sees itself.
template <typename T, int kTiles>
__device__ inline void to_logits(Acc<T> (&s)[kTiles][4], const AttentionArgs& a, int row0,
                                 int column0, const Acc<T>* hide) {
  using A = Acc<T>;
  const Lane lane = this_lane();
  const A scale = static_cast<A>(a.scale) * kLogitUnit<T>;
  if (a.roles == nullptr) {  // what is hidden is padding, zeros
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Pair<A> add = *reinterpret_cast<const Pair<A>*>(hide + 8 * n + 2 * lane.t);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * scale + (e % 2 ? add.second : add.first);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const Pair<A> add = *reinterpret_cast<const Pair<A>*>(hide + 8 * n + 2 * lane.t);
    const int from_diagonal = column0 + 8 * n - row0 + 2 * lane.t;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool own = from_diagonal + e % 2 == lane.g + 8 * (e / 2);
      // Chosen, not added: a dropped key may hold anything.
      s[n][e] = own || (e % 2 ? add.second : add.first) == A(0) ? s[n][e] * scale : -infinity<A>();
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

// o, times a factor per row, to columns column0.. of the rows row0.. of a dense [B, N, H, D]
// tensor.
template <typename T, int kTiles>
__device__ inline void write_rows(T* tensor, const AttentionArgs& a, Slice slice, int row0,
                                  int column0, const Acc<T> (&o)[kTiles][4],
                                  const Acc<T> (&factor)[2]) {
  const int row = row0 + this_lane().g;
  T* const to[2] = {row < a.tokens ? tensor + token_index(a, slice, row) * a.dim : nullptr,
                    row + 8 < a.tokens ? tensor + token_index(a, slice, row + 8) * a.dim : nullptr};
  store_rows<T>(to, column0, a.dim, o, factor);
}

// ---- blocks -------------------------------------------------------------------------------------

// Blocks are numbered tile first, then piece of the head dim, then slice.
struct Place {
  Slice slice;
  int piece, tile;
};

__device__ inline Place place_of(const AttentionArgs& a, int pieces, int tiles) {
  const int rest = static_cast<int>(blockIdx.x) / tiles;
  return {slice_at(a, rest / pieces), rest % pieces, static_cast<int>(blockIdx.x) % tiles};
}

__host__ __device__ inline int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

}  // namespace spot
