"""Cost of a model in multiply-accumulates, counted rather than estimated."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from spot_ext.connectivity import coefficient_flops
from spot_vit.config.fields import is_whole, plain
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import Predictor, predictors_in
from spot_vit.utils.modes import eval_mode, unwrap
from spot_vit.utils.places import attention_name, blocks_in, place_of
from spot_vit.utils.tables import format_table

PARTS = ("attention", "mlp", "predictor", "statistics", "connectivity", "other")
PROJECTIONS = ("aten.mm", "aten.addmm")  # inside attention; products with the map are batched


@dataclasses.dataclass(frozen=True)
class LayerFlops:
    """Multiply-accumulates of one layer per image.

    Attributes:
        name: "stem", "blocks.0", ..., "head".
        tokens: tokens that its attention sees, prefix included; 0 where they are pixels or feature
            maps.
        attention: projections and the two products with the map, of which sparse attention needs
            the named entries alone; without statistics.
        mlp: the block's MLP.
        predictor: its relevance module, which looks at the tokens before they are cut.
        statistics: of the attention map.
        connectivity: predicting which keys each query sees; combining basis rows counts their
            nonzero entries, on average (without weights: as initialised).
        products: the part of `attention` that is products with the map.
        other: the rest; all of it for stem and head, fused tokens for a block.
    """

    name: str
    tokens: int
    attention: int = 0
    mlp: int = 0
    predictor: int = 0
    statistics: int = 0
    connectivity: int = 0
    other: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        """Multiply-accumulates of all parts."""
        return sum(getattr(self, part) for part in PARTS)


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Multiply-accumulates per image; as text an aligned table of the layers in millions.

    Attributes:
        total: stem, blocks, head, predictors and statistics.
        predictor: the share of the relevance modules.
        statistics: the share of the attention statistics.
        connectivity: the share of the connectivity predictors.
        layers: the layers in order; their totals add up to `total`.
    """

    total: int
    predictor: int
    statistics: int
    connectivity: int
    layers: tuple[LayerFlops, ...]

    def __str__(self) -> str:
        absent = () if self.connectivity else ("connectivity",)
        parts = [part for part in (*PARTS, "total") if part not in absent]
        rows = [["layer", "tokens", *parts]]
        for layer in self.layers:
            costs = [_millions(getattr(layer, part)) for part in parts]
            rows.append([layer.name, str(layer.tokens or ""), *costs])
        sums = [_millions(sum(getattr(layer, part) for layer in self.layers)) for part in parts]
        rows.append(["sum, MMACs", "", *sums])
        return format_table(rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else ""


def image_size(size: Any) -> tuple[int, int, int]:
    """(channels, height, width) as plain ints, checked.

    Raises:
        ValueError: anything but three positive ints.
    """
    found = plain(size)
    if isinstance(found, tuple) and len(found) == 3 and all(map(is_whole, found)):
        channels, height, width = found
        if min(found) > 0:
            return channels, height, width
    example = f"; say (3, {found}, {found})" if is_whole(found) else ""
    raise ValueError(f"input_size must be (channels, height, width), got {size!r}{example}")


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> FlopCount:
    """Counts one eval forward pass at the current budget.

    The model runs on the meta device: no arithmetic is done, no weight is copied, and fused
    attention is counted in full, which it is not on CPU. Normalisation, activations and softmax are
    not counted, as in the papers' figures.

    Args:
        model: any model, wrapped or not; a SPOT model is counted at the budget it is set to. Layers
            are told apart where it has `blocks`.
        input_size: (channels, height, width) of one image.

    Returns:
        Counts per image.

    Raises:
        ValueError: `input_size` is not three positive ints.
    """
    input_size = image_size(input_size)
    model = unwrap(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    dtype = next(iter(model.parameters())).dtype
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    watch = _Watch(model)
    with eval_mode(model), torch.no_grad(), watch:
        functional_call(model, shapes, (image,))
    layers = watch.layers()
    return FlopCount(
        watch.counter.get_total_flops() // 2,
        sum(layer.predictor for layer in layers),
        sum(layer.statistics for layer in layers),
        sum(layer.connectivity for layer in layers),
        layers,
    )


def gmacs_of(model: nn.Module, input_size: tuple[int, int, int]) -> float | None:
    """Billions of multiply-accumulates per image; None where they cannot be counted.

    Layers that do not run on the meta device cannot.
    """
    try:
        return count_flops(model, input_size).total / 1e9
    except (NotImplementedError, RuntimeError):
        return None


class _Watch:
    """Counts a forward pass, and notes where the counts stand as each block starts and ends."""

    def __init__(self, model: nn.Module) -> None:
        blocks = blocks_in(model) if hasattr(model, "blocks") or place_of(model) else None
        self.blocks = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
        names = {module: name for name, module in model.named_modules()}
        self.places = [names[block] for block in self.blocks]
        self.attention = [f"{names[block]}.{attention_name(block)}" for block in self.blocks]
        self.root = type(model).__name__
        self.statistics = 0  # running, in FLOPs
        self.tokens: list[int] = []  # that attend, in each block
        self.leaving = 0  # the last block
        self.marks: list[tuple[int, int]] = []  # total and statistics, before and after each block
        predictors = predictors_in(model, Predictor)
        connecting = predictors_in(model, ConnectivityPredictor)
        self.scoring = [name for name in predictors if name not in connecting]
        self.connecting = list(connecting)
        self.density: dict[nn.Module, float] = {p: p.density() for p in connecting.values()}
        self.running = 1.0  # density of the basis of the predictor that runs
        own = {
            "spot.attention_stats": self._attention_stats,
            "spot.sparse_attention": self._sparse_attention,
            "spot.connectivity": self._connectivity,
            "spot.predict_connectivity": self._predict_connectivity,
        }
        split = {op: own[str(op)](f) for op, f in flop_registry.items() if str(op) in own}
        self.counter = FlopCounterMode(display=False, custom_mapping=split)

    def _attention_stats(self, formula: Any) -> Any:
        """The op's own formula, which also notes what exceeds the two products with the map."""

        def count(q: Tensor, *args: Any, **kwargs: Any) -> int:
            flops = formula(q, *args, **kwargs)
            self.statistics += flops - 4 * q.numel() * q.shape[1]
            return flops

        return _of_tensors(count)

    def _sparse_attention(self, formula: Any) -> Any:
        """The op's own formula for named keys, noting statistics likewise."""

        def count(q: Any, k: Any, v: Any, index: Any, *args: Any, **kwargs: Any) -> int:
            flops = formula(q, k, v, index, *args, **kwargs)
            self.statistics += flops - formula(q, k, v, index)
            return flops

        return _of_tensors(count)

    def _connectivity(self, formula: Any) -> Any:
        """The op's own formula, which is for a dense basis, times the basis' density."""

        def count(*args: Any, **kwargs: Any) -> int:
            return 2 * round(formula(*args, **kwargs) * self.running / 2)

        return _of_tensors(count)

    def _predict_connectivity(self, formula: Any) -> Any:
        """The op's own formula, whose combination of basis rows is counted by density."""

        def count(q: Any, k: Any, down: Any, query_weight: Any, *args: Any, **kwargs: Any) -> int:
            channels = None if query_weight is None else query_weight.shape[0]
            made = coefficient_flops(q.shape, k.shape[1], down.shape[1], channels)
            combination = formula(q, k, down, query_weight, *args, **kwargs) - made
            return made + 2 * round(combination * self.running / 2)

        return _of_tensors(count)

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(self.counter)
        for predictor in self.density:
            self._stack.callback(predictor.register_forward_pre_hook(self._predicts).remove)
        for block in self.blocks:
            for handle in (
                block.register_forward_pre_hook(self._starts),
                block.register_forward_hook(self._ends),
            ):
                self._stack.callback(handle.remove)
            attention = getattr(block, attention_name(block), None)
            if isinstance(attention, nn.Module):  # tokens may go between the two
                watching = attention.register_forward_pre_hook(self._attends, with_kwargs=True)
                self._stack.callback(watching.remove)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _mark(self) -> None:
        self.marks.append((self.counter.get_total_flops(), self.statistics))

    def _predicts(self, predictor: nn.Module, args: tuple[Any, ...]) -> None:
        self.running = self.density[predictor]

    def _starts(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens.append(_tokens(args[0]))
        self._mark()

    def _attends(self, attention: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.tokens[-1] = _tokens(args[0] if args else named["hidden_states"])

    def _ends(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._mark()
        self.leaving = _tokens(output[0] if isinstance(output, tuple) else output)

    def _ops(self, module: str) -> dict[Any, int]:
        """FLOPs inside a module, by operator."""
        return self.counter.get_flop_counts().get(f"{self.root}.{module}", {})

    def _of_predictors(self, b: int, names: list[str]) -> int:
        """FLOPs of the predictors among `names` that belong to a block."""
        own = [name for name in names if name.startswith(f"{self.places[b]}.")]
        return sum(sum(self._ops(name).values()) for name in own)

    def _projections(self, b: int) -> int:
        """FLOPs of a block's attention outside of its products with the map and predictors."""
        own = [name for name in self.connecting if name.startswith(f"{self.places[b]}.")]
        attention, *predictors = (
            sum(count for op, count in self._ops(name).items() if str(op) in PROJECTIONS)
            for name in (self.attention[b], *own)
        )
        return attention - sum(predictors)

    def layers(self) -> tuple[LayerFlops, ...]:
        """The layers in order, in multiply-accumulates."""
        total = self.counter.get_total_flops()
        if not self.blocks:
            return (LayerFlops("model", 0, other=total // 2),)
        begin = self.marks[0][0]
        result = [LayerFlops("stem", 0, other=begin // 2)]
        before = 0
        for b, tokens in enumerate(self.tokens):
            end, after = self.marks[2 * b + 1]
            statistics = after - before
            attention, mlp = (
                sum(self._ops(part).values())
                for part in (self.attention[b], f"{self.places[b]}.mlp")
            )
            predictor = self._of_predictors(b, self.scoring)
            connectivity = self._of_predictors(b, self.connecting)
            attention -= statistics + connectivity
            projections = self._projections(b)
            other = end - begin - attention - mlp - predictor - statistics - connectivity
            products = attention - projections
            parts = (attention, mlp, predictor, statistics, connectivity, other, products)
            result.append(LayerFlops(f"blocks.{b}", tokens, *(part // 2 for part in parts)))
            begin, before = end, after
        result.append(LayerFlops("head", self.leaving, other=(total - begin) // 2))
        return tuple(result)


_hook: Any
for _hook in (_Watch._starts, _Watch._attends, _Watch._ends, _Watch._predicts):
    _hook.counts_only = True  # see models/fast_blocks.py


def _of_tensors(count: Any) -> Any:
    """A formula that is given tensors rather than shapes, as registered ones want them."""
    count._get_raw = True
    return count


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 0  # feature maps of a convolutional network have none
