// The kernel table of each instruction set, and the one in use.
#pragma once

#include "args.h"

namespace spot {

constexpr int64_t kChoiceRows = 64;  // queries of a block of connectivity

// What a row kernel saw of the index: a bad entry, or positions that do not ascend strictly (and so
// may repeat).
enum RowStatus : int { kRowsFine = 0, kRowsUnsorted = 1, kRowsBad = 2 };

// Slots are indexed by Dtype (common/dispatch.h): float32, float64, float16, bfloat16.
struct KernelTable {
  // Images [begin, end).
  void (*select[4])(const SelectArgs&, int64_t begin, int64_t end);
  // Output rows [begin, end) of all images, counted together.
  RowStatus (*compact_rows)(const RowArgs&, int64_t begin, int64_t end);
  RowStatus (*scatter_rows)(const RowArgs&, int64_t begin, int64_t end);
  // Images [begin, end); false when an index is out of range or repeated.
  bool (*fuse[4])(const FuseArgs&, int64_t begin, int64_t end);
  bool (*fuse_backward[4])(const FuseArgs&, int64_t begin, int64_t end);
  // Spans, then columns of heads, [begin, end) of all images.
  void (*attention_stats[4])(const AttentionArgs&, int64_t begin, int64_t end);
  void (*attention_stats_columns[4])(const AttentionArgs&, int64_t begin, int64_t end);
  // Heads [begin, end) of all images; with one_bias heads of all images at once.
  void (*attention_stats_backward[4])(const AttentionGradArgs&, int64_t begin, int64_t end);
  // Spans, then columns, then (backward) heads [begin, end) of all images; false when the index is
  // bad.
  bool (*sparse_attention[4])(const SparseArgs&, int64_t begin, int64_t end);
  void (*sparse_attention_columns[4])(const SparseArgs&, int64_t begin, int64_t end);
  bool (*sparse_attention_backward[4])(const SparseGradArgs&, int64_t begin, int64_t end);
  // Blocks of rows [begin, end) of all heads of all images.
  void (*connectivity[4])(const ConnectivityArgs&, int64_t begin, int64_t end);
  // Panels [begin, end); of all blocks of rows, counted together.
  void (*pack_linear[4])(const PackLinearArgs&, int64_t begin, int64_t end);
  void (*packed_linear[4])(const PackedLinearArgs&, int64_t begin, int64_t end);
  // Rows [begin, end) of all images; false when a position is out of range.
  bool (*token_evidence[4])(const EvidenceArgs&, int64_t begin, int64_t end);
  // Spans [begin, end) of all images.
  void (*normalize[4])(const NormArgs&, int64_t begin, int64_t end);
  void (*normalize_backward[4])(const NormArgs&, int64_t begin, int64_t end);
  void (*remap[4])(const RemapArgs&, int64_t begin, int64_t end);
  void (*remap_backward[4])(const RemapArgs&, int64_t begin, int64_t end);
  void (*hidden[4])(const HiddenArgs&, int64_t begin, int64_t end);
  void (*hidden_backward[4])(const HiddenArgs&, int64_t begin, int64_t end);
  void (*score[4])(const ScoreArgs&, int64_t begin, int64_t end);
  void (*score_backward[4])(const ScoreArgs&, int64_t begin, int64_t end);
  // Groups [begin, end).
  void (*sum_parts[4])(const SumArgs&, int64_t begin, int64_t end);
};

// Throws where SPOT_ISA asks for what this processor lacks; not to be called in a parallel body.
const KernelTable& kernels();

}  // namespace spot

// For spot_ext._C, which knows no torch. Names are "baseline", "avx2", "avx512", "avx512_bf16".
extern "C" {
// "none" where SPOT_ISA asks for what is not there.
__attribute__((visibility("default"))) const char* spot_isa();
// False when the name is unknown or the processor lacks the instructions.
__attribute__((visibility("default"))) bool spot_set_isa(const char* name);
// Comma-separated names of what was built; and of what this processor can run.
__attribute__((visibility("default"))) const char* spot_isas_built();
__attribute__((visibility("default"))) const char* spot_isas_usable();
}
