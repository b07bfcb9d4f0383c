// CPU entry points of attention_stats: check, allocate, run the kernels in parallel.
#include "../common/attention_stats.h"

#include "isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

namespace spot {
namespace {

using torch::stable::parallel_for;

// The order in which kernels see the tokens of each image (AttentionArgs::order).
struct TokenOrder {
  std::vector<int32_t> order, kept;
  bool one;
};

// read(i): element i of keep [B, N-P].
template <typename Read>
void sort_tokens(const char* op, const AttentionShape& s, const Tensor& keep, Read&& read,
                 TokenOrder& result) {
  std::vector<int32_t> dropped;
  for (int64_t b = 0; b < s.batch; ++b) {
    const std::size_t start = result.order.size();
    dropped.clear();
    for (int64_t t = 0; t < s.num_prefix; ++t) result.order.push_back(static_cast<int32_t>(t));
    for (int64_t i = 0; i < s.num_patches(); ++i) {
      const double value = read(b * keep.stride(0) + i * keep.stride(1));
      SPOT_CHECK(value == 0 || value == 1, op, "keep must be exactly 0 or 1, got ", value,
                 " at keep[", b, ", ", i, "]");
      (value == 1 ? result.order : dropped).push_back(static_cast<int32_t>(s.num_prefix + i));
    }
    result.kept.push_back(
        static_cast<int32_t>(static_cast<int64_t>(result.order.size() - start) - s.num_prefix));
    result.order.insert(result.order.end(), dropped.begin(), dropped.end());
  }
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

TokenOrder order_tokens(const char* op, const AttentionShape& s,
                        const std::optional<Tensor>& keep) {
  TokenOrder result;
  result.one = !keep;
  if (!keep) {
    for (int64_t t = 0; t < s.num_tokens; ++t) result.order.push_back(static_cast<int32_t>(t));
    result.kept.push_back(static_cast<int32_t>(s.num_patches()));
    return result;
  }
  result.order.reserve(static_cast<std::size_t>(s.batch * s.num_tokens));
  const void* data = keep->const_data_ptr();
  switch (dtype_slot(op, "keep", *keep)) {
    case kFloat32:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return static_cast<const float*>(data)[i]; }, result);
      break;
    case kFloat64:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return static_cast<const double*>(data)[i]; }, result);
      break;
    case kFloat16:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return from_half(static_cast<const uint16_t*>(data)[i]); },
          result);
      break;
    default:
      sort_tokens(
          op, s, *keep,
          [=](int64_t i) { return from_bfloat16(static_cast<const uint16_t*>(data)[i]); }, result);
  }
  return result;
}

HeadRows head_rows(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

AttentionArgs attention_args(const char* op, const AttentionShape& s, const TokenOrder& order,
                             const Tensor& q, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& bias) {
  AttentionArgs args{};
  args.q = head_rows(q);
  args.k = head_rows(k);
  args.v = head_rows(v);
  if (bias) {
    args.bias = bias->const_data_ptr();
    args.bias_dtype = dtype_slot(op, "bias", *bias);
    for (int d = 0; d < 4; ++d) args.bias_strides[d] = bias->stride(d);
    if (bias->size(0) == 1) args.bias_strides[0] = 0;
  }
  args.order = order.order.data();
  args.kept = order.kept.data();
  args.one_order = order.one;
  args.batch = s.batch;
  args.num_tokens = s.num_tokens;
  args.num_heads = s.num_heads;
  args.head_dim = s.head_dim;
  args.num_prefix = s.num_prefix;
  args.class_token = s.class_token;
  args.scale = s.scale;
  return args;
}

// Into how many spans the queries of each head are cut: more than one only where there are few
// heads, since each packs the keys again. By shape alone, so that threads do not change the result.
int64_t spans(int64_t heads, int64_t num_tokens) {
  constexpr int64_t kEnough = 16, kLeastRows = 96;
  return std::max<int64_t>(
      1, std::min<int64_t>((kEnough + heads - 1) / heads, num_tokens / kLeastRows));
}

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

// [B, H, N-P] -> [B, N-P], heads in order.
template <typename A>
void sum_heads(const AttentionShape& s, const A* parts, A* sums) {
  const int64_t patches = s.num_patches();
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < patches; ++i) {
      A sum = 0;
      for (int64_t h = 0; h < s.num_heads; ++h) sum += parts[(b * s.num_heads + h) * patches + i];
      sums[b * patches + i] = sum;
    }
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
  if (keep_grad && wide == ScalarType::Float)
    sum_heads(s, static_cast<const float*>(keep_parts.const_data_ptr()),
              static_cast<float*>(keep_sums.mutable_data_ptr()));
  else if (keep_grad)
    sum_heads(s, static_cast<const double*>(keep_parts.const_data_ptr()),
              static_cast<double*>(keep_sums.mutable_data_ptr()));
  return {q_grad, k_grad, v_grad, keep_sums, bias_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("attention_stats", TORCH_BOX(&attention_stats));
  m.impl("attention_stats_backward", TORCH_BOX(&attention_stats_backward));
}

}  // namespace spot
