"""Settings of an evaluation."""

from __future__ import annotations

import pytest
from spot_vit.config.evaluation import GROUPS, EvaluationSettings


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as found:
        EvaluationSettings(
            checkpoint="",
            keep=(0.5, 0.5),
            batch_size=0,
            amp_dtype="bfloat",
            use_ema=True,
            corruptions=("fog",),
            imagenet_c="folder",
        )
    text = str(found.value)
    for words in (
        "6 problems",
        "keep must be a non-empty list, each a number above 0 and at most 1, none twice",
        "batch_size must be a whole number of 1 or more, got 0",
        "did you mean 'bfloat16'?",
        "use_ema needs model",
        "imagenet_c is damage that was done already",
        "checkpoint must name a file",
    ):
        assert words in text


def test_they_are_complete_and_survive_json() -> None:
    settings = EvaluationSettings(checkpoint="run", keep=(0.5,), data_args={"canvas": 64})
    assert EvaluationSettings.from_json(settings.to_json()) == settings
    grouped = [name for group in GROUPS for name in group.names()]
    assert sorted([*grouped, "checkpoint"]) == sorted(EvaluationSettings.names())
    assert all(rule.text for _, rule in EvaluationSettings.rules().values())


@pytest.mark.parametrize(
    ("output", "format", "csv"),
    [("a.json", None, False), ("a.CSV", None, True), ("a.csv", "json", False), ("a", "csv", True)],
)
def test_format_of_the_file(output: str, format: str | None, csv: bool) -> None:
    settings = EvaluationSettings(checkpoint="run", output=output, results_format=format)
    assert settings.as_csv is csv
