"""Tiny models, tokenizers and data sets on disk, and the five trainers set up on them."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no telemetry, no look for remote files

trl = pytest.importorskip("trl", minversion="1.16")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

WORDS = [f"w{i}" for i in range(61)]


def save_model(path, dtype=torch.float32, **config):
    """A Llama with an untied head and its word-level tokenizer, in a folder, as TRL wants them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    options = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
        "initializer_range": 0.3,
    }  # fmt: skip
    family = config.pop("family", "Llama")
    configuration = getattr(transformers, f"{family}Config")(**options | config)
    model = getattr(transformers, f"{family}ForCausalLM")(configuration).to(dtype)
    model.generation_config.eos_token_id = [1, *range(20, 30)]  # so that lengths of completions vary
    model.save_pretrained(path)
    return str(path)


def sentence(start, length):
    return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(length))


def dataset(kind, rows=16):
    prompts = [sentence(i, 2 + i % 3) for i in range(rows)]
    if kind in ("GRPO", "RLOO"):
        return datasets.Dataset.from_dict({"prompt": prompts})
    if kind == "SFT":
        return datasets.Dataset.from_dict({"text": [sentence(i, 6 + i % 4) for i in range(rows)]})
    chosen, rejected = (
        [" " + sentence(step * i + 3, 3 + i % length) for i in range(rows)] for step, length in ((5, 4), (11, 3))
    )
    if kind == "DPO":
        return datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    completion = [c if i % 2 else r for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))]
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "completion": completion, "label": [bool(i % 2) for i in range(rows)]}
    )


def rewards(completions, **_):
    """Any function that varies within a group, of equal texts too: TRL's advantages of equal rewards are rounding over eps."""
    return [(sum(map(ord, text)) % 97 + 0.37 * (i % 4)) / 97 for i, text in enumerate(completions)]


def build(kind, path, output, *, trainer=None, reward_funcs=rewards, data=None, trainer_options=None, **options):
    """A trainer of this kind for the CPU, which logs every step."""
    base = {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 1,
    }  # fmt: skip
    if kind in ("GRPO", "RLOO"):
        base |= {"num_generations": 4, "max_completion_length": 6}
    trainer = getattr(trl, f"{kind}Trainer") if trainer is None else trainer
    more = {"reward_funcs": reward_funcs} if kind in ("GRPO", "RLOO") else {}
    return trainer(
        model=path,
        args=getattr(trl, f"{kind}Config")(**base | options),
        train_dataset=dataset(kind) if data is None else data,
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
        **more,
        **(trainer_options or {}),
    )


TIMES = ("time", "runtime", "per_second", "total_flos")


def history(trainer):
    """What each step logged, without times."""
    trainer.train()
    kept = [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in trainer.state.log_history]
    return [entry for entry in kept if "loss" in entry]
