// From tensors to the arguments of the attention kernels, for their CPU entry points.
#pragma once

#include "../common/attention_stats.h"

#include "args.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace spot {

// The order in which kernels see the tokens of each image (AttentionArgs::order).
struct TokenOrder {
  std::vector<int32_t> order, kept;
  bool one;
};

// read(i): element i of keep [B, N-P].
template <typename Read>
void sort_tokens(const char* op, const AttentionShape& s, const Tensor& keep, Read&& read,
                 TokenOrder& result) {
  std::vector<int32_t> dropped;
  for (int64_t b = 0; b < s.batch; ++b) {
    const std::size_t start = result.order.size();
    dropped.clear();
    for (int64_t t = 0; t < s.num_prefix; ++t) result.order.push_back(static_cast<int32_t>(t));
    for (int64_t i = 0; i < s.num_patches(); ++i) {
      const double value = read(b * keep.stride(0) + i * keep.stride(1));
      SPOT_CHECK(value == 0 || value == 1, op, "keep must be exactly 0 or 1, got ", value,
                 " at keep[", b, ", ", i, "]");
      (value == 1 ? result.order : dropped).push_back(static_cast<int32_t>(s.num_prefix + i));
    }
    result.kept.push_back(
        static_cast<int32_t>(static_cast<int64_t>(result.order.size() - start) - s.num_prefix));
    result.order.insert(result.order.end(), dropped.begin(), dropped.end());
  }
}

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

inline TokenOrder order_tokens(const char* op, const AttentionShape& s,
                               const std::optional<Tensor>& keep) {
  TokenOrder result;
  result.one = !keep;
  if (!keep) {
    for (int64_t t = 0; t < s.num_tokens; ++t) result.order.push_back(static_cast<int32_t>(t));
    result.kept.push_back(static_cast<int32_t>(s.num_patches()));
    return result;
  }
  result.order.reserve(static_cast<std::size_t>(s.batch * s.num_tokens));
  const void* data = keep->const_data_ptr();
  switch (dtype_slot(op, "keep", *keep)) {
    case kFloat32:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return static_cast<const float*>(data)[i]; }, result);
      break;
    case kFloat64:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return static_cast<const double*>(data)[i]; }, result);
      break;
    case kFloat16:
      sort_tokens(
          op, s, *keep, [=](int64_t i) { return from_half(static_cast<const uint16_t*>(data)[i]); },
          result);
      break;
    default:
      sort_tokens(
          op, s, *keep,
          [=](int64_t i) { return from_bfloat16(static_cast<const uint16_t*>(data)[i]); }, result);
  }
  return result;
}

inline HeadRows head_rows(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline AttentionArgs attention_args(const char* op, const AttentionShape& s,
                                    const TokenOrder& order, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const std::optional<Tensor>& bias) {
  AttentionArgs args{};
  args.q = head_rows(q);
  args.k = head_rows(k);
  args.v = head_rows(v);
  if (bias) {
    args.bias = bias->const_data_ptr();
    args.bias_dtype = dtype_slot(op, "bias", *bias);
    for (int d = 0; d < 4; ++d) args.bias_strides[d] = bias->stride(d);
    if (bias->size(0) == 1) args.bias_strides[0] = 0;
  }
  args.order = order.order.data();
  args.kept = order.kept.data();
  args.one_order = order.one;
  args.batch = s.batch;
  args.num_tokens = s.num_tokens;
  args.num_heads = s.num_heads;
  args.head_dim = s.head_dim;
  args.num_prefix = s.num_prefix;
  args.class_token = s.class_token;
  args.scale = s.scale;
  return args;
}

// Into how many spans the queries of each head are cut: more than one only where there are few
// heads, since each packs the keys again. By shape alone, so that threads do not change the result.
inline int64_t spans(int64_t heads, int64_t num_tokens) {
  constexpr int64_t kEnough = 16, kLeastRows = 96;
  return std::max<int64_t>(
      1, std::min<int64_t>((kEnough + heads - 1) / heads, num_tokens / kLeastRows));
}

// [B, H, N-P] -> [B, N-P], heads in order.
template <typename A>
void sum_heads(const AttentionShape& s, const A* parts, A* sums) {
  const int64_t patches = s.num_patches();
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < patches; ++i) {
      A sum = 0;
      for (int64_t h = 0; h < s.num_heads; ++h) sum += parts[(b * s.num_heads + h) * patches + i];
      sums[b * patches + i] = sum;
    }
}
inline void sum_heads(const AttentionShape& s, const Tensor& parts, Tensor& sums) {
  if (parts.scalar_type() == ScalarType::Float)
    sum_heads(s, static_cast<const float*>(parts.const_data_ptr()),
              static_cast<float*>(sums.mutable_data_ptr()));
  else
    sum_heads(s, static_cast<const double*>(parts.const_data_ptr()),
              static_cast<double*>(sums.mutable_data_ptr()));
}

}  // namespace spot
