// Shapes, checks and results of attention_stats, shared by the CPU and CUDA entry points.
#pragma once

#include "dispatch.h"

#include <cmath>
#include <tuple>

namespace spot {

constexpr int64_t kNumStats = 6;  // cls_out, cls_in, row_mean, row_var, col_mean, col_var
constexpr int64_t kMaxHeadDim = 256;

struct AttentionShape {
  int64_t batch, num_tokens, num_heads, head_dim;  // B, N, H, D
  int64_t num_prefix;                              // P
  bool class_token;
  double scale;

  int64_t num_patches() const { return num_tokens - num_prefix; }
};

inline void check_like_q(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_rank(op, name, t, 4);
  check_dtype(op, name, t, q.scalar_type());
  check_same_device(op, name, t, "q", q);
  for (int64_t d = 0; d < 4; ++d) check_size(op, name, t, d, q.size(d), "as q has");
}

inline AttentionShape check_attention(const char* op, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const std::optional<Tensor>& keep,
                                      const std::optional<Tensor>& bias,
                                      std::optional<double> scale, int64_t num_prefix,
                                      bool class_token) {
  check_rank(op, "q", q, 4);
  dtype_slot(op, "q", q);
  check_like_q(op, "k", k, q);
  check_like_q(op, "v", v, q);
  const int64_t tokens = q.size(1), dim = q.size(3);
  SPOT_CHECK(dim >= 1 && dim <= kMaxHeadDim, op, "the head dim of q must be between 1 and ",
             kMaxHeadDim, ", got ", dim);
  SPOT_CHECK(tokens <= INT32_MAX, op, "q may have at most 2^31 - 1 tokens, got ", tokens);
  SPOT_CHECK(num_prefix >= 0 && num_prefix <= tokens, op, "num_prefix must be between 0 and ",
             tokens, " (the tokens of q), got ", num_prefix);
  SPOT_CHECK(!class_token || num_prefix > 0, op,
             "class_token=True needs num_prefix of at least 1, got 0");
  if (keep) {
    check_rank(op, "keep", *keep, 2);
    dtype_slot(op, "keep", *keep);
    check_same_device(op, "keep", *keep, "q", q);
    check_size(op, "keep", *keep, 0, q.size(0), "the batch");
    check_size(op, "keep", *keep, 1, tokens - num_prefix, "the patch tokens");
  }
  if (bias) {
    check_rank(op, "bias", *bias, 4);
    dtype_slot(op, "bias", *bias);
    check_same_device(op, "bias", *bias, "q", q);
    if (bias->size(0) != 1) check_size(op, "bias", *bias, 0, q.size(0), "1 or the batch");
    check_size(op, "bias", *bias, 1, q.size(2), "heads");
    check_size(op, "bias", *bias, 2, tokens, "tokens");
    check_size(op, "bias", *bias, 3, tokens, "tokens");
  }
  return {q.size(0),
          tokens,
          q.size(2),
          dim,
          num_prefix,
          class_token,
          scale.value_or(std::pow(static_cast<double>(dim), -0.5))};
}

// What the forward pass left for the backward pass, and the gradients that come in.
inline void check_attention_grad(const char* op, const Tensor& grad_out,
                                 const std::optional<Tensor>& grad_stats, const Tensor& q,
                                 const Tensor& out, const Tensor& stats, const Tensor& lse) {
  check_like_q(op, "grad_out", grad_out, q);
  check_like_q(op, "out", out, q);
  const auto check_wide = [&](const char* name, const Tensor& t, int64_t last) {
    check_rank(op, name, t, last ? 4 : 3);
    check_dtype(op, name, t, wide_type(q));
    check_same_device(op, name, t, "q", q);
    for (int64_t d = 0; d < 3; ++d) check_size(op, name, t, d, q.size(d), "as q has");
    if (last) check_size(op, name, t, 3, last, "the statistics");
  };
  check_wide("lse", lse, 0);
  if (!grad_stats) return;
  check_wide("grad_stats", *grad_stats, kNumStats);
  check_wide("stats", stats, kNumStats);
}

// What an attention op returns.
struct AttentionResults {
  Tensor out, stats, lse;

  std::tuple<Tensor, Tensor, Tensor> all() const { return {out, stats, lse}; }
};

inline AttentionResults empty_results(const Tensor& q, const AttentionShape& s, bool need_stats) {
  const std::vector<int64_t> none{0}, heads{s.batch, s.num_tokens, s.num_heads},
      stats{s.batch, s.num_tokens, s.num_heads, kNumStats};
  return {empty_on(q, sizes_of(q), q.scalar_type()),
          empty_on(q, need_stats ? stats : none, wide_type(q)), empty_on(q, heads, wide_type(q))};
}

}  // namespace spot
