"""`api`: what is compared with other libraries. With `PREFKERN_PARITY_API=reference` it is the definitions, not the kernels."""

import os

import pytest

import prefkern
from prefkern import reference


@pytest.fixture(scope="session")
def api():
    name = os.environ.get("PREFKERN_PARITY_API", "prefkern")
    return {"prefkern": prefkern, "reference": reference}[name]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A Llama of 8 hidden units and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)
