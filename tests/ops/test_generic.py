"""What holds for every op, generated from the op table."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS, defined_ops, each_error, each_sample
from ops.cases.base import Bad, Op, Sample
from support.arguments import clone, tensors, to_dtype, with_grad
from support.comparison import assert_accurate, assert_close, assert_gradient, assert_same_bits
from support.data import FLOATING, generator
from support.gradients import cotangents, gradients
from support.switches import cuda_kernels, isa, isa_control, threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

DIFFERENTIABLE = [op for op in OPS.values() if op.grads]


def _has(op: Op, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"spot::{op.name}", key)


def _large(op: Op, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> tuple[Any, ...]:
    """A call that several threads share: 12 ViT images."""
    if op.large:
        return op.sample(op.large).args(device, dtype)
    names = {"select_tokens": "(2, 196, 137)"}
    plain = op.exact or op.name.startswith("attention_stats")
    name = names.get(op.name, "ViT" if plain else "ViT, mean")
    args = op.sample(name).args(device, dtype)
    copies = 12 // args[0].shape[0]

    def repeat(value: Tensor) -> Tensor:
        if value.dtype == torch.int64:
            return value.repeat(copies, 1)
        return torch.cat([value.roll(step, dims=1) for step in range(copies)])

    return tree_map_only(Tensor, repeat, args)


# ---- the table itself ----------------------------------------------------------------------------


def test_every_op_is_in_the_table() -> None:
    assert set(OPS) == defined_ops()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_all_its_parts(op: Op) -> None:
    assert len(op.samples) >= 15 and len({sample.name for sample in op.samples}) == len(op.samples)
    assert sum(sample.traced for sample in op.samples) >= 8
    assert len(op.errors) >= 12 and len({bad.name for bad in op.errors}) == len(op.errors)
    assert callable(op.reference)
    assert _has(op, "Meta"), "no fake"
    assert op.call in flop_registry, "no FLOP formula"
    assert _has(op, "CPU"), "no CPU kernel"
    integer_only = op.name in ("select_tokens", "connectivity", "predict_connectivity")
    assert integer_only or _has(op, "Autograd"), "no autograd formula"
    assert op.grads or op.once_only or integer_only


def test_the_table_builds_the_same_arguments_every_time() -> None:
    assert set(OPS) == defined_ops()
    for op in OPS.values():
        for sample in op.samples:
            one, other = (sample.args("cpu", torch.bfloat16) for _ in range(2))
            for mine, theirs in zip(tensors(one), tensors(other), strict=True):
                assert_same_bits(mine, theirs)
                assert mine.stride() == theirs.stride()
            integer = (torch.int64, torch.int32)
            assert all(
                value.is_floating_point() or value.dtype in integer for value in tensors(one)
            )


def test_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == 2**63 - 1).all()


# ---- values and gradients ------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", FLOATING, ids=_name)
@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_values(op: Op, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    args = sample.args(device, dtype)
    actual = tensors(op.call(*args))
    plain = tensors(op.reference(*args))
    exact = tensors(op.reference(*to_dtype(args, torch.float64)))
    assert len(actual) == len(plain)
    for number, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        assert mine.is_contiguous(), f"output {number} has strides {mine.stride()}"
        if op.exact:
            assert_same_bits(mine, theirs, f"output {number}")
        elif op.name in ("attention_stats", "sparse_attention") and number == 1 and mine.numel():
            for column in range(6):  # each statistic has its own scale
                # Squares are summed around 1/n: that of a far-off mean bounds the error.
                mean = truth[..., column - 1].abs().max().item() if column in (3, 5) else 0.0
                assert_accurate(
                    mine[..., column],
                    theirs[..., column],
                    truth[..., column],
                    what=f"statistic {column}",
                    scale=mean**2,
                )
        else:
            assert_accurate(
                mine, theirs, truth, what=f"output {number}", rounding=op.rounding(dtype)
            )


def _drawn(call: Callable[..., Any], args: tuple[Any, ...], draws: int) -> list[Tensor | None]:
    """Gradients of several incoming ones, stacked; of one as they are."""
    each = [gradients(call, args, draw=draw)[1] for draw in range(draws)]
    if draws == 1:
        return each[0]
    return [None if of[0] is None else torch.stack(of) for of in zip(*each, strict=True)]


@pytest.mark.parametrize("dtype", FLOATING, ids=_name)
@pytest.mark.parametrize(("op", "sample"), [p for p in each_sample() if p.values[0].grads])
def test_gradients(op: Op, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    args = with_grad(sample.args(device, dtype), op.grads)
    wanted = [value for value in tensors(args) if value.requires_grad]
    # A gradient of one number is one rounding, and may cancel: there several incoming gradients.
    draws = 16 if any(value.numel() == 1 for value in wanted) else 1
    actual = _drawn(op.call, args, draws)
    plain = _drawn(op.reference, args, draws)
    exact = _drawn(op.reference, to_dtype(args, torch.float64), draws)
    assert len(actual) == len(wanted) > 0
    for number, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        if theirs is None and mine is not None:  # an argument that the output does not depend on
            assert not mine.any(), f"gradient {number} should be zero"
            continue
        assert_gradient(mine, theirs, truth, f"gradient {number}", rounding=op.rounding(dtype))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "partial"])
@pytest.mark.parametrize(
    ("op", "sample"), [p for p in each_sample(traced=True) if p.values[0].grads]
)
def test_incoming_gradients_of_any_strides(
    op: Op, sample: Sample, kind: str, device: torch.device
) -> None:
    args = with_grad(sample.args(device, torch.float64), op.grads)
    _, actual = gradients(op.call, args, kind)
    _, expected = gradients(op.reference, args, kind)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None) or not (mine if theirs is None else theirs).any()
        if mine is not None and theirs is not None:
            assert_close(mine, theirs, what="gradient")


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_a_gradient_for_any_subset_of_the_arguments(op: Op, device: torch.device) -> None:
    sample = next(s for s in op.samples if s.traced and s.args("cpu", torch.float64)[0].numel())
    names = {"compact_tokens": "shuffled", "scatter_tokens": "shuffled",
             "attention_stats": "masked with bias",
             "sparse_attention": "masked with statistics"}  # fmt: skip
    if op.name in names:
        sample = op.sample(names[op.name])
    args = sample.args(device, torch.float64)
    everything = with_grad(args, op.grads)
    _, all_grads = gradients(op.call, everything)
    by_place = dict(
        zip((i for i, a in enumerate(everything) if isinstance(a, Tensor) and a.requires_grad),
            all_grads, strict=True)
    )  # fmt: skip
    assert set(by_place) == set(op.grads)
    for place in op.grads:
        out, (grad,) = gradients(op.call, with_grad(args, (place,)))
        assert grad is not None and by_place[place] is not None
        assert_close(grad, by_place[place], what=f"gradient of argument {place} alone")
    out = op.call(*args)
    assert not any(value.requires_grad for value in tensors(out))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_not_differentiable_says_so(op: Op, device: torch.device) -> None:
    args = op.sample(op.samples[0].name).args(device, torch.float32)
    floating = tuple(
        i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()
    )
    outputs = tensors(op.call(*with_grad(args, floating)))
    if op.grads:
        assert outputs[0].requires_grad and outputs[0].grad_fn is not None
        assert not any(out.requires_grad for out in outputs[2:]), "lse is not differentiable"
    elif op.once_only:
        with pytest.raises(RuntimeError, match=op.once_only):
            outputs[0].sum().backward()
    else:
        assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op.twice], ids=lambda op: op.name)
def test_second_derivatives(op: Op, device: torch.device) -> None:
    args = with_grad(op.samples[1].args(device, torch.float64), op.grads)
    leaves = [value for value in tensors(args) if value.requires_grad]

    def second(call: Any) -> list[Tensor]:
        out = call(*args)
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))

    assert_close(second(op.call), second(op.reference), what="second derivative")


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.grads and op.once_only], ids=lambda op: op.name
)
def test_second_derivatives_that_do_not_exist_raise(op: Op, device: torch.device) -> None:
    args = with_grad(op.samples[0].args(device, torch.float64), op.grads)
    leaves = [value for value in tensors(args) if value.requires_grad]
    result = tensors(op.call(*args))[0]
    first = torch.autograd.grad((result**2).sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=op.once_only):
        torch.autograd.grad(sum(g.sum() for g in first if g is not None), leaves)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_changing_a_saved_tensor_before_backward_is_noticed(op: Op) -> None:
    args = with_grad(op.samples[1].args("cpu", torch.float64), op.grads)
    index = [v for v in tensors(args) if v.dtype == torch.int64]
    saved = index[0] if index else args[1]
    leaves = [value for value in tensors(args) if value.requires_grad]
    out = tensors(op.call(*args))[0]
    with torch.no_grad():
        saved.copy_(saved.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_checkpointing_and_saved_tensor_hooks(op: Op, device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    args = with_grad(op.samples[0].args(device, torch.float64), op.grads)
    _, expected = gradients(op.call, args)
    _, again = gradients(lambda *a: checkpoint(op.call, *a, use_reentrant=False), args)
    with torch.autograd.graph.save_on_cpu():
        _, hooked = gradients(op.call, args)
    for mine in (again, hooked):
        for one, other in zip(mine, expected, strict=True):
            assert_same_bits(one, other)


# ---- what a call leaves behind -------------------------------------------------------------------


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_inputs_stay_as_they_are(op: Op, sample: Sample, device: torch.device) -> None:
    args = sample.args(device, torch.float32)
    before = clone(args)
    versions = [value._version for value in tensors(args)]
    outputs = tensors(op.call(*args))
    assert [value._version for value in tensors(args)] == versions
    for now, then in zip(tensors(args), tensors(before), strict=True):
        assert_same_bits(now, then, "argument")
    memory = {value.untyped_storage().data_ptr() for value in tensors(args) if value.numel()}
    for number, out in enumerate(outputs):
        assert not out.numel() or out.untyped_storage().data_ptr() not in memory, (
            "alias of an input"
        )
        for other in outputs[:number]:
            assert not out.numel() or (
                out.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
            ), "two outputs share memory"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_results_are_leaves_of_nothing_under_no_grad(op: Op, device: torch.device) -> None:
    args = op.samples[0].args(device, torch.float32)
    expected = tensors(op.call(*args))
    tracked = with_grad(args, op.grads)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = tensors(op.call(*tracked))
        assert not any(out.requires_grad for out in outputs)
        for mine, theirs in zip(outputs, expected, strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_many_calls_do_not_grow_the_process(op: Op) -> None:
    good = with_grad(op.samples[0].args("cpu", torch.float32), op.grads)
    values = (b for b in op.errors if b.values or b.name.startswith("num_keep too"))
    bad = next(values, op.errors[0])
    wrong = bad.args("cpu")

    def calls(count: int) -> None:
        for _ in range(count):
            gradients(op.call, good)
            with pytest.raises((ValueError, RuntimeError)):
                op.call(*wrong)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    calls(50)
    gc.collect()
    before = resident()
    calls(300)
    gc.collect()
    assert resident() - before < 4 << 20


# ---- determinism ---------------------------------------------------------------------------------


def _outcome(op: Op, args: tuple[Any, ...], call: Any = None) -> list[Tensor]:
    outputs, grads = gradients(call or op.call, args)
    return [value.detach() for value in (*tensors(outputs), *grads) if value is not None]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_any_number_of_threads_gives_the_same_bits(op: Op) -> None:
    args = with_grad(_large(op), op.grads)
    results = []
    for count in (1, 2, 3, 4):
        with threads(count):
            results.append(_outcome(op, args))
    for other in results[1:]:
        if op.weights:  # torch's matrix products split long sums among threads
            assert_close(other, results[0], 1e-5)
            continue
        for mine, theirs in zip(other, results[0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_hundred_repeats_give_the_same_bits(op: Op, device: torch.device) -> None:
    args = with_grad(_large(op, device=device), op.grads)
    first = _outcome(op, args)
    for _ in range(100):
        for mine, theirs in zip(_outcome(op, args), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_instruction_set_gives_the_same(op: Op) -> None:
    sets = isa_control().isas()
    assert "baseline" in sets
    for sample in op.samples:
        for dtype in FLOATING:
            args = with_grad(sample.args("cpu", dtype), op.grads)
            with isa("baseline"):
                expected = _outcome(op, args)
            for name in sets[1:]:
                with isa(name):
                    actual = _outcome(op, args)
                if op.exact:
                    for mine, theirs in zip(actual, expected, strict=True):
                        assert_same_bits(mine, theirs, f"{sample.name} on {name}")
                else:
                    assert_close(actual, expected, 8 * torch.finfo(dtype).eps,
                                 f"{sample.name} on {name}")  # fmt: skip


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_eight_python_threads_at_once(op: Op) -> None:
    calls = [with_grad(s.args("cpu", torch.float32), op.grads) for s in op.samples if s.traced]
    calls.append(with_grad(_large(op), op.grads))
    expected = [_outcome(op, args) for args in calls]
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for step in range(3 * len(calls)):
            number = (first + step) % len(calls)
            actual = _outcome(op, calls[number])
            for mine, theirs in zip(actual, expected[number], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# ---- tracing -------------------------------------------------------------------------------------


def _traced(grads: tuple[bool, ...] = (False, True)) -> list[Any]:
    return [
        pytest.param(*p.values, grad, id=f"{p.id}-{'grad' if grad else 'plain'}")
        for p in each_sample(traced=True)
        for grad in grads
        if p.values[0].grads or not grad
    ]


@pytest.mark.parametrize(("op", "sample", "grad"), _traced())
def test_opcheck(op: Op, sample: Sample, grad: bool, device: torch.device) -> None:
    args = sample.args(device, torch.float32)
    torch.library.opcheck(op.call.default, with_grad(args, op.grads) if grad else args)


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_the_fake_says_what_comes(op: Op, sample: Sample, device: torch.device) -> None:
    for dtype in FLOATING:
        args = sample.args(device, dtype)
        with FakeTensorMode() as mode:
            fakes = tensors(op.call(*tree_map_only(Tensor, mode.from_tensor, args)))
        real = tensors(op.call(*args))
        assert len(fakes) == len(real)
        for fake, value in zip(fakes, real, strict=True):
            assert (fake.shape, fake.dtype, fake.device) == (value.shape, value.dtype, value.device)
            assert fake.stride() == value.stride()
            assert fake.is_contiguous()


def _compiled_outcomes(
    op: Op, args: tuple[Any, ...], grad: bool, backend: Any, dynamic: bool
) -> tuple[list[Tensor], list[Tensor]]:
    def function(*values: Any) -> Any:
        return op.call(*values)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    args = with_grad(args, op.grads) if grad else args
    return _outcome(op, args, compiled), _outcome(op, args)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("op", "sample"), each_sample(traced=True))
def test_compile(op: Op, sample: Sample, dynamic: bool, device: torch.device) -> None:
    args = sample.args(device, torch.float64)
    compiled, eager = _compiled_outcomes(op, args, bool(op.grads), "aot_eager", dynamic)
    assert_close(compiled, eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compile_with_inductor(op: Op, device: torch.device) -> None:
    dynamic = op.exact  # the other half is static
    name = {"attention_stats": "masked with bias", "select_tokens": "(2, 9, 4)"}.get(op.name)
    sample = op.sample(name) if name else op.samples[1]
    args = sample.args(device, torch.float64)
    compiled, eager = _compiled_outcomes(op, args, bool(op.grads), "inductor", dynamic)
    assert_close(compiled, eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_dynamic_sizes_compile_at_most_twice(op: Op) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: op.call(*a), fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 4, 5, 6, 7, 8):
        args = _large(op)
        args = tuple(
            a[:batch].contiguous() if isinstance(a, Tensor) and i not in op.weights else a
            for i, a in enumerate(args)
        )
        assert_close(compiled(*args), op.call(*args), 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.public is not None], ids=lambda op: op.name
)
def test_public_functions_compile_and_export(op: Op) -> None:
    sample = op.samples[1]
    args = sample.args("cpu", torch.float64)
    expected = tensors(op.public(*args))
    compiled = torch.compile(op.public, fullgraph=True, backend="aot_eager")
    assert_close(tensors(compiled(*args)), expected)

    class Call(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            rest = iter(values)
            return op.public(*(next(rest) if isinstance(a, Tensor) else a for a in args))

    exported = torch.export.export(Call(), tuple(tensors(args)))
    assert_close(tensors(exported.module()(*tensors(args))), expected)


# ---- in a model ----------------------------------------------------------------------------------


class Pruner(torch.nn.Module):
    """What a user writes: ops by their `torch.ops` names, between other layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.before = torch.nn.Linear(width, width)
        self.score = torch.nn.Linear(width, 1, bias=False)  # softmax would give it no gradient
        self.after = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        num_tokens = x.shape[1] - 1
        num_keep = num_tokens * 7 // 10
        scores = self.score(x[:, 1:]).squeeze(-1)
        index = torch.ops.spot.select_tokens(scores, num_keep)
        fused = torch.ops.spot.fuse_tokens(x, scores.softmax(-1), index)
        x = torch.ops.spot.compact_tokens(x, index, 1, fused[:, None])
        return self.after(x)


def _images(batch: int, num_tokens: int, device: Any = "cpu") -> Tensor:
    seeded = generator(f"images {batch} {num_tokens}")
    return torch.randn(batch, num_tokens, 16, generator=seeded, dtype=torch.float64).to(device)


def _model(device: Any = "cpu") -> Pruner:
    torch.manual_seed(5)
    return Pruner().double().to(device)


def _losses(model: Any, device: Any, steps: int) -> list[float]:
    """Losses of a few steps on images of growing number and size, then of the first ones again."""
    inner = getattr(model, "_orig_mod", model)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(_images(2 + step, 11 + step, device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in inner.parameters())
        optimizer.step()
        losses.append(loss.item())
    return [*losses, model(_images(2, 11, device)).square().mean().item()]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("dynamic", "backend", "steps"),
    [
        (False, "aot_eager", 2),
        (True, "aot_eager", 4),
        (None, "aot_eager", 4),
        (True, "inductor", 4),
    ],
)
def test_a_model_trains_compiled_as_in_eager(
    dynamic: bool | None, backend: str, steps: int, device: torch.device
) -> None:
    expected = _losses(_model(device), device, steps)
    assert expected[-1] < expected[0]
    compiled = torch.compile(_model(device), fullgraph=True, dynamic=dynamic, backend=backend)
    actual = _losses(compiled, device, steps)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_a_model_exports_with_dynamic_batch_and_tokens(strict: bool, tmp_path: Path) -> None:
    model = _model().eval()
    # From 4 tokens on, since export gives sizes 0 and 1 graphs of their own, whatever the op.
    shapes = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=4)}}
    exported = torch.export.export(model, (_images(2, 11),), dynamic_shapes=shapes, strict=strict)
    used = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    for name in ("select_tokens", "compact_tokens", "fuse_tokens"):
        assert f"spot.{name}.default" in used
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 4), (2, 11), (3, 12), (7, 41), (1, 197)):
        assert_close(loaded(_images(*shape)), model(_images(*shape)))


def test_a_model_exports_for_training() -> None:
    exported = torch.export.export(_model(), (_images(2, 11),)).module()
    torch.testing.assert_close(
        [exported(_images(2, 11)).square().mean().item()],
        [_model()(_images(2, 11)).square().mean().item()],
    )
    exported(_images(2, 11)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in exported.parameters())


class Everything(torch.nn.Module):
    """Every op once, on samples whose tensors are the inputs."""

    def __init__(self, calls: dict[str, tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        outputs = []
        for name, args in self.calls.items():
            filled = [next(rest) if isinstance(a, Tensor) else a for a in args]
            outputs += tensors(OPS[name].call(*filled))
        return tuple(out.clone() for out in outputs)


@pytest.mark.usefixtures("fresh_compiler")
def test_aot_inductor_runs_every_op(device: torch.device, tmp_path: Path) -> None:
    names = {"attention_stats": "masked with bias", "select_tokens": "(2, 9, 4)"}
    calls = {
        op.name: op.sample(names.get(op.name, op.samples[1].name)).args(device, torch.float32)
        for op in OPS.values()
    }
    values = tuple(value for args in calls.values() for value in tensors(args))
    model = Everything(calls)
    exported = torch.export.export(model, values)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "everything.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    assert_close(loaded(*values), model(*values), 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_aot_inductor_with_dynamic_batch_and_tokens(device: torch.device, tmp_path: Path) -> None:
    model = _model(device).eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64),
                    1: torch.export.Dim("tokens", min=4, max=512)}}  # fmt: skip
    exported = torch.export.export(model, (_images(2, 11, device),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for shape in ((1, 4), (2, 11), (5, 30), (1, 197)):
        assert_close(loaded(_images(*shape, device)), model(_images(*shape, device)))


# ---- wrong arguments -----------------------------------------------------------------------------


def _skip_values(bad: Bad, device: torch.device) -> bool:
    """Values are read on the CPU only; elsewhere that would need a synchronisation."""
    return bad.values and cuda_kernels(device)


@pytest.mark.parametrize(("op", "bad"), [p for p in each_error() if p.values[0].public is not None])
def test_public_functions_refuse(op: Op, bad: Bad, device: torch.device) -> None:
    if _skip_values(bad, device):
        op.public(*bad.args(device))
        return
    with pytest.raises(bad.raises) as caught:
        op.public(*bad.args(device))
    assert type(caught.value) is bad.raises
    for word in bad.words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(("op", "bad"), each_error())
def test_ops_refuse(op: Op, bad: Bad, device: torch.device) -> None:
    if bad.op_accepts or _skip_values(bad, device):
        try:
            op.call(*bad.args(device))
        except (RuntimeError, ValueError, TypeError):
            return
        return
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        op.call(*bad.args(device))
    if bad.layouts:
        return
    words = bad.words if bad.op_words is None else bad.op_words
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    ("op", "bad"),
    [
        p
        for p in each_error()
        if not any((p.values[1].values, p.values[1].op_accepts, p.values[1].layouts))
    ],
)
def test_fakes_refuse(op: Op, bad: Bad) -> None:
    args = bad.args("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, args)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            op.call(*fakes)
    if any(isinstance(a, Tensor) and a.device.type == "meta" for a in args):
        return  # torch refuses to mix devices before the fake can
    # Fakes share the checks of the public functions; op_words are for what the schema refuses.
    for word in bad.words if bad.op_words is None else ():
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def _changed(value: Any) -> Iterator[Any]:
    """What might stand in place of an argument, most of it wrong."""
    if isinstance(value, Tensor):
        kinds = *FLOATING, torch.int32, torch.int64, torch.bool, torch.complex64
        yield from (value.to(kind) for kind in kinds if kind != value.dtype)
        yield value[..., None]
        yield value.sum(0)
        for dim, size in enumerate(value.shape):
            yield from (value.narrow(dim, 0, count) for count in {0, 1, size - 1})
            yield torch.cat([value, value.narrow(dim, 0, 1)], dim)
        yield None
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {-1, 0, value - 1, value + 1} - {value}
    elif value is None:
        yield from (True, 0.5, 2, torch.ones(2, 3), torch.ones(2, 2, 6, 6))


def _refusal(op: Op, args: tuple[Any, ...]) -> str | None:
    try:
        op.call(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_fakes_refuse_what_ops_refuse(op: Op) -> None:
    """And nothing else: each argument of some samples changed in many ways, one at a time."""
    seen, refused, accepted = set(), 0, 0
    for sample in op.samples:
        args = sample.args("cpu", torch.float32)
        kinds = tuple(type(value) for value in args)
        if not sample.traced or kinds in seen or not all(t.numel() for t in tensors(args)):
            continue
        seen.add(kinds)
        for place, value in enumerate(args):
            for other in _changed(value):
                changed = (*args[:place], other, *args[place + 1 :])
                real = _refusal(op, changed)
                if real is not None and re.search(r"\w\[\d|0 or 1", real):
                    continue  # values, which fakes do not have
                with FakeTensorMode() as mode:
                    fake = _refusal(op, tree_map_only(Tensor, mode.from_tensor, changed))
                words = f"{sample.name}, argument {place}: op said {real}, fake said {fake}"
                assert (real is None) == (fake is None), words
                refused, accepted = refused + (real is not None), accepted + (real is None)
    assert refused > 5 and accepted > 0


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_forward_mode_is_refused(op: Op, device: torch.device) -> None:
    if op.public is None:
        pytest.fail("a differentiable op without a public function") if not op.twice else None
        return
    sample = op.samples[1]
    for place in op.grads:
        args = list(sample.args(device, torch.float32))
        if args[place] is None:
            continue
        with forward_ad.dual_level():
            args[place] = forward_ad.make_dual(args[place].clone(), torch.ones_like(args[place]))
            with pytest.raises(RuntimeError, match="forward-mode AD"):
                op.public(*args)
    args = list(sample.args(device, torch.float32))
    with pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(lambda x: op.public(x, *args[1:]), (args[0],), (torch.ones_like(args[0]),))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_functional_gradients_work_or_say_why_not(op: Op, device: torch.device) -> None:
    args = op.samples[0].args(device, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return tensors(op.call(x, *args[1:]))[0].square().sum()

    try:
        actual = torch.func.grad(loss)(args[0])
    except RuntimeError as error:
        assert "setup_context" in str(error) or "functorch" in str(error)
        return
    leaf = args[0].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vmap_equals_a_loop(op: Op, device: torch.device) -> None:
    args = op.samples[1].args(device, torch.float64)
    stacked = tree_map_only(Tensor, lambda v: torch.stack([v, v.flip(0), v]), args)
    places = tuple(0 if isinstance(a, Tensor) else None for a in args)
    actual = tensors(torch.vmap(op.call, in_dims=places)(*stacked))
    for item in range(3):
        expected = op.call(*tree_map_only(Tensor, lambda v, i=item: v[i], stacked))
        assert_close([out[item] for out in actual], tensors(expected))


# ---- autocast and FLOPs --------------------------------------------------------------------------


def _cast_by_hand(op: Op, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """What autocast should do to float32 arguments: row ops keep them, arithmetic is cast."""
    places = {
        "fuse_tokens": (0, 1),
        "attention_stats": (0, 1, 2),
        "token_relevance": (0, 1, *range(3, 13)),
        "connectivity": (0, 1),
        "predict_connectivity": tuple(range(8)),
        "sparse_attention": (0, 1, 2),
    }.get(op.name, ())
    assert places or op.exact or op.name.endswith("_backward")
    return tuple(
        a.to(dtype) if i in places and isinstance(a, Tensor) else a for i, a in enumerate(args)
    )


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize(("op", "sample"), each_sample(traced=True))
def test_autocast_to_the_ambient_dtype(
    op: Op, sample: Sample, ambient: torch.dtype, device: torch.device
) -> None:
    args = with_grad(sample.args(device, torch.float32), op.grads)
    with torch.amp.autocast(device.type, dtype=ambient):
        outputs = tensors(op.call(*args))
    expected = tensors(op.call(*_cast_by_hand(op, args, ambient)))
    for mine, theirs in zip(outputs, expected, strict=True):
        assert_same_bits(mine, theirs)
    wanted = [value for value in tensors(args) if value.requires_grad]
    used = [out for out in outputs if out.requires_grad]
    if used:
        sent = cotangents(used)
        mine = torch.autograd.grad(used, wanted, sent, allow_unused=True)
        used = [out for out in expected if out.requires_grad]
        theirs = torch.autograd.grad(used, wanted, sent, allow_unused=True)
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == torch.float32
                assert_same_bits(one, other)


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=_name)
def test_autocast_leaves_float64_alone(ambient: torch.dtype, device: torch.device) -> None:
    for op in OPS.values():
        args = op.samples[1].args(device, torch.float64)
        with torch.amp.autocast(device.type, dtype=ambient):
            outputs = tensors(op.call(*args))
        for mine, theirs in zip(outputs, tensors(op.call(*args)), strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_autocast_in_a_compiled_function(op: Op, device: torch.device) -> None:
    args = op.samples[1].args(device, torch.float32)

    def function(*values: Any) -> Any:
        with torch.amp.autocast(device.type, dtype=torch.float16):
            return op.call(*values)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(tensors(compiled(*args)), tensors(function(*args)), strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, 1e-3)


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_flops(op: Op, sample: Sample) -> None:
    args = sample.args("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        op.call(*args)
    least, most = op.flops(*args)
    assert least <= counter.get_total_flops() <= most
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        op.call(*tree_map_only(Tensor, mode.from_tensor, args))
    assert least <= counter.get_total_flops() <= most


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_flops_of_a_training_step(op: Op) -> None:
    args = with_grad(op.samples[0].args("cpu", torch.float32), op.grads)
    with FlopCounterMode(display=False) as counter:
        gradients(op.call, args)
    least, most = op.flops(*args)
    if op.exact:
        assert counter.get_total_flops() == 0
    else:
        assert 3 * least <= counter.get_total_flops() <= 4 * most
