"""Fields of a recipe that say how it is trained, on what machine, and where results go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, mapping, setting


@dataclasses.dataclass(frozen=True)
class OptimizerFields(Fields):
    """Optimizer and schedule."""

    epochs: int = setting(30, low=1, text="epochs, the warm-up among them")
    steps: int | None = setting(None, low=1, text="optimizer steps in all, instead of epochs")
    batch_size: int = setting(128, low=1, text="images in a batch of one process")
    validation_batch_size: int | None = setting(None, low=1, text="(batch_size)")
    grad_accum_steps: int = setting(1, low=1, text="batches that make up one optimizer step")
    opt: str = setting("adamw", text="optimizer, as timm names it")
    opt_eps: float | None = setting(None, above=0, text="its epsilon")
    opt_betas: tuple[float, ...] | None = setting(None, low=0, high=0.99999999, text="its betas")
    opt_kwargs: Mapping[str, Any] = mapping(text="further arguments of timm's optimizer")
    momentum: float = setting(0.9, low=0, high=0.99999999, text="of an optimizer that has it")
    weight_decay: float = setting(0.05, low=0, text="of matrices")
    lr: float = setting(1e-3, above=0, text="peak learning rate")
    min_lr: float = setting(1e-6, low=0, text="learning rate at the end")
    warmup_lr: float = setting(1e-6, low=0, text="learning rate at the start")
    warmup_epochs: float = setting(5, low=0, text="epochs from warmup_lr to lr")
    sched: str = setting(
        "cosine",
        choices=("cosine", "tanh", "step", "multistep", "poly"),
        text="schedule, as timm names it",
    )
    decay_epochs: float = setting(10, above=0, text="epochs between drops of the schedule step")
    decay_milestones: tuple[int, ...] = setting(
        (15, 25), low=1, ascending=True, text="epochs at which the schedule multistep drops"
    )
    decay_rate: float = setting(0.1, above=0, high=1, text="factor of those drops")
    layer_decay: float | None = setting(
        None, above=0, high=1, text="factor of the rate from each layer to the one below"
    )
    clip_grad: float | None = setting(None, above=0, text="largest norm, or value, of gradients")
    clip_mode: str = setting("norm", choices=("norm", "value", "agc"), text="how they are clipped")
    model_ema: bool = setting(False, text="keep a moving average of the weights, and evaluate it")
    model_ema_decay: float = setting(0.9998, low=0, high=1, text="its decay at each step")
    model_ema_warmup: bool = setting(False, text="a faster average at first")


@dataclasses.dataclass(frozen=True)
class MachineFields(Fields):
    """Machine."""

    seed: int = setting(42, low=0, text="of everything random")
    workers: int | None = setting(
        None, low=0, text="processes that load images, of each process (4, or the CPUs there are)"
    )
    device: str | None = setting(None, text="cpu, cuda or cuda:N (cuda where there is one)")
    threads: int | None = setting(None, low=1, text="CPU threads of each process (torch's choice)")
    pin_mem: bool = setting(False, text="load into memory that a GPU copies from quickly")
    amp: bool = setting(False, text="mixed precision")
    amp_dtype: str = setting(
        "bfloat16", choices=("bfloat16", "float16"), text="its type; float16 scales the loss"
    )
    channels_last: bool = setting(False, text="images and weights with channels last in memory")
    compile: bool = setting(False, text="compile the training step")
    grad_checkpointing: bool = setting(False, text="compute blocks again to save memory")
    sync_bn: bool = setting(False, text="batch norms over all processes")
    parallel: str = setting("ddp", choices=("ddp", "fsdp"), text="how processes train together")
    static_graph: bool = setting(False, text="tell ddp that every step is alike")


@dataclasses.dataclass(frozen=True)
class OutputFields(Fields):
    """Output."""

    output: str = setting("output/train", text="folder that holds the folders of runs")
    experiment: str | None = setting(None, text="name of the run's folder (a date, and the model)")
    resume: str | None = setting(None, text="go on with the run of this folder")
    val_interval: int = setting(1, low=1, text="epochs from one evaluation to the next")
    eval_metric: str = setting(
        "top1", choices=("top1", "top5", "loss", "map"), text="what best.safetensors is best in"
    )
    checkpoint_hist: int = setting(3, low=0, text="checkpoints of past epochs to keep")
    recovery_interval: int = setting(
        0, low=0, text="steps between saves, besides each epoch and every ten minutes"
    )
    log_interval: int = setting(50, low=1, text="steps from one line of metrics.jsonl to the next")
    log_wandb: bool = setting(False, text="log to Weights & Biases")
    log_tensorboard: bool = setting(False, text="write TensorBoard's files")
