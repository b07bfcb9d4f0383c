// Kernels of the compact slice: select, compact, scatter, fuse. Torch-free; one copy per ISA.
//
// Cost per image: select 2 to 32 (64 for float64) vector passes over N keys; compact and scatter
// one read and one write of each output row; fuse one pass over the removed tokens; fuse backward
// two. Memory: N keys, N bytes or N positions of per-thread scratch; nothing else.
#pragma once

#include "isa.h"
#include "numeric.h"
#include "scratch.h"

namespace spot {
namespace SPOT_ISA {

// ---- select ------------------------------------------------------------------------------------

// Unsigned keys in the order of the scores: NaN lowest, -0 equal to +0.
inline uint32_t order_key(float x) {
  const uint32_t u = bit_cast<uint32_t>(x + 0.0f);
  const uint32_t key = u ^ ((u >> 31) ? 0xffffffffu : 0x80000000u);
  return x == x ? key : 0u;
}
inline uint64_t order_key(double x) {
  const uint64_t u = bit_cast<uint64_t>(x + 0.0);
  const uint64_t key = u ^ ((u >> 63) ? ~uint64_t{0} : uint64_t{1} << 63);
  return x == x ? key : 0u;
}

constexpr int64_t kKeyLanes = 16;

// Keys that reach `threshold`; `n` is a multiple of kKeyLanes (said again for the compiler).
template <typename Key>
inline int64_t count_at_least(const Key* keys, int64_t n, Key threshold) {
  Key count = 0;  // as wide as the keys, so that lanes line up
  for (int64_t i = 0; i < (n & -kKeyLanes); ++i) count += keys[i] >= threshold ? Key{1} : Key{0};
  return static_cast<int64_t>(count);
}

// Writes the ascending positions of the `keep` largest of `n` keys; ties go to the lower position.
// Zeros, the lowest key there is, follow the n keys up to a multiple of kKeyLanes.
template <typename Key>
inline void largest_positions(const Key* keys, int64_t n, int64_t keep, int64_t* out) {
  // Highest threshold, bit by bit, that at least `keep` keys reach.
  const int64_t padded = round_up(n, kKeyLanes);
  Key threshold = 0;
  int64_t reach = n;
  for (int bit = static_cast<int>(sizeof(Key)) * 8 - 1; bit >= 0 && reach != keep; --bit) {
    const Key candidate = threshold | (Key{1} << bit);
    const int64_t count = count_at_least(keys, padded, candidate);
    threshold = count >= keep ? candidate : threshold;
    reach = count >= keep ? count : reach;
  }
  // Both loops write a position and then move on or not: no branch on the keys.
  int64_t written = 0;
  if (reach == keep) {
    for (int64_t i = 0; written < keep; ++i) {
      out[written] = i;
      written += keys[i] >= threshold;
    }
    return;
  }
  // The threshold is the exact keep-th key, and more keys equal it than are wanted.
  int64_t ties = keep;
  if (threshold != ~Key{0}) ties -= count_at_least(keys, padded, threshold + 1);
  for (int64_t i = 0; written < keep; ++i) {
    const bool tied = keys[i] == threshold;
    out[written] = i;
    written += (keys[i] > threshold) | (tied & (ties > 0));
    ties -= tied;
  }
}

template <typename T>
void select(const SelectArgs& a, int64_t begin, int64_t end) {
  using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
  if (a.num_keep == 0) return;
  const int64_t padded = round_up(a.num_tokens, kKeyLanes);
  Key* keys = static_cast<Key*>(thread_scratch(static_cast<std::size_t>(padded) * sizeof(Key)));
  for (int64_t i = a.num_tokens; i < padded; ++i) keys[i] = 0;
  for (int64_t b = begin; b < end; ++b) {
    const T* scores = static_cast<const T*>(a.scores) + b * a.batch_stride;
    if (a.stride == 1)
      for (int64_t i = 0; i < a.num_tokens; ++i) keys[i] = order_key(load(scores[i]));
    else
      for (int64_t i = 0; i < a.num_tokens; ++i) keys[i] = order_key(load(scores[i * a.stride]));
    largest_positions(keys, a.num_tokens, a.num_keep, a.index + b * a.num_keep);
  }
}

// ---- compact and scatter -----------------------------------------------------------------------

inline RowStatus worse(RowStatus a, RowStatus b) { return a > b ? a : b; }

// Calls image(b, first, last) for the rows of each image that [begin, end) touches.
template <typename Image>
inline RowStatus for_images(int64_t begin, int64_t end, int64_t rows_per_image, Image&& image) {
  RowStatus status = kRowsFine;
  while (begin < end) {
    const int64_t b = begin / rows_per_image;
    const int64_t start = b * rows_per_image;
    const int64_t stop = start + rows_per_image < end ? start + rows_per_image : end;
    status = worse(status, image(b, begin - start, stop - start));
    begin = stop;
  }
  return status;
}

// Copies `bytes` and fetches as many from `ahead` into second-level cache. Plain vector stores:
// into new pages, which large outputs are made of, both memcpy (`rep movsb`) and stores past the
// caches were slower.
inline void copy_bytes(char* out, const char* source, const char* ahead, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(ahead + i, 0, 2);
    std::memcpy(out + i, source + i, 64);
  }
  if (i < bytes) std::memcpy(out + i, source + i, static_cast<std::size_t>(bytes - i));
}

inline void copy_bytes(char* out, const char* source, int64_t bytes) {
  copy_bytes(out, source, source, bytes);
}

// Distance from the row that is copied to the one that is fetched: the processor's own prefetching
// does not know where the next row is.
constexpr int64_t kAheadBytes = 8192;

inline void copy_rows(char* out, const char* source, int64_t source_row, const RowArgs& a,
                      int64_t count) {
  if (source_row == a.row_bytes) {
    copy_bytes(out, source, count * a.row_bytes);
    return;
  }
  for (int64_t r = 0; r < count; ++r)
    copy_bytes(out + r * a.row_bytes, source + r * source_row, a.row_bytes);
}

inline RowStatus compact_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const int64_t head = a.num_prefix + a.num_extra;
  return for_images(begin, end, head + a.num_kept, [&](int64_t b, int64_t first, int64_t last) {
    const char* source = a.source + b * a.source_batch;
    const char* patches = source + a.num_prefix * a.source_row;
    char* out = a.out + b * (head + a.num_kept) * a.row_bytes;
    int64_t r = first;
    if (r < a.num_prefix) {
      const int64_t stop = last < a.num_prefix ? last : a.num_prefix;
      copy_rows(out + r * a.row_bytes, source + r * a.source_row, a.source_row, a, stop - r);
      r = stop;
    }
    if (r < head && r < last) {
      const int64_t stop = last < head ? last : head;
      const char* extra = a.second + b * a.second_batch + (r - a.num_prefix) * a.second_row;
      copy_rows(out + r * a.row_bytes, extra, a.second_row, a, stop - r);
      r = stop;
    }
    const int64_t* index = a.index + b * a.num_kept;  // index[r - head] belongs to output row r
    const int64_t ahead = 1 + kAheadBytes / a.row_bytes;
    const auto fits = [&a](int64_t at) { return at >= 0 && at < a.num_tokens; };
    RowStatus status = kRowsFine;
    for (; r < last; ++r) {
      const int64_t at = index[r - head];
      const int64_t next = index[(r + ahead < last ? r + ahead : last - 1) - head];
      if (!fits(at)) return kRowsBad;
      if (r > head && at <= index[r - head - 1]) status = kRowsUnsorted;
      copy_bytes(out + r * a.row_bytes, patches + at * a.source_row,
                 patches + (fits(next) ? next : at) * a.source_row, a.row_bytes);
    }
    return status;
  });
}

inline RowStatus scatter_rows(const RowArgs& a, int64_t begin, int64_t end) {
  const int64_t rows = a.num_prefix + a.num_tokens;
  int64_t* origin = static_cast<int64_t*>(
      thread_scratch(static_cast<std::size_t>(a.num_tokens) * sizeof(int64_t)));
  return for_images(begin, end, rows, [&](int64_t b, int64_t first, int64_t last) {
    const char* source = a.source + b * a.source_batch;
    const char* patches = source + (a.num_prefix + a.num_extra) * a.source_row;
    const char* second = a.second ? a.second + b * a.second_batch : nullptr;
    char* out = a.out + b * rows * a.row_bytes;
    for (int64_t i = 0; i < a.num_tokens; ++i) origin[i] = -1;
    const int64_t* index = a.index + b * a.num_kept;
    for (int64_t m = 0; m < a.num_kept; ++m) {
      if (index[m] < 0 || index[m] >= a.num_tokens || origin[index[m]] >= 0) return kRowsBad;
      origin[index[m]] = m;
    }
    int64_t r = first;
    if (r < a.num_prefix) {
      const int64_t stop = last < a.num_prefix ? last : a.num_prefix;
      copy_rows(out + r * a.row_bytes, source + r * a.source_row, a.source_row, a, stop - r);
      r = stop;
    }
    for (; r < last; ++r) {
      const int64_t m = origin[r - a.num_prefix];
      char* row = out + r * a.row_bytes;
      if (m >= 0)
        copy_bytes(row, patches + m * a.source_row, a.row_bytes);
      else if (second)
        copy_bytes(row, second + r * a.second_row, a.row_bytes);
      else
        std::memset(row, 0, static_cast<std::size_t>(a.row_bytes));
    }
    return kRowsFine;
  });
}

// ---- fuse --------------------------------------------------------------------------------------

// Ascending positions not named in `index`; -1 when an entry is out of range or repeated.
inline int64_t list_removed(const FuseArgs& a, int64_t b, int64_t* removed) {
  for (int64_t i = 0; i < a.num_tokens; ++i) removed[i] = i;
  const int64_t* index = a.index + b * a.num_kept;
  for (int64_t m = 0; m < a.num_kept; ++m) {
    if (index[m] < 0 || index[m] >= a.num_tokens || removed[index[m]] < 0) return -1;
    removed[index[m]] = -1;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < a.num_tokens; ++i)
    if (removed[i] >= 0) removed[count++] = i;
  return count;
}

// What the sums are divided by. Not its inverse: that of a denormal is inf, that of inf is 0.
template <typename T>
inline Acc<T> removed_weight(const FuseArgs& a, const T* weights, const int64_t* removed,
                             int64_t count) {
  if (!a.normalize) return 1;
  Acc<T> sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += load(weights[removed[i]]);
  return sum;
}

constexpr int64_t kFuseBlock = 256;  // channels summed at once, in registers and first-level cache

template <typename T>
bool fuse(const FuseArgs& a, int64_t begin, int64_t end) {
  int64_t* removed = static_cast<int64_t*>(
      thread_scratch(static_cast<std::size_t>(a.num_tokens) * sizeof(int64_t)));
  for (int64_t b = begin; b < end; ++b) {
    const int64_t count = list_removed(a, b, removed);
    if (count < 0) return false;
    const T* weights = static_cast<const T*>(a.weights) + b * a.num_tokens;
    const T* patches =
        static_cast<const T*>(a.tokens) + b * a.tokens_batch + a.num_prefix * a.tokens_row;
    T* out = static_cast<T*>(a.out) + b * a.channels;
    const Acc<T> mass = removed_weight<T>(a, weights, removed, count);
    for (int64_t c0 = 0; c0 < a.channels; c0 += kFuseBlock) {
      const int64_t width = a.channels - c0 < kFuseBlock ? a.channels - c0 : kFuseBlock;
      Acc<T> sum[kFuseBlock] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Acc<T> w = load(weights[removed[i]]);
        const T* row = patches + removed[i] * a.tokens_row + c0;
        for (int64_t c = 0; c < width; ++c) sum[c] += w * load(row[c]);
      }
      // No weight at all gives zero, whatever the tokens hold.
      for (int64_t c = 0; c < width; ++c)
        out[c0 + c] = store<T>(mass == 0 ? Acc<T>(0) : sum[c] / mass);
    }
  }
  return true;
}

template <typename T>
inline Acc<T> dot(const T* x, const T* y, int64_t n) {
  constexpr int64_t kLanes = 16;
  Acc<T> lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += load(x[i + l]) * load(y[i + l]);
  Acc<T> sum = 0;
  for (; i < n; ++i) sum += load(x[i]) * load(y[i]);
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// With o = sum_n w_n x_n / S:  dx_n = (w_n / S) g  and  dw_n = (x_n . g - o . g) / S.
// Unnormalised, S is 1 and there is no o . g term. Zero where S is zero.
template <typename T>
bool fuse_backward(const FuseArgs& a, int64_t begin, int64_t end) {
  const std::size_t n = static_cast<std::size_t>(a.num_tokens);
  int64_t* removed = static_cast<int64_t*>(thread_scratch(n * (sizeof(int64_t) + sizeof(Acc<T>))));
  Acc<T>* along = reinterpret_cast<Acc<T>*>(removed + n);  // x_n . g of the removed tokens
  const int64_t rows = a.num_prefix + a.num_tokens;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t count = list_removed(a, b, removed);
    if (count < 0) return false;
    const T* weights = static_cast<const T*>(a.weights) + b * a.num_tokens;
    const T* patches =
        static_cast<const T*>(a.tokens) + b * a.tokens_batch + a.num_prefix * a.tokens_row;
    const T* grad = static_cast<const T*>(a.grad) + b * a.channels;
    T* tokens_grad = static_cast<T*>(a.out) + b * rows * a.channels;
    T* weights_grad = static_cast<T*>(a.weights_grad) + b * a.num_tokens;
    std::memset(tokens_grad, 0, static_cast<std::size_t>(rows * a.channels) * sizeof(T));
    std::memset(weights_grad, 0, n * sizeof(T));
    const Acc<T> mass = removed_weight<T>(a, weights, removed, count);
    if (mass == 0) continue;
    Acc<T> mean = 0;
    for (int64_t i = 0; i < count; ++i) {
      along[i] = dot(patches + removed[i] * a.tokens_row, grad, a.channels);
      mean += load(weights[removed[i]]) * along[i];
    }
    mean = a.normalize ? mean / mass : Acc<T>(0);
    for (int64_t i = 0; i < count; ++i) {
      const Acc<T> w = load(weights[removed[i]]) / mass;
      T* row = tokens_grad + (a.num_prefix + removed[i]) * a.channels;
      for (int64_t c = 0; c < a.channels; ++c) row[c] = store<T>(w * load(grad[c]));
      weights_grad[removed[i]] = store<T>((along[i] - mean) / mass);
    }
  }
  return true;
}

}  // namespace SPOT_ISA
}  // namespace spot
