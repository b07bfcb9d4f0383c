// Argument checks. A failed one throws std::invalid_argument (a ValueError in Python on most torch
// versions) that names the op, the argument, what was expected and what came.
#pragma once

#include "stable.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace spot {

template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream text;
  text << "spot::" << op << ": ";
  (text << ... << args);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// As Python spells it, where kernels may meet it.
inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

#define SPOT_CHECK(cond, op, ...)               \
  do {                                          \
    if (!(cond)) ::spot::fail(op, __VA_ARGS__); \
  } while (0)

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  SPOT_CHECK(t.dim() == rank, op, name, " must have ", rank, " dimensions, got shape ",
             shape_of(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  SPOT_CHECK(t.scalar_type() == dtype, op, name, " must be ", dtype_name(dtype), ", got ",
             dtype_name(t.scalar_type()));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim,
                       int64_t expected, const char* meaning) {
  SPOT_CHECK(t.size(dim) == expected, op, name, " must have size ", expected, " (", meaning,
             ") in dimension ", dim, ", got shape ", shape_of(t));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const char* like_name, const Tensor& like) {
  const bool same = t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
                    t.get_device_index() == like.get_device_index();
  SPOT_CHECK(same, op, name, " must be on the device of ", like_name);
}

}  // namespace spot
