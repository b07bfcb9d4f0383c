// Training masks, read on the CPU.
#pragma once

#include "../../common/dispatch.h"

#include <cmath>
#include <cstring>

namespace spot {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
inline double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// read(i): element i of keep [B, N].
template <typename Read>
std::vector<uint8_t> read_keep(const char* op, const Tensor& keep, Read&& read) {
  std::vector<uint8_t> result;
  result.reserve(static_cast<std::size_t>(keep.size(0) * keep.size(1)));
  for (int64_t b = 0; b < keep.size(0); ++b)
    for (int64_t i = 0; i < keep.size(1); ++i) {
      const double value = read(b * keep.stride(0) + i * keep.stride(1));
      SPOT_CHECK(value == 0 || value == 1, op, "keep must be exactly 0 or 1, got ", value,
                 " at keep[", b, ", ", i, "]");
      result.push_back(value == 1);
    }
  return result;
}

inline std::vector<uint8_t> read_keep(const char* op, const Tensor& keep) {
  const void* data = readable(keep);
  const auto half = [=](int64_t i) { return static_cast<const uint16_t*>(data)[i]; };
  switch (dtype_slot(op, "keep", keep)) {
    case kFloat32:
      return read_keep(op, keep, [=](int64_t i) { return static_cast<const float*>(data)[i]; });
    case kFloat64:
      return read_keep(op, keep, [=](int64_t i) { return static_cast<const double*>(data)[i]; });
    case kFloat16: return read_keep(op, keep, [=](int64_t i) { return from_half(half(i)); });
    default: return read_keep(op, keep, [=](int64_t i) { return from_bfloat16(half(i)); });
  }
}

}  // namespace spot
