"""The command line: every command is listed, and what is wrong is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import spot_vit
from spot_vit.cli import main as command
from spot_vit.cli.demo import OTHERS
from spot_vit.cli.main import main
from spot_vit.utils import requirements

FOLDER = Path(command.__file__).parent


def test_every_file_of_a_command_is_listed() -> None:
    listed = {module.__name__.rpartition(".")[2] for module in command.COMMANDS}
    assert listed == {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "main"}
    for name in OTHERS:
        assert (FOLDER.parent / f"demos/{name}.py").exists()


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and all(
        module.__name__.rpartition(".")[2] in text for module in command.COMMANDS
    )


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.split() == ["spot-vit", spot_vit.__version__]


def test_info_prints_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^needs +torch>=[\d.]+, found ", text, re.MULTILINE)
    assert re.search(r"^needs +timm>=[\d.]+,<2, found ", text, re.MULTILINE)
    assert "NOT MET" not in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["needs"]["timm"]["met"] and facts["needs"]["timm"]["found"] == facts["timm"]


def test_info_remarks_on_old_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "_installed", {"torch": "2.14.1", "timm": "0.9.16"}.get)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^NOT MET +timm>=\S+ is needed, found 0\.9\.16: pip", text, re.MULTILINE)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs"]["timm"]["met"] is False


def test_bench_refuses_a_size_without_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "crossover", "--tokens", "7"]) == 2
    assert "no column of [7] tokens; there are 50, 100" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nothing"], ["demo", "nothing"], ["demo", "--seeds", "2"]])
def test_what_is_not_there_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and "error:" in capsys.readouterr().err


def test_how_threads_wait_is_settled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(command, "set_wait_policy", lambda: calls.append("policy"))
    parser = command.parser
    monkeypatch.setattr(command, "parser", lambda: calls.append("parser") or parser())
    assert main(["info", "--json"]) == 0
    assert calls == ["policy", "parser"]


def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("spot_vit.cli.info.requirements", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "spot: interrupted\n"
