// The one seam to torch: the only header that includes torch for CPU and CUDA code alike.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace spot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised contiguous tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Whether no element is there, and so nothing to compute.
inline bool is_empty(const Tensor& t) { return t.numel() == 0; }

// Where elements are. Never null, not even of nothing: neither memory functions nor offsets may be
// given that.
inline void* writable(const Tensor& t) {
  alignas(64) static char nothing[64];
  return is_empty(t) ? nothing : t.mutable_data_ptr();
}
inline const void* readable(const Tensor& t) {
  alignas(64) static const char nothing[64] = {};
  return is_empty(t) ? nothing : t.const_data_ptr();
}

// Bytes of the storage that `t` is a view of.
inline int64_t storage_bytes(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// `t` itself when its dimensions from 2 on are dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return dense(t);
    expected *= t.size(d);
  }
  return t;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace spot
