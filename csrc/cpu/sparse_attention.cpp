// CPU entry points of sparse_attention: check, allocate, run the kernels in parallel.
#include "../common/sparse_attention.h"

#include "host/attention_args.h"
#include "isa.h"

#include <atomic>
#include <tuple>

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
  const TokenOrder order = order_tokens(op, s, keep);
  const Tensor named = dense(index);
  const std::vector<int64_t> heads{s.batch, s.num_tokens, s.num_heads};
  Tensor out = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor lse = empty_on(q, heads, wide_type(q));
  Tensor stats = empty_on(q,
                          need_stats ? std::vector<int64_t>{heads[0], heads[1], heads[2], kNumStats}
                                     : std::vector<int64_t>{0},
                          wide_type(q));
  SparseArgs args{attention_args(op, s, order, q, k, v, std::nullopt),
                  static_cast<const int32_t*>(named.const_data_ptr()), s.num_named};
  AttentionArgs& a = args.attention;
  a.need_stats = need_stats;
  a.out = out.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  const int64_t items = s.batch * s.num_heads;
  if (items * s.num_tokens == 0) return {out, stats, lse};
  a.num_spans = spans(items, s.num_tokens);
  a.span_rows = (s.num_tokens + a.num_spans - 1) / a.num_spans;
  const bool combine = need_stats && a.num_spans > 1;
  // A pair of float64, or of wider numbers for float64, for each token.
  Tensor sums =
      empty_on(q, {combine ? items * a.num_spans : 0, s.num_tokens, 4}, ScalarType::Double);
  a.column_sums = sums.mutable_data_ptr();
  const KernelTable& table = kernels();
  run_checked(op, s, args, items * a.num_spans, [&](int64_t begin, int64_t end) {
    return table.sparse_attention[dtype](args, begin, end);
  });
  if (combine)
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      table.sparse_attention_columns[dtype](args, begin, end);
    });
  return {out, stats, lse};
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
  const Tensor named = dense(index), dense_stats = dense(stats), dense_lse = dense(lse);
  const Tensor dense_grad = grad_stats ? dense(*grad_stats) : dense_stats;

  SparseGradArgs args{};
  args.forward = {attention_args(op, s, order, q, k, v, std::nullopt),
                  static_cast<const int32_t*>(named.const_data_ptr()), s.num_named};
  args.forward.attention.stats = const_cast<void*>(dense_stats.const_data_ptr());
  args.forward.attention.lse = const_cast<void*>(dense_lse.const_data_ptr());
  args.grad_out = head_rows(grad_out);
  args.grad_stats = grad_stats ? dense_grad.const_data_ptr() : nullptr;
  args.q = q_grad.mutable_data_ptr();
  args.k = k_grad.mutable_data_ptr();
  args.v = v_grad.mutable_data_ptr();
  args.keep = keep_grad ? keep_parts.mutable_data_ptr() : nullptr;
  const KernelTable& table = kernels();
  if (s.num_tokens > 0)
    run_checked(op, s, args.forward, s.batch * s.num_heads, [&](int64_t begin, int64_t end) {
      return table.sparse_attention_backward[dtype](args, begin, end);
    });
  if (keep_grad) sum_heads(s, keep_parts, keep_sums);
  return {q_grad, k_grad, v_grad, keep_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
}

}  // namespace spot
