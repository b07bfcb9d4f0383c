// torch's own matrix products, on the device and stream of their operands. Operands may be views of
// any strides; nothing is copied that BLAS can read in place.
#pragma once

#include "check.h"

#include <array>

namespace spot {

// aten::mm(Tensor self, Tensor mat2) -> Tensor
inline Tensor product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  // Autocast, where nothing has switched it off, would change the dtype.
  SPOT_CHECK(result.scalar_type() == a.scalar_type(), "mm", "expected ",
             dtype_name(a.scalar_type()), ", got ", dtype_name(result.scalar_type()));
  return result;
}

// aten::mm.out(Tensor self, Tensor mat2, *, Tensor(a!) out) -> Tensor(a!)
inline void product_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // a second handle of `out`, to be freed
}

// out = a b + c d, the second product added in place. (The stable dispatcher cannot pass the
// scalars of aten::addmm.)
inline void products_into(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& c,
                          const Tensor& d) {
  TORCH_ERROR_CODE_CHECK(aoti_torch__mm_plus_mm_out(out.get(), a.get(), b.get(), c.get(), d.get()));
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline Tensor columns(Tensor matrix, int64_t start, int64_t count) {
  return torch::stable::narrow(matrix, 1, start, count);
}

}  // namespace spot
