"""Token ops in a model of your own: it trains, compiles and exports with a dynamic token count."""

import torch
from torch import Tensor, nn

import spot_ext  # noqa: F401  (registers torch.ops.spot)


class Shrinking(nn.Module):
    """A small transformer that keeps 70 % of the patch tokens after its first block."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        blocks = (nn.TransformerEncoderLayer(dim, 4, dim, 0.0, batch_first=True) for _ in range(2))
        self.first, self.second = blocks
        self.score, self.head = nn.Linear(dim, 1), nn.Linear(dim, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1+N, dim], class token first, to logits [B, 2]."""
        x = self.first(tokens)
        scores = self.score(x[:, 1:])  # [B, N, 1]
        index = torch.ops.spot.select_tokens(scores.squeeze(-1), scores.shape[1] * 7 // 10)
        x = torch.cat([x[:, :1], x[:, 1:] * scores.sigmoid()], dim=1)  # the scores learn by this
        return self.head(self.second(torch.ops.spot.compact_tokens(x, index))[:, 0])


def batch(size: int = 32, patches: int = 49, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Noise in which three patches carry the class."""
    labels = torch.randint(2, (size,))
    tokens = torch.randn(size, 1 + patches, dim)
    tokens[:, 1:4, 0] += (10.0 * labels - 5.0)[:, None]
    return tokens, labels


def main() -> None:
    torch.manual_seed(0)
    model = Shrinking()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(41):
        tokens, labels = batch()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}")

    model.eval().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True)
    print("compiled as eager:", torch.allclose(compiled(tokens), model(tokens), atol=1e-4))
    dims = {0: torch.export.Dim("images", min=2), 1: torch.export.Dim("tokens", min=16)}
    exported = torch.export.export(model, (tokens,), dynamic_shapes=(dims,)).module()
    tokens, labels = batch(size=5, patches=100)
    print("exported as eager:", torch.allclose(exported(tokens), model(tokens), atol=1e-4))


if __name__ == "__main__":
    main()
