// From tensors to the arguments of the attention kernels, for their CUDA entry points.
#pragma once

#include "../common/attention_stats.h"
#include "attention_backward.cuh"
#include "attention_forward.cuh"

namespace spot {

constexpr int kMostTokens = 1 << 30;

template <typename T>
HeadRows head_rows(const Tensor& t) {
  const auto aligned = [&](int64_t d) { return t.size(d) == 1 || t.stride(d) % kVector<T> == 0; };
  const bool wide = t.stride(3) == 1 && t.size(3) % kVector<T> == 0 && aligned(0) && aligned(1) &&
                    aligned(2) && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), wide};
}

template <typename T>
void set_args(AttentionArgs& a, const char* op, const AttentionShape& s, const Mask& mask,
              const Tensor& q, const Tensor& k, const Tensor& v,
              const std::optional<Tensor>& bias) {
  SPOT_CHECK(s.num_tokens <= kMostTokens, op, "q may have at most 2^30 tokens, got ", s.num_tokens);
  a.q = head_rows<T>(q);
  a.k = head_rows<T>(k);
  a.v = head_rows<T>(v);
  a.batch = s.batch;
  a.heads = s.num_heads;
  a.tokens = static_cast<int>(s.num_tokens);
  a.prefix = static_cast<int>(s.num_prefix);
  a.dim = static_cast<int>(s.head_dim);
  a.depth = round_up(a.dim, 32);
  a.class_token = s.class_token;
  a.scale = s.scale;
  a.roles = mask.roles ? data<uint8_t>(*mask.roles) : nullptr;
  a.counts = mask.counts ? data<int32_t>(*mask.counts) : nullptr;
  if (!bias) return;
  a.bias = bias->const_data_ptr();
  a.bias_batch = bias->size(0) == 1 ? 0 : bias->stride(0);
  a.bias_head = bias->stride(1);
  a.bias_row = bias->stride(2);
  a.bias_column = bias->stride(3);
  a.bias_type = dtype_slot(op, "bias", *bias);
}

// Where results go.
template <typename T>
void set_results(ForwardArgs<T>& a, AttentionResults& results, bool need_stats) {
  a.out = mutable_data<T>(results.out);
  a.stats = need_stats ? mutable_data<Acc<T>>(results.stats) : nullptr;
  a.lse = mutable_data<Acc<T>>(results.lse);
}

// Tensors that a backward pass reads besides its arguments.
struct BackwardTables {
  Tensor lse, stats, scratch;
};

// Fills in what came from the forward pass and the gradients that come in, and prepares the tables.
template <typename T>
BackwardTables prepare_backward(const char* op, BackwardArgs<T>& a, const Tensor& grad_out,
                                const std::optional<Tensor>& grad_stats, const Tensor& out,
                                const Tensor& stats, const Tensor& lse, cudaStream_t stream) {
  using A = Acc<T>;
  constexpr int kThreads = 256;
  a.table_tokens = round_up(a.tokens, kTableTokens);
  const int64_t entries = a.batch * a.heads * a.table_tokens;
  const BackwardTables tables{
      dense(lse), grad_stats ? dense(stats) : stats,
      empty_on(lse, {entries * (kEntryValues + (grad_stats ? kSideValues : 0))}, wide_type(out))};
  a.grad_out = head_rows<T>(grad_out);
  a.out = head_rows<T>(out);
  a.lse = data<A>(tables.lse);
  if (grad_stats) {
    a.stats = data<A>(tables.stats);
    a.grad_stats = data<A>(*grad_stats);
    a.grad_stats_batch = grad_stats->stride(0);
    a.grad_stats_token = grad_stats->stride(1);
    a.grad_stats_head = grad_stats->stride(2);
    a.grad_stats_entry = grad_stats->stride(3);
  }
  A* const scratch = mutable_data<A>(tables.scratch);
  a.entries = reinterpret_cast<QueryEntry<A>*>(scratch);
  a.hides = scratch + 4 * entries;
  a.query_sides = reinterpret_cast<Side<A>*>(scratch + 5 * entries);
  a.key_sides = reinterpret_cast<Side<A>*>(scratch + 9 * entries);
  launch(op, prepare_kernel<T>, grid_for(entries, kThreads / kGroup), kThreads, 0, stream, a,
         entries);
  return tables;
}

}  // namespace spot
