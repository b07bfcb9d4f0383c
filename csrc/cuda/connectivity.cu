// CUDA kernels of connectivity: the sums of a row, then the cut that its budget makes, without ever
// writing them to global memory.
//
// - connectivity_warp_kernel, up to 512 columns in play: a warp per row. The sums are in registers,
//   the basis in shared memory where it fits: each block works on rows of one image, so columns are
//   gathered once. The cut is a search over the bits of the keys, one count of the warp a bit, that
//   ends when a bit separates as many as wanted: usually after about 20. That search bounds it.
// - connectivity_block_kernel, beyond: a block per row. Keys in shared memory, or, where those do
//   not fit, summed again for each of the 5 passes (9 for float64); coefficients and basis from
//   global memory, through L2.
//
// predict_connectivity makes coefficients first, by the kernels of coefficients.cuh, and stores
// them unrounded. Keys are always added up before they are projected: that order never projects
// queries, and needs no projected keys of all tokens. Its basis is `up`, read in place, or made of
// it once a call where there are columns or a threshold on it.
//
// Sums run over the coefficients that count, in ascending order, in float32 (float64 for float64).
// Scratch: a byte per token with `keep`; for predict_connectivity, in the type of sums, also
// H R (N-P + D) numbers an image, and H R (D + 1) + R more with projections; and, in the dtype of
// up, R (n + 1) numbers of the basis where that is made. A column out of range is never
// dereferenced: its sum is NaN, so it ranks last, and its key takes no part in the coefficients;
// SPOT_CHECK=1 names it, at the price of a sync.
#include "../common/connectivity.h"
#include "coefficients.cuh"
#include "device.h"
#include "mask.cuh"
#include "select.cuh"

#include <algorithm>

namespace spot {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNone = -1, kBeyond = -2;  // columns: out of range; past the last one

// [B, H, N-P, R], strides; as given, or in the type of sums where they were made here.
template <typename C>
struct Coefficients {
  const C* data;
  int64_t image_stride, head_stride, query_stride, rank_stride;
};

template <typename T>
struct ConnectivityArgs {
  const T* basis;  // [R, columns], strides
  int64_t basis_row, basis_column, basis_columns;
  const int64_t* columns;  // [B, N] dense, or null
  const uint8_t* roles;    // [B, N], or null: all are candidates
  int32_t* index;          // [B, H, N-P, K]
  int heads, queries, rank, num_columns, budget, used;
  bool has_threshold;
  Acc<T> threshold;
};

// Which column of the basis is column j of an image.
template <typename T>
__device__ inline int64_t source_column(const ConnectivityArgs<T>& a, int64_t image, int64_t j) {
  if (j >= a.num_columns) return kBeyond;
  if (a.columns == nullptr) return j;
  const int64_t column = a.columns[image * a.num_columns + j];
  return column >= 0 && column < a.basis_columns ? column : kNone;
}

template <typename T>
__device__ inline Acc<T> basis_at(const ConnectivityArgs<T>& a, int r, int64_t column) {
  if (column < 0) return not_a_number<Acc<T>>();
  return load(a.basis[r * a.basis_row + column * a.basis_column]);
}

// 0 for what is no candidate, so that all candidates rank above it, NaN among them.
template <typename T>
__device__ inline SelectKey<T> candidate_key(const ConnectivityArgs<T>& a, int64_t image, int64_t j,
                                             Acc<T> sum) {
  using Key = SelectKey<T>;
  if (j >= a.num_columns) return 0;
  if (a.roles != nullptr && a.roles[image * a.num_columns + j] == kDropped) return 0;
  if (a.has_threshold && !(sum > a.threshold)) return 0;
  const Key key = order_key(sum);
  return key == 0 ? Key(1) : key;
}

// The coefficients of a row, and those of them that count, in ascending order. In shared memory.
template <typename A>
struct Chosen {
  A* weights;  // [R]
  int* ranks;  // [R], the first `used`
};

// By one warp; `row` as row_of gives it.
template <typename T, typename C>
__device__ inline void choose(const ConnectivityArgs<T>& a, const Coefficients<C>& coefficients,
                              const C* row, const Chosen<Acc<T>>& chosen) {
  using Key = SelectKey<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncwarp();  // those of the row before may still be read
  for (int r = lane; r < a.rank; r += kWarp) {
    chosen.weights[r] = load(row[r * coefficients.rank_stride]);
    chosen.ranks[r] = r;
  }
  __syncwarp();
  if (a.used == a.rank) return;
  const auto key_at = [&](int r) { return order_key(chosen.weights[r]); };
  const Cut<Key> cut = warp_cut<Key>(a.used, [&](Key key) {
    int count = 0;
    for (int r = lane; r < a.rank; r += kWarp) count += key_at(r) >= key ? 1 : 0;
    return __reduce_add_sync(0xffffffffu, count);
  });
  warp_selected(a.rank, cut, key_at, [&](int place, int r) { chosen.ranks[place] = r; });
  __syncwarp();
}

template <typename C>
__device__ inline const C* row_of(const Coefficients<C>& c, int queries, int64_t image, int row) {
  return c.data + image * c.image_stride + row / queries * c.head_stride +
         row % queries * c.query_stride;
}

// ---- a warp per row -----------------------------------------------------------------------------

// Shared memory: weights [warps, R], ranks [warps, R], and the basis [R, N] where `staged`.
template <typename A>
size_t warp_shared(int rank, int num_columns, bool staged) {
  return kWarps * rank * (sizeof(A) + sizeof(int)) +
         (staged ? sizeof(A) * rank * static_cast<size_t>(num_columns) : 0);
}

// Lane l has columns l + 32 c, c < kHeld.
template <typename T, int kHeld, typename C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1
                                            : kHeld > 8    ? 2
                                                           : 3)
    connectivity_warp_kernel(const ConnectivityArgs<T> a, const Coefficients<C> coefficients,
                             int parts, bool staged) {
  using A = Acc<T>;
  using Key = SelectKey<T>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t image = blockIdx.x / static_cast<unsigned>(parts);
  const int rows = a.heads * a.queries, size = (rows + parts - 1) / parts;
  const int first = static_cast<int>(blockIdx.x) % parts * size, end = min(first + size, rows);
  A* weights = reinterpret_cast<A*>(shared_memory);
  A* basis = weights + kWarps * a.rank;
  int* ranks = reinterpret_cast<int*>(basis + (staged ? a.rank * a.num_columns : 0));
  const Chosen<A> chosen{weights + warp * a.rank, ranks + warp * a.rank};
  if (staged) {
    for (int j = static_cast<int>(threadIdx.x); j < a.num_columns; j += kThreads) {
      const int64_t column = source_column(a, image, j);
      for (int r = 0; r < a.rank; ++r) basis[r * a.num_columns + j] = basis_at(a, r, column);
    }
    __syncthreads();
  }

  for (int row = first + warp; row < end; row += kWarps) {
    choose(a, coefficients, row_of(coefficients, a.queries, image, row), chosen);
    A sum[kHeld];
#pragma unroll
    for (int c = 0; c < kHeld; ++c) sum[c] = A(0);
    for (int s = 0; s < a.used; ++s) {
      const int r = chosen.ranks[s];
      const A weight = chosen.weights[r];
#pragma unroll
      for (int c = 0; c < kHeld; ++c) {
        const int j = c * kWarp + lane;
        if (j < a.num_columns)
          sum[c] += weight * (staged ? basis[r * a.num_columns + j]
                                     : basis_at(a, r, source_column(a, image, j)));
      }
    }
    Key keys[kHeld];
#pragma unroll
    for (int c = 0; c < kHeld; ++c) keys[c] = candidate_key(a, image, c * kWarp + lane, sum[c]);
    const auto count_from = [&](Key key) {
      int count = 0;
#pragma unroll
      for (int c = 0; c < kHeld; ++c) count += keys[c] >= key ? 1 : 0;
      return __reduce_add_sync(0xffffffffu, count);
    };
    const int candidates = count_from(1), wanted = min(a.budget, candidates);
    const Cut<Key> cut = wanted == candidates ? Cut<Key>{0, 0} : warp_cut<Key>(wanted, count_from);
    int32_t* to = a.index + (image * rows + row) * a.budget;
    int written = 0, ties = 0;
    const unsigned below = (1u << lane) - 1u;
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
      const unsigned tied = __ballot_sync(0xffffffffu, keys[c] == cut.at);
      const bool take =
          keys[c] > cut.at || (keys[c] == cut.at && ties + __popc(tied & below) < cut.ties);
      const unsigned taken = __ballot_sync(0xffffffffu, take);
      if (take) to[written + __popc(taken & below)] = c * kWarp + lane;
      written += __popc(taken);
      ties += __popc(tied);
    }
    for (int i = wanted + lane; i < a.budget; i += kWarp) to[i] = -1;
  }
}

// ---- a block per row ----------------------------------------------------------------------------

// Shared memory: weights and ranks [R], and keys [N] where kStored.
template <typename T, bool kStored>
size_t block_shared(int rank, int num_columns) {
  return rank * (sizeof(Acc<T>) + sizeof(int)) + 8 +
         (kStored ? sizeof(SelectKey<T>) * static_cast<size_t>(num_columns) : 0);
}

template <typename T, bool kStored, typename C>
__global__ void __launch_bounds__(kThreads)
    connectivity_block_kernel(const ConnectivityArgs<T> a, const Coefficients<C> coefficients) {
  using A = Acc<T>;
  using Key = SelectKey<T>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  __shared__ BlockSelect<Key> memory;
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = a.heads * a.queries;
  const int64_t image = blockIdx.x / static_cast<unsigned>(rows);
  const int row = static_cast<int>(blockIdx.x % static_cast<unsigned>(rows));
  Key* keys = reinterpret_cast<Key*>(shared_memory);
  A* weights = reinterpret_cast<A*>(shared_memory) + (kStored ? a.num_columns : 0);
  const Chosen<A> chosen{weights, reinterpret_cast<int*>(weights + a.rank)};
  if (thread < kWarp) choose(a, coefficients, row_of(coefficients, a.queries, image, row), chosen);
  __syncthreads();
  const auto compute = [&](int64_t j) {
    const int64_t column = source_column(a, image, j);
    A sum = A(0);
    for (int s = 0; s < a.used; ++s)
      sum += chosen.weights[chosen.ranks[s]] * basis_at(a, chosen.ranks[s], column);
    return candidate_key(a, image, j, sum);
  };
  const auto key_at = [&](int64_t j) {
    if constexpr (kStored)
      return keys[j];
    else
      return compute(j);
  };
  int count = 0;
  for (int j = thread; j < a.num_columns; j += kThreads) {
    const Key key = compute(j);
    if constexpr (kStored) keys[j] = key;
    count += key > 0 ? 1 : 0;
  }
  const int candidates = block_sum(count, memory.partial), wanted = min(a.budget, candidates);
  __syncthreads();
  const Cut<Key> cut =
      wanted == candidates ? Cut<Key>{0, 0} : block_cut(memory, a.num_columns, wanted, key_at);
  int32_t* to = a.index + blockIdx.x * static_cast<int64_t>(a.budget);
  block_selected(memory, a.num_columns, cut, key_at,
                 [&](int64_t place, int64_t j) { to[place] = static_cast<int32_t>(j); });
  for (int i = wanted + thread; i < a.budget; i += kThreads) to[i] = -1;
}

// ---- launches -----------------------------------------------------------------------------------

template <int kHeld, typename T, typename C>
void launch_warps(const char* op, const Tensor& like, const ConnectivityArgs<T>& a,
                  const Coefficients<C>& coefficients, int64_t batch, cudaStream_t stream) {
  using A = Acc<T>;
  // Half of what a block may have, so that two run side by side.
  const bool staged = warp_shared<A>(a.rank, a.num_columns, true) <= max_shared(like) / 2;
  const size_t shared = warp_shared<A>(a.rank, a.num_columns, staged);
  SPOT_CHECK(shared <= max_shared(like), op, "coefficients of ", a.rank, " a row need ", shared,
             " bytes of shared memory per block; the device has ", max_shared(like));
  // Few images: more blocks for each, but a warp no fewer rows than 4.
  const int64_t wanted = 4LL * device_attribute(like, cudaDevAttrMultiProcessorCount);
  const int64_t rows = a.heads * static_cast<int64_t>(a.queries);
  const int64_t parts =
      std::max<int64_t>(std::min(ceil_div(wanted, batch), ceil_div(rows, 4 * kWarps)), 1);
  launch(op, connectivity_warp_kernel<T, kHeld, C>, batch * parts, kThreads, shared, stream, a,
         coefficients, static_cast<int>(parts), staged);
}

template <typename T, typename C>
void launch_connectivity(const char* op, const Tensor& like, const ConnectivityArgs<T>& a,
                         const Coefficients<C>& coefficients, int64_t batch, cudaStream_t stream) {
  if (a.num_columns <= 4 * kWarp) return launch_warps<4>(op, like, a, coefficients, batch, stream);
  if (a.num_columns <= 8 * kWarp) return launch_warps<8>(op, like, a, coefficients, batch, stream);
  if (a.num_columns <= 16 * kWarp)
    return launch_warps<16>(op, like, a, coefficients, batch, stream);
  const int64_t blocks = batch * a.heads * a.queries;
  const size_t room = max_shared(like) - 2048;  // less what is static
  const size_t stored = block_shared<T, true>(a.rank, a.num_columns);
  if (stored <= room)
    return launch(op, connectivity_block_kernel<T, true, C>, blocks, kThreads, stored, stream, a,
                  coefficients);
  const size_t least = block_shared<T, false>(a.rank, a.num_columns);
  SPOT_CHECK(least <= room, op, "coefficients of ", a.rank, " a row need ", least,
             " bytes of shared memory per block; the device has ", room);
  launch(op, connectivity_block_kernel<T, false, C>, blocks, kThreads, least, stream, a,
         coefficients);
}

// ---- coefficients of queries --------------------------------------------------------------------

// Columns and mask as kernels read them.
struct Candidates {
  std::optional<Tensor> columns;  // [B, N] dense
  Mask mask;

  const int64_t* column_data() const { return columns ? data<int64_t>(*columns) : nullptr; }
  const uint8_t* role_data() const { return mask.roles ? data<uint8_t>(*mask.roles) : nullptr; }
};

// Columns are in [0, columns_end).
Candidates read_candidates(const char* op, const ConnectivityShape& s,
                           const std::optional<Tensor>& columns, int64_t columns_end,
                           const char* columns_meaning, const std::optional<Tensor>& keep,
                           cudaStream_t stream) {
  if (columns && checks_wanted())
    check_columns(op, copy_to_host(*columns), columns_end, columns_meaning);
  return {columns ? std::optional<Tensor>(dense(*columns)) : std::nullopt,
          read_mask(op, keep, s.num_columns, s.num_prefix(), stream)};
}

// [B, H, D, R] keys, and [B, H, R] what is added to their logits.
struct Keys {
  Tensor keys;
  std::optional<Tensor> bias;
};

template <typename T>
Keys make_keys(const char* op, const Tensor& k, const Tensor& down, const Projections& projections,
               const Candidates& candidates, const ConnectivityShape& s, double scale,
               cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t dim = k.size(3);
  const int64_t blocks =
      s.batch * s.num_heads * TilePlace::tiles(s.rank, kTileRows) * TilePlace::tiles(dim, kKeyDims);
  const auto scratch = [&](const std::vector<int64_t>& sizes) {
    return empty_on(k, sizes, wide_type(k));
  };
  const Tensor sums = scratch({s.batch, s.num_heads, dim, s.rank});
  std::optional<Tensor> mass;
  if (projections) mass = scratch({s.batch, s.rank});
  KeyArgs<T> a{};
  a.k = data<T>(k);
  for (int d = 0; d < 4; ++d) a.k_strides[d] = k.stride(d);
  a.down = data<T>(down);
  a.down_token = down.stride(0);
  a.down_rank = down.stride(1);
  a.num_down = down.size(0);
  a.columns = candidates.column_data();
  a.roles = candidates.role_data();
  a.sums = mutable_data<A>(sums);
  a.mass = mass ? mutable_data<A>(*mass) : nullptr;
  a.factor = projections ? A(1) : static_cast<A>(scale);
  a.tokens = s.num_columns;
  a.heads = static_cast<int>(s.num_heads);
  a.dim = static_cast<int>(dim);
  a.rank = static_cast<int>(s.rank);
  launch(op, keys_kernel<T>, blocks, kTileThreads, 0, stream, a);
  if (!projections) return {sums, std::nullopt};

  const Tensor keys = scratch({s.batch, s.num_heads, dim, s.rank});
  const Tensor bias = scratch({s.batch, s.num_heads, s.rank});
  ProjectionArgs<T> p{};
  p.sums = a.sums;
  p.mass = a.mass;
  p.query_weight = data<T>(*projections.query_weight);
  p.query_bias = data<T>(*projections.query_bias);
  p.key_weight = data<T>(*projections.key_weight);
  p.key_bias = data<T>(*projections.key_bias);
  for (int d = 0; d < 2; ++d) {
    p.query_weight_strides[d] = projections.query_weight->stride(d);
    p.key_weight_strides[d] = projections.key_weight->stride(d);
  }
  p.query_bias_stride = projections.query_bias->stride(0);
  p.key_bias_stride = projections.key_bias->stride(0);
  p.keys = mutable_data<A>(keys);
  p.bias = mutable_data<A>(bias);
  p.scale = static_cast<A>(scale);
  p.heads = a.heads;
  p.dim = a.dim;
  p.rank = a.rank;
  p.channels = static_cast<int>(projections.channels());
  launch(op, projection_kernel<T>, blocks, kTileThreads, 0, stream, p);
  return {keys, bias};
}

// [B, H, N-P, R] in the type of sums.
Tensor make_coefficients(const char* op, const Tensor& q, const Tensor& k, const Tensor& down,
                         const Projections& projections, const Candidates& candidates,
                         const ConnectivityShape& s, double scale, cudaStream_t stream) {
  const Tensor result = empty_on(q, {s.batch, s.num_heads, s.num_queries, s.rank}, wide_type(q));
  if (result.numel() == 0) return result;
  dispatch(dtype_slot(op, "q", q), [&](auto zero) {
    using T = decltype(zero);
    const Keys made = make_keys<T>(op, k, down, projections, candidates, s, scale, stream);
    CoefficientArgs<T> a{};
    a.q = data<T>(q);
    for (int d = 0; d < 4; ++d) a.q_strides[d] = q.stride(d);
    a.keys = data<Acc<T>>(made.keys);
    a.bias = made.bias ? data<Acc<T>>(*made.bias) : nullptr;
    a.out = mutable_data<Acc<T>>(result);
    a.heads = static_cast<int>(s.num_heads);
    a.queries = static_cast<int>(s.num_queries);
    a.rank = static_cast<int>(s.rank);
    a.dim = static_cast<int>(q.size(3));
    launch(op, coefficients_kernel<T>,
           s.batch * s.num_heads * TilePlace::tiles(s.num_queries, kTileQueries), kTileThreads, 0,
           stream, a);
  });
  return result;
}

// [R, n], and a column of zeros where columns may be n.
Tensor make_basis(const char* op, const Tensor& up, const std::optional<Tensor>& columns,
                  std::optional<double> basis_threshold, cudaStream_t stream) {
  if (!columns && !basis_threshold) return torch::stable::transpose(up, 0, 1);
  const int64_t rank = up.size(1), width = up.size(0) + (columns ? 1 : 0);
  const Tensor basis = empty_on(up, {rank, width}, up.scalar_type());
  dispatch(dtype_slot(op, "up", up), [&](auto zero) {
    using T = decltype(zero);
    BasisArgs<T> a{};
    a.up = data<T>(up);
    a.up_token = up.stride(0);
    a.up_rank = up.stride(1);
    a.num_up = up.size(0);
    a.basis = mutable_data<T>(basis);
    a.columns = width;
    a.rank = static_cast<int>(rank);
    a.magnitudes = basis_threshold.has_value();
    a.least = static_cast<Acc<T>>(basis_threshold.value_or(0.0));
    launch(op, basis_kernel<T>, ceil_div(rank, kTileDepth) * ceil_div(width, kTileRows),
           kTileThreads, 0, stream, a);
  });
  return basis;
}

// ---- entry points -------------------------------------------------------------------------------

// `coefficients` in the dtype of basis, or in that of sums.
Tensor choose_columns(const char* op, const ConnectivityShape& s, const Tensor& coefficients,
                      const Tensor& basis, const Candidates& candidates,
                      std::optional<double> threshold, cudaStream_t stream) {
  const Tensor index =
      empty_on(basis, {s.batch, s.num_heads, s.num_queries, s.budget}, ScalarType::Int);
  if (index.numel() == 0) return index;
  dispatch(dtype_slot(op, "basis", basis), [&](auto zero) {
    using T = decltype(zero);
    ConnectivityArgs<T> a{};
    a.basis = data<T>(basis);
    a.basis_row = basis.stride(0);
    a.basis_column = basis.stride(1);
    a.basis_columns = basis.size(1);
    a.columns = candidates.column_data();
    a.roles = candidates.role_data();
    a.index = mutable_data<int32_t>(index);
    a.heads = static_cast<int>(s.num_heads);
    a.queries = static_cast<int>(s.num_queries);
    a.rank = static_cast<int>(s.rank);
    a.num_columns = static_cast<int>(s.num_columns);
    a.budget = static_cast<int>(s.budget);
    a.used = static_cast<int>(s.used);
    a.has_threshold = threshold.has_value();
    a.threshold = static_cast<Acc<T>>(threshold.value_or(0.0));
    const auto run = [&](auto zero) {
      using C = decltype(zero);
      const Coefficients<C> c{data<C>(coefficients), coefficients.stride(0), coefficients.stride(1),
                              coefficients.stride(2), coefficients.stride(3)};
      launch_connectivity(op, basis, a, c, s.batch, stream);
    };
    if (coefficients.scalar_type() == basis.scalar_type())
      run(T{});
    else
      run(Acc<T>{});
  });
  return index;
}

Tensor connectivity(const Tensor& coefficients, const Tensor& basis, int64_t budget,
                    std::optional<Tensor> columns, std::optional<Tensor> keep,
                    std::optional<int64_t> coef_topk, std::optional<double> threshold) {
  const char* op = "connectivity";
  check_cuda(op, "coefficients", coefficients);
  const ConnectivityShape s =
      check_connectivity(op, coefficients, basis, budget, columns, keep, coef_topk);
  SPOT_CHECK(s.rank <= INT32_MAX && s.num_heads * s.num_queries <= INT32_MAX, op,
             "coefficients may have at most 2^31 - 1 rows per image, and columns");
  const DeviceGuard guard(coefficients.get_device_index());
  const cudaStream_t stream = current_stream(coefficients);
  const Candidates candidates =
      read_candidates(op, s, columns, basis.size(1), kColumnsOfBasis, keep, stream);
  return choose_columns(op, s, coefficients, basis, candidates, threshold, stream);
}

Tensor predict_connectivity(const Tensor& q, const Tensor& k, const Tensor& down,
                            std::optional<Tensor> query_weight, std::optional<Tensor> query_bias,
                            std::optional<Tensor> key_weight, std::optional<Tensor> key_bias,
                            const Tensor& up, int64_t budget, std::optional<Tensor> columns,
                            std::optional<Tensor> keep, std::optional<double> scale,
                            std::optional<int64_t> coef_topk, std::optional<double> basis_threshold,
                            std::optional<double> threshold) {
  const char* op = "predict_connectivity";
  check_cuda(op, "q", q);
  const Projections projections{query_weight, query_bias, key_weight, key_bias};
  const ConnectivityShape s =
      check_predict_connectivity(op, q, k, down, projections, up, budget, columns, keep, coef_topk);
  SPOT_CHECK(s.num_heads * s.num_queries <= INT32_MAX, op,
             "q may have at most 2^31 - 1 rows per image");
  constexpr int64_t kMost = INT32_MAX / 2;  // so that the end of a tile is still an int
  SPOT_CHECK(s.rank <= kMost && q.size(3) <= kMost && projections.channels() <= kMost, op,
             "the head dim, channels and columns of down may be at most 2^30 - 1");
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  const Candidates candidates =
      read_candidates(op, s, columns, up.size(0) + 1, kRowsOfUp, keep, stream);
  const Tensor coefficients = make_coefficients(op, q, k, down, projections, candidates, s,
                                                logit_scale(q, projections, scale), stream);
  const Tensor basis = make_basis(op, up, columns, basis_threshold, stream);
  return choose_columns(op, s, coefficients, basis, candidates, threshold, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m) {
  m.impl("connectivity", TORCH_BOX(&connectivity));
  m.impl("predict_connectivity", TORCH_BOX(&predict_connectivity));
}

}  // namespace spot
