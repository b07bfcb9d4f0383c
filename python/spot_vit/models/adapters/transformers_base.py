"""What adapters of Hugging Face's vision models share: no forward method of theirs is rewritten.

The model's own forward method runs with its own loop; each block takes its part in a sparse pass,
which travels with the keyword arguments. What is asked of attention takes the place of the mask
that a block hands on, and is answered behind the library's attention interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from spot_vit.models.adapters.base import AttentionAdapter, BlockAdapter
from spot_vit.models.hosted_pass import HostedPass
from spot_vit.models.loop import SpotLoop
from spot_vit.models.step import BlockStep
from spot_vit.nn.attention import AttentionRequest
from spot_vit.nn.pooling import pool_kept
from spot_vit.nn.positional import PositionTables
from spot_vit.utils.places import attention_of, blocks_in, prefix_of
from spot_vit.utils.sizes import patch_size

INTERFACE = "spot"
"""Name under which attention that answers requests is registered with the library."""


class _ThroughInterface:
    """A view of a configuration that sends attention to `INTERFACE`."""

    _attn_implementation = INTERFACE

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def attend_as_asked(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | AttentionRequest | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """The library's interface: [B, N, H * D] by a request, or what it would have run without us."""
    if isinstance(attention_mask, AttentionRequest):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return module._attention(q, k, v, attention_mask, arguments["scaling"]), None
    own = vars(module)["config"]._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, module.eager)
    output: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, **arguments
    )
    return output


AttentionInterface.register(INTERFACE, attend_as_asked)


class HostedAttention(AttentionAdapter):
    """Mixin of attention adapters: requests come in the place of masks."""

    eager: ClassVar[Callable[..., Any]]  # what its module runs where no interface is named

    @property
    def config(self) -> Any:
        """Its configuration, with the attention interface that answers requests."""
        return _ThroughInterface(vars(self)["config"])

    @config.setter
    def config(self, value: Any) -> None:
        vars(self)["config"] = value

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Any = None, **arguments: Any
    ) -> Any:
        """Output [B, N, C] and a map or None, by the library's own forward method."""
        if not isinstance(attention_mask, AttentionRequest):
            own = self._own_request(hidden_states.shape[1])
            attention_mask = attention_mask if own is None else own
        return super(AttentionAdapter, self).forward(hidden_states, attention_mask, **arguments)


class HostedBlock(BlockAdapter):
    """Mixin of block adapters: the library's own forward method is the whole block."""

    @property
    def attn(self) -> Any:
        """Its attention, by the name that the loop knows."""
        return attention_of(self)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *,
        spot_pass: HostedPass | None = None,
        step: BlockStep | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Tokens [B, N, C] to tokens; with a `spot_pass` as a part of that."""
        if spot_pass is not None:
            step = spot_pass.enter(self, hidden_states, arguments)
        y = super().forward(hidden_states, attention_mask, step=step, **arguments)
        return y if spot_pass is None or step is None else spot_pass.leave(step)

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y: Tensor = super(BlockAdapter, self).forward(x, request, **arguments)
        return y

    def _mix(self, x: Tensor) -> Tensor:
        return x


class HostedModel(SpotLoop):
    """Mixin of model adapters.

    Attributes:
        encoder_path: where embeddings and the final norm are, "" for the model itself.
        norm_name: of the final norm.
        answer: field of the output that `SpotOutput.logits` holds.
    """

    encoder_path: ClassVar[str] = ""
    norm_name: ClassVar[str]
    answer: ClassVar[str] = "logits"
    has_class_token = True
    cuts_inside_blocks = False
    grad_checkpointing = False  # the library checkpoints block by block itself
    pretrained_cfg: ClassVar = {"classifier": "classifier", "num_classes": 1000}
    config: Any
    loss_function: Any
    _can_record_outputs: Any

    @property
    def _encoder(self) -> Any:
        return attrgetter(self.encoder_path)(self) if self.encoder_path else self

    @property
    def blocks(self) -> Any:
        """Its blocks, by the name that the loop knows."""
        return blocks_in(self)

    @property
    def norm(self) -> Any:  # type: ignore[override]
        """Its final norm, likewise."""
        return self._encoder._modules[self.norm_name]

    @property
    def num_prefix_tokens(self) -> int:  # type: ignore[override]
        """Its class and register tokens, likewise."""
        return prefix_of(self)

    @property
    def num_classes(self) -> int:
        """Classes of its head; 0 without one."""
        return self.config.num_labels if self.answer == "logits" else 0

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: tokens and positions."""
        alone = ("_token", "_tokens", "position_embeddings", "position_embedding.weight")
        return {name for name, _ in self.named_parameters() if name.endswith(alone)}

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        *args: Any,
        aux: bool = False,
        kept: Sequence[Tensor] | None = None,
        ratios: Sequence[Sequence[int]] | None = None,
        **arguments: Any,
    ) -> Any:
        """What the library's model returns, its `labels` and loss included.

        Args:
            pixel_values: images [B, 3, H, W].
            *args: the library's.
            aux: return a `SpotOutput`, see `SpotLoop.forward`; its logits are the pooled features
                of a model without a head.
            kept: decisions to use instead of the predictor's, likewise.
            ratios: likewise.
            **arguments: the library's; no attention mask and no attention maps.

        Returns:
            The library's output object; `last_hidden_state` holds survivors alone, or all tokens
            where training masks. `SpotOutput` with `aux=True`.
        """
        self._refuse(arguments)
        as_object = arguments.pop("return_dict", None)
        if as_object is None:
            as_object = getattr(self.config, "return_dict", True)
        model: Any = self
        _CAN_RECORD_REGISTRY[model] = self._can_record_outputs  # which knows classes by name
        run = HostedPass(self, kept, aux, ratios)
        out = super(SpotLoop, self).forward(
            pixel_values, *args, spot_pass=run, return_dict=True, **arguments
        )
        state = run.state
        self._refuse_nothing_left(state)
        masked = state.mask is not None and self._pools_patches
        if aux or masked:
            tokens = out.get("last_hidden_state")
            tokens = self.norm(state.tokens) if tokens is None else tokens
            found = out.get(self.answer)
            if masked or found is None:
                found = self._head(tokens, state.mask)
            if aux:
                return self._output(found, tokens, state)
            self._replace(out, found, arguments.get("labels"))
        return out if as_object else out.to_tuple()

    def _replace(self, out: Any, found: Tensor, labels: Tensor | None) -> None:
        """Puts what a head says of the tokens that are kept into the output, and its loss."""
        if self.answer in out:
            out[self.answer] = found
        if labels is not None:
            out["loss"] = self.loss_function(labels, found, self.config)

    def _refuse(self, arguments: dict[str, Any]) -> None:
        if arguments.get("attention_mask") is not None:
            raise ValueError("attention_mask is not supported by a sparse model: it makes its own")
        maps = arguments.get("output_attentions")
        if maps or (maps is None and getattr(self.config, "output_attentions", False)):
            raise ValueError(
                "output_attentions is not supported by a sparse model, whose kernels hold no maps: "
                "use spot_vit.attention_maps(model, images)"
            )

    def _tables(self, arguments: dict[str, Any]) -> PositionTables:
        """Position tables, of the arguments that the library gives its blocks."""
        return PositionTables()

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        return self._encoder.embeddings(x), PositionTables()

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        down, across = patch_size(self)
        return height // down, width // across


def mean_of_kept(x: Tensor, mask: Tensor | None, num_prefix: int) -> Tensor:
    """[B, C] mean over the patches of x [B, P+N, C], those in `mask` [B, N] if it is given."""
    if mask is None:
        return x[:, num_prefix:].mean(dim=1)
    return pool_kept(x, mask, "avg", num_prefix)


def refuse_dropout(attention: Any) -> str | None:
    """Reason not to convert an attention module of this library, or None."""
    if getattr(attention, "attention_dropout", 0) or getattr(attention, "dropout", 0):
        return "attention dropout has no counterpart in attention with statistics"
    return None
