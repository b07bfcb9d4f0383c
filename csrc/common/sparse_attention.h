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

// Names the first entry of the index that is out of range, repeated, or behind a -1. Host memory
// only; the slow path after a kernel saw something odd, or the check that SPOT_CHECK=1 asks for.
inline void explain_names(const char* op, const int32_t* index, const SparseShape& s) {
  std::vector<bool> seen(static_cast<size_t>(s.num_tokens));
  const int64_t rows = s.batch * s.num_heads * s.num_patches();
  for (int64_t row = 0; row < rows; ++row, index += s.num_named) {
    seen.assign(seen.size(), false);
    const auto at = [&](int64_t entry) {
      std::ostringstream text;
      text << "index[" << row / s.num_patches() / s.num_heads << ", "
           << row / s.num_patches() % s.num_heads << ", " << row % s.num_patches() << ", " << entry
           << "]";
      return text.str();
    };
    for (int64_t entry = 0; entry < s.num_named; ++entry) {
      const int64_t key = index[entry];
      SPOT_CHECK(key >= -1 && key < s.num_tokens, op, at(entry), " is ", key, ", out of range for ",
                 s.num_tokens, " tokens");
      if (key < 0) continue;
      SPOT_CHECK(entry == 0 || index[entry - 1] >= 0, op, at(entry), " is ", key,
                 " behind a -1; a row ends at the first");
      SPOT_CHECK(!seen[static_cast<size_t>(key)], op, at(entry), " repeats position ", key,
                 "; positions must be distinct");
      seen[static_cast<size_t>(key)] = true;
    }
  }
}

}  // namespace spot
