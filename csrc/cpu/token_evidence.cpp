// CPU entry point of token_evidence: check, allocate, run in parallel.
#include "../common/token_evidence.h"

#include "isa.h"

#include <algorithm>
#include <atomic>

namespace spot {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kLeastStatistics = 1 << 17;  // per task: some 40 us, which is worth a thread

EvidenceScaling read_scaling(const char* op, const std::string& name) {
  if (name == "log1p") return kLogScaling;
  if (name == "n") return kScaleByCount;
  if (name == "raw") return kRawScaling;
  fail(op, "scaling must be 'n', 'log1p' or 'raw', got '", name, "'");
}

Tensor token_evidence(const std::vector<Tensor>& stats, const std::vector<int64_t>& counts,
                      const std::vector<int64_t>& followed, const std::vector<Tensor>& cuts,
                      std::string scaling, bool mean_heads, int64_t latest_first,
                      int64_t latest_last, bool moments) {
  const char* op = "token_evidence";
  EvidenceArgs args{};
  args.scaling = read_scaling(op, scaling);
  const EvidenceShape s = check_token_evidence(op, stats, counts, followed, cuts, mean_heads,
                                               latest_first, latest_last, moments);
  SPOT_CHECK(stats[0].is_cpu(), op, "stats[0] must be on the CPU");
  Tensor out = empty_on(stats[0], {s.batch, s.num_tokens, s.width}, stats[0].scalar_type());
  if (is_empty(out)) return out;
  std::vector<Tensor> held;  // with dense rows
  std::vector<EvidenceBlock> blocks;
  held.reserve(stats.size());
  blocks.reserve(stats.size());
  for (std::size_t i = 0; i < stats.size(); ++i) {
    const Tensor& t = held.emplace_back(dense_rows(stats[i]));
    const int64_t row = t.stride(1), prefix = (t.size(1) - counts[i]) * row;
    const char* data = static_cast<const char*>(readable(t));
    blocks.push_back({data + prefix * static_cast<int64_t>(t.element_size()), t.stride(0), row,
                      counts[i], followed[i]});
  }
  std::vector<EvidenceCut> steps;
  steps.reserve(cuts.size());
  for (std::size_t k = 0; k < cuts.size(); ++k)
    steps.push_back({static_cast<const int64_t*>(readable(cuts[k])), cuts[k].stride(0),
                     cuts[k].stride(1), s.chosen[k]});
  args.blocks = blocks.data();
  args.num_blocks = static_cast<int64_t>(blocks.size());
  args.cuts = steps.data();
  args.num_cuts = static_cast<int64_t>(steps.size());
  args.num_tokens = s.num_tokens;
  args.num_heads = s.num_heads;
  args.mean_heads = mean_heads;
  args.first = latest_first;
  args.last = latest_last;
  args.moments = moments;
  args.out = writable(out);
  const Dtype dtype = dtype_slot(op, "stats[0]", stats[0]);
  const KernelTable& table = kernels();
  const int64_t token = args.num_blocks * s.num_heads * kStatistics;
  std::atomic<bool> fine{true};
  parallel_for(0, s.batch * s.num_tokens, std::max<int64_t>(1, kLeastStatistics / (token + 1)),
               [&](int64_t begin, int64_t end) {
                 if (!table.token_evidence[dtype](args, begin, end)) fine = false;
               });
  if (!fine) explain_cuts(op, cuts, s, followed[0]);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) { m.impl("token_evidence", TORCH_BOX(&token_evidence)); }

}  // namespace spot
