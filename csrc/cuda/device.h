// The one file that names a CUDA shim of torch. These symbols live in libtorch_cuda only.
#pragma once

#include "../common/check.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <cstring>

namespace spot {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// The stream torch is using on the tensor's device; works during graph capture.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

#define SPOT_LAUNCH_CHECK() STD_CUDA_KERNEL_LAUNCH_CHECK()

// SPOT_CHECK=1 in the environment asks for synchronising checks of CUDA index tensors. Read once.
inline bool checks_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("SPOT_CHECK");
    return value != nullptr && std::strcmp(value, "0") != 0 && *value != '\0';
  }();
  return wanted;
}

inline Tensor copy_to_host(const Tensor& t) {
  return torch::stable::contiguous(
      torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

}  // namespace spot
