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

// A [B, N, H, D] operand, any strides.
struct HeadRows {
  const void* data;
  int64_t batch, token, head, dim;  // strides in elements
};

struct AttentionArgs {
  HeadRows q, k, v;
  const void* bias;  // [1|B, H, N, N] or null, of dtype slot bias_dtype
  int bias_dtype;
  int64_t bias_strides[4];  // 0 over a batch of one
  // Tokens of an image in the order [prefix | kept patches | dropped patches], and how many are
  // kept: one list for all images when nothing can be dropped.
  const int32_t* order;
  const int32_t* kept;
  bool one_order;
  int64_t batch, num_tokens, num_heads, head_dim, num_prefix;
  bool class_token, need_stats;
  double scale;
  void* out;    // [B, N, H, D], dense
  void* stats;  // [B, N, H, 6], dense; the result, or in the backward pass its input
  void* lse;    // [B, N, H], dense; likewise
  // Forward: queries of a head are cut into spans of span_rows. With several, column sums of each
  // go to column_sums [B, H, num_spans, 2, N], to be combined.
  int64_t num_spans, span_rows;
  void* column_sums;
};

struct AttentionGradArgs {
  AttentionArgs forward;
  HeadRows grad_out;
  const void* grad_stats;  // [B, N, H, 6], dense, or null
  void *q, *k, *v;         // [B, N, H, D], dense
  void* keep;              // [B, H, N-P] float32 or float64, to be summed over heads; or null
  void* bias;              // [1|B, H, N, N] as keep, dense; or null
  bool one_bias;           // the bias gradient sums over the batch
};

}  // namespace spot
