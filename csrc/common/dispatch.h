// Runtime dtype -> kernel slot. CPU kernel tables and CUDA launchers are indexed by Dtype.
#pragma once

#include "check.h"

namespace spot {

enum Dtype : int { kFloat32 = 0, kFloat64, kFloat16, kBFloat16, kNumDtypes };

inline Dtype dtype_slot(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: break;
  }
  fail(op, name, " must be float32, float64, float16 or bfloat16, got ",
       dtype_name(t.scalar_type()));
}

// Of sums and statistics: float32 for all dtypes but float64.
inline ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace spot
