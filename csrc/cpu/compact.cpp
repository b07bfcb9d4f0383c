// CPU entry points of the compact slice: check, allocate, run the kernels in parallel.
#include "../common/compact.h"

#include "../common/dispatch.h"
#include "isa.h"

#include <algorithm>
#include <atomic>

namespace spot {
namespace {

using torch::stable::parallel_for;

void check_cpu(const char* op, const char* name, const Tensor& t) {
  SPOT_CHECK(t.is_cpu(), op, name, " must be on the CPU");
}

// Work items per task, so that a task moves or computes about 32 KiB.
int64_t grain(int64_t bytes_per_item) { return std::max<int64_t>(1, 32768 / (bytes_per_item + 1)); }

// Runs a row kernel over all output rows. The kernels only notice trouble (an exception must not
// leave a parallel body); the words come from explain_index.
void run_rows(const char* op, RowStatus (*kernel)(const RowArgs&, int64_t, int64_t),
              const RowArgs& args, const Tensor& index, const TokenShape& shape,
              int64_t rows_per_image) {
  std::atomic<int> status{kRowsFine};
  parallel_for(0, shape.batch * rows_per_image, grain(args.row_bytes),
               [&](int64_t begin, int64_t end) {
                 const int seen = kernel(args, begin, end);
                 int worst = status.load();
                 while (seen > worst && !status.compare_exchange_weak(worst, seen)) {
                 }
               });
  if (status != kRowsFine) explain_index(op, index, shape);
}

Tensor select_tokens(const Tensor& scores, int64_t num_keep) {
  const char* op = "select_tokens";
  check_cpu(op, "scores", scores);
  check_select(op, scores, num_keep);
  const Dtype dtype = dtype_slot(op, "scores", scores);
  const int64_t batch = scores.size(0);
  Tensor index = empty_on(scores, {batch, num_keep}, ScalarType::Long);
  if (is_empty(index)) return index;
  const SelectArgs args{readable(scores), scores.stride(0), scores.stride(1),
                        scores.size(1),   num_keep,         static_cast<int64_t*>(writable(index))};
  const KernelTable& table = kernels();
  parallel_for(0, batch, grain(args.num_tokens * 16),
               [&](int64_t begin, int64_t end) { table.select[dtype](args, begin, end); });
  return index;
}

RowArgs row_args(const Rows& source, const std::optional<Rows>& second, const Tensor& index,
                 const Tensor& out, const TokenShape& s) {
  return {source.data(),
          source.batch_stride,
          source.row_stride,
          second ? second->data() : nullptr,
          second ? second->batch_stride : 0,
          second ? second->row_stride : 0,
          static_cast<const int64_t*>(readable(index)),
          static_cast<char*>(writable(out)),
          source.row_bytes,
          s.num_tokens,
          s.num_prefix,
          s.num_extra,
          s.num_kept};
}

Tensor new_rows(const Tensor& like, int64_t rows) {
  std::vector<int64_t> sizes = sizes_of(like);
  sizes[1] = rows;
  return empty_on(like, sizes, like.scalar_type());
}

std::optional<Rows> optional_rows(const std::optional<Tensor>& t) {
  return t ? std::optional<Rows>(rows_of(*t)) : std::nullopt;
}

Tensor compact_tokens(const Tensor& tokens, const Tensor& index, int64_t num_prefix,
                      std::optional<Tensor> extra) {
  const char* op = "compact_tokens";
  check_cpu(op, "tokens", tokens);
  const TokenShape shape = check_compact(op, tokens, index, num_prefix, extra);
  Tensor out = new_rows(tokens, shape.kept_rows());
  if (is_empty(out)) return explain_index(op, index, shape), out;
  const Tensor dense_index = dense(index);
  const Rows source = rows_of(tokens);
  const auto second = optional_rows(extra);
  run_rows(op, kernels().compact_rows, row_args(source, second, dense_index, out, shape),
           dense_index, shape, shape.kept_rows());
  return out;
}

Tensor scatter(const char* op, const char* name, const Tensor& compacted, const Tensor& index,
               int64_t num_tokens, int64_t num_prefix, int64_t num_extra,
               const std::optional<Tensor>& background) {
  check_cpu(op, name, compacted);
  const TokenShape shape =
      check_scatter(op, name, compacted, index, num_tokens, num_prefix, num_extra, background);
  Tensor out = new_rows(compacted, shape.full_rows());
  if (is_empty(out)) return explain_index(op, index, shape), out;
  const Tensor dense_index = dense(index);
  const Rows source = rows_of(compacted);
  const auto second = optional_rows(background);
  run_rows(op, kernels().scatter_rows, row_args(source, second, dense_index, out, shape),
           dense_index, shape, shape.full_rows());
  return out;
}

Tensor compact_tokens_backward(const Tensor& grad, const Tensor& index, int64_t num_tokens,
                               int64_t num_prefix, int64_t num_extra) {
  return scatter("compact_tokens_backward", "grad", grad, index, num_tokens, num_prefix, num_extra,
                 std::nullopt);
}

Tensor scatter_tokens(const Tensor& tokens, const Tensor& index, int64_t num_tokens,
                      int64_t num_prefix, std::optional<Tensor> background) {
  return scatter("scatter_tokens", "tokens", tokens, index, num_tokens, num_prefix, 0, background);
}

void run_images(const char* op, bool (*kernel)(const FuseArgs&, int64_t, int64_t),
                const FuseArgs& args, const Tensor& index, const TokenShape& shape, int64_t item) {
  std::atomic<bool> fine{true};
  parallel_for(0, shape.batch, grain(shape.num_tokens * args.channels * item),
               [&](int64_t begin, int64_t end) {
                 if (!kernel(args, begin, end)) fine = false;
               });
  if (!fine) explain_index(op, index, shape);
}

Tensor fuse_tokens(const Tensor& tokens, const Tensor& weights, const Tensor& index,
                   int64_t num_prefix, bool normalize) {
  const char* op = "fuse_tokens";
  check_cpu(op, "tokens", tokens);
  const Dtype dtype = dtype_slot(op, "tokens", tokens);
  const TokenShape shape = check_fuse(op, tokens, weights, index, num_prefix);
  Tensor out = empty_on(tokens, {shape.batch, tokens.size(2)}, tokens.scalar_type());
  if (is_empty(out)) return explain_index(op, index, shape), out;
  const Tensor rows = dense_rows(tokens);
  const Tensor dense_weights = dense(weights), dense_index = dense(index);
  const FuseArgs args{readable(rows),
                      rows.stride(0),
                      rows.stride(1),
                      readable(dense_weights),
                      static_cast<const int64_t*>(readable(dense_index)),
                      nullptr,
                      writable(out),
                      nullptr,
                      shape.num_tokens,
                      shape.num_prefix,
                      shape.num_kept,
                      tokens.size(2),
                      normalize};
  run_images(op, kernels().fuse[dtype], args, dense_index, shape,
             static_cast<int64_t>(tokens.element_size()));
  return out;
}

std::tuple<Tensor, Tensor> fuse_tokens_backward(const Tensor& grad, const Tensor& tokens,
                                                const Tensor& weights, const Tensor& index,
                                                int64_t num_prefix, bool normalize) {
  const char* op = "fuse_tokens_backward";
  check_cpu(op, "tokens", tokens);
  const Dtype dtype = dtype_slot(op, "tokens", tokens);
  const TokenShape shape = check_fuse(op, tokens, weights, index, num_prefix);
  check_fuse_grad(op, grad, tokens);
  Tensor tokens_grad = empty_on(tokens, sizes_of(tokens), tokens.scalar_type());
  Tensor weights_grad = empty_on(weights, sizes_of(weights), weights.scalar_type());
  if (is_empty(tokens)) {  // no channels, or nothing at all
    explain_index(op, index, shape);
    torch::stable::zero_(weights_grad);
    return {tokens_grad, weights_grad};
  }
  const Tensor rows = dense_rows(tokens);
  const Tensor dense_weights = dense(weights), dense_index = dense(index), dense_grad = dense(grad);
  const FuseArgs args{readable(rows),
                      rows.stride(0),
                      rows.stride(1),
                      readable(dense_weights),
                      static_cast<const int64_t*>(readable(dense_index)),
                      readable(dense_grad),
                      writable(tokens_grad),
                      writable(weights_grad),
                      shape.num_tokens,
                      shape.num_prefix,
                      shape.num_kept,
                      tokens.size(2),
                      normalize};
  run_images(op, kernels().fuse_backward[dtype], args, dense_index, shape,
             2 * static_cast<int64_t>(tokens.element_size()));
  return {tokens_grad, weights_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("compact_tokens", TORCH_BOX(&compact_tokens));
  m.impl("compact_tokens_backward", TORCH_BOX(&compact_tokens_backward));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens));
  m.impl("fuse_tokens", TORCH_BOX(&fuse_tokens));
  m.impl("fuse_tokens_backward", TORCH_BOX(&fuse_tokens_backward));
}

}  // namespace spot
