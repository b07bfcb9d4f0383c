"""Public functions in `spot_ext.definitions()`: values, reach, and what compilers trace then."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from ops.generic.calls import dtype_name
from support.arguments import refilled, tensors, with_grad
from support.chosen import ops_held, ops_run
from support.comparison import assert_close, assert_same_bits
from support.data import generator, random
from support.gradients import gradients
from support.slow import most_slow
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import spot_ext
from spot_ext import _definitions

PUBLIC = [op for op in OPS.values() if op.public]
PUBLIC_SAMPLES = [p for p in each_sample() if p.values[0].public]
each_public = pytest.mark.parametrize("op", PUBLIC, ids=lambda op: op.name)


def _call(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    return tensors(op.public(*args))


def _of_tensors(op: Op, args: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The public function of its tensor arguments alone, as tracers take it."""

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_call(op, refilled(args, values)))

    return call


class _Module(torch.nn.Module):
    """`call`, inside the context or not."""

    def __init__(self, call: Callable[..., Any], inside: bool = False) -> None:
        super().__init__()
        self.call, self.inside = call, inside

    def forward(self, *values: Tensor) -> Any:
        with spot_ext.definitions() if self.inside else nullcontext():
            return self.call(*values)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "sample"), PUBLIC_SAMPLES)
def test_values_are_those_of_reference_and_kernel(
    op: Op, sample: Sample, device: torch.device
) -> None:
    args = with_grad(sample.args(device, torch.float64), op.grads)
    outputs, expected = gradients(op.public, args)
    with spot_ext.definitions():
        defined, actual = gradients(op.public, args)
    for mine, theirs in zip(tensors(defined), tensors(op.reference(*args)), strict=False):
        assert_same_bits(mine, theirs)
    assert_close(tensors(defined), tensors(outputs))
    for mine, theirs in zip(actual, expected, strict=True):
        if mine is None:  # an argument that the output does not depend on
            assert theirs is None or not theirs.any()
        else:
            assert theirs is not None
            assert_close(mine, theirs, what="gradient")


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=dtype_name)
@each_public
def test_autocast_casts_as_the_op_does(op: Op, ambient: torch.dtype, device: torch.device) -> None:
    args = op.samples[1].args(device, torch.float32)
    with torch.amp.autocast(device.type, dtype=ambient):
        expected = _call(op, args)
        with spot_ext.definitions():
            actual = _call(op, args)
            assert torch.get_autocast_dtype(device.type) == ambient
            assert torch.is_autocast_enabled(device.type)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, 0.02)


def test_rows_of_two_dtypes_meet_under_autocast(device: torch.device) -> None:
    tokens, index = random("rows", (2, 4, 3), torch.bfloat16, device), torch.tensor([[0, 4, 2]] * 2)
    behind = random("behind", (2, 6, 3), torch.float32, device)
    with torch.amp.autocast(device.type, dtype=torch.bfloat16), spot_ext.definitions():
        out = spot_ext.scatter_tokens(tokens, index.to(device), 5, background=behind)
    assert out.dtype == torch.float32
    assert torch.equal(out[:, 1], tokens[:, 1].float()) and torch.equal(out[:, 2], behind[:, 2])


# ---- what the context reaches --------------------------------------------------------------------


@each_public
def test_no_kernel_runs(op: Op, device: torch.device) -> None:
    args = with_grad(op.samples[0].args(device, torch.float64), op.grads)
    with spot_ext.definitions():
        assert ops_run(lambda: gradients(op.public, args)) == []
        # Ops called by their own name are what they were.
        assert ops_run(lambda: op.call(*args)) == [op.name]
    assert ops_run(lambda: op.public(*args)) == [op.name]


def _runs_a_kernel() -> bool:
    scores = random("scores", (2, 9), torch.float32)
    return ops_run(lambda: spot_ext.select_tokens(scores, 4)) == ["select_tokens"]


def test_blocks_nest_and_end() -> None:
    again = spot_ext.definitions()
    with again:
        with again, spot_ext.definitions():
            assert not _runs_a_kernel()
        assert not _runs_a_kernel()
        with pytest.raises(ZeroDivisionError), spot_ext.definitions():
            1 / 0  # noqa: B018
        assert not _runs_a_kernel()
    assert _runs_a_kernel()
    with pytest.raises(ZeroDivisionError), again:
        1 / 0  # noqa: B018
    assert _runs_a_kernel()


def test_a_thread_chooses_for_itself() -> None:
    inside, outside = threading.Event(), threading.Event()

    def other() -> tuple[bool, bool]:
        first = _runs_a_kernel()
        with spot_ext.definitions():
            inside.set()
            assert outside.wait(60)
            return first, _runs_a_kernel()

    with ThreadPoolExecutor(1) as pool:
        with spot_ext.definitions():
            found = pool.submit(other)
            assert inside.wait(60)
        assert _runs_a_kernel()  # the other thread's block is open
        outside.set()
        assert found.result() == (True, False)


def test_checkpointing_repeats_the_definition() -> None:
    from torch.utils.checkpoint import checkpoint

    args = with_grad(OPS["attention_stats"].samples[0].args("cpu", torch.float64), (0,))
    with spot_ext.definitions():
        _, expected = gradients(spot_ext.attention_stats, args[:3])
        _, actual = gradients(
            lambda *a: checkpoint(spot_ext.attention_stats, *a, use_reentrant=False), args[:3]
        )

    def both() -> tuple[Any, Any]:
        return spot_ext.definitions(), spot_ext.definitions()

    _, chosen = gradients(  # the backward pass is outside of any block
        lambda *a: checkpoint(
            spot_ext.attention_stats, *a, use_reentrant=False, context_fn=both
        ),
        args[:3],
    )  # fmt: skip
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(chosen[0], expected[0])


@each_public
def test_errors_are_those_of_the_function(op: Op) -> None:
    args = op.samples[1].args("cpu", torch.float32)
    with spot_ext.definitions(), pytest.raises(TypeError, match="must be a tensor, got str"):
        op.public(*tree_map_only(Tensor, lambda value: "tokens", args))


def test_meta_tensors_have_definitions_too() -> None:
    scores = torch.empty(2, 9, device="meta")
    with spot_ext.definitions():
        index = spot_ext.select_tokens(scores, 4)
    assert (index.shape, index.device.type) == ((2, 4), "meta")


# ---- devices without kernels ---------------------------------------------------------------------


def test_devices_without_kernels_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_definitions, "_WITH_KERNELS", ("cuda",))
    monkeypatch.setattr(_definitions, "_warned", set())
    with pytest.warns(UserWarning, match="no kernels for cpu"):
        assert not _runs_a_kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _runs_a_kernel()


@pytest.mark.usefixtures("fresh_compiler")
@each_public
def test_devices_without_kernels_compile(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_definitions, "_WITH_KERNELS", ("cuda",))
    args = op.samples[1].args("cpu", torch.float64)
    graphs = EagerAndRecordGraphs()
    outputs = tensors(torch.compile(op.public, fullgraph=True, backend=graphs)(*args))
    assert [ops_held(graph.graph) for graph in graphs.graphs] == [[]]
    for mine, theirs in zip(outputs, tensors(op.reference(*args)), strict=False):
        assert_same_bits(mine, theirs)


# ---- compilers and tracers -----------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@each_public
def test_a_compiled_function_recompiles(op: Op) -> None:
    args = op.samples[1].args("cpu", torch.float64)
    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(op.public, fullgraph=True, backend=graphs)
    kernel, reference = _call(op, args), tensors(op.reference(*args))

    def check(expected: list[Tensor]) -> None:
        for mine, theirs in zip(tensors(compiled(*args)), expected, strict=False):
            assert_same_bits(mine, theirs)

    for _ in range(2):
        check(kernel)
        with spot_ext.definitions():
            check(reference)
            with spot_ext.definitions():
                check(reference)
            with ThreadPoolExecutor(1) as other:
                other.submit(check, kernel).result()
    assert [ops_held(graph.graph) for graph in graphs.graphs] == [[op.name], []]


@pytest.mark.usefixtures("fresh_compiler")
@each_public
def test_the_context_inside_a_compiled_function(op: Op) -> None:
    args = op.samples[1].args("cpu", torch.float64)

    def function(*values: Any) -> Any:
        with spot_ext.definitions():
            first = op.public(*values)
            with spot_ext.definitions():
                second = op.public(*values)
        return first, second, op.public(*values)

    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    first, second, third = compiled(*args)
    assert ops_held(graphs.graphs[0].graph) == [op.name]
    assert_close(tensors(first), tensors(second))
    assert_close(tensors(first), tensors(third))
    assert _runs_a_kernel()


@pytest.mark.usefixtures("fresh_compiler")
@each_public
def test_compiled_definitions_have_gradients(op: Op) -> None:
    args = with_grad(op.samples[1].args("cpu", torch.float64), op.grads)
    with spot_ext.definitions():
        outputs, expected = gradients(op.public, args)
        compiled = torch.compile(op.public, fullgraph=True, backend="aot_eager")
        results, actual = gradients(compiled, args)
    assert_close(tensors(results), tensors(outputs))
    assert [g is None for g in actual] == [g is None for g in expected]
    pairs = zip(actual, expected, strict=True)
    for mine, theirs in ((m, t) for m, t in pairs if m is not None):
        assert_close(mine, theirs, what="gradient")


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@each_public
def test_export(op: Op, strict: bool, inside: bool) -> None:
    args = op.samples[1].args("cpu", torch.float64)
    model, values = _Module(_of_tensors(op, args), inside), tuple(tensors(args))
    with nullcontext() if inside else spot_ext.definitions():
        exported = torch.export.export(model, values, strict=strict)
    assert ops_held(exported.graph) == []
    assert_close(tensors(exported.module()(*values)), _call(op, args))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_public
def test_make_fx(op: Op, mode: str) -> None:
    args = op.samples[1].args("cpu", torch.float64)
    values = tensors(args)
    with spot_ext.definitions():
        traced = make_fx(_of_tensors(op, args), tracing_mode=mode)(*values)
    assert ops_held(traced.graph) == []
    assert_close(tensors(traced(*values)), _call(op, args))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("context", [spot_ext.definitions, nullcontext])
@each_public
def test_torchscript(op: Op, context: Any, tmp_path: Path) -> None:
    args = op.samples[1].args("cpu", torch.float64)
    values = tuple(tensors(args))
    with context():
        traced = torch.jit.trace(_of_tensors(op, args), values, check_trace=False)
    names = [n.kind() for n in traced.graph.nodes() if n.kind().startswith("spot::")]
    assert names == ([] if context is spot_ext.definitions else [f"spot::{op.name}"])
    traced.save(str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    assert_close(tensors(loaded(*values)), _call(op, args))


class _Pruner(torch.nn.Module):
    """Every public function, with sizes and options that come out of a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(16, 2)
        torch.manual_seed(3)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        patches = keep.shape[1]
        prefix, num_keep = x.shape[1] - patches, patches * 7 // 10
        q = x.unflatten(-1, (2, 8))
        out, stats = spot_ext.attention_stats(
            q, q, q, keep, scale=q.shape[3] ** -0.5, num_prefix=prefix, class_token=True
        )
        basis = x[0, :, :8].T
        columns = spot_ext.connectivity(
            out[:, prefix:].transpose(1, 2), basis, patches // 2, coef_topk=3
        )
        named = spot_ext.predict_connectivity(
            q[:, prefix:], q, x[0, :, :4], x[0, :, 4:8], patches // 2, keep=keep
        )
        sparse, _ = spot_ext.sparse_attention(q, q, q, columns, num_prefix=prefix, class_token=True)
        weights = self.score.weight.repeat(2, 1), self.score.bias.repeat(2)
        scores = spot_ext.token_relevance(
            None, x[:, prefix:], keep, *[None] * 4, *weights, weights[0][:, :4], weights[1],
            weights[0][:2, :4], self.score.bias,
        )[..., 0]  # fmt: skip
        index = spot_ext.select_tokens(scores, num_keep)
        fused = spot_ext.fuse_tokens(x, scores.exp(), index, prefix)
        short = spot_ext.compact_tokens(x, index, prefix, fused[:, None])
        full = spot_ext.scatter_tokens(
            spot_ext.compact_tokens(x, index, prefix), index, patches, prefix, x
        )
        return out, stats, columns, named, sparse, scores, index, fused, short, full


def _images(batch: int, patches: int) -> tuple[Tensor, Tensor]:
    seeded = generator(f"images {batch} {patches}")
    x = torch.randn(batch, patches + 1, 16, generator=seeded, dtype=torch.float64)
    return x, (torch.rand(batch, patches, generator=seeded) < 0.7).double()


@pytest.mark.parametrize("strict", most_slow([False, True]), ids=["nonstrict", "strict"])
def test_definitions_export_with_dynamic_sizes(strict: bool) -> None:
    model = _Pruner().double().eval()
    patches = torch.export.Dim("patches", min=6)
    batch = torch.export.Dim("batch", min=2)
    shapes = {"x": {0: batch, 1: patches + 1}, "keep": {0: batch, 1: patches}}
    with spot_ext.definitions():
        exported = torch.export.export(model, _images(3, 11), dynamic_shapes=shapes, strict=strict)
    assert ops_held(exported.graph) == []
    for size in ((3, 11), (2, 6), (5, 40), (2, 17)):
        assert_close(exported.module()(*_images(*size)), model(*_images(*size)))


@pytest.mark.usefixtures("fresh_compiler")
def test_definitions_compile_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, counter = _Pruner().double(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for size in ((3, 11), (2, 6), (5, 40), (4, 17)):
        with spot_ext.definitions():
            actual = compiled(*_images(*size))
        assert_close(actual, model(*_images(*size)))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_with_sizes_that_are_tensors() -> None:
    """Tracing makes tensors of sizes: kernels take them as they were, definitions compute them.

    TorchScript has dim ** -0.5 of a size in float32, which is why results are that close only.
    """
    model = _Pruner().double().eval()
    plain = torch.jit.trace(model, _images(3, 11), check_trace=False)
    assert_close(plain(*_images(3, 11)), model(*_images(3, 11)), 1e-6)
    with spot_ext.definitions():
        traced = torch.jit.trace(model, _images(3, 11), check_trace=False)
    for size in ((3, 11), (2, 6), (5, 40)):
        assert_close(traced(*_images(*size)), model(*_images(*size)), 1e-6)
    with pytest.raises(TypeError, match="num_keep must be an int, got Tensor"):
        spot_ext.select_tokens(_images(2, 6)[1], torch.tensor(4))
