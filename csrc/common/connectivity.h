// Shapes and checks of connectivity, shared by the CPU and CUDA entry points.
#pragma once

#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace spot {

struct ConnectivityShape {
  int64_t batch, num_heads, num_queries, rank;  // B, H, N-P, R
  int64_t num_columns;                          // N, those in play
  int64_t budget;                               // K
  int64_t used;                                 // coefficients of a row that count

  int64_t num_prefix() const { return num_columns - num_queries; }
};

// What both ops check besides where coefficients come from; B, H, Q and R are in `s`, and the
// columns of the full grid: the `grid_sizes` of `grid_name`.
inline ConnectivityShape check_choice(const char* op, ConnectivityShape s, const char* like_name,
                                      const Tensor& like, const char* grid_name,
                                      const char* grid_sizes, int64_t budget,
                                      const std::optional<Tensor>& columns,
                                      const std::optional<Tensor>& keep,
                                      std::optional<int64_t> coef_topk) {
  // One more, for none of the grid, is still an int32.
  SPOT_CHECK(s.num_columns < INT32_MAX, op, grid_name, " must have less than 2^31 - 1 ", grid_sizes,
             ", got ", s.num_columns);
  if (columns) {
    check_rank(op, "columns", *columns, 2);
    check_dtype(op, "columns", *columns, ScalarType::Long);
    check_same_device(op, "columns", *columns, like_name, like);
    check_size(op, "columns", *columns, 0, s.batch, "the batch");
    s.num_columns = columns->size(1);
    SPOT_CHECK(s.num_columns < INT32_MAX, op, "columns must have less than 2^31 - 1 columns, got ",
               s.num_columns);
  }
  SPOT_CHECK(s.num_queries <= s.num_columns, op, columns ? "columns" : grid_name,
             " must have at least ", s.num_queries, " ", columns ? "columns" : grid_sizes, ", as ",
             like_name, " has queries, got ", s.num_columns);
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
  check_rank(op, "basis", basis, 2);
  check_dtype(op, "basis", basis, coefficients.scalar_type());
  check_same_device(op, "basis", basis, "coefficients", coefficients);
  check_size(op, "basis", basis, 0, coefficients.size(3), "the coefficients of a row");
  const ConnectivityShape s{coefficients.size(0),
                            coefficients.size(1),
                            coefficients.size(2),
                            coefficients.size(3),
                            basis.size(1),
                            0,
                            0};
  return check_choice(op, s, "coefficients", coefficients, "basis", "columns", budget, columns,
                      keep, coef_topk);
}

// Both projections, to as many channels; or none.
struct Projections {
  std::optional<Tensor> query_weight, query_bias, key_weight, key_bias;  // [c, D], [c]

  explicit operator bool() const { return query_weight.has_value(); }
  int64_t channels() const { return query_weight ? query_weight->size(0) : 0; }

  void check(const char* op, const Tensor& q) const {
    const std::pair<const char*, const std::optional<Tensor>*> all[] = {
        {"query_weight", &query_weight},
        {"query_bias", &query_bias},
        {"key_weight", &key_weight},
        {"key_bias", &key_bias}};
    const char *present = nullptr, *absent = nullptr;
    for (const auto& [name, tensor] : all) {
      if (*tensor && !present) present = name;
      if (!*tensor && !absent) absent = name;
    }
    if (!present) return;
    SPOT_CHECK(!absent, op, absent, " must be given as well as ", present);
    for (const auto& [name, tensor] : all) {
      const bool weight = tensor == &query_weight || tensor == &key_weight;
      check_rank(op, name, **tensor, weight ? 2 : 1);
      check_size(op, name, **tensor, 0, channels(), "the channels of query_weight");
      if (weight) check_size(op, name, **tensor, 1, q.size(3), "the head dim of q");
      check_dtype(op, name, **tensor, q.scalar_type());
      check_same_device(op, name, **tensor, "q", q);
    }
  }
};

inline ConnectivityShape check_predict_connectivity(const char* op, const Tensor& q,
                                                    const Tensor& k, const Tensor& down,
                                                    const Projections& projections,
                                                    const Tensor& up, int64_t budget,
                                                    const std::optional<Tensor>& columns,
                                                    const std::optional<Tensor>& keep,
                                                    std::optional<int64_t> coef_topk) {
  check_rank(op, "q", q, 4);
  dtype_slot(op, "q", q);
  check_rank(op, "k", k, 4);
  check_dtype(op, "k", k, q.scalar_type());
  check_same_device(op, "k", k, "q", q);
  check_size(op, "k", k, 0, q.size(0), "the batch");
  check_size(op, "k", k, 2, q.size(2), "heads");
  check_size(op, "k", k, 3, q.size(3), "the head dim of q");
  for (const auto& [name, matrix] : {std::pair{"down", &down}, std::pair{"up", &up}}) {
    check_rank(op, name, *matrix, 2);
    check_dtype(op, name, *matrix, q.scalar_type());
    check_same_device(op, name, *matrix, "q", q);
  }
  for (int64_t d = 0; d < 2; ++d) check_size(op, "up", up, d, down.size(d), "as down has");
  projections.check(op, q);
  const ConnectivityShape s =
      check_choice(op, {q.size(0), q.size(2), q.size(1), up.size(1), up.size(0), 0, 0}, "q", q,
                   "up", "rows", budget, columns, keep, coef_topk);
  check_size(op, "k", k, 1, s.num_columns, columns ? "as columns has" : "as up has tokens");
  return s;
}

// The factor of the logits.
inline double logit_scale(const Tensor& q, const Projections& projections,
                          std::optional<double> scale) {
  const int64_t width = projections ? projections.channels() : q.size(3);
  return scale.value_or(std::pow(static_cast<double>(std::max<int64_t>(width, 1)), -0.5));
}

// What `columns` of either op may be.
constexpr const char* kColumnsOfBasis = "the columns of basis";
constexpr const char* kRowsOfUp = "a row of up, or one more for none";

// Names the first of `columns`, dense and in host memory, that is out of range: [0, end).
inline void check_columns(const char* op, const Tensor& columns, int64_t end, const char* meaning) {
  const int64_t* data = static_cast<const int64_t*>(readable(columns));
  for (int64_t i = 0; i < columns.size(0) * columns.size(1); ++i)
    SPOT_CHECK(data[i] >= 0 && data[i] < end, op, "columns must be in [0, ", end, ") (", meaning,
               "), got ", data[i], " at columns[", i / columns.size(1), ", ", i % columns.size(1),
               "]");
}

}  // namespace spot
