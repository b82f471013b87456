"""A training step of TRL's GRPOTrainer on the CPU, with TRL's head and with prefkern's: time, memory, exactness.

    python benchmarks/trl_step.py --threads 1 --json benchmarks/results/cpu-trl-step.json

Each variant has a process of its own, so that its peak memory is its own, and they take steps in turns, so that a busy machine
meets all alike: ratios are medians over the rounds of two steps of the same round. The step is the trainer's own: forward
through the model and the head, TRL's GRPO loss, backward, AdamW, on a fixed batch of sampled tokens (sampling itself is the
same in all variants and is left out).

    trl             TRL's head, which on the CPU scores the tokens of the prompt too
    trl-labelled    the same, made to score only the tokens that have a label, as TRL does on GPUs
    prefkern        after `prefkern.integrations.trl.patch()`, which does the same

The error is the largest difference of the log-probs that the trainer computes from those of the same hidden states and head
in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("trl", "trl-labelled", "prefkern")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def save_model(path: str, options: argparse.Namespace) -> None:
    """A small Llama with a large head, whose logits have the spread of a trained model's, and a tokenizer of its size."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(options.vocab)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", eos_token="w1", unk_token="w2"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=2 * options.hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3.0 / options.hidden**0.5)
    model.save_pretrained(path)


def make_trainer(path: str, output: str, dtype: str, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(the trainer, a batch as its rollout would make it)"""
    import datasets
    import torch
    import transformers
    import trl

    trainer = trl.GRPOTrainer(
        model=path,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=output, per_device_train_batch_size=options.batch, num_generations=options.batch, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", model_init_kwargs={"dtype": DTYPES[dtype]},
            max_completion_length=options.completion, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3 w4"] * options.batch}),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    generator = torch.Generator().manual_seed(1)

    def ids(columns: int) -> torch.Tensor:
        return torch.randint(3, options.vocab, (options.batch, columns), generator=generator)

    lengths = torch.randint(options.completion // 2, options.completion + 1, (options.batch,), generator=generator)
    mask = (torch.arange(options.completion) < lengths[:, None]).long()
    batch = {
        "prompt_ids": ids(options.prompt),
        "prompt_mask": torch.ones(options.batch, options.prompt, dtype=torch.long),
        "completion_ids": ids(options.completion),
        "completion_mask": mask,
        "advantages": torch.randn(options.batch, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    return trainer, batch


def log_prob_error(trainer: Any, batch: dict[str, Any]) -> float:
    """Of the log-probs of the completions."""
    import torch

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    columns = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, columns)
        hidden = trainer.model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        weight = trainer.model.lm_head.weight.double()
        worst = 0.0
        for row in range(len(ids)):
            keep = batch["completion_mask"][row].bool()
            z = hidden[row, -columns - 1 : -1][keep].double() @ weight.T
            exact = z.log_softmax(-1).gather(1, batch["completion_ids"][row][keep][:, None])[:, 0]
            worst = max(worst, (logp[row][keep].double() - exact).abs().max().item())
    return worst


def work(variant: str, dtype: str, path: str, options: argparse.Namespace) -> None:
    """A process of one variant: a step for each line "step" that it reads, and its memory and errors at the end."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(options.threads)
    import trl.trainer.utils as hooks

    from prefkern.bench.timing import peak_extra_bytes

    calls = None
    if variant == "prefkern":
        from prefkern.integrations.trl import patch

        calls = patch()
    elif variant == "trl-labelled":
        hooks._use_triton = lambda device: True
    with tempfile.TemporaryDirectory() as output:
        trainer, batch = make_trainer(path, output, dtype, options)
        trainer._prepare_inputs = lambda inputs: inputs

        def step() -> None:
            trainer.training_step(trainer.model, dict(batch), None)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        def answer(**values: Any) -> None:
            print(json.dumps(values), file=answers, flush=True)

        error = log_prob_error(trainer, batch)
        step()
        extra = peak_extra_bytes(step)
        answer(max_error=error, peak_extra_bytes=extra, rows=int(batch["num_items_in_batch"]))
        for line in sys.stdin:
            if line.strip() != "step":
                break
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            answer(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        assert calls is None or calls.calls > 1, "the steps did not go through prefkern's head"
        answer(calls=None if calls is None else calls.calls)


class Worker:
    """The other end of `work`."""

    def __init__(self, variant: str, dtype: str, path: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--work", variant, dtype, path]
        for name in ("threads", "batch", "prompt", "completion", "hidden", "vocab"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.about = self.read()
        self.steps: list[dict[str, float]] = []

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended early: {self.process.args}")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def tell(self, text: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        self.tell("end")
        self.process.wait(60)


def ratio(mine: Worker, theirs: Worker, clock: str) -> float:
    return statistics.median(a[clock] / b[clock] for a, b in zip(mine.steps, theirs.steps, strict=True))


def measure(dtype: str, path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    workers = {variant: Worker(variant, dtype, path, options) for variant in options.variants}
    for done in range(options.rounds):
        order = list(workers) if done % 2 else list(workers)[::-1]
        for variant in order:
            workers[variant].steps.append(workers[variant].tell("step"))
    rows = []
    for variant, worker in workers.items():
        worker.end()
        walls, first = [step["wall"] for step in worker.steps], workers[options.variants[0]]
        rows.append(
            {
                "op": "trl_grpo_step",
                "shape": [options.batch, options.prompt, options.completion, options.hidden, options.vocab],
                "dtype": dtype,
                "mode": "step",
                "outputs": "log_probs, entropy",
                "peer": variant,
                "status": "ok",
                "note": f"{worker.about['rows']} tokens with a label",
                "time_ms": 1e3 * statistics.median(walls),
                "min_ms": 1e3 * min(walls),
                "cpu_ms": 1e3 * statistics.median(step["cpu"] for step in worker.steps),
                f"ratio_{options.variants[0]}": ratio(worker, first, "wall"),
                f"cpu_ratio_{options.variants[0]}": ratio(worker, first, "cpu"),
                "peak_mib": worker.about["peak_extra_bytes"] / 2**20,
                "max_error": worker.about["max_error"],
                "rounds": options.rounds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | head | a step | ratio | extra MiB | max error of log-probs |", "| --- | --- | --- | --- | --- | --- |"]
    first = rows[0]["peer"]
    for row in rows:
        lines.append(
            f"| {row['dtype']} | {row['peer']} | {row['time_ms']:.0f} ms | {row[f'ratio_{first}']:.2f}x | "
            f"{row['peak_mib']:.0f} | {row['max_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("VARIANT", "DTYPE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options)
        return
    import torch

    from prefkern.bench import report

    torch.set_num_threads(options.threads)
    surroundings = report.environment()
    with tempfile.TemporaryDirectory() as path:
        save_model(path, options)
        rows = [row for dtype in options.dtypes for row in measure(dtype, path, options)]
    print(table(rows))
    if options.json:
        command = " ".join(["python benchmarks/trl_step.py", *sys.argv[1:]])
        report.save(report.results(rows, surroundings, command), options.json)


if __name__ == "__main__":
    main()
