"""SPOT's operators: compaction, relevance, evidence, attention (with statistics, sparse), linear.

Importing this package registers `torch.ops.spot.*`, for CPU and CUDA, with autograd. Functions take
and return torch tensors; each module holds one slice: public functions, `*_reference` definitions
in plain PyTorch, and what torch needs to trace, differentiate and count them. `definitions` is the
context in which the functions run their definitions, and `library_path` says where the library is.
"""

from spot_ext import _library

__path__ += [path for path in _library.extra_paths if path not in __path__]

from spot_ext._definitions import definitions  # noqa: E402
from spot_ext._library import library_path  # noqa: E402
from spot_ext._version import __version__  # noqa: E402
from spot_ext.attention_stats import attention_stats, attention_stats_reference  # noqa: E402
from spot_ext.compact import (  # noqa: E402
    compact_tokens,
    compact_tokens_reference,
    fuse_tokens,
    fuse_tokens_reference,
    scatter_tokens,
    scatter_tokens_reference,
    select_tokens,
    select_tokens_reference,
)
from spot_ext.connectivity import (  # noqa: E402
    connectivity,
    connectivity_reference,
    predict_connectivity,
    predict_connectivity_reference,
)
from spot_ext.packed_linear import (  # noqa: E402
    pack_linear,
    pack_linear_reference,
    packed_linear,
    packed_linear_reference,
)
from spot_ext.relevance import token_relevance, token_relevance_reference  # noqa: E402
from spot_ext.sparse_attention import (  # noqa: E402
    sparse_attention,
    sparse_attention_reference,
)
from spot_ext.token_evidence import token_evidence, token_evidence_reference  # noqa: E402

__all__ = [
    "__version__",
    "attention_stats",
    "attention_stats_reference",
    "compact_tokens",
    "compact_tokens_reference",
    "connectivity",
    "connectivity_reference",
    "definitions",
    "fuse_tokens",
    "fuse_tokens_reference",
    "library_path",
    "pack_linear",
    "pack_linear_reference",
    "packed_linear",
    "packed_linear_reference",
    "predict_connectivity",
    "predict_connectivity_reference",
    "scatter_tokens",
    "scatter_tokens_reference",
    "select_tokens",
    "select_tokens_reference",
    "sparse_attention",
    "sparse_attention_reference",
    "token_evidence",
    "token_evidence_reference",
    "token_relevance",
    "token_relevance_reference",
]
