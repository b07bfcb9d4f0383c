// CPU entry points of attention_stats: check, allocate, run the kernels in parallel.
#include "host/attention_entry.h"
#include "isa.h"

namespace spot {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor, Tensor> attention_stats(const Tensor& q, const Tensor& k,
                                                   const Tensor& v, std::optional<Tensor> keep,
                                                   std::optional<Tensor> bias,
                                                   std::optional<double> scale, int64_t num_prefix,
                                                   bool class_token, bool need_stats) {
  const char* op = "attention_stats";
  const AttentionShape s = check_attention(op, q, k, v, keep, bias, scale, num_prefix, class_token);
  SPOT_CHECK(q.is_cpu(), op, "q must be on the CPU");
  const Dtype dtype = dtype_slot(op, "q", q);
  AttentionResults results = empty_results(q, s, need_stats);
  if (is_empty(q)) return results.all();
  const TokenOrder order = order_tokens(op, s, keep);
  const int64_t items = s.batch * s.num_heads;
  AttentionArgs args{};
  set_args(args, op, s, order, q, k, v, bias);
  set_results(args, s, results, need_stats);
  const bool combine = need_stats && args.num_spans > 1;
  Tensor sums = empty_on(q, {combine ? items * args.num_spans : 0, 2, s.num_tokens}, wide_type(q));
  args.column_sums = writable(sums);
  const KernelTable& table = kernels();
  parallel_for(0, items * args.num_spans, 1,
               [&](int64_t begin, int64_t end) { table.attention_stats[dtype](args, begin, end); });
  if (combine)
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      table.attention_stats_columns[dtype](args, begin, end);
    });
  return results.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_stats_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_stats, const Tensor& q, const Tensor& k,
    const Tensor& v, std::optional<Tensor> keep, std::optional<Tensor> bias, const Tensor& out,
    const Tensor& stats, const Tensor& lse, std::optional<double> scale, int64_t num_prefix,
    bool class_token, bool keep_grad, bool bias_grad) {
  const char* op = "attention_stats_backward";
  const AttentionShape s = check_attention(op, q, k, v, keep, bias, scale, num_prefix, class_token);
  check_attention_grad(op, grad_out, grad_stats, q, out, stats, lse);
  SPOT_CHECK(q.is_cpu(), op, "q must be on the CPU");
  SPOT_CHECK(keep || !keep_grad, op, "keep_grad=True needs keep");
  SPOT_CHECK(bias || !bias_grad, op, "bias_grad=True needs bias");
  const Dtype dtype = dtype_slot(op, "q", q);
  AttentionGrads grads = empty_grads(q, s, keep_grad);
  Tensor bias_sums =
      empty_on(q, bias_grad ? sizes_of(*bias) : std::vector<int64_t>{0}, wide_type(q));
  if (is_empty(q)) {
    torch::stable::zero_(grads.keep);
    torch::stable::zero_(bias_sums);
    return {grads.q, grads.k, grads.v, grads.keep, bias_sums};
  }
  const TokenOrder order = order_tokens(op, s, keep);
  const AttentionSaved saved(stats, lse, grad_stats);
  AttentionGradArgs args{};
  set_args(args.forward, op, s, order, q, k, v, bias);
  set_grads(args, args.forward, saved, grad_out, grads, keep_grad);
  args.bias = bias_grad ? writable(bias_sums) : nullptr;
  args.one_bias = bias_grad && bias->size(0) == 1;
  const KernelTable& table = kernels();
  parallel_for(
      0, args.one_bias ? s.num_heads : s.batch * s.num_heads, 1,
      [&](int64_t begin, int64_t end) { table.attention_stats_backward[dtype](args, begin, end); });
  if (keep_grad) sum_heads(s, grads.keep_parts, grads.keep);
  return {grads.q, grads.k, grads.v, grads.keep, bias_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("attention_stats", TORCH_BOX(&attention_stats));
  m.impl("attention_stats_backward", TORCH_BOX(&attention_stats_backward));
}

}  // namespace spot
