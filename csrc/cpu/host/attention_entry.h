// From tensors to the arguments of the attention kernels, for their CPU entry points.
#pragma once

#include "../../common/attention_stats.h"

#include "../args.h"
#include "keep.h"

#include <algorithm>

namespace spot {

// The order in which kernels see the tokens of each image (AttentionArgs::order).
struct TokenOrder {
  std::vector<int32_t> order, kept;
  bool one;
};

inline TokenOrder order_tokens(const char* op, const AttentionShape& s,
                               const std::optional<Tensor>& keep) {
  TokenOrder result;
  result.one = !keep;
  const std::vector<uint8_t> kept = keep ? read_keep(op, *keep) : std::vector<uint8_t>{};
  const int64_t patches = s.num_patches();
  const auto is_kept = [&](int64_t b, int64_t i) {
    return result.one || kept[static_cast<std::size_t>(b * patches + i)] != 0;
  };
  for (int64_t b = 0; b < (result.one ? 1 : s.batch); ++b) {
    for (int64_t t = 0; t < s.num_prefix; ++t) result.order.push_back(static_cast<int32_t>(t));
    int32_t count = 0;
    for (const bool wanted : {true, false})
      for (int64_t i = 0; i < patches; ++i)
        if (is_kept(b, i) == wanted) {
          result.order.push_back(static_cast<int32_t>(s.num_prefix + i));
          count += wanted;
        }
    result.kept.push_back(count);
  }
  return result;
}

inline HeadRows head_rows(const Tensor& t) {
  return {readable(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline void set_args(AttentionArgs& args, const char* op, const AttentionShape& s,
                     const TokenOrder& order, const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& bias) {
  args.q = head_rows(q);
  args.k = head_rows(k);
  args.v = head_rows(v);
  if (bias) {
    args.bias = readable(*bias);
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
}

// Into how many spans the queries of each head are cut: more than one only where there are few
// heads, since each packs the keys again. By shape alone, so that threads do not change the result.
inline int64_t spans(int64_t heads, int64_t num_tokens) {
  constexpr int64_t kEnough = 16, kLeastRows = 96;
  return std::max<int64_t>(
      1, std::min<int64_t>((kEnough + heads - 1) / heads, num_tokens / kLeastRows));
}

// Where results go, and how queries are cut; there must be some.
inline void set_results(AttentionArgs& args, const AttentionShape& s, AttentionResults& results,
                        bool need_stats) {
  args.need_stats = need_stats;
  args.out = writable(results.out);
  args.stats = writable(results.stats);
  args.lse = writable(results.lse);
  args.num_spans = spans(s.batch * s.num_heads, s.num_tokens);
  args.span_rows = (s.num_tokens + args.num_spans - 1) / args.num_spans;
}

// Gradients of what every attention op takes; that of keep by head too, before it is summed.
struct AttentionGrads {
  Tensor q, k, v, keep, keep_parts;
};

inline AttentionGrads empty_grads(const Tensor& q, const AttentionShape& s, bool keep_grad) {
  const auto like_q = [&] { return empty_on(q, sizes_of(q), q.scalar_type()); };
  const std::vector<int64_t> none{0}, keep{s.batch, s.num_patches()},
      parts{s.batch, s.num_heads, s.num_patches()};
  return {like_q(), like_q(), like_q(), empty_on(q, keep_grad ? keep : none, wide_type(q)),
          empty_on(q, keep_grad ? parts : none, wide_type(q))};
}

// What kernels of the backward pass read as dense memory.
struct AttentionSaved {
  Tensor stats, lse;
  std::optional<Tensor> grad_stats;

  AttentionSaved(const Tensor& stats_given, const Tensor& lse_given,
                 const std::optional<Tensor>& grad_given)
      : stats(grad_given ? dense(stats_given) : stats_given), lse(dense(lse_given)) {
    if (grad_given) grad_stats = dense(*grad_given);
  }
};

// Of AttentionGradArgs or SparseGradArgs; `forward` is within `args`.
template <typename GradArgs>
void set_grads(GradArgs& args, AttentionArgs& forward, const AttentionSaved& saved,
               const Tensor& grad_out, AttentionGrads& grads, bool keep_grad) {
  forward.stats = const_cast<void*>(readable(saved.stats));
  forward.lse = const_cast<void*>(readable(saved.lse));
  args.grad_out = head_rows(grad_out);
  args.grad_stats = saved.grad_stats ? readable(*saved.grad_stats) : nullptr;
  args.q = writable(grads.q);
  args.k = writable(grads.k);
  args.v = writable(grads.v);
  args.keep = keep_grad ? writable(grads.keep_parts) : nullptr;
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
inline void sum_heads(const AttentionShape& s, const Tensor& parts, Tensor& sums) {
  if (parts.scalar_type() == ScalarType::Float)
    sum_heads(s, static_cast<const float*>(readable(parts)), static_cast<float*>(writable(sums)));
  else
    sum_heads(s, static_cast<const double*>(readable(parts)), static_cast<double*>(writable(sums)));
}

}  // namespace spot
