// Warp and block primitives shared by the kernels. Deterministic: fixed trees, no float atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace spot {

constexpr int kWarp = 32;

// Sums run in float32, and in float64 for float64.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T store(Acc<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(x);
  else
    return x;
}

template <typename T>
__device__ inline T not_a_number() {
  return store<T>(static_cast<Acc<T>>(__int_as_float(0x7fc00000)));
}

template <typename A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sum over the block, given to every thread. `partial` holds one value per warp (at most 32).
template <typename A>
__device__ inline A block_sum(A x, A* partial) {
  x = warp_sum(x);
  __syncthreads();  // partial may still be read from an earlier call
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  x = static_cast<int>(threadIdx.x % kWarp) < warps ? partial[threadIdx.x % kWarp] : A(0);
  return warp_sum(x);
}

// Largest value of the block, given to every thread; as block_sum.
__device__ inline int block_max(int x, int* partial) {
  x = __reduce_max_sync(0xffffffffu, x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  return __reduce_max_sync(0xffffffffu, partial[static_cast<int>(threadIdx.x) % kWarp % warps]);
}

// Sum of `x` over this and all lower threads of the block.
__device__ inline int block_scan(int x, int* partial) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, x, step);
    x += lane >= step ? below : 0;
  }
  __syncthreads();
  if (lane == kWarp - 1) partial[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += partial[w];
  return x;
}

// Number of `flag`s in lower threads of the block; `total` gets the number in the whole block.
__device__ inline int block_rank(bool flag, int* partial, int& total) {
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
  if (lane == 0) partial[warp] = __popc(votes);
  __syncthreads();
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  int before = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? partial[w] : 0;
    total += partial[w];
  }
  return before + __popc(votes & ((1u << lane) - 1u));
}

}  // namespace spot
