// CUDA kernels of attention_stats. float16 and bfloat16 run on tensor cores (mma.m16n8k16), float32
// and float64 as plain arithmetic in the same kernels; sums are float32 (float64 for float64).
// Nothing of N^2 numbers is stored but the gradient of a bias.
//
// - Forward: up to 272 tokens of 16 bits without bias, one block per image and head, one pass, no
//   scratch. Otherwise blocks of 16 to 64 query rows that loop over the keys, twice with
//   statistics; scratch 2 N numbers per query tile (N^2 / 32 for 64 rows).
// - Backward: 7 products of N^2 D (8 with statistics), where an algorithm with atomics needs 5;
//   scratch at most 14 numbers per token and head.
// - float32 takes a block per 64 columns of the results, float64 per 32, others per 128; each has
//   its own q k^T. Shared memory grows with D: 98 KiB a block are enough up to D = 128.
#include "../common/attention_stats.h"
#include "attention_entry.cuh"
#include "attention_forward.cuh"

#include <algorithm>

namespace spot {
namespace {

constexpr int kThreads = 256;

// As many warps, at most `most`, as shared memory has room for; `bytes` are those of a number of
// warps.
template <typename F>
int fitting_warps(const char* op, const Tensor& q, int most, F&& bytes) {
  const size_t room = max_shared(q);
  while (most > 1 && bytes(most) > room) most /= 2;
  SPOT_CHECK(bytes(most) <= room, op, "a head dim of ", q.size(3), " needs ", bytes(most),
             " bytes of shared memory per block in this dtype; the device has ", room);
  return most;
}

// ---- forward ------------------------------------------------------------------------------------

template <typename T, int kOut, bool kStats>
void launch_loop(const char* op, const Tensor& q, ForwardArgs<T>& a, cudaStream_t stream) {
  const int warps = fitting_warps(op, q, kLoopWarps,
                                  [&](int w) { return loop_shared<T, kOut, kStats>(a.depth, w); });
  const int tiles = static_cast<int>(ceil_div(a.tokens, 16 * warps));
  const int pieces = static_cast<int>(ceil_div(a.depth, kOut));
  std::optional<Tensor> partial;
  if constexpr (kStats) {
    partial = empty_on(q, {a.batch, a.heads, tiles, 2 * a.tokens + 1}, wide_type(q));
    a.partial = mutable_data<Acc<T>>(*partial);
  }
  launch(op, attention_loop_kernel<T, kOut, kStats>, a.batch * a.heads * tiles * pieces,
         warps * kWarp, loop_shared<T, kOut, kStats>(a.depth, warps), stream, a, tiles, pieces);
  if constexpr (kStats) {
    const int64_t columns = a.batch * a.heads * a.tokens;
    launch(op, column_statistics_kernel<T>, grid_for(columns, kThreads), kThreads, 0, stream, a,
           tiles, columns);
  }
}

template <typename T, bool kStats>
void launch_forward(const char* op, const Tensor& q, ForwardArgs<T>& a, cudaStream_t stream) {
  if constexpr (kTensorCores<T> && kStats) {
    // The rows kernel knows no bias. Without statistics the loop needs one pass only.
    if (a.bias == nullptr && dispatch_keys(a.tokens, [&](auto keys) {
          return launch_rows<T, decltype(keys)::value, true, false>(op, q, a, stream);
        }))
      return;
  }
  if constexpr (kTensorCores<T>) {
    if (a.dim > 64) return launch_loop<T, 128, kStats>(op, q, a, stream);
  }
  launch_loop<T, plain_columns<T>(), kStats>(op, q, a, stream);
}

std::tuple<Tensor, Tensor, Tensor> attention_stats(const Tensor& q, const Tensor& k,
                                                   const Tensor& v, std::optional<Tensor> keep,
                                                   std::optional<Tensor> bias,
                                                   std::optional<double> scale, int64_t num_prefix,
                                                   bool class_token, bool need_stats) {
  const char* op = "attention_stats";
  check_cuda(op, "q", q);
  const AttentionShape s = check_attention(op, q, k, v, keep, bias, scale, num_prefix, class_token);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  AttentionResults results = empty_results(q, s, need_stats);
  const Mask mask = read_mask(op, keep, s.num_tokens, s.num_prefix, stream);
  if (results.lse.numel() == 0) return results.all();
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    ForwardArgs<T> a{};
    set_args<T>(a, op, s, mask, q, k, v, bias);
    set_results(a, results, need_stats);
    dispatch(need_stats,
             [&](auto wanted) { launch_forward<T, decltype(wanted)::value>(op, q, a, stream); });
  });
  return results.all();
}

// ---- backward -----------------------------------------------------------------------------------

template <typename T, int kOut, bool kStats>
void launch_backward(const char* op, const Tensor& q, const BackwardArgs<T>& a,
                     cudaStream_t stream) {
  const int pieces = static_cast<int>(ceil_div(a.depth, kOut));
  const auto launch_one = [&](auto* kernel, auto&& bytes) {
    const int warps = fitting_warps(op, q, kBackwardWarps, bytes);
    const int tiles = static_cast<int>(ceil_div(a.tokens, 16 * warps));
    launch(op, kernel, a.batch * a.heads * tiles * pieces, warps * kWarp, bytes(warps), stream, a,
           tiles, pieces);
  };
  launch_one(attention_query_kernel<T, kOut, kStats>,
             [&](int warps) { return backward_shared<T, kQueryInner<T, kOut>>(a.depth, warps); });
  launch_one(attention_key_kernel<T, kOut, kStats>,
             [&](int warps) { return backward_shared<T, kKeyInner<T, kOut>>(a.depth, warps); });
}

template <typename T, bool kStats>
void launch_bias(const char* op, const Tensor& q, const BackwardArgs<T>& a, cudaStream_t stream) {
  constexpr int kSize = kBiasInner<T>;
  const auto bytes = [&](int w) { return backward_shared<T, kSize>(a.depth, w); };
  const int warps = fitting_warps(op, q, kBackwardWarps, bytes);
  const int query_tiles = static_cast<int>(ceil_div(a.tokens, 16 * warps));
  const int key_tiles = static_cast<int>(ceil_div(a.tokens, kSize));
  launch(op, attention_bias_kernel<T, kStats>,
         a.bias_images * a.heads * query_tiles * static_cast<int64_t>(key_tiles), warps * kWarp,
         bytes(warps), stream, a, query_tiles, key_tiles);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_stats_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_stats, const Tensor& q, const Tensor& k,
    const Tensor& v, std::optional<Tensor> keep, std::optional<Tensor> bias, const Tensor& out,
    const Tensor& stats, const Tensor& lse, std::optional<double> scale, int64_t num_prefix,
    bool class_token, bool keep_grad, bool bias_grad) {
  const char* op = "attention_stats_backward";
  check_cuda(op, "q", q);
  const AttentionShape s = check_attention(op, q, k, v, keep, bias, scale, num_prefix, class_token);
  check_attention_grad(op, grad_out, grad_stats, q, out, stats, lse);
  SPOT_CHECK(!keep_grad || keep, op, "keep_grad=True needs keep");
  SPOT_CHECK(!bias_grad || bias, op, "bias_grad=True needs bias");
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const ScalarType wide = wide_type(q);
  Tensor dq = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dk = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dv = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dkeep = empty_on(q, keep_grad ? sizes_of(*keep) : std::vector<int64_t>{0}, wide);
  Tensor dbias = empty_on(q, bias_grad ? sizes_of(*bias) : std::vector<int64_t>{0}, wide);
  const Mask mask = read_mask(op, keep, s.num_tokens, s.num_prefix, stream);
  const int64_t rows = s.batch * s.num_tokens * s.num_heads;
  const Tensor keep_partial =
      empty_on(q, {keep_grad ? s.batch : 0, s.num_heads, s.num_tokens}, wide);
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    BackwardArgs<T> a{};
    set_args<T>(a, op, s, mask, q, k, v, bias);
    const BackwardTables tables =
        prepare_backward<T>(op, a, grad_out, grad_stats, out, stats, lse, stream);
    a.dq = mutable_data<T>(dq);
    a.dk = mutable_data<T>(dk);
    a.dv = mutable_data<T>(dv);
    a.keep_partial = keep_grad ? mutable_data<Acc<T>>(keep_partial) : nullptr;
    dispatch(grad_stats.has_value(), [&](auto wanted) {
      constexpr bool kStats = decltype(wanted)::value;
      if (rows > 0) {
        if constexpr (kTensorCores<T>) {
          if (a.dim > 64)
            launch_backward<T, 128, kStats>(op, q, a, stream);
          else
            launch_backward<T, 64, kStats>(op, q, a, stream);
        } else {
          launch_backward<T, plain_columns<T>(), kStats>(op, q, a, stream);
        }
      }
      if (dbias.numel() > 0 && bias_grad) {
        a.dbias = mutable_data<Acc<T>>(dbias);
        a.bias_images = bias->size(0);
        launch_bias<T, kStats>(op, q, a, stream);
      }
    });
    if (keep_grad)
      launch(op, keep_gradient_kernel<T>, grid_for(dkeep.numel(), kThreads), kThreads, 0, stream, a,
             mutable_data<Acc<T>>(dkeep), dkeep.numel());
  });
  return {dq, dk, dv, dkeep, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m) {
  m.impl("attention_stats", TORCH_BOX(&attention_stats));
  m.impl("attention_stats_backward", TORCH_BOX(&attention_stats_backward));
}

}  // namespace spot
