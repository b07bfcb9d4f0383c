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
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "device.h"

#include <algorithm>

namespace spot {
namespace {

constexpr int kThreads = 256;
constexpr int kMostTokens = 1 << 30;

template <typename F>
void dispatch(bool flag, F&& f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t grid_for(int64_t items, int64_t per_block) {
  return std::min<int64_t>(ceil_div(items, per_block), INT32_MAX);
}

template <typename T>
View view_of(const Tensor& t) {
  const auto aligned = [&](int64_t d) { return t.size(d) == 1 || t.stride(d) % kVector<T> == 0; };
  const bool wide = t.stride(3) == 1 && t.size(3) % kVector<T> == 0 && aligned(0) && aligned(1) &&
                    aligned(2) && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), wide};
}

// Roles of the tokens and numbers of kept ones; empty without a mask.
struct Mask {
  std::optional<Tensor> roles, counts;
};

Mask read_mask(const char* op, const std::optional<Tensor>& keep, const AttentionShape& s,
               cudaStream_t stream) {
  if (!keep || s.batch == 0) return {};
  const Tensor roles = empty_on(*keep, {s.batch, s.num_tokens}, ScalarType::Byte);
  const Tensor counts = empty_on(*keep, {2, s.batch}, ScalarType::Int);
  int32_t* const numbers = mutable_data<int32_t>(counts);
  dispatch(dtype_slot(op, "keep", *keep), [&](auto zero) {
    using M = decltype(zero);
    launch(op, roles_kernel<M>, s.batch, kThreads, kWarp * sizeof(int), stream, data<M>(*keep),
           keep->stride(0), keep->stride(1), static_cast<int>(s.num_tokens),
           static_cast<int>(s.num_prefix), mutable_data<uint8_t>(roles), numbers,
           numbers + s.batch);
  });
  if (checks_wanted()) {
    const Tensor host = copy_to_host(counts);
    const int32_t* first_bad = data<int32_t>(host) + s.batch;
    for (int64_t b = 0; b < s.batch; ++b)
      SPOT_CHECK(first_bad[b] >= s.num_patches(), op, "keep must be exactly 0 or 1, but keep[", b,
                 ", ", first_bad[b], "] is not");
  }
  return {roles, counts};
}

template <typename T>
void fill_args(AttentionArgs& a, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               const Mask& mask, const std::optional<Tensor>& bias, const AttentionShape& s) {
  SPOT_CHECK(s.num_tokens <= kMostTokens, op, "q may have at most 2^30 tokens, got ", s.num_tokens);
  a.q = view_of<T>(q);
  a.k = view_of<T>(k);
  a.v = view_of<T>(v);
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

template <typename T, int kKeys>
bool launch_rows(const char* op, const Tensor& q, const ForwardArgs<T>& a, cudaStream_t stream) {
  const int64_t blocks = a.batch * a.heads;
  // Few blocks: more warps in each.
  const int row_tiles = static_cast<int>(ceil_div(a.tokens, 16));
  const int full = blocks < 2 * device_attribute(q, cudaDevAttrMultiProcessorCount) ? 8 : 4;
  const int warps = std::min(full, row_tiles);
  const size_t shared = rows_shared<T, kKeys>(a.depth, warps);
  if (shared > max_shared(q)) return false;
  launch(op, attention_rows_kernel<T, kKeys>, blocks, warps * kWarp, shared, stream, a);
  return true;
}

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
    // Sizes of common ViTs, whole and after cuts: 197 tokens, 138, 98, 69; 257 to 261. Without
    // statistics the loop needs one pass only.
    if (a.bias != nullptr) {
      // The rows kernel knows no bias.
    } else if (a.tokens <= 80) {
      if (launch_rows<T, 80>(op, q, a, stream)) return;
    } else if (a.tokens <= 112) {
      if (launch_rows<T, 112>(op, q, a, stream)) return;
    } else if (a.tokens <= 144) {
      if (launch_rows<T, 144>(op, q, a, stream)) return;
    } else if (a.tokens <= 208) {
      if (launch_rows<T, 208>(op, q, a, stream)) return;
    } else if (a.tokens <= 272) {
      if (launch_rows<T, 272>(op, q, a, stream)) return;
    }
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
  Tensor out = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor stats = need_stats
                     ? empty_on(q, {s.batch, s.num_tokens, s.num_heads, kNumStats}, wide_type(q))
                     : empty_on(q, {0}, wide_type(q));
  Tensor lse = empty_on(q, {s.batch, s.num_tokens, s.num_heads}, wide_type(q));
  const Mask mask = read_mask(op, keep, s, stream);
  if (lse.numel() == 0) return {out, stats, lse};
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    ForwardArgs<T> a{};
    fill_args<T>(a, op, q, k, v, mask, bias, s);
    a.out = mutable_data<T>(out);
    a.stats = mutable_data<Acc<T>>(stats);
    a.lse = mutable_data<Acc<T>>(lse);
    dispatch(need_stats,
             [&](auto wanted) { launch_forward<T, decltype(wanted)::value>(op, q, a, stream); });
  });
  return {out, stats, lse};
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
  const Mask mask = read_mask(op, keep, s, stream);
  const Tensor dense_lse = dense(lse);
  const std::optional<Tensor> dense_stats =
      grad_stats ? std::optional<Tensor>(dense(stats)) : std::nullopt;
  const int64_t rows = s.batch * s.num_tokens * s.num_heads;
  const int64_t entries =
      s.batch * s.num_heads * round_up(static_cast<int>(s.num_tokens), kTableTokens);
  const Tensor scratch =
      empty_on(q, {entries * (kEntryValues + (grad_stats ? kSideValues : 0))}, wide);
  const Tensor keep_partial =
      empty_on(q, {keep_grad ? s.batch : 0, s.num_heads, s.num_tokens}, wide);
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    BackwardArgs<T> a{};
    fill_args<T>(a, op, q, k, v, mask, bias, s);
    a.grad_out = view_of<T>(grad_out);
    a.out = view_of<T>(out);
    a.lse = data<Acc<T>>(dense_lse);
    if (grad_stats) {
      a.stats = data<Acc<T>>(*dense_stats);
      a.grad_stats = data<Acc<T>>(*grad_stats);
      a.grad_stats_batch = grad_stats->stride(0);
      a.grad_stats_token = grad_stats->stride(1);
      a.grad_stats_head = grad_stats->stride(2);
      a.grad_stats_entry = grad_stats->stride(3);
    }
    using A = Acc<T>;
    A* const tables = mutable_data<A>(scratch);
    a.table_tokens = round_up(a.tokens, kTableTokens);
    a.entries = reinterpret_cast<QueryEntry<A>*>(tables);
    a.hides = tables + 4 * entries;
    a.query_sides = reinterpret_cast<Side<A>*>(tables + 5 * entries);
    a.key_sides = reinterpret_cast<Side<A>*>(tables + 9 * entries);
    a.dq = mutable_data<T>(dq);
    a.dk = mutable_data<T>(dk);
    a.dv = mutable_data<T>(dv);
    a.keep_partial = keep_grad ? mutable_data<Acc<T>>(keep_partial) : nullptr;
    launch(op, prepare_kernel<T>, grid_for(entries, kThreads / kGroup), kThreads, 0, stream, a,
           entries);
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
