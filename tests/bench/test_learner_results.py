"""The learner's benchmark takes hours: what was measured is kept, whoever stops or shares it."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from bench import learner, setup
from bench import learner_results as results
from bench.learner_report import Lead, differing, markdown, table
from cloud.learners.config import LearnerConfig
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from cloud.learners.config import Precision

BASE: dict[str, Any] = {"retention": {"mean": 0.5}, "human": 0.125}
PLAN = learner.Plan(methods=("sft",), skills=("lights", "media"), seeds=(0,))
MADE = results.made(PLAN, LearnerConfig())


def a_run() -> dict[str, Any]:
    run: dict[str, Any] = {"average": 0.5, "bwt": 0.0, "base_kl": 0.1, "human": 0.5}
    run |= {"retention": {"mean": 0.5}, "matrix": [[0.5]], "correct": [["01"]]}
    stage = {"method": "sft", "learn_seconds": 1.0, "precision": "fp32"}
    return run | {"human_correct": ["01"], "stages": [stage]}


def made_of(commit: str = "abc") -> dict[str, Any]:
    return {"method": "sft", "seed": 0, "commit": commit}


def stopped(folder: Path, commit: str = "abc") -> dict[str, Any]:
    """What a run leaves that was killed in its second stage."""
    result = {"stages": [{"steps": 75}], "matrix": [[0.9]], "seconds": 60}
    setup.write(folder / results.STAGES, {"made_of": made_of(commit), "result": result})
    (folder / "0.safetensors").write_bytes(b"learnt")
    (folder / "1").mkdir()
    return result


def test_a_stopped_run_goes_on_after_its_last_whole_stage(tmp_path: Path) -> None:
    result = stopped(tmp_path)
    assert results.whole_stages(tmp_path, made_of()) == result
    assert (tmp_path / "0.safetensors").read_bytes() == b"learnt"


@pytest.mark.parametrize(
    ("kept", "now"), [("abc", "def"), ("abc+", "abc+"), ("", "")], ids=["other", "changed", "none"]
)
def test_stages_of_another_commit_or_of_changed_files_are_done_anew(
    tmp_path: Path, kept: str, now: str
) -> None:
    stopped(tmp_path, kept)
    assert results.whole_stages(tmp_path, made_of(now)) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"made_of": 1}'])
def test_stages_that_cannot_be_read_are_done_anew(tmp_path: Path, text: str) -> None:
    stopped(tmp_path)
    (tmp_path / results.STAGES).write_text(text)
    assert results.whole_stages(tmp_path, made_of()) == {}
    assert not list(tmp_path.iterdir())


def test_runs_that_are_stored_at_once_are_all_kept(tmp_path: Path) -> None:
    """By threads here, which the lock of a file keeps apart as it does processes."""
    out = tmp_path / "full.json"
    runs = [f"{method}/{seed}" for method in ("sft", "lora") for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(results.store, out, MADE, BASE, {r: a_run()}) for r in runs]:
            done.result()
    kept = json.loads(out.read_text())
    assert set(kept["runs"]) == set(runs)
    assert kept["methods"]["lora"]["seeds"] == list(range(8))


def test_results_of_other_options_are_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "full.json"
    results.store(out, MADE, BASE, {"sft/0": a_run()})
    before = out.read_bytes()
    other = results.made(replace(PLAN, skills=("lights",)), LearnerConfig())
    with pytest.raises(InvalidInputError, match=r"other skills.*--out"):
        results.store(out, other, BASE, {"sft/1": a_run()})
    other = results.made(PLAN, LearnerConfig(learning_rate=1.0))
    with pytest.raises(InvalidInputError, match=r"other learning_rate.*--out"):
        results.store(out, other, BASE, {"sft/1": a_run()})
    assert out.read_bytes() == before


def test_a_rival_gets_our_seconds_only_from_a_run_with_as_many_threads_in_its_precision() -> None:
    ours = a_run() | {"threads": PLAN.threads}
    assert results.seconds(ours, PLAN, "fp32") == [1.0]
    with pytest.raises(InvalidInputError, match=r"measured with --threads 9.*--rival-steps"):
        results.seconds(ours | {"threads": 9}, PLAN, "fp32")
    with pytest.raises(InvalidInputError, match=r"measured in fp32.*--rival-steps"):
        results.seconds(ours, PLAN, "bf16")
    assert results.seconds(None, PLAN, "fp32") is None


def test_who_does_not_wait_is_told_at_once_that_another_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "sft-0"
    with setup.alone(folder, wait=False) as first, setup.alone(folder, wait=False) as second:
        assert (first, second) == (True, False)
    with setup.alone(folder, wait=False) as third:
        assert third


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16"), (False, "fp32")])
def test_options_name_the_precision_that_the_machine_has_unless_it_is_given(
    able: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert setup.options([]).precision == expected
    for given in ("fp32", "bf16"):
        assert setup.options([f"precision={given}"]).precision == given


def test_runs_of_two_precisions_share_a_file_and_its_table_says_which_leads_are_between_them(
    tmp_path: Path,
) -> None:
    out = tmp_path / "full.json"
    runs: tuple[tuple[str, Precision], ...]
    runs = (("sdft/0", "bf16"), ("sft/0", "fp32"), ("sft/1", "bf16"))
    for name, precision in runs:
        run = a_run()
        run["stages"][0]["precision"] = precision
        made = results.made(PLAN, LearnerConfig(precision=precision))
        results.store(out, made, BASE, {name: run})
    methods = json.loads(out.read_text())["methods"]
    assert methods["sft"]["precision"] == {"0": "fp32", "1": "bf16"}
    assert methods["sft"]["sdft_other_precision"] == [0]
    text = Console(width=200, record=True)
    text.print(table(methods, BASE | {"human": 0.0}))
    assert "seed 0: sdft in another precision" in text.export_text()


def test_the_table_is_whole_on_a_terminal_of_80_columns() -> None:
    figures: dict[str, Any] = {"average": 0.85, "bwt": -0.955, "base_kl": 0.0688, "human": 0.5}
    figures |= {"retention_drop": -0.0133, "precision": {"0": "bf16", "1": "fp32"}}
    figures |= {"sdft_lead_95": (-0.0433, 0.0067), "sdft_human_lead_95": (0.7179, 0.8182)}
    text = Console(width=80, record=True, file=io.StringIO())
    text.print(table({"sdft_teacher_only": figures}, {"human": 0.0}))
    shown = text.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for whole in ("sdft_teacher_only", "0.850", "-0.955", "0.069", "+0.013", "-4.3, +0.7"):
        assert whole in shown


def runs_of_two_seeds() -> dict[str, Any]:
    runs = {f"{m}/{s}": a_run() for m in ("sdft", "sft") for s in (0, 1)}
    for name, average in (("sdft/0", 0.75), ("sdft/1", 0.5), ("sft/0", 0.25), ("sft/1", 0.25)):
        runs[name] |= {"average": average, "matrix": [[average]]}
    runs["sdft/0"]["correct"], runs["sft/0"]["correct"] = [["1111"]], [["0000"]]
    return runs


def test_a_lead_is_of_the_seeds_that_both_have_and_its_interval_pairs_their_requests() -> None:
    runs = runs_of_two_seeds()
    ours = {0: runs["sdft/0"], 1: runs["sdft/1"]}
    lead = Lead.of(ours, {0: runs["sft/0"], 2: runs["sft/1"]})
    assert lead.by_seed == {0: 0.5}
    assert lead.interval == (1.0, 1.0)  # each of its four requests
    assert Lead.of(ours, ours).interval == (0.0, 0.0)


def test_the_table_for_a_page_has_each_run_their_mean_and_the_leads() -> None:
    text = markdown(runs_of_two_seeds(), BASE, ["sdft", "sft", "lora"], "sdft")
    assert "| as imported | | | 0 | 0 | 0.125 | |" in text
    assert "| `sdft`, seed 0 (fp32) | 0.750 |" in text
    assert "| `sdft`, mean of 2 | 0.625 |" in text
    assert "| `sft` | +50.0, +25.0 | +37.5 ± 12.5 | " in text
    assert "lora" not in text
    assert "seed 0" not in markdown(runs_of_two_seeds(), BASE, ["sdft"], "sdft", means=True)
    turned = markdown(runs_of_two_seeds(), BASE, ["sdft", "sft"], "sft")
    assert "| `sdft` | \N{MINUS SIGN}50.0, \N{MINUS SIGN}25.0 |" in turned


def test_results_with_other_options_are_not_read_together() -> None:
    replayed = results.made(PLAN, LearnerConfig(replay_batch=3))
    fewer = results.made(replace(PLAN, tests=9), LearnerConfig())
    assert differing([MADE, MADE]) == []
    assert differing([MADE, replayed, fewer]) == ["replay_batch", "tests"]
