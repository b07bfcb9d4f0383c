// The largest of many keys, ties to the lower position: by a warp that can count them, or by a
// block in one pass per 8 bits of the key.
#pragma once

#include "block.cuh"

namespace spot {

// Unsigned keys in the order of the values: NaN lowest (0), then -inf; -0 equal to +0.
__device__ inline uint32_t order_key(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);
  const uint32_t key = u ^ ((u >> 31) ? 0xffffffffu : 0x80000000u);
  return x == x ? key : 0u;
}
__device__ inline uint64_t order_key(double x) {
  const uint64_t u = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  const uint64_t key = u ^ ((u >> 63) ? ~uint64_t{0} : uint64_t{1} << 63);
  return x == x ? key : 0u;
}

template <typename T>
using SelectKey = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

// The keys to take: all above `at`, and the first `ties` of those equal to it.
template <typename Key>
struct Cut {
  Key at;
  int64_t ties;
};

// The cut that takes `wanted` (at least 1) keys. count_from(key): how many are not below `key`, the
// same in all lanes. Ends early where a bit separates exactly the wanted ones.
template <typename Key, typename Count>
__device__ inline Cut<Key> warp_cut(int wanted, Count&& count_from) {
  Key at = 0;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
    const int count = count_from(at | bit);
    if (count < wanted) continue;
    at |= bit;
    if (count == wanted) break;
  }
  return {at, wanted - count_from(at + 1)};  // no number has the largest key
}

// Calls selected(place, i) in this lane for each of `count` positions that the cut takes; places
// count them in order. key_at(i) is called for i < count; all lanes take part.
template <typename Key, typename KeyAt, typename Selected>
__device__ inline int warp_selected(int count, const Cut<Key>& cut, KeyAt&& key_at,
                                    Selected&& selected) {
  const unsigned below = (1u << (threadIdx.x % kWarp)) - 1u;
  int written = 0, ties = 0;  // over all earlier chunks; the same in every lane
  for (int start = 0; start < count; start += kWarp) {
    const int i = start + static_cast<int>(threadIdx.x) % kWarp;
    const Key key = i < count ? key_at(i) : Key(0);
    const unsigned tied = __ballot_sync(0xffffffffu, i < count && key == cut.at);
    const bool take =
        i < count && (key > cut.at || (key == cut.at && ties + __popc(tied & below) < cut.ties));
    const unsigned taken = __ballot_sync(0xffffffffu, take);
    if (take) selected(written + __popc(taken & below), i);
    written += __popc(taken);
    ties += __popc(tied);
  }
  return written;
}

constexpr int kSelectThreads = 256;

// Shared memory of a block of kSelectThreads threads that selects.
template <typename Key>
struct BlockSelect {
  int histogram[kSelectThreads];
  int partial[kSelectThreads / kWarp];
  Key at;
  int64_t wanted;
};

// As warp_cut, by the whole block; key_at(i) is called for i < count.
template <typename Key, typename KeyAt>
__device__ inline Cut<Key> block_cut(BlockSelect<Key>& memory, int64_t count, int64_t wanted,
                                     KeyAt&& key_at) {
  Key at = 0, mask = 0;  // bits found so far; `wanted`: among those that share them
  for (int shift = static_cast<int>(sizeof(Key)) * 8 - 8; shift >= 0; shift -= 8) {
    memory.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) {
      const Key key = key_at(i);
      if ((key & mask) == at)
        atomicAdd(&memory.histogram[static_cast<int>((key >> shift) & 0xff)], 1);
    }
    __syncthreads();
    const int digit = 255 - static_cast<int>(threadIdx.x), here = memory.histogram[digit];
    const int64_t above = block_scan(here, memory.partial) - here;
    if (above < wanted && wanted <= above + here) {  // true in exactly one thread
      memory.at = at | (static_cast<Key>(digit) << shift);
      memory.wanted = wanted - above;
    }
    __syncthreads();
    at = memory.at;
    wanted = memory.wanted;
    mask |= static_cast<Key>(0xff) << shift;
  }
  return {at, wanted};
}

// As warp_selected, by the whole block.
template <typename Key, typename KeyAt, typename Selected>
__device__ inline int64_t block_selected(BlockSelect<Key>& memory, int64_t count,
                                         const Cut<Key>& cut, KeyAt&& key_at, Selected&& selected) {
  int64_t written = 0, ties = 0;  // over all earlier chunks; the same in every thread
  for (int64_t start = 0; start < count; start += kSelectThreads) {
    const int64_t i = start + threadIdx.x;
    const Key key = i < count ? key_at(i) : Key(0);
    const bool tied = i < count && key == cut.at;
    int tied_total, taken_total;
    const int tied_before = block_rank(tied, memory.partial, tied_total);
    const bool take = i < count && (key > cut.at || (tied && ties + tied_before < cut.ties));
    const int place = block_rank(take, memory.partial, taken_total);
    if (take) selected(written + place, i);
    written += taken_total;
    ties += tied_total;
  }
  return written;
}

}  // namespace spot
