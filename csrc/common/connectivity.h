// Shapes and checks of connectivity, shared by the CPU and CUDA entry points.
#pragma once

#include "dispatch.h"

namespace spot {

struct ConnectivityShape {
  int64_t batch, num_heads, num_queries, rank;  // B, H, N-P, R
  int64_t num_columns;                          // N, those in play
  int64_t budget;                               // K
  int64_t used;                                 // coefficients of a row that count

  int64_t num_prefix() const { return num_columns - num_queries; }
};

inline ConnectivityShape check_connectivity(const char* op, const Tensor& coefficients,
                                            const Tensor& basis, int64_t budget,
                                            const std::optional<Tensor>& columns,
                                            const std::optional<Tensor>& keep,
                                            std::optional<int64_t> coef_topk) {
  check_rank(op, "coefficients", coefficients, 4);
  dtype_slot(op, "coefficients", coefficients);
  check_rank(op, "basis", basis, 2);
  check_dtype(op, "basis", basis, coefficients.scalar_type());
  check_same_device(op, "basis", basis, "coefficients", coefficients);
  check_size(op, "basis", basis, 0, coefficients.size(3), "the coefficients of a row");
  int64_t in_play = basis.size(1);
  if (columns) {
    check_rank(op, "columns", *columns, 2);
    check_dtype(op, "columns", *columns, ScalarType::Long);
    check_same_device(op, "columns", *columns, "coefficients", coefficients);
    check_size(op, "columns", *columns, 0, coefficients.size(0), "the batch");
    in_play = columns->size(1);
  }
  const int64_t queries = coefficients.size(2), rank = coefficients.size(3);
  SPOT_CHECK(in_play <= INT32_MAX, op, "basis may have at most 2^31 - 1 columns, got ", in_play);
  SPOT_CHECK(queries <= in_play, op, columns ? "columns" : "basis", " must have at least ", queries,
             " columns, as coefficients has queries, got ", in_play);
  SPOT_CHECK(budget >= 1 && budget <= in_play, op, "budget must be between 1 and ", in_play,
             " (the columns), got ", budget);
  SPOT_CHECK(!coef_topk || *coef_topk >= 1, op, "coef_topk must be an int64 of at least 1, got ",
             coef_topk.value_or(0));
  if (keep) {
    check_rank(op, "keep", *keep, 2);
    dtype_slot(op, "keep", *keep);
    check_same_device(op, "keep", *keep, "coefficients", coefficients);
    check_size(op, "keep", *keep, 0, coefficients.size(0), "the batch");
    check_size(op, "keep", *keep, 1, queries, "the patch tokens");
  }
  const int64_t used = coef_topk && *coef_topk < rank ? *coef_topk : rank;
  return {coefficients.size(0), coefficients.size(1), queries, rank, in_play, budget, used};
}

// Names the first of `columns`, dense and in host memory, that is out of range.
inline void check_columns(const char* op, const Tensor& columns, int64_t num_basis) {
  const int64_t* data = static_cast<const int64_t*>(columns.const_data_ptr());
  for (int64_t i = 0; i < columns.size(0) * columns.size(1); ++i)
    SPOT_CHECK(data[i] >= 0 && data[i] < num_basis, op, "columns must be in [0, ", num_basis,
               ") (the columns of basis), got ", data[i], " at columns[", i / columns.size(1), ", ",
               i % columns.size(1), "]");
}

}  // namespace spot
