// What the kernels of sparse_attention share: the map's layout, rows gathered by a warp, and lists
// of the map's entries by key.
//
// A warp works on one row of results at a time and takes rows of the other side in any order. Lanes
// form groups; a group reads a whole row in 16-byte pieces and sums dot products over itself, so
// that a warp has kKeys * kAhead rows in flight. Each group adds up its own share, and the groups
// are combined once per row of results.
#pragma once

#include "attention.cuh"

namespace spot {

constexpr int kSparseThreads = 128;
constexpr int kSparseWarps = kSparseThreads / kWarp;

// The entries of an image and head are numbered row by row: prefix rows have all N keys, in order,
// patch rows the K that `index` names.
struct SparseMap {
  const int32_t* index;  // [B, H, N-P, K]
  int named;             // K
  int entries;           // P N + (N-P) K
};

__device__ inline int first_entry(const AttentionArgs& a, const SparseMap& map, int row) {
  return row < a.prefix ? row * a.tokens : a.prefix * a.tokens + (row - a.prefix) * map.named;
}

// The keys of a patch row.
__device__ inline const int32_t* names_of(const AttentionArgs& a, const SparseMap& map, Slice slice,
                                          int row) {
  if (row < a.prefix) return nullptr;
  const int64_t patches = a.tokens - a.prefix;
  return map.index + (slice_index(a, slice) * patches + row - a.prefix) * map.named;
}

// ---- rows of a warp -----------------------------------------------------------------------------

template <typename T, int kDepth>
struct Gather {
  static constexpr int kPieces = kDepth / kVector<T>;  // of 16 bytes in a row
  static constexpr int kHeld = kPieces % 3 == 0 ? 3    // of them in a lane
                               : kPieces <= 8   ? 1
                               : kPieces <= 64  ? 2
                                                : 4;
  static constexpr int kLanes = kPieces / kHeld;  // of a group
  static constexpr int kKeys = kWarp / kLanes;    // rows side by side, one per group
  static constexpr int kAhead = kHeld == 1 ? 2 : 1;
  static constexpr int kStep = kKeys * kAhead;
  static_assert((kLanes & (kLanes - 1)) == 0 && kLanes <= kWarp && kStep <= kWarp);

  using A = Acc<T>;
  using Raw = Vector<T>[kHeld];
  using Wide = A[kHeld][kVector<T>];

  __device__ static int part() { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) % kWarp / kLanes; }
  // Column of this lane's piece h.
  __device__ static int column(int h) { return (h * kLanes + part()) * kVector<T>; }

  // This lane's part of a row of `dim` values, zeros beyond; nothing is read unless `there`. Rows
  // are dense, aligned, and end in whole pieces.
  __device__ static void read(Raw& row, const T* from, int dim, bool there) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      uint4 bits{0u, 0u, 0u, 0u};
      if (there && column(h) < dim) bits = *reinterpret_cast<const uint4*>(from + column(h));
      memcpy(&row[h], &bits, sizeof(bits));
    }
  }
  __device__ static void widen(Wide& wide, const Raw& row) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) wide[h][i] = load(row[h].at[i]);
  }
  __device__ static void clear(Wide& wide) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) wide[h][i] = A(0);
  }
  __device__ static void scale(Wide& wide, A factor) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) wide[h][i] *= factor;
  }
  __device__ static void add(Wide& wide, A factor, const Raw& row) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) wide[h][i] += factor * load(row[h].at[i]);
  }
  // Given to all lanes of the group.
  __device__ static A dot(const Wide& wide, const Raw& row) {
    A sum = A(0);
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum += wide[h][i] * load(row[h].at[i]);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
  // Over the groups, given to all.
  __device__ static A across(A x) {
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  __device__ static void across(Wide& wide) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) wide[h][i] = across(wide[h][i]);
  }
  __device__ static A largest_across(A x) {
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2)
      x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
  }
  // A dense row of `dim` values, from the first group.
  __device__ static void write(T* to, const Wide& wide, int dim) {
    if (group() != 0) return;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int c = column(h);
      Vector<T> row;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) row.at[i] = store<T>(wide[h][i]);
      if (dim % kVector<T> == 0) {
        uint4 bits;
        memcpy(&bits, &row, sizeof(bits));
        if (c < dim) *reinterpret_cast<uint4*>(to + c) = bits;
      } else {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i)
          if (c + i < dim) to[c + i] = row.at[i];
      }
    }
  }
  // The warps' shares of one row, in shared memory [kSparseWarps, kDepth].
  __device__ static void share(A* shared, const Wide& wide, int warp) {
    if (group() != 0) return;
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) shared[warp * kDepth + column(h) + i] = wide[h][i];
  }
  __device__ static void add_shared(Wide& wide, A factor, const A* shared, int warp) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        wide[h][i] += factor * shared[warp * kDepth + column(h) + i];
  }
};

// Blocks that are to run side by side, which bounds registers.
template <typename T, int kDepth>
constexpr int kSparseBlocks = sizeof(typename Gather<T, kDepth>::Wide) > 32 ? 3 : 4;

// Rows of a block, prefix rows first since they are long: a prefix row takes a whole block, whose
// warps share its keys; a patch row takes a warp, and a block a range of them.
struct SparsePlace {
  Slice slice;
  int row, end, step;  // of this warp
  bool dense;
};

__device__ inline SparsePlace sparse_place(const AttentionArgs& a, int parts) {
  const int64_t prefix_rows = a.batch * a.heads * a.prefix;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (blockIdx.x < prefix_rows) {
    const int row = static_cast<int>(blockIdx.x) % a.prefix;
    return {slice_at(a, static_cast<int>(blockIdx.x) / a.prefix), row, row + 1, 1, true};
  }
  const int64_t rest = blockIdx.x - prefix_rows;
  const int size = (a.tokens - a.prefix + parts - 1) / parts;
  const int first = a.prefix + static_cast<int>(rest % parts) * size;
  return {slice_at(a, rest / parts), first + warp, min(first + size, a.tokens), kSparseWarps,
          false};
}

// Set in a key that the row must not see: a dropped one, unless it is its own. Positions are below.
constexpr int kHidden = 1 << 30;

// Calls f(first, keys) along the first `length` keys of a row, kStep at a time: keys[u] is what
// this lane's group finds at first + u kKeys + group: a position, perhaps with kHidden, or -1 where
// there is none, or one out of range. Warps of a dense row take turns.
template <typename G, typename F>
__device__ inline void walk_keys(const AttentionArgs& a, const SparsePlace& place, int row,
                                 const int32_t* names, int length, F&& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int step = place.dense ? kSparseThreads : kWarp;
#pragma unroll 1
  for (int chunk = place.dense ? warp * kWarp : 0; chunk < length; chunk += step) {
    const int at = chunk + lane;
    int key = -1;
    if (at < length) {
      key = place.dense ? at : names[at];
      if (key < 0 || key >= a.tokens)
        key = -1;
      else if (key != row && role_of(a, place.slice, key) == kDropped)
        key |= kHidden;
    }
#pragma unroll 1
    for (int first = 0; first < min(kWarp, length - chunk); first += G::kStep) {
      int keys[G::kAhead];
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u)
        keys[u] = __shfl_sync(0xffffffffu, key, first + u * G::kKeys + G::group());
      f(chunk + first, keys);
    }
  }
}

__device__ inline bool visible(int key) { return key >= 0 && (key & kHidden) == 0; }

// ---- what an index may say ----------------------------------------------------------------------

constexpr int kSeenWords = 128;  // per warp, a bit per key of a window

// How many keys a row names, or -1 where one is out of range, repeated, or behind a -1. Ascending
// rows are read once; others once more per window of 32 kSeenWords tokens.
__device__ inline int checked_length(const int32_t* names, int named, int tokens, unsigned* seen) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int length = 0, last = -1;
  bool bad = false, ascending = true, ended = false;
  for (int first = 0; first < named; first += kWarp) {
    const int key = first + lane < named ? names[first + lane] : -1;
    const bool valid = key >= 0 && key < tokens;
    bad |= key < -1 || key >= tokens;
    const unsigned votes = __ballot_sync(kAll, valid);
    bad |= (votes & (votes + 1u)) != 0u || (ended && votes != 0u);
    ended |= votes != kAll;
    length += __popc(votes);
    int before = __shfl_up_sync(kAll, key, 1);
    before = lane == 0 ? last : before;
    ascending &= !valid || before < key;
    last = __shfl_sync(kAll, key, kWarp - 1);
  }
  if (__any_sync(kAll, bad)) return -1;
  if (__all_sync(kAll, ascending)) return length;
  bool repeated = false;
  for (int window = 0; window < tokens; window += 32 * kSeenWords) {
    __syncwarp();
    for (int i = lane; i < kSeenWords; i += kWarp) seen[i] = 0u;
    __syncwarp();
    for (int i = lane; i < length; i += kWarp) {
      const int bit = names[i] - window;
      if (bit < 0 || bit >= 32 * kSeenWords) continue;
      const unsigned mask = 1u << (bit % 32);
      repeated |= (atomicOr(&seen[bit / 32], mask) & mask) != 0u;
    }
  }
  __syncwarp();
  return __any_sync(kAll, repeated) ? -1 : length;
}

// ---- entries by key -----------------------------------------------------------------------------

// What a column of the map holds: entry list[s] of patch rows, numbered from 0, for s from
// starts[key] to starts[key + 1], in ascending order of rows.
struct SparseLists {
  const int32_t* starts;  // [B, H, N+1]
  const int32_t* list;    // [B, H, (N-P) K]

  __device__ const int32_t* starts_of(const AttentionArgs& a, Slice slice) const {
    return starts + slice_index(a, slice) * (a.tokens + 1);
  }
  __device__ const int32_t* list_of(const AttentionArgs& a, const SparseMap& map,
                                    Slice slice) const {
    return list + slice_index(a, slice) * (a.tokens - a.prefix) * map.named;
  }
};

// One block per image and head. Each warp counts the keys in its share of the entries, in order;
// the sums over lower keys and warps are where it writes. No atomics, so the order is always the
// same. Counters [warps, N] are in shared memory, or in `counters` where they do not fit.
__global__ void __launch_bounds__(kSparseThreads)
    sparse_lists_kernel(const AttentionArgs a, SparseMap map, int32_t* starts, int32_t* list,
                        int32_t* counters) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  __shared__ int partial[kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp, threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int tokens = a.tokens;
  const int total = (tokens - a.prefix) * map.named;
  const int32_t* index = map.index + blockIdx.x * static_cast<int64_t>(total);
  starts += blockIdx.x * (static_cast<int64_t>(tokens) + 1);
  list += blockIdx.x * static_cast<int64_t>(total);
  int32_t* all = counters == nullptr ? reinterpret_cast<int32_t*>(shared_memory)
                                     : counters + blockIdx.x * static_cast<int64_t>(warps) * tokens;
  int32_t* own = all + warp * static_cast<int64_t>(tokens);
  const int share = ((total + warps - 1) / warps + kWarp - 1) / kWarp * kWarp;
  const int first = min(warp * static_cast<int64_t>(share), static_cast<int64_t>(total));
  const int end = min(total - first, share) + first;

  // Calls f(entry, place) where an entry names a key; place counts from own[key], which moves on.
  const auto each_entry = [&](auto&& f) {
    for (int chunk = first; chunk < end; chunk += kWarp) {
      const int entry = chunk + lane;
      const int key = entry < end ? index[entry] : -1;
      const bool valid = key >= 0 && key < tokens;
      const unsigned same = __match_any_sync(0xffffffffu, valid ? key : -1);
      const int rank = __popc(same & ((1u << lane) - 1u));
      const int place = valid ? own[key] + rank : 0;
      __syncwarp();
      if (valid && rank == 0) own[key] = place + __popc(same);
      __syncwarp();
      if (valid) f(entry, place);
    }
  };

  for (int key = lane; key < tokens; key += kWarp) own[key] = 0;
  __syncwarp();
  each_entry([](int, int) {});
  __syncthreads();
  int before = 0;
  for (int chunk = 0; chunk < tokens; chunk += threads) {
    const int key = chunk + thread;
    int count = 0;
    for (int w = 0; w < warps && key < tokens; ++w)
      count += all[w * static_cast<int64_t>(tokens) + key];
    const int through = before + block_scan(count, partial);
    int place = through - count;
    if (key < tokens) starts[key] = place;
    for (int w = 0; w < warps && key < tokens; ++w) {
      int32_t& here = all[w * static_cast<int64_t>(tokens) + key];
      const int more = here;
      here = place;
      place += more;
    }
    __syncthreads();
    if (thread == threads - 1) partial[0] = through;
    __syncthreads();
    before = partial[0];
  }
  if (thread == 0) starts[tokens] = before;
  each_entry([&](int entry, int place) { list[place] = entry; });
}

}  // namespace spot
