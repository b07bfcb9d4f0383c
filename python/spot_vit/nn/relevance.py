"""The token relevance module: which patch tokens matter."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from spot_ext import token_relevance
from spot_vit.nn.predictor import Predictor, plain_layer


class TokenRelevance(Predictor):
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
        if not self.plain:
            return self._by_layers(tokens, features, keep)
        like = self.fc1.weight if self.norm is None else tokens
        return token_relevance(
            None if self.norm is None else tokens,
            None if features is None else features.to(like.dtype),
            keep,
            None if self.norm is None else self.norm.weight,
            None if self.norm is None else self.norm.bias,
            None if self.remap is None else self.remap.weight,
            None if self.remap is None else self.remap.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.fc3.weight,
            self.fc3.bias,
            eps=1e-5 if self.norm is None else self.norm.eps,
        )

    @property
    def plain(self) -> bool:
        """Whether reading the weights of its layers is the same as calling them."""
        return plain_layer(self.norm, self.remap, self.fc1, self.fc2, self.fc3)

    def _by_layers(self, tokens: Tensor, features: Tensor | None, keep: Tensor | None) -> Tensor:
        """The same, by calling the layers one by one."""
        parts = [] if features is None else [features.to(tokens.dtype)]
        if self.norm is not None and self.remap is not None:
            local, shared = F.gelu(self.remap(self.norm(tokens))).chunk(2, dim=-1)
            weight = shared.new_ones(shared.shape[:2]) if keep is None else keep.to(shared.dtype)
            total = weight.sum(dim=1, keepdim=True).clamp(min=1)
            mean = torch.einsum("bn,bnd->bd", weight, shared) / total
            parts = [local, mean[:, None].expand_as(local), *(f.to(local.dtype) for f in parts)]
        x = F.gelu(self.fc2(F.gelu(self.fc1(torch.cat(parts, dim=-1)))))
        logits = self.fc3(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
