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

// What both ops check besides where coefficients come from; B, H, Q and R are in `s`.
inline ConnectivityShape check_choice(const char* op, ConnectivityShape s, const char* like_name,
                                      const Tensor& like, const char* rank_name,
                                      const Tensor& basis, int64_t budget,
                                      const std::optional<Tensor>& columns,
                                      const std::optional<Tensor>& keep,
                                      std::optional<int64_t> coef_topk) {
  check_rank(op, "basis", basis, 2);
  check_dtype(op, "basis", basis, like.scalar_type());
  check_same_device(op, "basis", basis, like_name, like);
  check_size(op, "basis", basis, 0, s.rank, rank_name);
  s.num_columns = basis.size(1);
  if (columns) {
    check_rank(op, "columns", *columns, 2);
    check_dtype(op, "columns", *columns, ScalarType::Long);
    check_same_device(op, "columns", *columns, like_name, like);
    check_size(op, "columns", *columns, 0, s.batch, "the batch");
    s.num_columns = columns->size(1);
  }
  SPOT_CHECK(s.num_columns <= INT32_MAX, op, "basis may have at most 2^31 - 1 columns, got ",
             s.num_columns);
  SPOT_CHECK(s.num_queries <= s.num_columns, op, columns ? "columns" : "basis",
             " must have at least ", s.num_queries, " columns, as ", like_name,
             " has queries, got ", s.num_columns);
  SPOT_CHECK(budget >= 1 && budget <= s.num_columns, op, "budget must be between 1 and ",
             s.num_columns, " (the columns), got ", budget);
  SPOT_CHECK(!coef_topk || *coef_topk >= 1, op, "coef_topk must be an int64 of at least 1, got ",
             coef_topk.value_or(0));
  if (keep) {
    check_rank(op, "keep", *keep, 2);
    dtype_slot(op, "keep", *keep);
    check_same_device(op, "keep", *keep, like_name, like);
    check_size(op, "keep", *keep, 0, s.batch, "the batch");
    check_size(op, "keep", *keep, 1, s.num_queries, "the patch tokens");
  }
  s.budget = budget;
  s.used = coef_topk && *coef_topk < s.rank ? *coef_topk : s.rank;
  return s;
}

inline ConnectivityShape check_connectivity(const char* op, const Tensor& coefficients,
                                            const Tensor& basis, int64_t budget,
                                            const std::optional<Tensor>& columns,
                                            const std::optional<Tensor>& keep,
                                            std::optional<int64_t> coef_topk) {
  check_rank(op, "coefficients", coefficients, 4);
  dtype_slot(op, "coefficients", coefficients);
  const ConnectivityShape s{coefficients.size(0),
                            coefficients.size(1),
                            coefficients.size(2),
                            coefficients.size(3),
                            0,
                            0,
                            0};
  return check_choice(op, s, "coefficients", coefficients, "the coefficients of a row", basis,
                      budget, columns, keep, coef_topk);
}

inline ConnectivityShape check_predict_connectivity(
    const char* op, const Tensor& q, const Tensor& keys, const std::optional<Tensor>& bias,
    const Tensor& basis, int64_t budget, const std::optional<Tensor>& columns,
    const std::optional<Tensor>& keep, std::optional<int64_t> coef_topk) {
  check_rank(op, "q", q, 4);
  dtype_slot(op, "q", q);
  check_rank(op, "keys", keys, 4);
  check_dtype(op, "keys", keys, q.scalar_type());
  check_same_device(op, "keys", keys, "q", q);
  check_size(op, "keys", keys, 0, q.size(0), "the batch");
  check_size(op, "keys", keys, 2, q.size(2), "heads");
  check_size(op, "keys", keys, 3, q.size(3), "the head dim of q");
  if (bias) {
    check_rank(op, "bias", *bias, 3);
    check_dtype(op, "bias", *bias, q.scalar_type());
    check_same_device(op, "bias", *bias, "q", q);
    for (int64_t d = 0; d < 3; ++d) check_size(op, "bias", *bias, d, keys.size(d), "as keys has");
  }
  const ConnectivityShape s{q.size(0), q.size(2), q.size(1), keys.size(1), 0, 0, 0};
  return check_choice(op, s, "q", q, "the keys", basis, budget, columns, keep, coef_topk);
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
