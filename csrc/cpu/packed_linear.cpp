// CPU entry points of linear layers with packed weights: check, allocate, run in parallel.
#include "../common/packed_linear.h"

#include "isa.h"

#include <algorithm>

namespace spot {
namespace {

using torch::stable::parallel_for;

static_assert(kPanel == kPanelOutputs, "checks and kernels mean the same panels");

// Rows of a block have so many elements: with what they give they stay in second-level cache.
constexpr int64_t kBlockElements = 32768, kLeastBlockRows = 42;
constexpr int64_t kLeastProducts = 1 << 18;  // per task

Activation read_activation(const char* op, const std::string& name) {
  if (name == "none") return kNoActivation;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  fail(op, "activation must be 'none', 'gelu' or 'gelu_tanh', got '", name, "'");
}

// The distance between rows where all dimensions but the last are one, and the last is dense.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return std::nullopt;
  int64_t row = 0, next = 0;  // of the innermost dimension that counts; what the next one needs
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!next) row = t.stride(d), next = row;
    if (t.stride(d) != next) return std::nullopt;
    next *= t.size(d);
    if (!next) return std::nullopt;  // repeated rows
  }
  return row;
}

struct Rows {
  Tensor held;
  int64_t row;

  explicit Rows(const Tensor& t) : held(t), row(t.size(t.dim() - 1)) {
    if (const auto stride = row_stride(t))
      row = *stride;
    else
      held = dense(t);
  }
};

Tensor pack_linear(const Tensor& weight) {
  const char* op = "pack_linear";
  check_pack_linear(op, weight);
  SPOT_CHECK(weight.is_cpu(), op, "weight must be on the CPU");
  const int64_t panels = count_panels(weight.size(0));
  Tensor out = empty_on(weight, {panels, weight.size(1), kPanel}, weight.scalar_type());
  if (is_empty(out)) return out;
  const PackLinearArgs args{readable(weight), weight.stride(0), weight.stride(1),
                            weight.size(1),   weight.size(0),   writable(out)};
  const Dtype dtype = dtype_slot(op, "weight", weight);
  const KernelTable& table = kernels();
  parallel_for(0, panels, 4,
               [&](int64_t begin, int64_t end) { table.pack_linear[dtype](args, begin, end); });
  return out;
}

Tensor packed_linear(const Tensor& input, const Tensor& packed, int64_t out_features,
                     std::optional<Tensor> bias, std::optional<Tensor> residual,
                     std::string activation) {
  const char* op = "packed_linear";
  const LinearShape s = check_packed_linear(op, input, packed, out_features, bias, residual);
  SPOT_CHECK(input.is_cpu(), op, "input must be on the CPU");
  PackedLinearArgs args{};
  args.activation = read_activation(op, activation);
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = out_features;
  Tensor out = empty_on(input, sizes, input.scalar_type());
  if (is_empty(out)) return out;
  const Rows rows(input);
  const Tensor panels = dense(packed);
  args.input = readable(rows.held);
  args.input_row = rows.row;
  args.packed = readable(panels);
  std::optional<Tensor> shift;
  if (bias) shift = dense(*bias), args.bias = readable(*shift);
  std::optional<Rows> added;
  if (residual) {
    added.emplace(*residual);
    args.residual = readable(added->held);
    args.residual_row = added->row;
  }
  args.rows = s.rows;
  args.in_features = s.in_features;
  args.out_features = out_features;
  const int64_t depth = std::max<int64_t>(s.in_features, 1);
  args.block_rows = std::min(s.rows, std::max(kLeastBlockRows, kBlockElements / depth));
  args.out = writable(out);
  const int64_t blocks = (s.rows + args.block_rows - 1) / args.block_rows;
  const Dtype dtype = dtype_slot(op, "input", input);
  const KernelTable& table = kernels();
  const int64_t grain = kLeastProducts / (args.block_rows * depth * kPanel) + 1;
  parallel_for(0, blocks * count_panels(out_features), grain,
               [&](int64_t begin, int64_t end) { table.packed_linear[dtype](args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace spot
