"""The examples of docs/integrations/trl.md run."""

import re
from pathlib import Path

import pytest

from integrations.trl_tiny import dataset, rewards, save_model, trl
from prefkern.integrations.trl import unpatch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "trl.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_its_examples_run(number, tmp_path, capsys):
    options = {
        "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    names = {
        "model": save_model(tmp_path / "model"), "reward": rewards, "prompts": dataset("GRPO"), "texts": dataset("SFT"),
        "pairs": dataset("DPO"), "args": trl.GRPOConfig(**options, num_generations=4, max_completion_length=6),
        "sft_args": trl.SFTConfig(**options), "dpo_args": trl.DPOConfig(**options),
    }  # fmt: skip
    try:
        exec(EXAMPLES[number], names)
    finally:
        unpatch()
    assert number != 1 or capsys.readouterr().out.endswith("\n1\n")
    assert "trainer" not in names or names["trainer"].state.global_step == 1


def test_there_are_examples():
    assert len(EXAMPLES) == 4
