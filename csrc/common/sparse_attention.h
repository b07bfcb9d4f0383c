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

// Names the first entry of an index that is out of range, repeated, or behind a -1. Host memory
// only; the slow path after a kernel saw something odd, or the check that SPOT_CHECK=1 asks for.
inline void explain_keys(const char* op, const SparseShape& s, const int32_t* index) {
  std::vector<int64_t> where(static_cast<std::size_t>(s.num_tokens));
  const int64_t rows = s.batch * s.num_heads * s.num_patches();
  for (int64_t row = 0; row < rows; ++row) {
    where.assign(where.size(), -1);
    int64_t end = s.num_named;
    for (int64_t t = 0; t < s.num_named; ++t) {
      const int64_t key = index[row * s.num_named + t];
      const auto place = [&](int64_t at) {
        std::ostringstream text;
        text << "index[" << row / s.num_patches() / s.num_heads << ", "
             << row / s.num_patches() % s.num_heads << ", " << row % s.num_patches() << ", " << at
             << "]";
        return text.str();
      };
      if (key == -1) {
        end = t < end ? t : end;
        continue;
      }
      SPOT_CHECK(key >= 0 && key < s.num_tokens, op, "index must be in [0, ", s.num_tokens,
                 "), or -1 at the end of a row, got ", key, " at ", place(t));
      SPOT_CHECK(end > t, op, "index must have -1 at the end of a row only, got ", key, " at ",
                 place(t), " behind it");
      int64_t& before = where[static_cast<std::size_t>(key)];
      SPOT_CHECK(before < 0, op, "index must name a key once, got ", key, " at ", place(before),
                 " and ", place(t), " repeated");
      before = t;
    }
  }
}

}  // namespace spot
