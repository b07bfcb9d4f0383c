// Compiled once per instruction set, with SPOT_ISA naming it: one line per op and dtype.
#include "isa.h"

#include "attention_stats.h"
#include "attention_stats_backward.h"
#include "compact.h"
#include "connectivity.h"
#include "packed_linear.h"
#include "relevance.h"
#include "sparse_attention.h"
#include "sparse_attention_backward.h"
#include "token_evidence.h"

#define SPOT_JOIN_(a, b) a##b
#define SPOT_JOIN(a, b) SPOT_JOIN_(a, b)
#define SPOT_PER_DTYPE(kernel)                                                          \
  {SPOT_ISA::kernel<float>, SPOT_ISA::kernel<double>, SPOT_ISA::kernel<SPOT_ISA::Half>, \
   SPOT_ISA::kernel<SPOT_ISA::BFloat16>}

namespace spot {

extern const KernelTable SPOT_JOIN(kernels_, SPOT_ISA);
const KernelTable SPOT_JOIN(kernels_, SPOT_ISA) = {
    SPOT_PER_DTYPE(select),
    SPOT_ISA::compact_rows,
    SPOT_ISA::scatter_rows,
    SPOT_PER_DTYPE(fuse),
    SPOT_PER_DTYPE(fuse_backward),
    SPOT_PER_DTYPE(attention_stats),
    SPOT_PER_DTYPE(attention_stats_columns),
    SPOT_PER_DTYPE(attention_stats_backward),
    SPOT_PER_DTYPE(sparse_attention),
    SPOT_PER_DTYPE(sparse_attention_columns),
    SPOT_PER_DTYPE(sparse_attention_backward),
    SPOT_PER_DTYPE(connectivity),
    SPOT_PER_DTYPE(pack_linear),
    SPOT_PER_DTYPE(packed_linear),
    SPOT_PER_DTYPE(token_evidence),
    SPOT_PER_DTYPE(normalize),
    SPOT_PER_DTYPE(normalize_backward),
    SPOT_PER_DTYPE(remap),
    SPOT_PER_DTYPE(remap_backward),
    SPOT_PER_DTYPE(hidden),
    SPOT_PER_DTYPE(hidden_backward),
    SPOT_PER_DTYPE(score),
    SPOT_PER_DTYPE(score_backward),
    SPOT_PER_DTYPE(sum_parts),
};

}  // namespace spot
