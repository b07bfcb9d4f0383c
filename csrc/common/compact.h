// Shapes and checks of the compact slice, shared by the CPU and CUDA entry points.
#pragma once

#include "check.h"

#include <unordered_set>

namespace spot {

// A [B, T, ...] tensor seen as rows of bytes. Rows are dense; batch and row strides are free.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  int64_t batch_stride, row_stride, row_bytes;

  const char* data() const { return static_cast<const char*>(readable(tensor)); }
};

inline Rows rows_of(const Tensor& given) {
  const Tensor t = dense_rows(given);
  const int64_t item = static_cast<int64_t>(t.element_size());
  int64_t row = item;
  for (int64_t d = 2; d < t.dim(); ++d) row *= t.size(d);
  return {t, t.stride(0) * item, t.stride(1) * item, row};
}

struct TokenShape {
  int64_t batch;       // B
  int64_t num_tokens;  // N, patch tokens of the full grid
  int64_t num_prefix;  // P
  int64_t num_extra;   // E
  int64_t num_kept;    // M

  int64_t full_rows() const { return num_prefix + num_tokens; }
  int64_t kept_rows() const { return num_prefix + num_extra + num_kept; }
};

// index [B, M] int64 beside `tokens`; M <= N, since positions are distinct.
inline void check_index(const char* op, const Tensor& index, const char* like_name,
                        const Tensor& like, int64_t num_tokens) {
  check_rank(op, "index", index, 2);
  check_dtype(op, "index", index, ScalarType::Long);
  check_same_device(op, "index", index, like_name, like);
  check_size(op, "index", index, 0, like.size(0), "the batch");
  SPOT_CHECK(index.size(1) <= num_tokens, op, "index names ", index.size(1),
             " distinct positions, but there are only ", num_tokens, " patch tokens");
}

inline void check_prefix(const char* op, const char* name, const Tensor& t, int64_t num_prefix) {
  SPOT_CHECK(t.dim() >= 2, op, name, " must have shape [B, tokens, ...], got ", shape_of(t));
  check_memory(op, name, t);
  SPOT_CHECK(num_prefix >= 0 && num_prefix <= t.size(1), op, "num_prefix must be between 0 and ",
             t.size(1), " (the tokens of ", name, "), got ", num_prefix);
}

inline void check_same_rows(const char* op, const char* name, const Tensor& t,
                            const char* like_name, const Tensor& like) {
  bool same = t.dim() == like.dim() && t.size(0) == like.size(0);
  for (int64_t d = 2; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  SPOT_CHECK(same, op, name, " must match ", like_name, " in all but dimension 1: ", shape_of(t),
             " beside ", shape_of(like));
  check_dtype(op, name, t, like.scalar_type());
  check_same_device(op, name, t, like_name, like);
  check_memory(op, name, t);
}

inline TokenShape check_compact(const char* op, const Tensor& tokens, const Tensor& index,
                                int64_t num_prefix, const std::optional<Tensor>& extra) {
  check_prefix(op, "tokens", tokens, num_prefix);
  check_index(op, index, "tokens", tokens, tokens.size(1) - num_prefix);
  if (extra) check_same_rows(op, "extra", *extra, "tokens", tokens);
  return {tokens.size(0), tokens.size(1) - num_prefix, num_prefix, extra ? extra->size(1) : 0,
          index.size(1)};
}

// `compacted` has P+E+M rows that go back to a grid of `num_tokens`.
inline TokenShape check_scatter(const char* op, const char* name, const Tensor& compacted,
                                const Tensor& index, int64_t num_tokens, int64_t num_prefix,
                                int64_t num_extra, const std::optional<Tensor>& background) {
  SPOT_CHECK(num_tokens >= 0, op, "num_tokens must not be negative, got ", num_tokens);
  SPOT_CHECK(num_extra >= 0, op, "num_extra must not be negative, got ", num_extra);
  check_prefix(op, name, compacted, num_prefix);
  SPOT_CHECK(num_tokens <= INT64_MAX - num_prefix, op, "num_tokens is too large: ", num_tokens);
  SPOT_CHECK(num_extra <= compacted.size(1) - num_prefix, op, "num_extra must be at most ",
             compacted.size(1) - num_prefix, " (the tokens of ", name, " after the prefix), got ",
             num_extra);
  check_index(op, index, name, compacted, num_tokens);
  check_size(op, name, compacted, 1, num_prefix + num_extra + index.size(1),
             "prefix, extra and indexed tokens");
  if (background) {
    check_same_rows(op, "background", *background, name, compacted);
    check_size(op, "background", *background, 1, num_prefix + num_tokens,
               "num_prefix + num_tokens");
  }
  return {compacted.size(0), num_tokens, num_prefix, num_extra, index.size(1)};
}

inline TokenShape check_fuse(const char* op, const Tensor& tokens, const Tensor& weights,
                             const Tensor& index, int64_t num_prefix) {
  check_rank(op, "tokens", tokens, 3);
  const TokenShape shape = check_compact(op, tokens, index, num_prefix, std::nullopt);
  check_rank(op, "weights", weights, 2);
  check_dtype(op, "weights", weights, tokens.scalar_type());
  check_same_device(op, "weights", weights, "tokens", tokens);
  check_size(op, "weights", weights, 0, shape.batch, "the batch");
  check_size(op, "weights", weights, 1, shape.num_tokens, "the patch tokens");
  return shape;
}

inline void check_fuse_grad(const char* op, const Tensor& grad, const Tensor& tokens) {
  check_rank(op, "grad", grad, 2);
  check_dtype(op, "grad", grad, tokens.scalar_type());
  check_same_device(op, "grad", grad, "tokens", tokens);
  check_size(op, "grad", grad, 0, tokens.size(0), "the batch");
  check_size(op, "grad", grad, 1, tokens.size(2), "the channels");
}

inline void check_select(const char* op, const Tensor& scores, int64_t num_keep) {
  check_rank(op, "scores", scores, 2);
  SPOT_CHECK(scores.size(1) <= INT32_MAX, op, "scores may have at most 2^31 - 1 tokens, got ",
             scores.size(1));
  SPOT_CHECK(num_keep >= 0 && num_keep <= scores.size(1), op, "num_keep must be between 0 and ",
             scores.size(1), " (the scored tokens), got ", num_keep);
}

// Positions that were met before, of `num_tokens`.
class Met {
 public:
  Met(int64_t num_tokens, int64_t num_kept) : few_(num_tokens / 64 > num_kept + 64) {
    if (!few_) marks_.resize(static_cast<size_t>(num_tokens));
  }
  void forget() {
    set_.clear();
    marks_.assign(marks_.size(), false);
  }
  // False when it was there.
  bool add(int64_t at) {
    if (few_) return set_.insert(at).second;
    const bool fresh = !marks_[static_cast<size_t>(at)];
    marks_[static_cast<size_t>(at)] = true;
    return fresh;
  }

 private:
  const bool few_;  // then marks would take more than the positions themselves
  std::unordered_set<int64_t> set_;
  std::vector<bool> marks_;
};

// Names the first of `index` [B, M], in host memory, that is out of range or repeated. The slow
// path after a kernel saw something odd, where rows have no bytes to copy, and the check that
// SPOT_CHECK=1 asks for. What an expanded index repeats is looked at once.
inline void explain_index(const char* op, const Tensor& index, const TokenShape& s) {
  if (is_empty(index)) return;
  const int64_t* data = static_cast<const int64_t*>(readable(index));
  const int64_t image = index.stride(0), entry = index.stride(1);
  const int64_t images = image == 0 ? 1 : s.batch;
  Met met(s.num_tokens, s.num_kept);
  for (int64_t b = 0; b < images; ++b) {
    met.forget();
    for (int64_t m = 0; m < s.num_kept; ++m) {
      const int64_t at = data[b * image + m * entry];
      SPOT_CHECK(at >= 0 && at < s.num_tokens, op, "index[", b, ", ", m, "] is ", at,
                 ", out of range for ", s.num_tokens, " patch tokens");
      SPOT_CHECK(met.add(at), op, "index[", b, ", ", m, "] repeats position ", at,
                 "; positions must be distinct");
    }
  }
}

}  // namespace spot
