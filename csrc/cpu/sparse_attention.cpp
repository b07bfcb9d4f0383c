// CPU entry points of sparse_attention: check, allocate, run the kernels in parallel.
#include "../common/sparse_attention.h"

#include "host/attention_entry.h"
#include "isa.h"

#include <atomic>

namespace spot {
namespace {

using torch::stable::parallel_for;

template <typename Run>
void run_checked(const char* op, const SparseShape& s, const SparseArgs& args, int64_t items,
                 Run&& run) {
  std::atomic<bool> fine{true};
  parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    if (!run(begin, end)) fine = false;  // an exception must not leave a parallel body
  });
  if (fine) return;
  explain_keys(op, s, args.index);
  fail(op, "index changed while it was read");
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& index,
                                                    std::optional<Tensor> keep,
                                                    std::optional<double> scale, int64_t num_prefix,
                                                    bool class_token, bool need_stats) {
  const char* op = "sparse_attention";
  const SparseShape s =
      check_sparse_attention(op, q, k, v, index, keep, scale, num_prefix, class_token);
  SPOT_CHECK(q.is_cpu(), op, "q must be on the CPU");
  const Dtype dtype = dtype_slot(op, "q", q);
  AttentionResults results = empty_results(q, s, need_stats);
  if (is_empty(q)) return results.all();
  const TokenOrder order = order_tokens(op, s, keep);
  const Tensor named = dense(index);
  const int64_t items = s.batch * s.num_heads;
  SparseArgs args{{}, static_cast<const int32_t*>(readable(named)), s.num_named};
  AttentionArgs& a = args.attention;
  set_args(a, op, s, order, q, k, v, std::nullopt);
  set_results(a, s, results, need_stats);
  const bool combine = need_stats && a.num_spans > 1;
  // A pair of float64, or of wider numbers for float64, for each token.
  Tensor sums =
      empty_on(q, {combine ? items * a.num_spans : 0, s.num_tokens, 4}, ScalarType::Double);
  a.column_sums = writable(sums);
  const KernelTable& table = kernels();
  run_checked(op, s, args, items * a.num_spans, [&](int64_t begin, int64_t end) {
    return table.sparse_attention[dtype](args, begin, end);
  });
  if (combine)
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      table.sparse_attention_columns[dtype](args, begin, end);
    });
  return results.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_stats, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& index, std::optional<Tensor> keep, const Tensor& out,
    const Tensor& stats, const Tensor& lse, std::optional<double> scale, int64_t num_prefix,
    bool class_token, bool keep_grad) {
  const char* op = "sparse_attention_backward";
  const SparseShape s =
      check_sparse_attention(op, q, k, v, index, keep, scale, num_prefix, class_token);
  check_attention_grad(op, grad_out, grad_stats, q, out, stats, lse);
  SPOT_CHECK(q.is_cpu(), op, "q must be on the CPU");
  SPOT_CHECK(keep || !keep_grad, op, "keep_grad=True needs keep");
  const Dtype dtype = dtype_slot(op, "q", q);
  AttentionGrads grads = empty_grads(q, s, keep_grad);
  if (is_empty(q)) {
    torch::stable::zero_(grads.keep);
    return {grads.q, grads.k, grads.v, grads.keep};
  }
  const TokenOrder order = order_tokens(op, s, keep);
  const AttentionSaved saved(stats, lse, grad_stats);
  const Tensor named = dense(index);
  SparseGradArgs args{};
  args.forward = {{}, static_cast<const int32_t*>(readable(named)), s.num_named};
  set_args(args.forward.attention, op, s, order, q, k, v, std::nullopt);
  set_grads(args, args.forward.attention, saved, grad_out, grads, keep_grad);
  const KernelTable& table = kernels();
  run_checked(op, s, args.forward, s.batch * s.num_heads, [&](int64_t begin, int64_t end) {
    return table.sparse_attention_backward[dtype](args, begin, end);
  });
  if (keep_grad) sum_heads(s, grads.keep_parts, grads.keep);
  return {grads.q, grads.k, grads.v, grads.keep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
}

}  // namespace spot
