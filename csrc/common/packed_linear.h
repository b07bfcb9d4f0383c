// Shapes and checks of linear layers with packed weights.
#pragma once

#include "dispatch.h"

#include <string>

namespace spot {

constexpr int64_t kPanelOutputs = 32;

struct LinearShape {
  int64_t rows, in_features, out_features;
};

inline int64_t count_panels(int64_t out_features) {
  return out_features / kPanelOutputs + (out_features % kPanelOutputs != 0);
}

inline void check_pack_linear(const char* op, const Tensor& weight) {
  check_rank(op, "weight", weight, 2);
  dtype_slot(op, "weight", weight);
}

inline LinearShape check_packed_linear(const char* op, const Tensor& input, const Tensor& packed,
                                       int64_t out_features, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& residual) {
  SPOT_CHECK(input.dim() >= 1, op, "input must have at least 1 dimension, got shape ",
             shape_of(input));
  check_memory(op, "input", input);
  dtype_slot(op, "input", input);
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_dtype(op, name, t, input.scalar_type());
    check_same_device(op, name, t, "input", input);
  };
  check_rank(op, "packed", packed, 3);
  check_like("packed", packed);
  const int64_t last = input.dim() - 1;
  check_size(op, "packed", packed, 1, input.size(last), "the features of input");
  check_size(op, "packed", packed, 2, kPanelOutputs, "the outputs of a panel");
  const int64_t panels = packed.size(0);
  SPOT_CHECK(panels <= INT64_MAX / kPanelOutputs, op, "packed has too many panels: ", panels);
  const int64_t most = panels * kPanelOutputs, least = panels ? most - kPanelOutputs + 1 : 0;
  SPOT_CHECK(out_features >= least && out_features <= most, op, "out_features must be between ",
             least, " and ", most, " (as packed has panels), got ", out_features);
  if (bias) {
    check_rank(op, "bias", *bias, 1);
    check_like("bias", *bias);
    check_size(op, "bias", *bias, 0, out_features, "out_features");
  }
  int64_t rows = 1;  // without a row, sizes of the others may be too large to multiply
  for (int64_t d = 0; d < last; ++d)
    if (input.size(d) == 0) rows = 0;
  for (int64_t d = 0; rows > 0 && d < last; ++d) rows *= input.size(d);
  if (residual) {
    check_rank(op, "residual", *residual, input.dim());
    check_like("residual", *residual);
    for (int64_t d = 0; d < last; ++d)
      check_size(op, "residual", *residual, d, input.size(d), "as input has");
    check_size(op, "residual", *residual, last, out_features, "out_features");
  }
  return {rows, input.size(last), out_features};
}

}  // namespace spot
