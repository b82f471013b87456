"""What calls are given: models inside of wrappers, labels, and what belongs to each of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from ...ops.logprobs import _keep, _logits_dtype, _output_bits

IGNORED = -100  # what transformers ignores


def unwrap(model: Any) -> Any:
    """The transformers model inside of what trains it."""
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("model is a DataParallel, whose replicas share a forward; DistributedDataParallel is expected")
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
            continue
        for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
            inside = getattr(model, name, None)
            if isinstance(inside, nn.Module) and not isinstance(model, transformers.PreTrainedModel):
                model = inside
                break
        else:
            return model


def causal_lm(model: Any) -> Any:
    inner = unwrap(model)
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(f"model is a {type(inner).__name__}; a model of transformers is expected, or one inside of a wrapper")
    if inner.config.is_encoder_decoder or not inner.can_generate():
        kind = "has an encoder" if inner.config.is_encoder_decoder else "cannot generate"
        raise ValueError(f"model is a {type(inner).__name__}, which {kind}; a causal language model is expected")
    return inner


def names_of(outputs: Iterable[str]) -> tuple[str, ...]:
    outputs = outputs if isinstance(outputs, str) else tuple(outputs)
    _output_bits(outputs)
    return tuple(outputs)


def rounding(logits_dtype: str | None) -> str | None:
    if logits_dtype is not None:
        _logits_dtype(logits_dtype)
    return logits_dtype


def positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    return temperature


def spread(temperature: Tensor, rows: int, width: int, padded: bool) -> Tensor:
    """One temperature for each position that the head sees, of one for each column of the result."""
    try:
        temperature = temperature.expand(rows, width)
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; a number is expected, or what broadcasts to {[rows, width]}"
        ) from None
    return functional.pad(temperature, (0, int(padded)), value=1.0)


def spread_rows(keep: Any, rows: int, width: int, padded: bool) -> tuple[Tensor, Tensor]:
    """`keep` for each position that the head sees, of what it is for each element of the result; nothing at the last."""
    offsets, ids = _keep(keep)
    if offsets.shape != (rows * width + 1,):
        raise ValueError(
            f"keep's offsets has shape {list(offsets.shape)}; the result has {rows} x {width} elements, so "
            f"[{rows * width + 1}] is expected"
        )
    if padded:
        starts, ends = (t.reshape(rows, width) for t in (offsets[:-1], offsets[1:]))
        offsets = torch.cat([torch.cat([starts, ends[:, -1:]], 1).flatten(), offsets[-1:]])
    return offsets, ids


def labels_of(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    labels = input_ids
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        counts = attention_mask.bool()
        counts = counts & functional.pad(counts[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~counts, IGNORED)
    if position_ids is not None and position_ids.shape == input_ids.shape:
        labels = labels.masked_fill(position_ids == 0, IGNORED)
    return labels


def shift(labels: Tensor, ignored: int = IGNORED) -> Tensor:
    return functional.pad(labels, (0, 1), value=ignored)[..., 1:]


def mean(logp: Tensor, targets: Tensor, items: Tensor | int | None, ignored: int) -> Tensor:
    if items is None:
        items = (targets != ignored).sum()
    return -logp.sum() / (items.to(logp.device) if isinstance(items, Tensor) else items)


def accepts(kind: type[nn.Module], name: str) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
