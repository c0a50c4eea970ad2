"""The peer: the same demonstrations learnt by TRL's ``SDFTTrainer``, with the paper's recipe.

Runs in an environment of its own (``requirements-trl.txt``) and imports nothing of the project::

    python3 -m venv build/bench/trl-venv
    build/bench/trl-venv/bin/python -m pip install -r bench/peers/requirements-trl.txt
    build/bench/trl-venv/bin/python bench/peers/trl_sdft.py --help

``--data`` holds one demonstration a line: ``prompt``, the chat that the student sees, as a list of
messages with ``role`` and ``content``, the user's last; ``answer``, the text that is right; and for
``--teacher given`` also ``teacher_prompt``, the whole chat that the teacher sees. Chats are laid
out as plain ChatML, to the letter as ``protos.prompt.render`` does it.

What is set, because TRL's defaults are not the paper's (arXiv 2601.19897 and its code):

=============================  ==================================================================
``distillation_alpha=0``       forward KL(teacher || student); TRL's default is Jensen-Shannon
``full_logits``                the whole vocabulary; TRL's default is the student's top 100
``teacher_model_kind="ema"``   and rate 0.01 after every step; TRL's default is a frozen teacher
``num_generations=1``          one answer a prompt, temperature 1, nothing cut from the tail
``max_prompt_length=None``     TRL cuts prompts at 512 tokens from the left, and does not say so
``bf16=False``                 fp32 throughout, but for ``--bf16``, which is TRL's default: products
                               in bfloat16, weights in fp32
no activation checkpointing    TRL's default saves memory and costs time
accumulation 1                 a step is one optimizer step on ``--batch`` new prompts
AdamW, cosine, clip 1.0        warm-up 10 steps from 0, so the first step changes nothing
``distillation_is_clip=None``  no importance weights: answers are never older than the weights
=============================  ==================================================================

The default teacher prompt is the paper's prose. ``--teacher trl`` is TRL's own (the answer behind
the request), ``--teacher given`` the one in the data: TRL's templates only reach the last message,
so its prompt builder is replaced by one that passes the chat on; all else stays TRL's. The paper's
code leaves out the first tokens of an answer; ``--skip-tokens 3`` does that, but a student that has
yet to learn how its answers begin would never learn it.

A step's seconds go from before its rollout to after the teacher's average; ``rollout_seconds`` is
the part until both prompts are ready. TRL drops what is left of a pass over the data. Torch's
threads wait busily: beside other work a step takes many times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "paper": "\n{prompt}\n\nThis is an example for a response to the question:\n"
    "{privileged_context}\n\nNow answer with a response of your own, including the thinking "
    "process.\n",
    "trl": "{prompt}\n\n{privileged_context}",
    "given": "{prompt}{privileged_context}",  # not used: the prompt builder is replaced
}
ONE_STEP = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 1}
SAMPLING = {"num_generations": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
PLAIN_CPU = {"use_cpu": True, "activation_checkpointing": False}
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def demonstrations(path: Path, shown: str) -> list[dict[str, Any]]:
    """Rows for TRL: ``prompt``, and the field ``shown`` that only the teacher sees.

    Raises:
        ValueError: a line is not a demonstration.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"prompt": list(row["prompt"]), "privileged_context": row[shown]})
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path}, line {number}: needs 'prompt', a list of messages, and {shown!r}"
            raise ValueError(msg) from error
    return rows


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.json with ChatML; an answer ends as a turn does."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  # --help need not wait

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(path), eos_token=END, pad_token=END
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's recipe in the words of SDFTConfig; the module's docstring says why."""
    recipe = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "max_completion_length": options.max_completion,
        "max_prompt_length": None,
        "distillation_mode": "full_logits",
        "distillation_alpha": 0.0,
        "distillation_is_clip": None,
        "num_loss_tokens_to_skip": options.skip_tokens,
        "teacher_model_kind": "ema",
        "teacher_update_rate": options.ema_rate,
        "teacher_sync_steps": 1,
        "teacher_prompt_template": TEMPLATES[options.teacher],
        "optim": "adamw_torch_fused",
        "learning_rate": options.learning_rate,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.warmup,
        "max_grad_norm": 1.0,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": options.bf16,
        "seed": options.seed,
    }
    return ONE_STEP | SAMPLING | PLAIN_CPU | recipe


def train(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Train, save if asked, and return what ``--out`` holds."""
    import torch  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer, sdft_trainer  # noqa: PLC0415

    seconds: list[float] = []
    cpu: list[float] = []
    rollout: list[float] = []
    tokens: list[dict[str, int]] = []

    class Watch(TrainerCallback):
        """A stopwatch for steps and their rollouts, and the sizes of padded batches."""

        began = cpu_began = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.began)
            cpu.append(time.process_time() - self.cpu_began)
            print(f"step {len(seconds)}/{options.steps}: {seconds[-1]:.2f} s", file=sys.stderr)

        def on_self_distillation_batch_prepared(self, **batch: Any) -> None:  # noqa: ANN401
            rollout.append(time.perf_counter() - self.began)
            count, completion = batch["completion_ids"].shape
            prompt, teacher = (batch[k].shape[1] for k in ("prompt_ids", "teacher_input_ids"))
            sizes = {"prompt": prompt, "teacher_prompt": teacher - completion}
            tokens.append({"rollouts": count, **sizes, "completion": completion})

    class AsGiven(sdft_trainer.DemonstrationTeacherContextBuilder):  # type: ignore[misc]
        """The teacher's whole chat comes with the data."""

        def _compose_teacher_prompt(self, _prompt: object, privileged_context: object) -> object:
            return privileged_context

    torch.set_num_threads(options.threads)
    recipe = settings(options)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SDFTTrainer(
            model=str(options.model),
            args=SDFTConfig(**recipe, **QUIET, output_dir=scratch),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer_of(options.tokenizer),
        )
        if options.teacher == "given":
            trainer.teacher_context_builder = AsGiven(trainer)
        trainer.add_callback(Watch())  # the last one: the teacher's average is inside a step
        began = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - began
    if options.save:
        trainer.model.save_pretrained(options.save)
        # As it came: transformers 5 writes a config.json whose rotary base 4.x would overlook.
        shutil.copy(options.model / "config.json", options.save / "config.json")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step_seconds": [round(s, 3) for s in seconds],
        "median_step_seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": [round(s, 3) for s in cpu],
        "rollout_seconds": [round(s, 3) for s in rollout],
        "train_seconds": round(total, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        "losses": [entry["loss"] for entry in logs],
        "learning_rates": [entry["learning_rate"] for entry in logs],
        "completion_tokens": [entry["completions/mean_length"] for entry in logs],
        "step_tokens": tokens,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "config": recipe | {"demonstrations": len(rows), "threads": options.threads},
    }


def main() -> None:
    """Read the options, train, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a fp32 model: a student's masters")
    add("--tokenizer", type=Path, help="tokenizer.json (a bundle has one); default: the model's")
    add("--data", type=Path, required=True, help="demonstrations, a JSON object a line: see above")
    add("--teacher", choices=TEMPLATES, default="paper", help="its prompt (default: %(default)s)")
    add("--steps", type=int, default=55, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=8, help="prompts a step (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-5, help="at its peak (default: %(default)s)")
    add("--warmup", type=int, default=10, help="steps of warm-up (default: %(default)s)")
    add("--ema-rate", type=float, default=0.01, help="student in teacher (default: %(default)s)")
    add("--max-completion", type=int, default=40, help="tokens of a rollout (default: %(default)s)")
    add("--skip-tokens", type=int, default=0, help="an answer's first tokens without loss")
    add("--seed", type=int, default=0, help="of order and rollouts (default: %(default)s)")
    add("--bf16", action="store_true", help="mixed precision: products in bfloat16")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--save", type=Path, help="folder for the learnt weights, as safetensors")
    options = parser.parse_args()
    options.tokenizer = options.tokenizer or options.model / "tokenizer.json"
    for needed in (options.model / "config.json", options.tokenizer, options.data):
        if not needed.is_file():
            parser.error(f"{needed} is missing: see --model, --tokenizer and --data above")
    shown = "teacher_prompt" if options.teacher == "given" else "answer"
    try:
        rows = demonstrations(options.data, shown)
    except ValueError as error:
        parser.error(str(error))
    if len(rows) < options.batch:
        parser.error(f"{len(rows)} demonstrations make no batch of {options.batch}: lower --batch")
    # Before transformers and TRL are imported: nothing asks a hub, and TRL is known to be unstable.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    figures = train(options, rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['median_step_seconds']} s a step, peak {figures['peak_mb']} MB: {options.out}")


if __name__ == "__main__":
    main()
