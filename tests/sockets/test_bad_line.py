"""A device's process behind a line that is cut, stalls, corrupts and delays, with real gRPC.

Whatever the line does, the device comes to the right student, people are answered all the while,
and no byte that came through is fetched again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.sockets.sockets_home import Home
    from tests.sockets.sockets_proxy import Ahead, Trouble
else:
    from sockets_home import Home
    from sockets_proxy import Ahead, Trouble

CUTS = 10
FEW = 700_000
"""Bytes: two chunks and a part of a third."""
CHUNK = 256 * 1024
_HIDDEN, _LAYERS = 512, 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student of eight megabytes: enough to be cut often."""
    from cloud.students.importer import bring_in
    from protos.harness import Harness
    from tests.conftest import make_tiny_folder

    source = make_tiny_folder(tmp_path_factory.mktemp("model"), hidden=_HIDDEN, layers=_LAYERS)
    out = tmp_path_factory.mktemp("imported") / "student"
    bring_in(source, Harness(system="Be brief.", max_tokens=6), out, lambda *_: None)
    return out / "bundle"


@pytest.fixture(scope="module")
def home(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(tmp_path_factory.mktemp("home"), student) as made:
        yield made


@pytest.fixture(autouse=True)
def _people_are_answered(home: Home) -> Iterator[None]:
    before = home.answered
    yield
    home.until(lambda: home.answered > before)
    home.until(lambda: not home.left_over())
    assert home.failures == []


def test_ten_cuts_and_no_byte_is_fetched_twice(home: Home) -> None:
    before, sent = home.fetched(), home.proxy.to_device
    home.proxy.expect(*[Ahead(Trouble.CUT, FEW)] * CUTS)
    release = home.release()
    home.until(lambda: home.serves(release))
    assert not home.proxy.ahead
    assert home.fetched() - before == release["bytes"]
    # Of what was under way at a cut, a device has no whole chunk.
    assert home.proxy.to_device - sent < release["bytes"] + (CUTS + 1) * CHUNK + CHUNK


def test_a_line_that_goes_silent_is_given_up_and_the_download_goes_on(home: Home) -> None:
    before = home.fetched()
    home.proxy.expect(Ahead(Trouble.STALL, FEW), Ahead(Trouble.STALL, FEW))
    release = home.release()
    home.until(lambda: home.serves(release))
    assert not home.proxy.ahead
    assert home.fetched() - before == release["bytes"]


def test_flipped_bits_never_get_into_service(home: Home) -> None:
    before = home.fetched()
    home.proxy.expect(Ahead(Trouble.CORRUPT, FEW), Ahead(Trouble.CORRUPT, FEW))
    release = home.release()
    home.until(lambda: home.serves(release))
    assert not home.proxy.ahead
    assert home.fetched() - before > release["bytes"]  # what was wrong was thrown away


def test_a_slow_line_only_takes_longer(home: Home) -> None:
    home.proxy.expect(Ahead(Trouble.DELAY, CHUNK))
    release = home.release()
    home.until(lambda: home.serves(release))
    assert not home.proxy.ahead


def test_a_disk_that_is_full_for_a_while_holds_up_the_update_alone(home: Home) -> None:
    before = home.fetched()
    home.let_files_have(4 * CHUNK + 1)
    release = home.release()
    home.until(lambda: home.logged("File too large"))
    answered = home.answered
    home.until(lambda: home.answered > answered)
    home.let_files_have()
    home.until(lambda: home.serves(release))
    assert home.fetched() - before <= release["bytes"]


def test_a_device_killed_during_a_download_goes_on_where_it_was(home: Home) -> None:
    home.proxy.expect(Ahead(Trouble.STALL, 4 * CHUNK))
    release = home.release()
    home.until(lambda: home.part() >= CHUNK and not home.proxy.ahead)
    home.kill()
    part = home.part()
    home.start()
    home.until(lambda: home.serves(release))
    assert home.fetched() == release["bytes"] - part
