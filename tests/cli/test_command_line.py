"""The command as people type it: help that names everything, errors that say what to do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cloud.cli import main
from cloud.releases.keys import open_keys
from edge.process import locked

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)
COMMANDS = {
    "broker": ["--listen", "--state"],
    "student import": ["--out", "--harness"],
    "cloud": [
        *("--state", "--student", "--channel", "--broker", "--grpc", "--metrics"),
        *(
            "--demonstrations",
            "--learner",
            "--steps",
            "--budget",
            "--min-new",
            "--max-base-kl",
            "--plan",
            "--threads",
        ),
    ],
    "edge": [
        *("--state", "--device", "--trust", "--student", "--channel", "--broker", "--cloud"),
        *("--listen", "--metrics", "--expected-corrections", "--threads", "--memory-limit"),
    ],
    "demo": ["--out", "--seed", "--threads"],
    "rollout list": ["--state", "--json"],
    "rollout show": ["--state", "--channel", "--json"],
    "rollout start": ["--state", "--channel", "--release", "--plan", "--reason"],
    "rollout pause": ["--state", "--channel"],
    "rollout resume": ["--state", "--channel"],
    "rollout abort": ["--state", "--channel", "--reason"],
    "rollout rollback": ["--state", "--channel", "--to", "--plan", "--reason"],
    "device pin": ["--state", "--channel", "--release"],
    "device unpin": ["--state", "--channel"],
    "device unbox": ["--state", "--channel"],
}


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Anabranch = Callable[..., Ended]


@pytest.fixture
def anabranch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Anabranch:
    """Run the command to its end, in an empty folder, on a wide terminal without colours."""
    for name, value in (("COLUMNS", "200"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["anabranch", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return command


def complaint(ended: Ended) -> str:
    """The one line that tells a person what to do."""
    assert ended.code == 1
    assert ended.err.startswith("anabranch: ")
    assert len(ended.err.splitlines()) == 1
    return ended.err


def test_help_names_every_command(anabranch: Anabranch) -> None:
    ended = anabranch("--help")
    assert ended.code == 0
    for name in ("broker", "student", "cloud", "edge", "demo", "rollout", "device"):
        assert re.search(rf"\b{name}\b", ended.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_options(anabranch: Anabranch, command: str) -> None:
    ended = anabranch(*command.split(), "--help")
    assert ended.code == 0
    said = set(re.findall(r"--[a-z-]+", ended.out))
    assert said == {*COMMANDS[command], "--help"}


DEVICE = ("edge", "--state", "state", "--device", "kitchen", "--trust", "trusted.pem")
CLOUD = ("cloud", "--state", "state", "--student", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (CLOUD, "nowhere holds no imported student: run `anabranch student import --out nowhere`"),
        ((*CLOUD, "--broker", "nowhere"), "'nowhere' is not an address: write host:port"),
        ((*CLOUD, "--grpc", "50051"), "'50051' is not an address"),
        ((*CLOUD, "--metrics", "host:port"), "'host:port' is not an address"),
        ((*CLOUD, "--channel", "a/b"), "channel 'a/b'"),
        (DEVICE, "trusted.pem is not there: copy the cloud's keys/trusted.pem to it"),
        ((*DEVICE, "--broker", "1883"), "'1883' is not an address"),
        ((*DEVICE, "--cloud", "host:99999"), "'host:99999' is not an address"),
        ((*DEVICE, "--device", "+"), "device '+'"),
        (("broker", "--listen", "nowhere"), "'nowhere' is not an address"),
        (("student", "import", "nowhere", "--out", "student"), "neither a GGUF file nor"),
    ],
)
def test_what_a_person_can_mend_is_said_in_one_line(
    anabranch: Anabranch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = anabranch(*arguments)
    assert said in complaint(ended)
    assert {p.name for p in tmp_path.iterdir()} <= {"state"}


def test_a_device_without_a_student_says_how_to_get_one(
    anabranch: Anabranch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    open_keys(keys)
    arguments = ("edge", "--state", str(tmp_path / "state"), "--device", "kitchen")
    ended = anabranch(*arguments, "--trust", str(keys / "trusted.pem"))
    assert "--student" in complaint(ended)


@pytest.mark.parametrize(
    "arguments",
    [
        ("student", "import", "--out", "student", "--harness", "nowhere.json"),
        ("cloud", "--state", "state"),
        ("edge", "--threads", "0"),
        ("cloud", "--min-new", "2"),
        ("nonsense",),
    ],
)
def test_an_option_that_is_wrong_in_itself_is_a_usage_error(
    anabranch: Anabranch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ended = anabranch(*arguments)
    assert ended.code == 2
    assert "Usage: " in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--grpc", "--metrics"])
def test_a_cloud_whose_address_is_taken_ends_in_good_order(
    anabranch: Anabranch, tmp_path: Path, tiny_student: Path, option: str
) -> None:
    state = tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = {"--grpc": "127.0.0.1:0", "--metrics": "127.0.0.1:0", option: address}
        arguments = [word for pair in options.items() for word in pair]
        ended = anabranch(
            "cloud", "--state", str(state), "--student", str(tiny_student), *arguments
        )
    assert f"cannot listen on {address}" in complaint(ended)
    assert not (state / "cloud.json").exists()


def test_a_second_cloud_on_the_same_state_is_refused(
    anabranch: Anabranch, tmp_path: Path, tiny_student: Path
) -> None:
    with locked(tmp_path):
        ended = anabranch("cloud", "--state", str(tmp_path), "--student", str(tiny_student))
    assert f"process ({os.getpid()}) runs on {tmp_path}" in complaint(ended)


def test_as_a_process_of_its_own_it_ends_with_the_same_line_and_code() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cloud.cli", "broker", "--listen", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "'nowhere' is not an address" in complaint(Ended(ended.returncode, "", ended.stderr))
