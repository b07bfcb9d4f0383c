// Forward kernels of sparse_attention.
//
// - sparse_forward_kernel: one pass over the keys of a row with a running maximum and sum. Reads q
//   once, and a row of k and of v for each entry of the map: rows of one image and head are used by
//   the blocks at work on it, so they come from L1 or L2. That gather bounds it, with the plain
//   arithmetic on it (no tensor cores). With statistics it leaves the map in `map_values`.
// - sparse_columns_kernel, with statistics: one warp per column, from the lists by key.
// - attention_rows_kernel, of attention_forward.cuh: the whole map of 16-bit types on tensor cores,
//   for up to 272 tokens, with the index as bits from sparse_seen_kernel.
//
// Scratch: for gathers none without statistics, else two numbers per entry of the map (lists and
// values); for tensor cores a bit per query and key.
#pragma once

#include "attention_forward.cuh"
#include "sparse_attention.cuh"

namespace spot {

template <typename T>
struct SparseForwardArgs : ForwardArgs<T> {
  SparseMap map;
  SparseLists lists;
  Acc<T>* map_values;  // [B, H, entries], with statistics; negative: not counted
};

// Statistics of a patch row, from its logits in `values`, which become the map.
template <typename T>
__device__ inline void row_statistics(const SparseForwardArgs<T>& a, Slice slice, int row,
                                      const int32_t* names, int length, bool bad, Acc<T> top,
                                      Acc<T> inverse_sum, Acc<T>* values) {
  using A = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool kept = role_of(a, slice, row) == kPatch;
  const auto counts = [&](int key) {
    return key >= a.prefix && role_of(a, slice, key) == kPatch;  // in range
  };
  const A inverse = inverse_count<A>(a, slice);
  A sum = A(0), cls_in = A(0), present = A(0);
  for (int at = lane; at < a.map.named; at += kWarp) {
    if (at >= length && !bad) break;
    const A p = bad ? not_a_number<A>() : exponential<T>(values[at] - top) * inverse_sum;
    values[at] = kept ? p : A(-1);
    if (bad) continue;
    if (names[at] == 0 && a.class_token) cls_in = p;
    if (!counts(names[at])) continue;
    sum += p;
    present += A(1);
  }
  // A row without a softmax is NaN, even where it names no patch.
  const A mean = (warp_sum(sum) + A(0) * inverse_sum) * inverse;
  cls_in = warp_sum(cls_in);
  present = warp_sum(present);
  A square = A(0);
  for (int at = lane; at < length && kept; at += kWarp)
    if (counts(names[at])) square += (values[at] - mean) * (values[at] - mean);
  square = warp_sum(square) + (patch_count<A>(a, slice) - present) * mean * mean;
  if (lane != 0) return;
  A* to = stats_row(a, slice, row);
  const A unknown = not_a_number<A>();
  if (!a.class_token) to[0] = A(0);  // else from the class token's row
  to[1] = !kept ? A(0) : bad ? unknown : cls_in;
  to[2] = !kept ? A(0) : bad ? unknown : mean;
  to[3] = !kept ? A(0) : bad ? unknown : square * inverse;
}

// kDepth: head dim, rounded up to one of a few.
template <typename T, int kDepth>
__global__ void __launch_bounds__(kSparseThreads, (kSparseBlocks<T, kDepth>))
    sparse_forward_kernel(const SparseForwardArgs<T> a, int parts) {
  using A = Acc<T>;
  using G = Gather<T, kDepth>;
  __shared__ unsigned seen[kSparseWarps][kSeenWords];
  __shared__ A shared_o[kSparseWarps * kDepth];
  __shared__ A shared_top[kSparseWarps], shared_sum[kSparseWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const SparsePlace place = sparse_place(a, parts);
  const Slice slice = place.slice;
  const T* k = origin<T>(a.k, slice);
  const T* v = origin<T>(a.v, slice);
  const A scale = static_cast<A>(a.scale) * kLogitUnit<T>;

  for (int row = place.row; row < place.end; row += place.step) {
    const int32_t* names = names_of(a, a.map, slice, row);
    int length = a.tokens;
    if (!place.dense) length = checked_length(names, a.map.named, a.tokens, seen[warp]);
    const bool bad = length < 0;
    length = max(length, 0);
    A* values = nullptr;
    if (a.stats != nullptr && (!place.dense || (row == 0 && a.class_token)))
      values = a.map_values + slice_index(a, slice) * a.map.entries + first_entry(a, a.map, row);

    typename G::Raw q_row;
    G::read(q_row, origin<T>(a.q, slice) + row * a.q.token, a.dim, true);
    typename G::Wide q, o;
    G::widen(q, q_row);
    G::clear(o);
    A top = -infinity<A>(), sum = A(0);
    bool any = false;
    walk_keys<G>(a, place, row, names, length, [&](int first, const int (&keys)[G::kAhead]) {
      typename G::Raw k_rows[G::kAhead], v_rows[G::kAhead];
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u) {
        const int64_t key = keys[u];
        G::read(k_rows[u], k + key * a.k.token, a.dim, visible(keys[u]));
        G::read(v_rows[u], v + key * a.v.token, a.dim, visible(keys[u]));
      }
      A s[G::kAhead], highest = top;
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u) {
        const A product = G::dot(q, k_rows[u]) * scale;
        s[u] = visible(keys[u]) ? product : -infinity<A>();
        any |= visible(keys[u]);
        highest = max(highest, s[u]);
        if (values != nullptr && G::part() == 0 && keys[u] >= 0)
          values[first + u * G::kKeys + G::group()] = s[u];
      }
      const A from = finite_top(highest), factor = exponential<T>(top - from);
      top = highest;
      sum *= factor;
      G::scale(o, factor);
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u) {
        const A e = exponential<T>(s[u] - from);
        sum += e;
        G::add(o, e, v_rows[u]);
      }
    });

    // The groups' shares, then those of the warps.
    A all = G::largest_across(top);
    A factor = exponential<T>(top - finite_top(all));
    top = all;
    sum = G::across(sum * factor);
    G::scale(o, factor);
    G::across(o);
    any = __any_sync(0xffffffffu, any);
    if (place.dense) {
      G::share(shared_o, o, warp);
      if (lane == 0) {
        shared_top[warp] = top;
        shared_sum[warp] = sum;
      }
      __syncthreads();  // logits too
      if (warp != 0) return;
      top = -infinity<A>();
      for (int w = 0; w < kSparseWarps; ++w) top = max(top, shared_top[w]);
      sum = A(0);
      G::clear(o);
      for (int w = 0; w < kSparseWarps; ++w) {
        factor = exponential<T>(shared_top[w] - finite_top(top));
        sum += factor * shared_sum[w];
        G::add_shared(o, factor, shared_o, w);
      }
      any = true;  // itself
    } else {
      __syncwarp();  // logits
    }

    top = finite_top(top);
    const A inverse_sum = bad ? not_a_number<A>() : any ? A(1) / sum : A(0);
    G::scale(o, inverse_sum);
    const int64_t token = token_index(a, slice, row);
    G::write(a.out + token * a.dim, o, a.dim);
    if (lane == 0)
      a.lse[token] = bad   ? not_a_number<A>()
                     : any ? (top + logarithm<T>(sum)) / kLogitUnit<T>
                           : -infinity<A>();
    if (a.stats == nullptr) continue;
    if (!place.dense) {
      row_statistics(a, slice, row, names, length, bad, top, inverse_sum, values);
      continue;
    }
    if (lane < 6) stats_row(a, slice, row)[lane] = A(0);
    if (values == nullptr) continue;
    for (int key = a.prefix + lane; key < a.tokens; key += kWarp)
      stats_row(a, slice, key)[0] =
          role_of(a, slice, key) == kPatch ? exponential<T>(values[key] - top) * inverse_sum : A(0);
  }
}

// What rows see, as bits for attention_rows_kernel; one warp per row.
template <typename T, int kKeys>
__global__ void __launch_bounds__(kSparseThreads, 12)
    sparse_seen_kernel(const SparseForwardArgs<T> a, uint32_t* bits, int64_t rows) {
  constexpr int kWords = kSeenBits<kKeys>;
  static_assert(kWords <= kSeenWords && kWords < kWarp);
  __shared__ unsigned all_seen[kSparseWarps][kSeenWords];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned* seen = all_seen[threadIdx.x / kWarp];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSparseWarps;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kSparseWarps) + threadIdx.x / kWarp; i < rows;
       i += step) {
    const Slice slice = slice_at(a, i / a.tokens);
    const int row = static_cast<int>(i % a.tokens);
    const bool dense = row < a.prefix;
    const int32_t* names = names_of(a, a.map, slice, row);
    const int length = dense ? a.tokens : checked_length(names, a.map.named, a.tokens, seen);
    __syncwarp();
    if (lane < kWords) seen[lane] = 0u;
    __syncwarp();
    bool any = false;
    for (int at = lane; at < length; at += kWarp) {
      const int key = dense ? at : names[at];
      if (key != row && role_of(a, slice, key) == kDropped) continue;
      atomicOr(&seen[key / 32], 1u << key % 32);
      any = true;
    }
    any = __any_sync(0xffffffffu, any);
    uint32_t* to = bits + i * (kWords + 1);
    __syncwarp();
    if (lane < kWords) to[lane] = seen[lane];
    if (lane == kWords) to[lane] = length < 0 ? kBad : any ? kSees : kBlind;
    __syncwarp();
  }
}

// Entries 4 and 5 of the statistics; one warp per patch column, entries in the order of rows.
template <typename T>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_columns_kernel(const SparseForwardArgs<T> a, int64_t columns) {
  using A = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int patches = a.tokens - a.prefix;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSparseWarps;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kSparseWarps) + threadIdx.x / kWarp;
       i < columns; i += step) {
    const Slice slice = slice_at(a, i / patches);
    const int key = a.prefix + static_cast<int>(i % patches);
    const bool kept = role_of(a, slice, key) == kPatch;
    const int32_t* starts = a.lists.starts_of(a, slice);
    const int32_t* list = a.lists.list_of(a, a.map, slice);
    const A* values =
        a.map_values + slice_index(a, slice) * a.map.entries + first_entry(a, a.map, a.prefix);
    const int end = kept ? starts[key + 1] : starts[key];
    const A inverse = inverse_count<A>(a, slice);
    A sum = A(0), present = A(0), square = A(0);
    for (int s = starts[key] + lane; s < end; s += kWarp) {
      const A p = values[list[s]];
      if (p < A(0)) continue;
      sum += p;
      present += A(1);
    }
    const A mean = warp_sum(sum) * inverse;
    present = warp_sum(present);
    for (int s = starts[key] + lane; s < end; s += kWarp) {
      const A p = values[list[s]];
      if (!(p < A(0))) square += (p - mean) * (p - mean);
    }
    square = warp_sum(square) + (patch_count<A>(a, slice) - present) * mean * mean;
    if (lane != 0) continue;
    A* to = stats_row(a, slice, key) + 4;
    to[0] = kept ? mean : A(0);
    to[1] = kept ? square * inverse : A(0);
  }
}

}  // namespace spot
