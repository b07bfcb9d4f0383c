// The one file that names a CUDA shim of torch. These symbols live in libtorch_cuda only.
#pragma once

#include "../common/dispatch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace spot {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// The stream torch is using on the tensor's device; works during graph capture.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// SPOT_CHECK=1 in the environment asks for synchronising checks of CUDA index tensors. Read once.
inline bool checks_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("SPOT_CHECK");
    return value != nullptr && std::strcmp(value, "0") != 0 && *value != '\0';
  }();
  return wanted;
}

inline void check_cuda(const char* op, const char* name, const Tensor& t) {
  SPOT_CHECK(t.is_cuda(), op, name, " must be on a CUDA device");
}

// f(zero of the kernels' type for the dtype).
template <typename F>
auto dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kFloat16: return f(__half{});
    default: return f(__nv_bfloat16{});
  }
}

// f(std::true_type) or f(std::false_type).
template <typename F>
void dispatch(bool flag, F&& f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline int64_t grid_for(int64_t items, int64_t per_block) {
  return std::min<int64_t>(ceil_div(items, per_block), INT32_MAX);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int device_attribute(const Tensor& t, cudaDeviceAttr attribute) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, t.get_device_index()));
  return value;
}

// Bytes of shared memory a block may ask for.
inline size_t max_shared(const Tensor& t) {
  return static_cast<size_t>(device_attribute(t, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Starts `blocks` blocks with `shared` bytes of dynamic shared memory each; none is fine.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  SPOT_CHECK(blocks <= INT32_MAX, op, "the arguments need ", blocks,
             " blocks; a grid has 2^31 - 1");
  if (shared > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream>>>(
      arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline Tensor copy_to_host(const Tensor& t) {
  return torch::stable::contiguous(
      torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

}  // namespace spot
