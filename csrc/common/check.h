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

// Every tensor argument passes here: kernels read what shape and strides say, and memory that was
// freed (`untyped_storage().resize_(0)`), cut short or never there (fake tensors) ends in an error.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  if (is_empty(t) || !(t.is_cpu() || t.is_cuda())) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const int64_t item = static_cast<int64_t>(t.element_size());
  const int64_t needed = (last + 1) * item, found = storage_bytes(t);
  SPOT_CHECK(found >= needed, op, name, " of shape ", shape_of(t), " needs ", needed,
             " bytes of memory, but its storage has ", found,
             "; it was freed or resized while the tensor was still in use");
  const auto data = reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
  SPOT_CHECK(data != static_cast<std::uintptr_t>(t.storage_offset() * item), op, name, " of shape ",
             shape_of(t), " has no memory, as fake tensors have none");
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  SPOT_CHECK(t.dim() == rank, op, name, " must have ", rank, " dimensions, got shape ",
             shape_of(t));
  check_memory(op, name, t);
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
