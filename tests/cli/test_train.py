"""`spot train`: from a command line to a recipe, and what is said when it cannot be."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from spot_vit.cli import train as command
from spot_vit.cli.main import main, parser
from spot_vit.config.recipe import Recipe
from spot_vit.config.recipe_files import read, shipped, to_yaml
from spot_vit.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from spot_vit.cli.main import main
sys.exit(main({words!r}))
"""
TIMM = (
    "data-dir dataset train-split val-split class-map input-key target-key model pretrained "
    "initial-checkpoint model-kwargs num-classes img-size amp amp-dtype channels-last torchcompile "
    "grad-accum-steps grad-checkpointing layer-decay clip-grad clip-mode mixup cutmix smoothing aa "
    "reprob remode recount drop drop-path model-ema model-ema-decay model-ema-warmup seed "
    "log-wandb epochs opt opt-eps opt-betas opt-kwargs momentum lr min-lr warmup-lr warmup-epochs "
    "sched weight-decay resume recovery-interval checkpoint-hist batch-size "
    "validation-batch-size workers output experiment eval-metric log-interval no-aug scale ratio "
    "hflip vflip color-jitter train-interpolation mixup-prob mixup-switch-prob mixup-mode "
    "mixup-off-epoch bce-loss bce-target-thresh bce-sum mean std interpolation crop-pct sync-bn "
    "decay-epochs decay-rate decay-milestones pin-mem device synthetic dataset-download"
)
"""Flags of timm's training script that mean the same here; and --synthetic, which is ours."""


def recipe(*words: str) -> Recipe:
    return command.recipe_of(parser().parse_args(["train", *words]))


def problems(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What is said of a wrong command line, a line each."""
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    lines = said.err.splitlines()
    assert lines[0].startswith("spot train: ")
    return [line.strip() for line in lines[1:]] or [lines[0].removeprefix("spot train: ")]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that were carried out, by a stand-in of the package that does."""
    seen: list[Recipe] = []
    runs = types.ModuleType("spot_vit.runs.train")
    runs.train = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spot_vit.runs.train", runs)
    return seen


# ---- from flags to a recipe ----------------------------------------------------------------------


def test_a_timm_user_types_what_they_know() -> None:
    words = (
        "photos --model vit_tiny_patch16_224 --pretrained --num-classes 7 -b 64 -vb 8 -j 2"
        " --lr 5e-4 --opt lamb --opt-betas 0.9 0.99 --sched step --epochs 3 --amp"
        " --amp-dtype float16 --aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --scale 0.5 1"
        " --model-ema --clip-grad 1.0 --torchcompile --model-kwargs global_pool=avg"
        " class_token=false -d torch/cifar10 --warmup-epochs 0.5 --no-aug --seed 0"
        " --mean 0.5 0.5 0.5 --input-key jpg"
    )
    assert recipe(*words.split()) == Recipe(
        data="photos", model="vit_tiny_patch16_224", pretrained=True, num_classes=7, batch_size=64,
        validation_batch_size=8, workers=2, lr=5e-4, opt="lamb", opt_betas=(0.9, 0.99),
        sched="step", epochs=3, amp=True, amp_dtype="float16", aa="rand-m9-mstd0.5-inc1", mixup=0.8,
        cutmix=1.0, scale=(0.5, 1.0), model_ema=True, clip_grad=1.0, compile=True,
        model_kwargs={"global_pool": "avg", "class_token": False}, dataset="torch/cifar10",
        warmup_epochs=0.5, no_aug=True, seed=0, mean=(0.5, 0.5, 0.5), input_key="jpg",
    )  # fmt: skip


def test_timm_flags_are_there() -> None:
    for word in TIMM.split():
        found = parser().parse_args(["train", f"--{word}"])
        assert found.problems == [] and found.words == [], word


def test_our_own_flags() -> None:
    words = (
        "photos --method dynamicvit --keep 0.8 --at 2 4 --soft fuse --attention-keep 0.3"
        " --teacher best.safetensors --stage finetune --sparsifiner reduce_n=4 --synthetic"
    )
    found = recipe(*words.split())
    assert (found.method, found.keep, found.at, found.soft) == ("dynamicvit", 0.8, (2, 4), "fuse")
    assert (found.attention_keep, found.teacher, found.stage) == (
        0.3, "best.safetensors", "finetune",
    )  # fmt: skip
    assert found.sparsifiner == {"reduce_n": 4} and found.synthetic
    assert recipe("x", "--sampled-keep", "0.3", "0.9").sampled_keep == (0.3, 0.9)
    assert recipe("x", "--features", "embed", "cls").features == ("embed", "cls")


@pytest.mark.parametrize(
    "words",
    ["photos --keep 0.8", "--keep 0.8 photos", "--data-dir photos --keep 0.8",
     "--keep 0.8 --data photos", "--keep 0.8 --amp --no-amp photos"],
)  # fmt: skip
def test_data_may_stand_anywhere(words: str) -> None:
    assert recipe(*words.split()) == Recipe(data="photos", keep=0.8)


def test_flags_go_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-4\nepochs: 7\namp: true\nmodel_kwargs: {a: 1, b: 2}\nkeep: [0.9, 0.5]")
    found = recipe("photos", "-c", str(file), "--epochs", "8", "--no-amp", "--model-kwargs", "b=3")
    assert found == Recipe(
        data="photos", lr=1e-4, epochs=8, model_kwargs={"a": 1, "b": 3}, keep=(0.9, 0.5)
    )
    assert recipe("photos", "--config", "evit-deit-s", "--keep", "0.5") == Recipe.from_dict(
        read("evit-deit-s") | {"data": "photos", "keep": 0.5}
    )


def test_digits_have_a_recipe_of_their_own() -> None:
    own = Recipe.from_dict(read("digits"))
    assert recipe() == recipe("digits") == own
    assert recipe("digits", "--keep", "0.5") == own.replace(keep=0.5)
    assert recipe("digits", "--model", "vit_tiny_patch16_224") == Recipe(
        model="vit_tiny_patch16_224"
    )
    assert recipe("photos") == Recipe(data="photos")


def test_a_run_goes_on_with_its_own_recipe(tmp_path: Path) -> None:
    saved = Recipe(data="photos", epochs=3, output="x", lr=1e-4, initial_checkpoint="a.pt")
    (tmp_path / "recipe.yaml").write_text(to_yaml(saved))
    (tmp_path / "resume.pt").write_bytes(b"")
    assert recipe("--resume", str(tmp_path)) == saved.replace(resume=str(tmp_path))
    state = str(tmp_path / "resume.pt")
    assert recipe("--resume", state, "-j", "1") == saved.replace(resume=state, workers=1)


@pytest.mark.parametrize("name", shipped())
def test_print_config_runs_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["photos", "-c", name, "--keep", "0.6", "--seed", "3", "--print-config"]
    assert main(["train", *words]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "again.yaml"
    file.write_text(text)
    assert recipe("-c", str(file)) == recipe(*words[:-1])
    assert set(yaml.safe_load(text)) == set(Recipe.names()), "complete"


# ---- what is said --------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_listed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epoch: 3\nweight_decay: -1\n")
    found = problems(
        capsys, "photos", "more", "-c", str(file), "--learning-rate", "0.1", "--keep", "2", "--lr",
        "--methd", "x", "--spot", "tau", "--drop", "high", "--torchcompile", "eager",
    )  # fmt: skip
    expected = [
        "--learning-rate is no flag; say --lr",
        "--methd is no flag; did you mean --method?",
        "--lr needs a value: a number above 0",
        "spot takes name=value, got 'tau'",
        "expected one DATA, got photos, more",
        "--torchcompile compiles with inductor, got 'eager'",
        "epoch is no field of a recipe; did you mean 'epochs'?",
        "drop must be a number from 0 to 0.999, got 'high'",
        "keep must be a number from 1e-06 to 1, or a non-empty list, each a number from 1e-06 to "
        "1, got 2.0",
        "weight_decay must be a number of 0 or more, got -1",
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-c spot-deit-x", "there is no file 'spot-deit-x', and the recipes are .*did you mean"),
        ("--method spt", "got 'spt'; did you mean 'spot'"),
        ("--kd-model-name x", "--kd-model-name is no flag; say --teacher"),
        ("--keep", "--keep needs a value"),
        ("--keep 0.5 0.7", "must not rise"),
        ("--seed -1", "seed must be a whole number of 0 or more, got -1"),
        ("--epochs 3.5", "epochs must be a whole number of 1 or more, got '3.5'"),
        ("--data a b", "expected one DATA, got a, b"),
        ("--stage connectivity", "give attention_keep"),
    ],
)
def test_one_problem_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = problems(capsys, *words.split())
    assert len(found) == 1 and re.search(said, found[0]), found


def test_faults_of_the_run_are_one_line(
    trained: list[Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spot_vit.runs.stopping import Stopped
    from spot_vit.training.step import NonFiniteStep

    runs: Any = sys.modules["spot_vit.runs.train"]
    stopped = Stopped(signal.SIGTERM, "go on with --resume run")

    def status(error: BaseException) -> tuple[int, str]:
        def fail(recipe: Recipe) -> None:
            raise error

        monkeypatch.setattr(runs, "train", fail)
        code = main(["train", "photos"])
        return code, capsys.readouterr().err

    assert status(UserError("data: no folder photos")) == (
        2, "spot train: data: no folder photos\n",
    )  # fmt: skip
    assert status(stopped) == (143, "spot train: go on with --resume run\n")
    code, text = status(NonFiniteStep({"loss": float("nan")}, " at step 3"))
    assert code == 1 and text.startswith("spot train: ") and "nan" in text
    assert status(KeyboardInterrupt()) == (130, "spot: interrupted\n")
    with pytest.raises(ZeroDivisionError):  # faults of the program stay faults
        status(ZeroDivisionError())


def test_the_recipe_is_carried_out(trained: list[Recipe]) -> None:
    assert main(["train", "photos", "--keep", "0.5"]) == 0
    assert trained == [Recipe(data="photos", keep=0.5)]


def blocked(packages: set[str], *words: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=packages, words=list(words))
    environment = {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_needs_no_package(words: list[str]) -> None:
    done = blocked({"torch", "timm", "yaml", "jsonargparse", "numpy"}, *words)
    assert done.returncode == 0 and not done.stderr
    assert ("--keep" if len(words) > 1 else "train") in done.stdout


def test_info_needs_no_package() -> None:
    done = blocked({"timm", "yaml", "jsonargparse"}, "info")
    assert done.returncode == 0 and not done.stderr
    done = blocked({"torch", "timm", "yaml", "jsonargparse"}, "info")
    assert done.returncode == 1 and not done.stderr
    assert "No module named 'torch'" in done.stdout and "timm>=" in done.stdout


def test_what_is_missing_is_said() -> None:
    for packages, words in (({"yaml"}, ["photos", "--print-config"]), ({"timm"}, ["photos"])):
        done = blocked(packages, "train", *words)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "pip install 'spot-vit[train]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = blocked({"torch", "timm"}, "train", "photos", "--print-config")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["data"] == "photos"
