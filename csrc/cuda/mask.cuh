// Masks over tokens, read once per call: what each token is to the kernels.
#pragma once

#include "block.cuh"
#include "device.h"

namespace spot {

enum Role : uint8_t { kDropped = 0, kPatch = 1, kPrefix = 2 };

constexpr int kRolesThreads = 256;

// One block per image: roles [B, N] and the number of kept patch tokens; first_bad[b] is the first
// position whose value is neither 0 nor 1, or the number of positions.
template <typename M>
__global__ void __launch_bounds__(kRolesThreads)
    roles_kernel(const M* keep, int64_t batch_stride, int64_t stride, int tokens, int prefix,
                 uint8_t* roles, int32_t* counts, int32_t* first_bad) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  int* partial = reinterpret_cast<int*>(shared_memory);  // [32]
  keep += blockIdx.x * batch_stride;
  roles += blockIdx.x * static_cast<int64_t>(tokens);
  int count = 0, bad = tokens - prefix;
  for (int i = static_cast<int>(threadIdx.x); i < tokens; i += static_cast<int>(blockDim.x)) {
    if (i < prefix) {
      roles[i] = kPrefix;
      continue;
    }
    const Acc<M> value = load(keep[(i - prefix) * stride]);
    const bool kept = value > Acc<M>(0.5);
    if (value != Acc<M>(0) && value != Acc<M>(1)) bad = min(bad, i - prefix);
    roles[i] = kept ? kPatch : kDropped;
    count += kept ? 1 : 0;
  }
  count = block_sum(count, partial);
  bad = -block_max(-bad, partial);
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = count;
    first_bad[blockIdx.x] = bad;
  }
}

// Roles of the tokens and numbers of kept ones; empty without a mask.
struct Mask {
  std::optional<Tensor> roles, counts;
};

// keep [B, tokens - prefix].
inline Mask read_mask(const char* op, const std::optional<Tensor>& keep, int64_t tokens,
                      int64_t prefix, cudaStream_t stream) {
  if (!keep || keep->size(0) == 0) return {};
  const int64_t batch = keep->size(0);
  const Tensor roles = empty_on(*keep, {batch, tokens}, ScalarType::Byte);
  const Tensor counts = empty_on(*keep, {2, batch}, ScalarType::Int);
  int32_t* const numbers = mutable_data<int32_t>(counts);
  dispatch(dtype_slot(op, "keep", *keep), [&](auto zero) {
    using M = decltype(zero);
    launch(op, roles_kernel<M>, batch, kRolesThreads, kWarp * sizeof(int), stream, data<M>(*keep),
           keep->stride(0), keep->stride(1), static_cast<int>(tokens), static_cast<int>(prefix),
           mutable_data<uint8_t>(roles), numbers, numbers + batch);
  });
  if (checks_wanted()) {
    const Tensor host = copy_to_host(counts);
    const int32_t* first_bad = data<int32_t>(host) + batch;
    for (int64_t b = 0; b < batch; ++b)
      SPOT_CHECK(first_bad[b] >= tokens - prefix, op, "keep must be exactly 0 or 1, but keep[", b,
                 ", ", first_bad[b], "] is not");
  }
  return {roles, counts};
}

}  // namespace spot
