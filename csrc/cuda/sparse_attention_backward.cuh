// Backward kernels of sparse_attention; the formulas are those of attention_backward.cuh, for the
// entries of the map alone.
//
// - prepare_kernel, of attention_backward.cuh: per token and head.
// - sparse_query_kernel, per query: p and dS of its entries, and dq = scale dS k. Gathers k and v
//   as the forward pass does, with statistics k once more, since delta needs the whole row.
// - sparse_key_kernel, per key: dk = scale dS^T q and dv = p^T dO over the prefix rows, then over
//   the list of its entries, in order; the gradient of keep per head. Gathers q and dO. A warp does
//   a key, so one that most queries name takes longest.
//
// Scratch: three numbers per entry of the map (lists, p, dS), four with a gradient of keep, and
// those of prepare_kernel.
#pragma once

#include "attention_backward.cuh"
#include "sparse_attention.cuh"

namespace spot {

template <typename T>
struct SparseBackwardArgs : BackwardArgs<T> {
  SparseMap map;
  SparseLists lists;
  Pair<Acc<T>>* pairs;  // [B, H, entries]: p and dS
  Acc<T>* keep_terms;   // [B, H, entries] or null: what an entry adds to the gradient of keep
};

template <typename T, int kDepth, bool kStats>
__global__ void __launch_bounds__(kSparseThreads, (kSparseBlocks<T, kDepth>))
    sparse_query_kernel(const SparseBackwardArgs<T> a, int parts) {
  using A = Acc<T>;
  using G = Gather<T, kDepth>;
  __shared__ A shared_dq[kSparseWarps * kDepth];
  __shared__ A shared_extra[kSparseWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const SparsePlace place = sparse_place(a, parts);
  const Slice slice = place.slice;
  const T* k = origin<T>(a.k, slice);
  const T* v = origin<T>(a.v, slice);
  const A scale = static_cast<A>(a.scale) * kLogitUnit<T>;
  const A inverse = kStats ? inverse_count<A>(a, slice) : A(0);

  for (int row = place.row; row < place.end; row += place.step) {
    const int32_t* names = names_of(a, a.map, slice, row);
    const int length = place.dense ? a.tokens : a.map.named;
    const int64_t entries = slice_index(a, slice) * a.map.entries + first_entry(a, a.map, row);
    Pair<A>* pairs = a.pairs + entries;
    A* keep_terms = a.keep_terms != nullptr ? a.keep_terms + entries : nullptr;
    const QueryEntry<A> entry = a.entries[table_index(a, slice, row)];
    Side<A> side{};
    if constexpr (kStats) side = a.query_sides[table_index(a, slice, row)];

    typename G::Raw raw;
    typename G::Wide q, grad, dq;
    G::read(raw, origin<T>(a.q, slice) + row * a.q.token, a.dim, true);
    G::widen(q, raw);
    G::read(raw, origin<T>(a.grad_out, slice) + row * a.grad_out.token, a.dim, true);
    G::widen(grad, raw);
    G::clear(dq);
    A extra = A(0);
    walk_keys<G>(a, place, row, names, length, [&](int first, const int (&keys)[G::kAhead]) {
      typename G::Raw k_rows[G::kAhead], v_rows[G::kAhead];
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u) {
        const int64_t key = keys[u] & (kHidden - 1);
        const bool there = keep_terms != nullptr ? keys[u] >= 0 : visible(keys[u]);
        G::read(k_rows[u], k + key * a.k.token, a.dim, there);
        G::read(v_rows[u], v + key * a.v.token, a.dim, there);
      }
#pragma unroll
      for (int u = 0; u < G::kAhead; ++u) {
        const int key = keys[u] & (kHidden - 1), at = first + u * G::kKeys + G::group();
        const A above = G::dot(q, k_rows[u]) * scale - entry.lse;
        const A from_out = G::dot(grad, v_rows[u]);
        const A p = visible(keys[u]) ? exponential<T>(above) : A(0);
        A gradient = A(0);
        if constexpr (kStats) {
          if (visible(keys[u])) {
            const A t =
                statistic_gradient(p, inverse, side, a.key_sides[table_index(a, slice, key)],
                                   a.class_token && row == 0, a.class_token && key == 0);
            gradient = from_out + t;
            extra += p * t;
          }
        } else {
          gradient = visible(keys[u]) ? p * (from_out - entry.own) : A(0);
          G::add(dq, gradient, k_rows[u]);
        }
        if (G::part() != 0 || keys[u] < 0) continue;
        pairs[at] = {p, gradient};
        if (keep_terms == nullptr) continue;
        const A w = visible(keys[u]) ? p : quotient<T>(A(1), A(1) + exponential<T>(-above));
        keep_terms[at] = key == row ? A(0) : w * (from_out - entry.own);
      }
    });

    if constexpr (kStats) {
      extra = G::across(extra);
      if (place.dense) {
        if (lane == 0) shared_extra[warp] = extra;
        __syncthreads();
        extra = A(0);
        for (int w = 0; w < kSparseWarps; ++w) extra += shared_extra[w];
      }
      const A delta = entry.own + extra;
      walk_keys<G>(a, place, row, names, length, [&](int first, const int (&keys)[G::kAhead]) {
        typename G::Raw k_rows[G::kAhead];
#pragma unroll
        for (int u = 0; u < G::kAhead; ++u)
          G::read(k_rows[u], k + (keys[u] & (kHidden - 1)) * a.k.token, a.dim, visible(keys[u]));
#pragma unroll
        for (int u = 0; u < G::kAhead; ++u) {
          A gradient = A(0);
          if (G::part() == 0 && visible(keys[u])) {  // the lane that wrote the pair
            Pair<A>& pair = pairs[first + u * G::kKeys + G::group()];
            gradient = pair.first * (pair.second - delta);
            pair.second = gradient;
          }
          gradient = __shfl_sync(0xffffffffu, gradient, G::group() * G::kLanes);
          G::add(dq, gradient, k_rows[u]);
        }
      });
    }

    G::across(dq);
    if (place.dense) {
      G::share(shared_dq, dq, warp);
      __syncthreads();
      if (warp != 0) return;
      G::clear(dq);
      for (int w = 0; w < kSparseWarps; ++w) G::add_shared(dq, A(1), shared_dq, w);
    }
    // The forward pass left NaN where the index is wrong.
    G::scale(dq, entry.lse == entry.lse ? static_cast<A>(a.scale) : not_a_number<A>());
    G::write(a.dq + token_index(a, slice, row) * a.dim, dq, a.dim);
  }
}

// Keys are shared out as patch rows are; all keys have a warp each.
template <typename T, int kDepth>
__global__ void __launch_bounds__(kSparseThreads, (kSparseBlocks<T, kDepth>))
    sparse_key_kernel(const SparseBackwardArgs<T> a, int parts) {
  using A = Acc<T>;
  using G = Gather<T, kDepth>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Slice slice = slice_at(a, blockIdx.x / static_cast<unsigned>(parts));
  const int size = (a.tokens + parts - 1) / parts;
  const int first_key = static_cast<int>(blockIdx.x) % parts * size;
  const int end_key = min(first_key + size, a.tokens);
  const T* q = origin<T>(a.q, slice);
  const T* grad = origin<T>(a.grad_out, slice);
  const int32_t* starts = a.lists.starts_of(a, slice);
  const int32_t* list = a.lists.list_of(a, a.map, slice);
  const int64_t entries = slice_index(a, slice) * a.map.entries;
  const int patch_entries = first_entry(a, a.map, a.prefix);

  for (int key = first_key + warp; key < end_key; key += kSparseWarps) {
    const int start = starts[key], count = a.prefix + starts[key + 1] - start;
    typename G::Wide dk, dv;
    G::clear(dk);
    G::clear(dv);
    A dkeep = A(0);
#pragma unroll 1
    for (int chunk = 0; chunk < count; chunk += kWarp) {
      const int i = chunk + lane;
      int query = -1;
      Pair<A> pair{A(0), A(0)};
      if (i < count) {
        const int listed = i < a.prefix ? 0 : list[start + i - a.prefix];
        query = i < a.prefix ? i : a.prefix + listed / a.map.named;
        const int64_t at = entries + (i < a.prefix ? i * a.tokens + key : patch_entries + listed);
        pair = a.pairs[at];
        if (a.keep_terms != nullptr) dkeep += a.keep_terms[at];
      }
#pragma unroll 1
      for (int first = 0; first < min(kWarp, count - chunk); first += G::kStep) {
        typename G::Raw q_rows[G::kAhead], grad_rows[G::kAhead];
#pragma unroll
        for (int u = 0; u < G::kAhead; ++u) {
          const int64_t from = __shfl_sync(0xffffffffu, query, first + u * G::kKeys + G::group());
          G::read(q_rows[u], q + from * a.q.token, a.dim, from >= 0);
          G::read(grad_rows[u], grad + from * a.grad_out.token, a.dim, from >= 0);
        }
#pragma unroll
        for (int u = 0; u < G::kAhead; ++u) {
          const int from = first + u * G::kKeys + G::group();
          G::add(dk, __shfl_sync(0xffffffffu, pair.second, from), q_rows[u]);
          G::add(dv, __shfl_sync(0xffffffffu, pair.first, from), grad_rows[u]);
        }
      }
    }
    G::across(dk);
    G::across(dv);
    G::scale(dk, static_cast<A>(a.scale));
    const int64_t token = token_index(a, slice, key);
    G::write(a.dk + token * a.dim, dk, a.dim);
    G::write(a.dv + token * a.dim, dv, a.dim);
    if (a.keep_partial == nullptr) continue;
    dkeep = warp_sum(dkeep);
    if (lane == 0) a.keep_partial[slice_index(a, slice) * a.tokens + key] = dkeep;
  }
}

}  // namespace spot
