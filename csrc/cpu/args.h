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

struct SparseArgs {
  AttentionArgs attention;  // without a bias
  const int32_t* index;     // [B, H, N-P, K], dense
  int64_t num_named;        // K
};

struct SparseGradArgs {
  SparseArgs forward;
  HeadRows grad_out;
  const void* grad_stats;  // [B, N, H, 6], dense, or null
  void *q, *k, *v;         // [B, N, H, D], dense
  void* keep;              // [B, H, N-P] float32 or float64, to be summed over heads; or null
};

struct ConnectivityArgs {
  const void* coefficients;  // [B, H, Q, R], any strides; or null, to make them, up to `scale`
  int64_t coefficients_strides[4];
  HeadRows q, k;     // [B, Q, H, D], [B, N, H, D]
  const void* down;  // [columns, R], any strides
  int64_t down_row, down_rank;
  const void *query_weight, *query_bias, *key_weight, *key_bias;  // [c, D], [c], dense
  bool projected;  // whether those are there; of none of the channels they are null
  int64_t head_dim, channels;
  bool projects_first;  // before keys are added up, rather than behind it
  double scale;
  const void* basis;  // [R, n], any strides
  int64_t basis_row, basis_column;
  bool magnitudes;  // the basis is |basis| where that exceeds the next, else 0
  double basis_threshold;
  int64_t num_places;      // n; a column n is one of zeros
  const int64_t* columns;  // [B, N], dense, in range; or null
  const uint8_t* keep;     // [B, Q], dense, or null
  int64_t num_heads, num_queries, rank, num_columns, budget, used;
  bool has_threshold;
  double threshold;
  int32_t* index;  // [B, H, Q, budget]
};

// Tokens of an image are cut into spans by shape alone, so that sums over tokens, which are made of
// sums over spans, do not depend on threads. Work items are the spans of all images.
struct Spans {
  int64_t num_tokens, rows, count;  // N, tokens per span, spans per image
};

// Below, T is the dtype of the tokens and A that of sums: float32, or float64 for float64. What is
// not a pointer to [B, N, D] tokens is dense. Sums are [B, spans, ...] of A.

struct NormArgs {
  Spans spans;
  const void* tokens;  // [B, N, D], last dimension dense
  int64_t tokens_batch, tokens_row;
  const void *weight, *bias;  // [D]
  int64_t channels;
  double eps;
  void* out;          // [B, N, D]
  const void* grad;   // [B, N, D], of `out` (backward)
  void* tokens_grad;  // [B, N, D] or null (backward)
  void* sums;         // [B, spans, 2, D] (backward): gradients of weight and bias
};

struct RemapArgs {
  Spans spans;
  const void* remapped;  // [B, N, 2 half], before the bias
  const void* bias;      // [2 half]
  const void* keep;      // [B, N] of A, or null
  int64_t half;
  void* local;              // [B, N, half]: GELU of the first half
  void* sums;               // [B, spans, half] of GELU of the second; backward: [B, spans, 2 half]
  const void* mass;         // [B] of A, kept tokens (backward)
  const void* shared;       // [B, half] (backward)
  const void* local_grad;   // [B, N, half] (backward)
  const void* shared_grad;  // [B, half] (backward)
  void* remapped_grad;      // [B, N, 2 half] (backward)
  void* keep_grad;          // [B, N] of A, or null (backward)
};

struct HiddenArgs {
  Spans spans;
  const void* hidden;  // [B, N, H], before `once` and the bias
  const void* once;    // [B, H], or null
  const void* bias;    // [H]
  int64_t width;
  void* active;  // [B, N, H]: GELU of their sum; backward: or null
  void* grad;    // [B, N, H] (backward): of `active` before, of `hidden` after
  void* sums;    // [B, spans, H] (backward): of the latter
};

struct ScoreArgs {
  Spans spans;
  const void* hidden;  // [B, N, H], before its bias
  const void* bias;    // [H]
  int64_t width;
  const void *weight, *weight_bias;  // [2, H], [2]
  void* logits;                      // [B, N, 2] of A; in the backward pass its input
  const void* grad;                  // [B, N, 2] of A (backward)
  void* hidden_grad;                 // [B, N, H] (backward)
  void* sums;  // [B, spans, 3 H + 2] (backward): gradients of bias, weight and weight_bias
};

// out[g] = sum over p of parts[g, p], in order; with `mass` divided by max(mass[g], 1).
struct SumArgs {
  const void* parts;  // [groups, count, columns] of A, group by group `stride` apart
  int64_t count, columns, row, stride;
  const void* mass;  // [groups] of A, or null
  void* out;         // [groups, columns], of A if `wide`
  bool wide;
};

constexpr int64_t kPanel = 32;  // outputs of a panel of packed weights, for any instruction set

struct PackLinearArgs {
  const void* weight;  // [out, in], any strides
  int64_t weight_row, weight_column;
  int64_t in_features, out_features;
  void* out;  // [panels, in, kPanel], dense
};

enum Activation : int { kNoActivation = 0, kGelu, kGeluTanh };

struct PackedLinearArgs {
  const void* input;  // [rows, in], last dimension dense
  int64_t input_row;
  const void* packed;    // [panels, in, kPanel], dense
  const void* bias;      // [out], dense, or null
  const void* residual;  // [rows, out], last dimension dense; or null
  int64_t residual_row;
  int64_t rows, in_features, out_features;
  int64_t block_rows;  // most rows of a block; work items are the panels of all blocks
  Activation activation;
  void* out;  // [rows, out], dense
};

enum EvidenceScaling : int { kRawScaling = 0, kScaleByCount, kLogScaling };

// What attention_stats said of a block: its patch tokens [B, count, H, 6], last two dense.
struct EvidenceBlock {
  const void* stats;
  int64_t batch, token;  // strides in elements
  int64_t count;
  int64_t followed;  // cuts before the block
};

struct EvidenceCut {
  const int64_t* index;  // [B, kept], any strides
  int64_t batch, token;
  int64_t chosen;  // positions are below
};

struct EvidenceArgs {
  const EvidenceBlock* blocks;  // oldest first
  int64_t num_blocks;
  const EvidenceCut* cuts;
  int64_t num_cuts;
  int64_t num_tokens, num_heads;  // of the result; of the statistics
  EvidenceScaling scaling;
  bool mean_heads, moments;
  int64_t first, last;  // columns of the newest block
  void* out;            // [B, num_tokens, F], dense
};

}  // namespace spot
