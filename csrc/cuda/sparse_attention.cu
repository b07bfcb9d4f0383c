// CUDA kernels of sparse_attention. Sums are float32 (float64 for float64). Nothing of N^2 numbers
// is stored; scratch and, but for the first kind of forward pass, cost grow with the entries of the
// map, B H (P N + (N-P) K).
//
// - Forward on tensor cores: float16 and bfloat16 up to 272 tokens, unless K is below N / 16. The
//   kernel of attention_stats for the whole map, with the index as bits: N^2 / 8 bytes per image
//   and head, no more than half of the index. This is the work of dense attention whatever K is;
//   for so few tokens gathers are expected to take longer (not measured).
// - Forward by gathers: reads a row of k and one of v per entry, plain arithmetic. Scratch only
//   with statistics: a list and a value per entry.
// - Backward by gathers: reads a row of k, v, q and dO per entry (with statistics k twice) and
//   writes p and dS per entry, from which the pass over keys works without dot products. Gradients
//   of keys are sums over lists by key in ascending order of queries: the same bits in every run.
//
// Gathered rows come from L1 or L2 where they hold the N D of an image and head; that traffic and
// the plain arithmetic bound the kernels, so K / N must be small for them to pass dense attention.
//
// An entry of `index` out of range is never dereferenced. A query that names one, that names a key
// twice, or a key behind a -1, gets NaN, and so do the statistics and gradients that it enters (on
// tensor cores the column statistics of all keys of its image and head). SPOT_CHECK=1 names it
// instead, at the price of a sync.
#include "../common/sparse_attention.h"
#include "attention_entry.cuh"
#include "sparse_attention_backward.cuh"
#include "sparse_attention_forward.cuh"

#include <algorithm>

namespace spot {
namespace {

constexpr int64_t kMostEntries = 1 << 30;

// The index and what goes with it.
struct Named {
  Tensor index;  // keeps the memory alive
  SparseMap map;
};

Named read_index(const char* op, const Tensor& given, const SparseShape& s) {
  const int64_t entries = s.num_prefix * s.num_tokens + s.num_patches() * s.num_named;
  SPOT_CHECK(entries <= kMostEntries, op,
             "prefix and index may name at most 2^30 keys per image "
             "and head, got ",
             entries);
  if (checks_wanted()) explain_keys(op, s, data<int32_t>(copy_to_host(given)));
  const Tensor index = dense(given);
  return {index, {data<int32_t>(index), static_cast<int>(s.num_named), static_cast<int>(entries)}};
}

// `t` itself where its rows can be read in 16-byte pieces, else a copy with rows of whole pieces.
template <typename T>
Tensor in_pieces(const Tensor& t) {
  if (head_rows<T>(t).wide) return t;
  std::vector<int64_t> sizes = sizes_of(t);
  sizes[3] = round_up(static_cast<int>(sizes[3]), kVector<T>);
  Tensor padded = empty_on(t, sizes, t.scalar_type());
  if (sizes[3] != t.size(3)) torch::stable::zero_(padded);
  Tensor there = torch::stable::narrow(padded, 3, 0, t.size(3));
  torch::stable::copy_(there, t);
  return padded;
}

// Tensors behind SparseLists.
struct Lists {
  Tensor starts, list;
  SparseLists view;
};

// Counters of the warps in shared memory, where they fit for one warp at least.
Lists list_by_key(const char* op, const Tensor& q, const AttentionArgs& a, const Named& named,
                  cudaStream_t stream) {
  const int64_t slices = a.batch * a.heads;
  Lists lists{empty_on(q, {slices, a.tokens + 1}, ScalarType::Int),
              empty_on(q, {slices, (a.tokens - a.prefix) * static_cast<int64_t>(named.map.named)},
                       ScalarType::Int),
              {}};
  const auto bytes = [&](int warps) { return sizeof(int32_t) * warps * a.tokens; };
  const size_t room = max_shared(q) - 1024;  // less what is static
  int warps = kSparseWarps;
  while (warps > 1 && bytes(warps) > room) warps /= 2;
  const bool fits = bytes(warps) <= room;
  if (!fits) warps = kSparseWarps;
  const Tensor counters =
      empty_on(q, {fits ? 0 : slices * warps * static_cast<int64_t>(a.tokens)}, ScalarType::Int);
  launch(op, sparse_lists_kernel, slices, warps * kWarp, fits ? bytes(warps) : 0, stream, a,
         named.map, mutable_data<int32_t>(lists.starts), mutable_data<int32_t>(lists.list),
         fits ? nullptr : mutable_data<int32_t>(counters));
  lists.view = {data<int32_t>(lists.starts), data<int32_t>(lists.list)};
  return lists;
}

// Blocks that share the rows of an image and head: enough to fill the device, and a warp no fewer
// rows than one.
int parts_for(const Tensor& q, const AttentionArgs& a, int rows) {
  const int64_t wanted = 8LL * device_attribute(q, cudaDevAttrMultiProcessorCount);
  const int64_t most = std::max<int64_t>(ceil_div(rows, kSparseWarps), 1);
  return static_cast<int>(
      std::min(ceil_div(wanted, std::max<int64_t>(a.batch * a.heads, 1)), most));
}

// f(integral constant of the head dim, rounded up).
template <typename F>
void dispatch_depth(int dim, F&& f) {
  if (dim <= 32)
    f(std::integral_constant<int, 32>{});
  else if (dim <= 64)
    f(std::integral_constant<int, 64>{});
  else if (dim <= 96)
    f(std::integral_constant<int, 96>{});
  else if (dim <= 128)
    f(std::integral_constant<int, 128>{});
  else
    f(std::integral_constant<int, 256>{});
}

// From this share of the keys on, all of them are taken through tensor cores where those can. An
// estimate from rates of arithmetic, not measured.
constexpr int kDenseShare = 16;

// The whole map of an image and head in one block; false where that cannot be, or does not pay.
template <typename T, bool kStats>
bool launch_dense(const char* op, const Tensor& q, SparseForwardArgs<T>& a, cudaStream_t stream) {
  if constexpr (kTensorCores<T>) {
    if (kDenseShare * static_cast<int64_t>(a.map.named) < a.tokens) return false;
    return dispatch_keys(a.tokens, [&](auto keys) {
      constexpr int kKeys = decltype(keys)::value;
      const int64_t rows = a.batch * a.heads * a.tokens;
      const Tensor seen = empty_on(q, {rows, kSeenBits<kKeys> + 1}, ScalarType::Int);
      uint32_t* bits = mutable_data<uint32_t>(seen);
      launch(op, sparse_seen_kernel<T, kKeys>, grid_for(rows, kSparseWarps), kSparseThreads, 0,
             stream, a, bits, rows);
      a.seen = bits;
      return launch_rows<T, kKeys, kStats, true>(op, q, a, stream);
    });
  } else {
    return false;
  }
}

template <typename T, bool kStats>
void launch_gather(const char* op, const Tensor& q, SparseForwardArgs<T>& a, const Named& named,
                   cudaStream_t stream) {
  const int64_t slices = a.batch * a.heads;
  const int patches = a.tokens - a.prefix, parts = parts_for(q, a, patches);
  const Tensor map_values = empty_on(q, {kStats ? slices : 0, a.map.entries}, wide_type(q));
  a.map_values = mutable_data<Acc<T>>(map_values);
  dispatch_depth(a.dim, [&](auto depth) {
    launch(op, sparse_forward_kernel<T, decltype(depth)::value>,
           slices * (a.prefix + (patches > 0 ? parts : 0)), kSparseThreads, 0, stream, a, parts);
  });
  if (!kStats || patches == 0) return;
  const Lists lists = list_by_key(op, q, a, named, stream);
  a.lists = lists.view;
  launch(op, sparse_columns_kernel<T>, grid_for(slices * patches, kSparseWarps), kSparseThreads, 0,
         stream, a, slices * patches);
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& index,
                                                    std::optional<Tensor> keep,
                                                    std::optional<double> scale, int64_t num_prefix,
                                                    bool class_token, bool need_stats) {
  const char* op = "sparse_attention";
  check_cuda(op, "q", q);
  const SparseShape s =
      check_sparse_attention(op, q, k, v, index, keep, scale, num_prefix, class_token);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  AttentionResults results = empty_results(q, s, need_stats);
  const Named named = read_index(op, index, s);
  const Mask mask = read_mask(op, keep, s.num_tokens, s.num_prefix, stream);
  if (results.lse.numel() == 0) return results.all();
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    const Tensor q_rows = in_pieces<T>(q), k_rows = in_pieces<T>(k), v_rows = in_pieces<T>(v);
    SparseForwardArgs<T> a{};
    set_args<T>(a, op, s, mask, q_rows, k_rows, v_rows, std::nullopt);
    a.map = named.map;
    set_results(a, results, need_stats);
    dispatch(need_stats, [&](auto wanted) {
      constexpr bool kStats = decltype(wanted)::value;
      if (!launch_dense<T, kStats>(op, q, a, stream))
        launch_gather<T, kStats>(op, q, a, named, stream);
    });
  });
  return results.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_stats, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& index, std::optional<Tensor> keep, const Tensor& out,
    const Tensor& stats, const Tensor& lse, std::optional<double> scale, int64_t num_prefix,
    bool class_token, bool keep_grad) {
  const char* op = "sparse_attention_backward";
  check_cuda(op, "q", q);
  const SparseShape s =
      check_sparse_attention(op, q, k, v, index, keep, scale, num_prefix, class_token);
  check_attention_grad(op, grad_out, grad_stats, q, out, stats, lse);
  SPOT_CHECK(!keep_grad || keep, op, "keep_grad=True needs keep");
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const ScalarType wide = wide_type(q);
  Tensor dq = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dk = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dv = empty_on(q, sizes_of(q), q.scalar_type());
  Tensor dkeep = empty_on(q, keep_grad ? sizes_of(*keep) : std::vector<int64_t>{0}, wide);
  const Named named = read_index(op, index, s);
  const Mask mask = read_mask(op, keep, s.num_tokens, s.num_prefix, stream);
  const Tensor keep_partial =
      empty_on(q, {keep_grad ? s.batch : 0, s.num_heads, s.num_tokens}, wide);
  const int64_t slices = s.batch * s.num_heads;
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Tensor q_rows = in_pieces<T>(q), k_rows = in_pieces<T>(k), v_rows = in_pieces<T>(v);
    const Tensor grad_rows = in_pieces<T>(grad_out);
    SparseBackwardArgs<T> a{};
    set_args<T>(a, op, s, mask, q_rows, k_rows, v_rows, std::nullopt);
    a.keep_partial = keep_grad ? mutable_data<A>(keep_partial) : nullptr;
    if (lse.numel() > 0) {
      const BackwardTables tables =
          prepare_backward<T>(op, a, grad_rows, grad_stats, out, stats, lse, stream);
      const Tensor pairs = empty_on(q, {slices, named.map.entries, 2}, wide);
      const Tensor keep_terms = empty_on(q, {keep_grad ? slices : 0, named.map.entries}, wide);
      const Lists lists = list_by_key(op, q, a, named, stream);
      a.dq = mutable_data<T>(dq);
      a.dk = mutable_data<T>(dk);
      a.dv = mutable_data<T>(dv);
      a.map = named.map;
      a.lists = lists.view;
      a.pairs = reinterpret_cast<Pair<A>*>(mutable_data<A>(pairs));
      a.keep_terms = keep_grad ? mutable_data<A>(keep_terms) : nullptr;
      const int patches = a.tokens - a.prefix, parts = parts_for(q, a, patches);
      const int key_parts = parts_for(q, a, a.tokens);
      dispatch_depth(a.dim, [&](auto depth) {
        constexpr int kDepth = decltype(depth)::value;
        dispatch(grad_stats.has_value(), [&](auto wanted) {
          launch(op, sparse_query_kernel<T, kDepth, decltype(wanted)::value>,
                 slices * (a.prefix + (patches > 0 ? parts : 0)), kSparseThreads, 0, stream, a,
                 parts);
        });
        launch(op, sparse_key_kernel<T, kDepth>, slices * key_parts, kSparseThreads, 0, stream, a,
               key_parts);
      });
    }
    if (keep_grad)
      launch(op, keep_gradient_kernel<T>, grid_for(dkeep.numel(), kSparseThreads), kSparseThreads,
             0, stream, a, mutable_data<A>(dkeep), dkeep.numel());
  });
  return {dq, dk, dv, dkeep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
}

}  // namespace spot
