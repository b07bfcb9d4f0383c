// CPU entry points of attention_stats: check, allocate, run the kernels in parallel.
#include "host/attention_args.h"
#include "isa.h"

#include <tuple>

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
  const TokenOrder order = order_tokens(op, s, keep);
  const std::vector<int64_t> heads{s.batch, s.num_tokens, s.num_heads};
  Tensor out = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor lse = empty_on(q, heads, wide_type(q));
  Tensor stats = empty_on(q,
                          need_stats ? std::vector<int64_t>{heads[0], heads[1], heads[2], kNumStats}
                                     : std::vector<int64_t>{0},
                          wide_type(q));
  AttentionArgs args = attention_args(op, s, order, q, k, v, bias);
  args.need_stats = need_stats;
  args.out = out.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  const int64_t items = s.batch * s.num_heads;
  if (items * s.num_tokens == 0) return {out, stats, lse};
  args.num_spans = spans(items, s.num_tokens);
  args.span_rows = (s.num_tokens + args.num_spans - 1) / args.num_spans;
  const bool combine = need_stats && args.num_spans > 1;
  Tensor sums = empty_on(q, {combine ? items * args.num_spans : 0, 2, s.num_tokens}, wide_type(q));
  args.column_sums = sums.mutable_data_ptr();
  const KernelTable& table = kernels();
  parallel_for(0, items * args.num_spans, 1,
               [&](int64_t begin, int64_t end) { table.attention_stats[dtype](args, begin, end); });
  if (combine)
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      table.attention_stats_columns[dtype](args, begin, end);
    });
  return {out, stats, lse};
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
  const TokenOrder order = order_tokens(op, s, keep);
  const std::vector<int64_t> none{0};
  const ScalarType wide = wide_type(q);
  Tensor q_grad = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor k_grad = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor v_grad = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor keep_sums =
      empty_on(q, keep_grad ? std::vector<int64_t>{s.batch, s.num_patches()} : none, wide);
  Tensor keep_parts = empty_on(
      q, keep_grad ? std::vector<int64_t>{s.batch, s.num_heads, s.num_patches()} : none, wide);
  Tensor bias_sums = empty_on(q, bias_grad ? sizes_of(*bias) : none, wide);
  const Tensor dense_stats = dense(stats), dense_lse = dense(lse);
  const Tensor dense_grad = grad_stats ? dense(*grad_stats) : dense_stats;

  AttentionGradArgs args{};
  args.forward = attention_args(op, s, order, q, k, v, bias);
  args.forward.stats = const_cast<void*>(dense_stats.const_data_ptr());
  args.forward.lse = const_cast<void*>(dense_lse.const_data_ptr());
  args.grad_out = head_rows(grad_out);
  args.grad_stats = grad_stats ? dense_grad.const_data_ptr() : nullptr;
  args.q = q_grad.mutable_data_ptr();
  args.k = k_grad.mutable_data_ptr();
  args.v = v_grad.mutable_data_ptr();
  args.keep = keep_grad ? keep_parts.mutable_data_ptr() : nullptr;
  args.bias = bias_grad ? bias_sums.mutable_data_ptr() : nullptr;
  args.one_bias = bias_grad && bias->size(0) == 1;
  const KernelTable& table = kernels();
  if (s.num_tokens > 0)
    parallel_for(0, args.one_bias ? s.num_heads : s.batch * s.num_heads, 1,
                 [&](int64_t begin, int64_t end) {
                   table.attention_stats_backward[dtype](args, begin, end);
                 });
  if (keep_grad) sum_heads(s, keep_parts, keep_sums);
  return {q_grad, k_grad, v_grad, keep_sums, bias_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("attention_stats", TORCH_BOX(&attention_stats));
  m.impl("attention_stats_backward", TORCH_BOX(&attention_stats_backward));
}

}  // namespace spot
