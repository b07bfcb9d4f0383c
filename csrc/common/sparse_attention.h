// Shapes and checks of sparse_attention, shared by the CPU and CUDA entry points.
#pragma once

#include "attention_stats.h"

namespace spot {

struct SparseShape : AttentionShape {
  int64_t num_named;  // K, keys that the index names for each patch query
};

inline SparseShape check_sparse_attention(const char* op, const Tensor& q, const Tensor& k,
                                          const Tensor& v, const Tensor& index,
                                          const std::optional<Tensor>& keep,
                                          std::optional<double> scale, int64_t num_prefix,
                                          bool class_token) {
  const AttentionShape s =
      check_attention(op, q, k, v, keep, std::nullopt, scale, num_prefix, class_token);
  check_rank(op, "index", index, 4);
  check_dtype(op, "index", index, ScalarType::Int);
  check_same_device(op, "index", index, "q", q);
  check_size(op, "index", index, 0, s.batch, "the batch");
  check_size(op, "index", index, 1, s.num_heads, "heads");
  check_size(op, "index", index, 2, s.num_patches(), "the patch tokens");
  SPOT_CHECK(index.size(3) <= s.num_tokens, op, "index names ", index.size(3),
             " distinct keys a query, but there are only ", s.num_tokens, " tokens");
  return {s, index.size(3)};
}

}  // namespace spot
