// Plain arguments of the CPU kernels: pointers, sizes and strides only. Strides are in bytes for
// row copies and in elements for arithmetic kernels.
#pragma once

#include <cstdint>

namespace spot {

struct SelectArgs {
  const void* scores;  // [B, N], any strides
  int64_t batch_stride, stride;
  int64_t num_tokens, num_keep;
  int64_t* index;  // [B, num_keep]
};

// Moves rows between the full layout [P | N] and the compacted layout [P | E | M].
struct RowArgs {
  const char* source;
  int64_t source_batch, source_row;
  const char* second;  // extra rows (compact) or background rows (scatter); may be null
  int64_t second_batch, second_row;
  const int64_t* index;  // [B, M], dense
  char* out;             // dense rows
  int64_t row_bytes;
  int64_t num_tokens, num_prefix, num_extra, num_kept;
};

struct FuseArgs {
  const void* tokens;  // [B, P+N, C], last dimension dense
  int64_t tokens_batch, tokens_row;
  const void* weights;   // [B, N], dense
  const int64_t* index;  // [B, M], dense
  const void* grad;      // [B, C], dense (backward)
  void* out;             // [B, C], or the gradient of tokens [B, P+N, C]
  void* weights_grad;    // [B, N] (backward)
  int64_t num_tokens, num_prefix, num_kept, channels;
  bool normalize;
};

}  // namespace spot
