// Shapes and checks of token_evidence.
#pragma once

#include "dispatch.h"

#include <string>
#include <vector>

namespace spot {

constexpr int64_t kStatistics = 6;  // of a token and head, as attention_stats gives them

struct EvidenceShape {
  int64_t batch;                // B
  int64_t num_tokens;           // M, rows of the result
  int64_t num_heads;            // H, before any mean
  int64_t width;                // F
  std::vector<int64_t> chosen;  // of each cut: the tokens it chose from; 0 where no block asks
};

inline void check_statistics(const char* op, std::size_t i, const Tensor& t, int64_t count,
                             const Tensor& like) {
  const std::string name = "stats[" + std::to_string(i) + "]";
  check_rank(op, name.c_str(), t, 4);
  check_dtype(op, name.c_str(), t, like.scalar_type());
  check_same_device(op, name.c_str(), t, "stats[0]", like);
  check_size(op, name.c_str(), t, 0, like.size(0), "the batch");
  check_size(op, name.c_str(), t, 2, like.size(2), "the heads of stats[0]");
  check_size(op, name.c_str(), t, 3, kStatistics, "the statistics");
  SPOT_CHECK(count >= 0 && count <= t.size(1), op, "counts[", i, "] must be between 0 and ",
             t.size(1), " (the tokens of ", name, "), got ", count);
}

inline EvidenceShape check_token_evidence(const char* op, const std::vector<Tensor>& stats,
                                          const std::vector<int64_t>& counts,
                                          const std::vector<int64_t>& followed,
                                          const std::vector<Tensor>& cuts, bool mean_heads,
                                          int64_t first, int64_t last, bool moments) {
  const std::size_t blocks = stats.size();
  const int64_t num_cuts = static_cast<int64_t>(cuts.size());
  SPOT_CHECK(blocks > 0, op, "stats must hold the statistics of at least one block");
  SPOT_CHECK(counts.size() == blocks, op, "counts must have ", blocks,
             " entries (one for each of stats), got ", counts.size());
  SPOT_CHECK(followed.size() == blocks, op, "followed must have ", blocks,
             " entries (one for each of stats), got ", followed.size());
  SPOT_CHECK(last >= 0 && last <= kStatistics, op, "latest[1] must be between 0 and ", kStatistics,
             ", got ", last);
  SPOT_CHECK(first >= 0 && first <= last, op, "latest[0] must be between 0 and ", last, ", got ",
             first);
  SPOT_CHECK(first < last || moments, op, "latest and moments ask for nothing");
  const Tensor& like = stats[0];
  check_rank(op, "stats[0]", like, 4);
  dtype_slot(op, "stats[0]", like);
  for (std::size_t i = 0; i < blocks; ++i) check_statistics(op, i, stats[i], counts[i], like);
  for (int64_t k = 0; k < num_cuts; ++k) {
    const Tensor& cut = cuts[static_cast<std::size_t>(k)];
    const std::string name = "cuts[" + std::to_string(k) + "]";
    check_rank(op, name.c_str(), cut, 2);
    check_dtype(op, name.c_str(), cut, ScalarType::Long);
    check_same_device(op, name.c_str(), cut, "stats[0]", like);
    check_size(op, name.c_str(), cut, 0, like.size(0), "the batch");
  }
  EvidenceShape s{like.size(0), 0, like.size(2), 0, std::vector<int64_t>(cuts.size(), 0)};
  int64_t before = 0;        // cuts that are done
  s.num_tokens = counts[0];  // and the tokens they left
  const auto cut_until = [&](int64_t end) {
    for (; before < end; ++before) {
      const std::size_t k = static_cast<std::size_t>(before);
      s.chosen[k] = s.num_tokens;
      s.num_tokens = cuts[k].size(1);
    }
  };
  for (std::size_t i = 0; i < blocks; ++i) {
    SPOT_CHECK(followed[i] >= before && followed[i] <= num_cuts, op, "followed[", i,
               "] must be between ", before, " and ", num_cuts, " (ascending, of the cuts), got ",
               followed[i]);
    if (i == 0) before = followed[0];  // nothing asks what cuts before the first block did
    cut_until(followed[i]);
    SPOT_CHECK(counts[i] == s.num_tokens, op, "counts[", i, "] must be ", s.num_tokens,
               " (the tokens left when that block ran), got ", counts[i]);
  }
  cut_until(num_cuts);
  s.width = (mean_heads ? 1 : s.num_heads) * (last - first + (moments ? 2 * kStatistics : 0));
  return s;
}

// Names the first position that is out of range; the slow path after a kernel met one.
inline void explain_cuts(const char* op, const std::vector<Tensor>& cuts, const EvidenceShape& s,
                         int64_t first) {
  for (std::size_t k = static_cast<std::size_t>(first); k < cuts.size(); ++k) {
    const int64_t* index = static_cast<const int64_t*>(readable(cuts[k]));
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t m = 0; m < cuts[k].size(1); ++m) {
        const int64_t at = index[b * cuts[k].stride(0) + m * cuts[k].stride(1)];
        SPOT_CHECK(at >= 0 && at < s.chosen[k], op, "cuts[", k, "][", b, ", ", m, "] is ", at,
                   ", out of range for ", s.chosen[k], " tokens");
      }
  }
}

}  // namespace spot
