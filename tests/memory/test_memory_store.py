"""Working memory on a real SQLite file."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from edge.memory.store import Demonstration, Memory
from protos.errors import InvalidInputError, StorageError
from protos.prompt import Message

if TYPE_CHECKING:
    from pathlib import Path


def demonstration(identity: str, text: str, answer: str) -> Demonstration:
    return Demonstration(identity, (Message("user", text),), answer)


def shown(memory: Memory, text: str, limit: int = 3) -> list[str]:
    found = memory.nearest([Message("user", text)], limit=limit, min_similarity=0.5)
    return [s.answer for s in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.sqlite"


def test_a_demonstration_is_shown_raw_and_whole(path: Path) -> None:
    memory = Memory(path=path)
    turns = (Message("user", "lamp on"), Message("assistant", "which?"), Message("user", "the red"))
    memory.add(Demonstration("1", turns, '{"name": "red"}'))
    (found,) = memory.nearest([Message("user", "the red")], limit=3, min_similarity=0.5)
    assert found.messages == turns
    assert found.answer == '{"name": "red"}'


def test_the_newest_answer_to_the_same_request_replaces_the_older_one(path: Path) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("1", "lamp on", "old"))
    memory.add(demonstration("2", "lamp off", "off"))
    memory.add(demonstration("3", "Lamp  on", "new"))
    assert shown(memory, "lamp on") == ["off", "new"]
    assert shown(Memory(path=path), "lamp on") == ["off", "new"]


def test_a_wiped_correction_does_not_bring_an_older_one_back(path: Path) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("1", "lamp on", "old"))
    memory.add(demonstration("2", "lamp on", "new"))
    assert memory.wipe(["2", "of another device"]) == 1
    assert shown(memory, "lamp on") == []
    assert Memory(path=path).size == 0


def test_a_correction_newer_than_the_release_survives_the_wipe(path: Path) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("1", "lamp on", "learned"))
    memory.add(demonstration("2", "lamp on", "newer"))
    assert memory.wipe(["1"]) == 0
    assert shown(memory, "lamp on") == ["newer"]


def test_wiping_very_many_ids_works(path: Path) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("7", "lamp on", "on"))
    assert memory.wipe([str(i) for i in range(50_000)]) == 1


def test_memory_is_bounded_and_the_oldest_leave_first(path: Path) -> None:
    memory = Memory(path=path, capacity=3)
    for i in range(5):
        memory.add(demonstration(str(i), f"command {i}", f"answer {i}"))
    assert (memory.size, memory.left) == (3, 2)
    again = Memory(path=path, capacity=3)
    assert shown(again, "command 9", limit=9) == ["answer 2", "answer 3", "answer 4"]
    smaller = Memory(path=path, capacity=1)
    assert shown(smaller, "command 9", limit=9) == ["answer 4"]


def test_adding_the_same_demonstration_again_changes_nothing(path: Path) -> None:
    memory = Memory(path=path)
    for _ in range(2):
        memory.add(demonstration("1", "lamp on", "on"))
    assert memory.size == 1
    assert Memory(path=path).size == 1


def test_an_answer_that_no_prompt_can_hold_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="im_end"):
        demonstration("1", "lamp on", "on<|im_end|>")


def test_memory_survives_sigkill(path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib\n"
        "from edge.memory.store import Demonstration, Memory\n"
        "from protos.prompt import Message\n"
        "memory = Memory(path=pathlib.Path(sys.argv[1]))\n"
        "memory.add(Demonstration('1', (Message('user', 'lamp on'),), 'on'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert shown(Memory(path=path), "lamp on") == ["on"]


def test_a_corrupt_file_is_set_aside_and_memory_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b"this is not a database" * 500)
    memory = Memory(path=path)
    assert memory.size == 0
    memory.add(demonstration("1", "lamp on", "on"))
    assert Memory(path=path).size == 1
    (aside,) = path.parent.glob("memory.sqlite.corrupt-*")
    assert aside.read_bytes().startswith(b"this is not a database")
    assert "set aside" in caplog.text


def test_a_row_that_makes_no_sense_is_left_out_and_reported(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("1", "lamp on", "on"))
    for identity, messages in (("2", "{"), ("3", '[["robot", "hi"]]'), ("4", "5")):
        memory._db.execute(
            "INSERT INTO demonstrations (id, messages, answer) VALUES (?, ?, 'x')",
            (identity, messages),
        )
    memory.close()
    with caplog.at_level(logging.ERROR):
        assert Memory(path=path).size == 1
    assert all(f"demonstration {i} in working memory" in caplog.text for i in "234")


def test_on_a_full_disk_a_demonstration_is_used_until_the_restart(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(path=path)
    pages = memory._db.execute("PRAGMA page_count").fetchone()[0]
    memory._db.execute(f"PRAGMA max_page_count={pages}")
    assert not memory.add(demonstration("1", "lamp on", "on " * 5000))
    assert memory.size == 1
    assert "until the next restart" in caplog.text
    assert Memory(path=path).size == 0


def test_a_wipe_that_the_disk_refuses_forgets_nothing(path: Path) -> None:
    memory = Memory(path=path)
    memory.add(demonstration("1", "lamp on", "on"))
    memory._db.execute("PRAGMA query_only=ON")
    with pytest.raises(StorageError, match="cannot wipe"):
        memory.wipe(["1"])
    assert memory.size == 1


def test_threads_may_recall_while_others_add_and_wipe(path: Path) -> None:
    memory = Memory(path=path)
    failures: list[BaseException] = []

    def guarded(work: int) -> None:
        try:
            for i in range(20):
                identity = f"{work}-{i}"
                memory.add(demonstration(identity, f"command {identity}", identity))
                shown(memory, "command")
                memory.wipe([identity])
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert memory.size == 0
