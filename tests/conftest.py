"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from cloud.broker import EmbeddedBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Tiny models compute no faster on many threads, and threads that wait for one another on a machine
# that is busy with something else stand still. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and processes
# inherit that: those that tests start and stop are to hear it as from a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Give a loopback port that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds, and fail if it does not within half a minute."""

    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 30 s"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[str]:
    """Run a real embedded broker; the value is its ``host:port``."""
    listen = f"127.0.0.1:{free_port()}"
    embedded = EmbeddedBroker(listen=listen, workdir=tmp_path_factory.mktemp("broker"))
    embedded.start()
    yield listen
    embedded.stop()


def make_tiny_folder(folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2) -> Path:
    """A Hugging Face folder with a random small Llama and a byte-level tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    torch.manual_seed(seed)
    config = LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=288,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny student."""
    return make_tiny_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student, imported: ``bundle/`` and ``masters/``."""
    return _imported(tiny_folder, tmp_path_factory.mktemp("tiny-student") / "student")


@pytest.fixture(scope="session")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny student, and wide enough for low-rank products to pay."""
    folder = make_tiny_folder(tmp_path_factory.mktemp("wide-model"), hidden=256)
    return _imported(folder, tmp_path_factory.mktemp("wide-student") / "student")


def _imported(folder: Path, out: Path) -> Path:
    from cloud.students.importer import bring_in
    from protos.harness import Harness

    bring_in(folder, Harness(system="Be brief.", max_tokens=12), out, lambda *_: None)
    return out
