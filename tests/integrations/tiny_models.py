"""Causal language models of a few thousand weights, made on the spot: architectures by name, seeded, in eval mode."""

from __future__ import annotations

from typing import Any

import torch
import transformers

transformers.utils.logging.set_verbosity_error()  # of what is unusual about configs this small

VOCAB, HIDDEN, LAYERS = 97, 32, 2
_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {**_ROPE, "output_router_logits": True, "router_aux_loss_coef": 0.02}

# By the name of its class without the end; what distinguishes the output head of each is beside it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _ROPE),
    "llama_tied": ("Llama", {**_ROPE, "tie_word_embeddings": True}),
    "mistral": ("Mistral", _ROPE),
    "qwen2": ("Qwen2", _ROPE),
    "qwen3": ("Qwen3", {**_ROPE, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_ROPE, "head_dim": 8, "final_logit_softcapping": 0.7}),
    "gemma3": ("Gemma3", {**_ROPE, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "gemma3_uncapped": ("Gemma3", {**_ROPE, "head_dim": 8}),
    "cohere": ("Cohere", {**_ROPE, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2", {**_ROPE, "logit_scale": 0.25, "head_dim": 8}),
    "granite": ("Granite", {**_ROPE, "logits_scaling": 3.0}),
    "phi": ("Phi", {**_ROPE, "num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoX", {**_ROPE, "num_key_value_heads": 4}),
    "opt": ("OPT", {**_ROPE, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "opt_projected": ("OPT", {**_ROPE, "ffn_dim": 48, "word_embed_proj_dim": 16, "enable_bias": False}),
    "bert": ("Bert", {**_ROPE, "is_decoder": True}),  # a head with layers of its own, and a bias
    "falcon_h1": (
        "FalconH1",
        {**_ROPE, "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "bart": ("Bart", {"vocab_size": VOCAB, "d_model": HIDDEN, "decoder_layers": 1, "decoder_attention_heads": 4}),
}
_ENDS = ("ForCausalLM", "LMHeadModel")


def make_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The model of that name. Rows of its head have a norm of about 1, so that log-probs differ, and biases are not 0."""
    family, settings = MODELS[name]
    of_text = "Gemma3Text" if family == "Gemma3" else family
    made = getattr(transformers, f"{of_text}Config")(**{**settings, **config})
    kind = next(getattr(transformers, family + end) for end in _ENDS if hasattr(transformers, family + end))
    torch.manual_seed(seed)
    model = kind(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
        head = model.get_output_embeddings()
        head.weight.normal_(0, HIDDEN**-0.5, generator=generator)
    return model.to(dtype).eval()


def make_batch(*, rows: int = 3, length: int = 9, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """input_ids, an attention_mask that is padded on the right, and labels with some -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
