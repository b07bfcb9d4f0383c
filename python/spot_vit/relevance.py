"""The token relevance module: which patch tokens matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


class TokenRelevance(nn.Module):
    """Scores each token from its embedding, the mean of the kept ones, and its attention evidence.

    A fully connected remap split into a local and a global half, then an MLP over local half, mean
    global half and evidence (published, arXiv 2511.10488; widths, GELU and initialisation are our
    choice and follow DynamicViT's predictor, which this is when there is no evidence).

    Args:
        dim: D, width of the tokens.
        num_features: F, columns of evidence; 0 for none.
        d_remap: width of the remap, 0 to leave the embedding out.
    """

    def __init__(self, dim: int, num_features: int, d_remap: int) -> None:
        super().__init__()
        d_in = d_remap + num_features
        h1, h2 = max(d_in // 2, 1), max(d_in // 4, 1)
        self.d_remap, self.num_features = d_remap, num_features
        self.norm = nn.LayerNorm(dim, eps=1e-5) if d_remap else None
        self.remap = nn.Linear(dim, d_remap) if d_remap else None
        self.fc1 = nn.Linear(d_in, h1)
        self.fc2 = nn.Linear(h1, h2)
        self.fc3 = nn.Linear(h2, 2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, features: Tensor | None, keep: Tensor | None) -> Tensor:
        """Log-probabilities of keeping and of dropping.

        Args:
            tokens: [B, N, D] patch tokens.
            features: [B, N, F] evidence, or None when F is 0.
            keep: [B, N] 0/1 mask of the tokens still alive, or None for all.

        Returns:
            [B, N, 2] float32 (float64) log-probabilities, index 0 = keep.
        """
        if self.norm is None or self.remap is None:
            assert features is not None
            hidden = self.fc1(features.to(self.fc1.weight.dtype))
        else:
            local, shared = F.gelu(self.remap(self.norm(tokens))).chunk(2, dim=-1)
            if keep is None:
                shared = shared.mean(dim=1)
            else:  # the mean of nothing is 0
                wide = torch.promote_types(shared.dtype, torch.float32)
                weight = keep.to(wide)
                total = (shared * weight[..., None]).sum(dim=1)
                shared = (total / weight.sum(dim=1, keepdim=True).clamp(min=1)).to(shared.dtype)
            # The global half is the same for all tokens of an image: it enters once per image.
            half = self.d_remap // 2
            weight_local, weight_shared, weight_features = self.fc1.weight.split(
                [half, half, self.num_features], dim=1
            )
            once = F.linear(shared, weight_shared, self.fc1.bias)[:, None]
            hidden = F.linear(local, weight_local) + once
            if features is not None:
                hidden = hidden + F.linear(features.to(local.dtype), weight_features)
        hidden = self.fc2(F.gelu(hidden))
        logits = self.fc3(F.gelu(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
