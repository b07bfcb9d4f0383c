// CUDA kernels of the compact slice. One read and one write per output row (select: one read of the
// scores per 8 key bits). Scratch: 4 bytes per patch token for scatter and fuse, from torch's pool.
//
// An index out of range is never dereferenced: its row is NaN (0 for integers). Where rows are sent
// rather than fetched (scatter, fuse and the gradients) a repeated position makes its row NaN, and
// an out-of-range one the whole image. SPOT_CHECK=1 turns both into errors, at the price of a sync.
#include "../common/compact.h"
#include "../common/dispatch.h"
#include "block.cuh"
#include "device.h"
#include "select.cuh"

#include <algorithm>

namespace spot {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;  // where a warp has one

// ---- select ------------------------------------------------------------------------------------

// One block per image.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const T* __restrict__ scores, int64_t batch_stride, int64_t stride,
                  int64_t num_tokens, int64_t num_keep, int64_t* __restrict__ index) {
  __shared__ BlockSelect<SelectKey<T>> memory;
  scores += blockIdx.x * batch_stride;
  index += blockIdx.x * num_keep;
  const auto key_at = [&](int64_t i) { return order_key(load(scores[i * stride])); };
  const Cut<SelectKey<T>> cut = block_cut(memory, num_tokens, num_keep, key_at);
  block_selected(memory, num_tokens, cut, key_at,
                 [&](int64_t place, int64_t i) { index[place] = i; });
}

// ---- compact and scatter -----------------------------------------------------------------------

struct RowCopy {
  const char* source;
  int64_t source_batch, source_row;  // bytes
  const char* second;                // extra (compact) or background (scatter) rows, or null
  int64_t second_batch, second_row;
  const int64_t* index;   // [B, M], compact
  const int32_t* origin;  // [B, N+1], scatter (see invert_kernel)
  char* out;
  int64_t row_bytes, rows, total_rows;
  int64_t num_tokens, num_prefix, num_extra, num_kept;
  uint4 poison;  // 16 bytes of NaN in the dtype, or of 0
};

// Where output row r of image b comes from; null with poison set when it must not be read.
__device__ inline const char* compact_source(const RowCopy& a, int64_t b, int64_t r, bool& poison) {
  const char* source = a.source + b * a.source_batch;
  if (r < a.num_prefix) return source + r * a.source_row;
  r -= a.num_prefix;
  if (r < a.num_extra) return a.second + b * a.second_batch + r * a.second_row;
  const int64_t at = a.index[b * a.num_kept + r - a.num_extra];
  poison = at < 0 || at >= a.num_tokens;
  return poison ? nullptr : source + (a.num_prefix + at) * a.source_row;
}

__device__ inline const char* scatter_source(const RowCopy& a, int64_t b, int64_t r, bool& poison) {
  const char* source = a.source + b * a.source_batch;
  if (r < a.num_prefix) return source + r * a.source_row;
  const int32_t* origin = a.origin + b * (a.num_tokens + 1);
  const int32_t m = origin[r - a.num_prefix];
  poison = m == -2 || origin[a.num_tokens] != 0;
  if (poison) return nullptr;
  if (m >= 0) return source + (a.num_prefix + a.num_extra + m) * a.source_row;
  return a.second ? a.second + b * a.second_batch + r * a.second_row : nullptr;
}

// One warp copies a row, with kInFlight loads per thread under way before the first store.
template <typename Vector>
__device__ inline void copy_row(Vector* out, const Vector* source, int64_t count) {
  constexpr int kInFlight = 4;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kInFlight * kWarp) {
    Vector held[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (i + k * kWarp < count) held[k] = source[i + k * kWarp];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (i + k * kWarp < count) out[i + k * kWarp] = held[k];
  }
}

// One warp per output row, Vector-wide accesses (as wide as every address allows).
template <typename Vector, bool kScatter>
__global__ void __launch_bounds__(kThreads) row_kernel(RowCopy a) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const int lane = threadIdx.x % kWarp;
  Vector poison_value;
  memcpy(&poison_value, &a.poison, sizeof(Vector));
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarp;
       row < a.total_rows; row += warps) {
    const int64_t b = row / a.rows;
    bool poison = false;
    const char* from = kScatter ? scatter_source(a, b, row - b * a.rows, poison)
                                : compact_source(a, b, row - b * a.rows, poison);
    const Vector* source = reinterpret_cast<const Vector*>(from);
    Vector* out = reinterpret_cast<Vector*>(a.out + row * a.row_bytes);
    const int64_t count = a.row_bytes / static_cast<int64_t>(sizeof(Vector));
    const Vector fill = poison ? poison_value : Vector{};
    if (source != nullptr) {
      copy_row(out, source, count);
    } else {
      for (int64_t i = lane; i < count; i += kWarp) out[i] = fill;
    }
  }
}

// origin[b, n]: which index entry names position n; -1 none, -2 more than one.
// origin[b, N]: 1 when some entry is out of range. Integer atomics, so the result is unique.
__global__ void __launch_bounds__(kThreads)
    invert_kernel(const int64_t* __restrict__ index, int32_t* __restrict__ origin,
                  int64_t num_tokens, int64_t num_kept) {
  index += blockIdx.x * num_kept;
  origin += blockIdx.x * (num_tokens + 1);
  for (int64_t i = threadIdx.x; i <= num_tokens; i += kThreads) origin[i] = i < num_tokens ? -1 : 0;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < num_kept; m += kThreads) {
    const int64_t at = index[m];
    if (at < 0 || at >= num_tokens)
      atomicExch(&origin[num_tokens], 1);
    else if (atomicCAS(&origin[at], -1, static_cast<int32_t>(m)) != -1)
      atomicExch(&origin[at], -2);
  }
}

// ---- fuse --------------------------------------------------------------------------------------

struct FuseSizes {
  int64_t tokens_batch, tokens_row;  // elements
  int64_t num_tokens, num_prefix, channels;
  bool normalize;
};

// Sum of the removed weights of one image, by the whole block.
template <typename T>
__device__ inline Acc<T> removed_weight(const T* weights, const int32_t* origin, int64_t num_tokens,
                                        Acc<T>* partial) {
  Acc<T> sum = 0;
  for (int64_t i = threadIdx.x; i < num_tokens; i += blockDim.x)
    if (origin[i] == -1) sum += load(weights[i]);
  return block_sum(sum, partial);
}

// Whether the index of the image is unusable: an entry out of range, or a repeated position.
__device__ inline bool bad_index(const int32_t* origin, int64_t num_tokens) {
  bool bad = origin[num_tokens] != 0;
  for (int64_t i = threadIdx.x; i < num_tokens; i += blockDim.x) bad |= origin[i] == -2;
  return __syncthreads_or(bad);
}

// Block = tile of kThreads channels of an image; thread = channel, tokens in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fuse_kernel(const T* __restrict__ tokens, const T* __restrict__ weights,
                const int32_t* __restrict__ origin, T* __restrict__ out, FuseSizes s) {
  __shared__ Acc<T> partial[kWarp];
  const int64_t tiles = (s.channels + kThreads - 1) / kThreads, b = blockIdx.x / tiles,
                c = blockIdx.x % tiles * kThreads + threadIdx.x;
  weights += b * s.num_tokens;
  origin += b * (s.num_tokens + 1);
  const bool bad = bad_index(origin, s.num_tokens);
  const Acc<T> sum = removed_weight(weights, origin, s.num_tokens, partial);
  if (c >= s.channels) return;
  T* result = out + b * s.channels + c;
  if (bad) {
    *result = not_a_number<T>();
    return;
  }
  if (s.normalize && sum == 0) {
    *result = store<T>(0);
    return;
  }
  const T* column = tokens + b * s.tokens_batch + s.num_prefix * s.tokens_row + c;
  Acc<T> total = 0;
#pragma unroll 4
  for (int64_t i = 0; i < s.num_tokens; ++i)
    if (origin[i] == -1) total += load(weights[i]) * load(column[i * s.tokens_row]);
  *result = store<T>(s.normalize ? total / sum : total);
}

// along[b, n] = x_n . g for removed tokens; one warp per token.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fuse_along_kernel(const T* __restrict__ grad, const T* __restrict__ tokens,
                      const int32_t* __restrict__ origin, Acc<T>* __restrict__ along, int64_t batch,
                      FuseSizes s) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t item = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarp;
       item < batch * s.num_tokens; item += warps) {
    const int64_t b = item / s.num_tokens, n = item - b * s.num_tokens;
    if (origin[b * (s.num_tokens + 1) + n] != -1) continue;
    const T* row = tokens + b * s.tokens_batch + (s.num_prefix + n) * s.tokens_row;
    const T* g = grad + b * s.channels;
    Acc<T> sum = 0;
    for (int64_t c = lane; c < s.channels; c += kWarp) sum += load(row[c]) * load(g[c]);
    sum = warp_sum(sum);
    if (lane == 0) along[item] = sum;
  }
}

// Block per image: dx_n = (w_n / S) g, dw_n = (x_n . g - o . g) / S; zero where S is zero.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fuse_backward_kernel(const T* __restrict__ grad, const T* __restrict__ weights,
                         const int32_t* __restrict__ origin, const Acc<T>* __restrict__ along,
                         T* __restrict__ tokens_grad, T* __restrict__ weights_grad, FuseSizes s) {
  __shared__ Acc<T> partial[kWarp];
  const int64_t b = blockIdx.x;
  grad += b * s.channels;
  weights += b * s.num_tokens;
  origin += b * (s.num_tokens + 1);
  along += b * s.num_tokens;
  weights_grad += b * s.num_tokens;
  tokens_grad += b * (s.num_prefix + s.num_tokens) * s.channels;
  const bool bad = bad_index(origin, s.num_tokens);
  const Acc<T> sum = removed_weight(weights, origin, s.num_tokens, partial);
  Acc<T> mean = 0;
  for (int64_t i = threadIdx.x; i < s.num_tokens; i += kThreads)
    if (origin[i] == -1) mean += load(weights[i]) * along[i];
  mean = block_sum(mean, partial);
  // Divided by, not multiplied with its inverse: that of a denormal is inf.
  const Acc<T> mass = s.normalize ? sum : Acc<T>(1);
  mean = s.normalize && mass != 0 ? mean / mass : Acc<T>(0);
  for (int64_t i = threadIdx.x; i < s.num_tokens; i += kThreads) {
    const bool live = origin[i] == -1 && mass != 0;
    weights_grad[i] = bad    ? not_a_number<T>()
                      : live ? store<T>((along[i] - mean) / mass)
                             : store<T>(0);
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = threadIdx.x / kWarp; r < s.num_prefix + s.num_tokens; r += kRowsPerBlock) {
    const int64_t n = r - s.num_prefix;
    const bool live = n >= 0 && origin[n] == -1 && mass != 0;
    const Acc<T> w = live ? load(weights[n]) / mass : Acc<T>(0);
    T* row = tokens_grad + r * s.channels;
    for (int64_t c = lane; c < s.channels; c += kWarp)
      row[c] = bad ? not_a_number<T>() : live ? store<T>(w * load(grad[c])) : store<T>(0);
  }
}

// ---- entry points ------------------------------------------------------------------------------

void check_values(const char* op, const Tensor& index, const TokenShape& shape) {
  if (checks_wanted()) explain_index(op, copy_to_host(index), shape);
}

Tensor select_tokens(const Tensor& scores, int64_t num_keep) {
  const char* op = "select_tokens";
  check_select(op, scores, num_keep);
  const Dtype dtype = dtype_slot(op, "scores", scores);
  const DeviceGuard guard(scores.get_device_index());
  Tensor index = empty_on(scores, {scores.size(0), num_keep}, ScalarType::Long);
  if (index.numel() == 0) return index;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(op, select_kernel<T>, scores.size(0), kThreads, 0, current_stream(scores),
           data<T>(scores), scores.stride(0), scores.stride(1), scores.size(1), num_keep,
           mutable_data<int64_t>(index));
  });
  return index;
}

// 16 bytes of the NaN of a floating or complex dtype, or zeros.
uint4 poison_of(ScalarType type) {
  const auto words = [](unsigned x, unsigned y) { return uint4{x, y, x, y}; };
  switch (type) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat: return words(0x7fc00000u, 0x7fc00000u);
    case ScalarType::Double:
    case ScalarType::ComplexDouble: return words(0u, 0x7ff80000u);
    case ScalarType::Half:
    case ScalarType::ComplexHalf: return words(0x7e007e00u, 0x7e007e00u);
    case ScalarType::BFloat16: return words(0x7fc07fc0u, 0x7fc07fc0u);
    default: return words(0u, 0u);
  }
}

template <bool kScatter>
void launch_rows(const char* op, const RowCopy& a, cudaStream_t stream) {
  if (a.total_rows == 0 || a.row_bytes == 0) return;
  const uint64_t mix = reinterpret_cast<uint64_t>(a.source) | reinterpret_cast<uint64_t>(a.second) |
                       reinterpret_cast<uint64_t>(a.out) |
                       static_cast<uint64_t>(a.source_batch | a.source_row | a.second_batch |
                                             a.second_row | a.row_bytes);
  const auto copy = [&](auto* kernel) {
    launch(op, kernel, grid_for(a.total_rows, kRowsPerBlock), kThreads, 0, stream, a);
  };
  if (mix % 16 == 0)
    copy(row_kernel<uint4, kScatter>);
  else if (mix % 8 == 0)
    copy(row_kernel<uint2, kScatter>);
  else if (mix % 4 == 0)
    copy(row_kernel<unsigned, kScatter>);
  else if (mix % 2 == 0)
    copy(row_kernel<unsigned short, kScatter>);
  else
    copy(row_kernel<unsigned char, kScatter>);
}

RowCopy row_copy(const Rows& source, const std::optional<Rows>& second, const Tensor& out,
                 const TokenShape& s, int64_t rows) {
  return {source.data(),
          source.batch_stride,
          source.row_stride,
          second ? second->data() : nullptr,
          second ? second->batch_stride : 0,
          second ? second->row_stride : 0,
          nullptr,
          nullptr,
          mutable_data<char>(out),
          source.row_bytes,
          rows,
          s.batch * rows,
          s.num_tokens,
          s.num_prefix,
          s.num_extra,
          s.num_kept,
          poison_of(out.scalar_type())};
}

Tensor new_rows(const Tensor& like, int64_t rows) {
  std::vector<int64_t> sizes = sizes_of(like);
  sizes[1] = rows;
  return empty_on(like, sizes, like.scalar_type());
}

Tensor invert(const char* op, const Tensor& index, const TokenShape& s, cudaStream_t stream) {
  SPOT_CHECK(s.num_tokens < 0x7fffffff, op, "at most 2^31 - 2 patch tokens, got ", s.num_tokens);
  const Tensor dense_index = dense(index);
  Tensor origin = empty_on(index, {s.batch, s.num_tokens + 1}, ScalarType::Int);
  if (s.batch == 0) return origin;
  launch(op, invert_kernel, s.batch, kThreads, 0, stream, data<int64_t>(dense_index),
         mutable_data<int32_t>(origin), s.num_tokens, s.num_kept);
  return origin;
}

Tensor compact_tokens(const Tensor& tokens, const Tensor& index, int64_t num_prefix,
                      std::optional<Tensor> extra) {
  const char* op = "compact_tokens";
  check_cuda(op, "tokens", tokens);
  const TokenShape shape = check_compact(op, tokens, index, num_prefix, extra);
  const DeviceGuard guard(tokens.get_device_index());
  check_values(op, index, shape);
  Tensor out = new_rows(tokens, shape.kept_rows());
  const Tensor dense_index = dense(index);
  const Rows source = rows_of(tokens);
  const auto second = extra ? std::optional<Rows>(rows_of(*extra)) : std::nullopt;
  RowCopy args = row_copy(source, second, out, shape, shape.kept_rows());
  args.index = data<int64_t>(dense_index);
  launch_rows<false>(op, args, current_stream(tokens));
  return out;
}

Tensor scatter(const char* op, const char* name, const Tensor& compacted, const Tensor& index,
               int64_t num_tokens, int64_t num_prefix, int64_t num_extra,
               const std::optional<Tensor>& background) {
  check_cuda(op, name, compacted);
  const TokenShape shape =
      check_scatter(op, name, compacted, index, num_tokens, num_prefix, num_extra, background);
  const DeviceGuard guard(compacted.get_device_index());
  check_values(op, index, shape);
  const cudaStream_t stream = current_stream(compacted);
  Tensor out = new_rows(compacted, shape.full_rows());
  const Rows source = rows_of(compacted);
  const auto second = background ? std::optional<Rows>(rows_of(*background)) : std::nullopt;
  const Tensor origin = invert(op, index, shape, stream);
  RowCopy args = row_copy(source, second, out, shape, shape.full_rows());
  args.origin = data<int32_t>(origin);
  launch_rows<true>(op, args, stream);
  return out;
}

Tensor compact_tokens_backward(const Tensor& grad, const Tensor& index, int64_t num_tokens,
                               int64_t num_prefix, int64_t num_extra) {
  return scatter("compact_tokens_backward", "grad", grad, index, num_tokens, num_prefix, num_extra,
                 std::nullopt);
}

Tensor scatter_tokens(const Tensor& tokens, const Tensor& index, int64_t num_tokens,
                      int64_t num_prefix, std::optional<Tensor> background) {
  return scatter("scatter_tokens", "tokens", tokens, index, num_tokens, num_prefix, 0, background);
}

FuseSizes fuse_sizes(const Tensor& tokens, const TokenShape& s, bool normalize) {
  return {tokens.stride(0), tokens.stride(1), s.num_tokens,
          s.num_prefix,     tokens.size(2),   normalize};
}

Tensor fuse_tokens(const Tensor& tokens, const Tensor& weights, const Tensor& index,
                   int64_t num_prefix, bool normalize) {
  const char* op = "fuse_tokens";
  check_cuda(op, "tokens", tokens);
  const Dtype dtype = dtype_slot(op, "tokens", tokens);
  const TokenShape shape = check_fuse(op, tokens, weights, index, num_prefix);
  const DeviceGuard guard(tokens.get_device_index());
  check_values(op, index, shape);
  const cudaStream_t stream = current_stream(tokens);
  const Tensor rows = dense_rows(tokens);
  const Tensor dense_weights = dense(weights);
  Tensor out = empty_on(tokens, {shape.batch, tokens.size(2)}, tokens.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor origin = invert(op, index, shape, stream);
  const FuseSizes sizes = fuse_sizes(rows, shape, normalize);
  const int64_t blocks = shape.batch * ceil_div(sizes.channels, kThreads);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(op, fuse_kernel<T>, blocks, kThreads, 0, stream, data<T>(rows), data<T>(dense_weights),
           data<int32_t>(origin), mutable_data<T>(out), sizes);
  });
  return out;
}

std::tuple<Tensor, Tensor> fuse_tokens_backward(const Tensor& grad, const Tensor& tokens,
                                                const Tensor& weights, const Tensor& index,
                                                int64_t num_prefix, bool normalize) {
  const char* op = "fuse_tokens_backward";
  check_cuda(op, "tokens", tokens);
  const Dtype dtype = dtype_slot(op, "tokens", tokens);
  const TokenShape shape = check_fuse(op, tokens, weights, index, num_prefix);
  check_fuse_grad(op, grad, tokens);
  const DeviceGuard guard(tokens.get_device_index());
  check_values(op, index, shape);
  const cudaStream_t stream = current_stream(tokens);
  const Tensor rows = dense_rows(tokens);
  const Tensor dense_weights = dense(weights), dense_grad = dense(grad);
  Tensor tokens_grad = empty_on(tokens, sizes_of(tokens), tokens.scalar_type());
  Tensor weights_grad = empty_on(weights, sizes_of(weights), weights.scalar_type());
  if (shape.batch == 0) return {tokens_grad, weights_grad};
  const Tensor origin = invert(op, index, shape, stream);
  const FuseSizes sizes = fuse_sizes(rows, shape, normalize);
  const Tensor along = empty_on(tokens, {shape.batch, shape.num_tokens},
                                dtype == kFloat64 ? ScalarType::Double : ScalarType::Float);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(op, fuse_along_kernel<T>, grid_for(shape.batch * shape.num_tokens, kRowsPerBlock),
           kThreads, 0, stream, data<T>(dense_grad), data<T>(rows), data<int32_t>(origin),
           mutable_data<Acc<T>>(along), shape.batch, sizes);
    launch(op, fuse_backward_kernel<T>, shape.batch, kThreads, 0, stream, data<T>(dense_grad),
           data<T>(dense_weights), data<int32_t>(origin), data<Acc<T>>(along),
           mutable_data<T>(tokens_grad), mutable_data<T>(weights_grad), sizes);
  });
  return {tokens_grad, weights_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("compact_tokens", TORCH_BOX(&compact_tokens));
  m.impl("compact_tokens_backward", TORCH_BOX(&compact_tokens_backward));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens));
  m.impl("fuse_tokens", TORCH_BOX(&fuse_tokens));
  m.impl("fuse_tokens_backward", TORCH_BOX(&fuse_tokens_backward));
}

}  // namespace spot
