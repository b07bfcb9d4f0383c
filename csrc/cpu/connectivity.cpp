// CPU entry points of connectivity: check, allocate, run the kernel in parallel.
#include "../common/connectivity.h"

#include "host/attention_entry.h"
#include "isa.h"

namespace spot {
namespace {

using torch::stable::parallel_for;

// Whether it costs less to project keys and queries before keys are added up, than to add keys up
// and to project the sums, there and back. Per head, in multiply-accumulates.
bool projects_first(const ConnectivityShape& s, int64_t head_dim, int64_t channels) {
  const int64_t both = s.num_queries + s.num_columns;
  return both * channels * (head_dim + s.rank) <
         both * s.rank * head_dim + s.rank * channels * (2 * head_dim + 1);
}

Tensor new_index(const char* op, const ConnectivityShape& s, const Tensor& like) {
  SPOT_CHECK(like.is_cpu(), op, "arguments must be on the CPU");
  return empty_on(like, {s.batch, s.num_heads, s.num_queries, s.budget}, ScalarType::Int);
}

// What both ops share; `args` says where coefficients and basis come from. There must be queries.
Tensor choose(const char* op, const ConnectivityShape& s, ConnectivityArgs args, const Tensor& like,
              const Tensor& index, const std::optional<Tensor>& columns,
              const char* columns_meaning, int64_t columns_end, const std::optional<Tensor>& keep,
              std::optional<double> threshold) {
  const Dtype dtype = dtype_slot(op, "basis", like);
  const Tensor places = columns ? dense(*columns) : index;
  if (columns) check_columns(op, places, columns_end, columns_meaning);
  const std::vector<uint8_t> kept = keep ? read_keep(op, *keep) : std::vector<uint8_t>{};
  args.columns = columns ? static_cast<const int64_t*>(readable(places)) : nullptr;
  args.keep = keep ? kept.data() : nullptr;
  args.num_heads = s.num_heads;
  args.num_queries = s.num_queries;
  args.rank = s.rank;
  args.num_columns = s.num_columns;
  args.budget = s.budget;
  args.used = s.used;
  args.has_threshold = threshold.has_value();
  args.threshold = threshold.value_or(0);
  args.index = static_cast<int32_t*>(writable(index));
  const int64_t blocks = (s.num_queries + kChoiceRows - 1) / kChoiceRows;
  const KernelTable& table = kernels();
  parallel_for(0, s.batch * s.num_heads * blocks, 1,
               [&](int64_t begin, int64_t end) { table.connectivity[dtype](args, begin, end); });
  return index;
}

Tensor connectivity(const Tensor& coefficients, const Tensor& basis, int64_t budget,
                    std::optional<Tensor> columns, std::optional<Tensor> keep,
                    std::optional<int64_t> coef_topk, std::optional<double> threshold) {
  const char* op = "connectivity";
  const ConnectivityShape s =
      check_connectivity(op, coefficients, basis, budget, columns, keep, coef_topk);
  const Tensor index = new_index(op, s, coefficients);
  if (is_empty(index)) return index;
  ConnectivityArgs args{};
  args.coefficients = readable(coefficients);
  for (int d = 0; d < 4; ++d) args.coefficients_strides[d] = coefficients.stride(d);
  args.basis = readable(basis);
  args.basis_row = basis.stride(0);
  args.basis_column = basis.stride(1);
  args.num_places = basis.size(1);
  return choose(op, s, args, coefficients, index, columns, kColumnsOfBasis, args.num_places, keep,
                threshold);
}

Tensor predict_connectivity(const Tensor& q, const Tensor& k, const Tensor& down,
                            std::optional<Tensor> query_weight, std::optional<Tensor> query_bias,
                            std::optional<Tensor> key_weight, std::optional<Tensor> key_bias,
                            const Tensor& up, int64_t budget, std::optional<Tensor> columns,
                            std::optional<Tensor> keep, std::optional<double> scale,
                            std::optional<int64_t> coef_topk, std::optional<double> basis_threshold,
                            std::optional<double> threshold) {
  const char* op = "predict_connectivity";
  const Projections projections{query_weight, query_bias, key_weight, key_bias};
  const ConnectivityShape s =
      check_predict_connectivity(op, q, k, down, projections, up, budget, columns, keep, coef_topk);
  const Tensor index = new_index(op, s, q);
  if (is_empty(index)) return index;
  ConnectivityArgs args{};
  args.q = head_rows(q);
  args.k = head_rows(k);
  args.down = readable(down);
  args.down_row = down.stride(0);
  args.down_rank = down.stride(1);
  args.head_dim = q.size(3);
  args.channels = projections.channels();
  args.scale = logit_scale(q, projections, scale);
  std::vector<Tensor> weights;
  args.projected = static_cast<bool>(projections);
  if (projections) {
    for (const auto* tensor : {&query_weight, &query_bias, &key_weight, &key_bias})
      weights.push_back(dense(**tensor));
    args.query_weight = readable(weights[0]);
    args.query_bias = readable(weights[1]);
    args.key_weight = readable(weights[2]);
    args.key_bias = readable(weights[3]);
    args.projects_first = projects_first(s, args.head_dim, args.channels);
  }
  args.basis = readable(up);
  args.basis_row = up.stride(1);
  args.basis_column = up.stride(0);
  args.magnitudes = basis_threshold.has_value();
  args.basis_threshold = basis_threshold.value_or(0);
  args.num_places = up.size(0);
  return choose(op, s, args, q, index, columns, kRowsOfUp, args.num_places + 1, keep, threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("connectivity", TORCH_BOX(&connectivity));
  m.impl("predict_connectivity", TORCH_BOX(&predict_connectivity));
}

}  // namespace spot
