"""Steps around an optimiser: Nesterov extrapolation between stages (APO), and extragradient (EGPO)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ._names import choice, nearest_hint

Params = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]
LORA = ("merge", "stack", "factors")
PHASES = ("start", "extrapolated", "restored")

_CHUNK = 1 << 26  # elements that are in flight at once: 256 MiB per temporary
_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?([AB])(\.|$)", re.IGNORECASE)


# ---- Nesterov


class _Entry(NamedTuple):
    name: str
    new: Tensor
    old: Tensor
    out: Tensor | None


def nesterov_extrapolate(
    params_new: Params,
    params_old: Params,
    alpha: float = 0.3,
    *,
    out: Params | None = None,
    trainable: Callable[[str], bool] | None = None,
    lora: Literal["merge", "stack", "factors"] = "merge",
) -> Any:
    r"""Weights beyond the newest, :math:`\hat\theta = \theta_{new} + \alpha (\theta_{new} - \theta_{old})` (APO).

    For a policy that is linear in its log-probs this is the extrapolation of the policy itself,
    :math:`\hat\pi \propto \pi_{new} (\pi_{new} / \pi_{old})^\alpha`. What comes out is what the next stage samples from and its
    reference.

    Args:
        params_new, params_old: modules, or tensors by name, or sequences of tensors, of the two last stages. Names that only
            the old ones have do not matter; the old ones may lie on another device.
        alpha: the momentum, in [0, 1). 0: a copy of the new weights.
        out: written to and returned; it may be `params_new` or `params_old` itself. None: new tensors, by name or as a list.
        trainable: which names to extrapolate. None: of a module its parameters that require a gradient, of tensors all. What
            is left out, and all that is not floating-point, such as counters, comes from `params_new` as it is. Running
            statistics are floating-point: name what to extrapolate if tensors by name hold them.
        lora: what to do with LoRA factors, known by their names (``lora_A``, ``lora_B``): A and B each extrapolated do not
            give the extrapolated product BA. ``"merge"``: refuse them; merge the adapters into the weights first.
            ``"stack"``: factors of twice the rank whose product is exact, A one above the other and B side by side; load them
            with the scale of the old rank (in peft, twice the `lora_alpha`). ``"factors"``: each by itself, an approximation.

    float32 and float64 are computed as they are; lower precisions in float32, rounded once. A tensor that several names share
    is extrapolated once, and shared in the result. In float32 one extra copy of the weights is needed, if `out` is None,
    and otherwise a piece of 256 MiB or of the largest tensor.

    Raises:
        ValueError: alpha outside [0, 1), other names or shapes, or a NaN or infinity, with the name of its tensor: nothing has
            been written then. (Should a result overflow its dtype, that is only seen on the way.) Waits for the device.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; a number in [0, 1) is expected")
    choice("lora", lora, LORA)
    new, old = _named("params_new", params_new), _named("params_old", params_old)
    dest = None if out is None else _named("out", out)
    wanted = trainable or _requiring_gradients(params_new)
    moving = {name for name, t in new.items() if (t.is_floating_point() or t.is_complex()) and wanted(name)}
    _check(new, old, dest, moving)
    factors = sorted(name for name in moving if _FACTOR.search(name))
    if factors and lora == "merge":
        raise ValueError(
            f"params_new has LoRA factors, such as {factors[0]}: A and B extrapolated are not BA extrapolated. Merge the "
            "adapters first, or choose lora='stack' (exact, twice the rank) or lora='factors' (approximate)"
        )
    with torch.no_grad():
        _check_finite("params_new", {name: new[name] for name in moving})
        _check_finite("params_old", {name: old[name] for name in moving})
        stacked = _stacked(factors, new, old, alpha, dest) if lora == "stack" else {}
        entries = [
            _Entry(name, new[name], old[name], None if dest is None else dest[name])
            for name in new
            if name in moving - stacked.keys()
        ]
        found = _extrapolated(entries, alpha) | stacked
        if dest is not None:
            for name in new.keys() - moving:
                dest[name].copy_(new[name])
            return out
        kept: dict[Any, Tensor] = {}  # what names share, they share in the copy
        for name in new:
            if name not in moving:
                found[name] = kept.setdefault(_place(new[name]), new[name].detach().clone())
    in_order = {name: found[name] for name in new}
    return in_order if isinstance(params_new, (nn.Module, Mapping)) else list(in_order.values())


def _named(what: str, params: Any) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        return dict(params.state_dict(keep_vars=True))
    named = dict(params) if isinstance(params, Mapping) else None
    if named is None and isinstance(params, Sequence):
        named = {str(i): t for i, t in enumerate(params)}
    if named is None or not all(isinstance(t, Tensor) for t in named.values()):
        raise TypeError(f"{what} is a {type(params).__name__}; a module, tensors by name, or a sequence of tensors is expected")
    return named


def _requiring_gradients(params: Params) -> Callable[[str], bool]:
    if not isinstance(params, nn.Module):
        return lambda name: True
    state = params.state_dict(keep_vars=True)
    return lambda name: isinstance(state[name], nn.Parameter) and state[name].requires_grad


def _check(new: dict[str, Tensor], old: dict[str, Tensor], dest: dict[str, Tensor] | None, moving: set[str]) -> None:
    for what, others, names in (("params_old", old, moving), ("out", dest or {}, new.keys() if dest is not None else ())):
        for name in names:
            if name not in others:
                raise ValueError(f"{what} has no {name!r}, which params_new has{nearest_hint(name, others)}")
            if others[name].shape != new[name].shape:
                raise ValueError(
                    f"{what}[{name!r}] has shape {list(others[name].shape)}; {list(new[name].shape)} is that of params_new"
                )


def _check_finite(what: str, tensors: Mapping[str, Tensor], problem: str = "has a NaN or an infinity") -> None:
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(name)
    for names in by_device.values():
        largest = torch._foreach_norm([tensors[name].detach() for name in names], float("inf"))
        finite = torch.stack([x.double() for x in largest]).isfinite().tolist()
        for name, good in zip(names, finite, strict=True):
            if not good:
                raise ValueError(f"{what}[{name!r}] {problem}")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen alike. A tensor without memory of its own is only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _extrapolated(entries: list[_Entry], alpha: float) -> dict[str, Tensor]:
    first: dict[Any, _Entry] = {}
    same: dict[str, str] = {}
    for entry in entries:
        known = first.setdefault(_place(entry.new if entry.out is None else entry.out), entry)
        same[entry.name] = known.name
        if known is not entry:
            for what, one, other in (("params_new", known.new, entry.new), ("params_old", known.old, entry.old)):
                if _place(one) != _place(other) and not torch.equal(one, other):
                    raise ValueError(f"{known.name!r} and {entry.name!r} are one tensor, but differ in {what}")
    distinct = list(first.values())
    results: dict[str, Tensor] = {}
    for chunk in [distinct] if _overlap(distinct) else _chunks(distinct):
        results.update(_extrapolate_chunk(chunk, alpha))
    return {name: results[known] for name, known in same.items() if known in results}


def _chunks(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    chunk: list[_Entry] = []
    size = 0
    for entry in entries:
        if chunk and size + entry.new.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += entry.new.numel()
    if chunk:
        yield chunk


def _overlap(entries: list[_Entry]) -> bool:
    """Whether what is written for one entry may lie where another one reads: then all is read before any is written."""
    if not entries or entries[0].out is None:
        return False
    spans = []
    for i, entry in enumerate(entries):
        for t in {_place(t): t for t in (entry.new, entry.old, entry.out) if t is not None and t.numel()}.values():
            extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + extent * t.element_size(), i))
    spans.sort()
    furthest, of = 0, -1
    for start, end, i in spans:
        if start < furthest and i != of:
            return True
        if end > furthest:
            furthest, of = end, i
    return False


def _extrapolate_chunk(entries: list[_Entry], alpha: float) -> dict[str, Tensor]:
    groups: dict[tuple[torch.device, torch.dtype], list[_Entry]] = {}
    for entry in entries:
        dtype = torch.promote_types(torch.promote_types(entry.new.dtype, entry.old.dtype), torch.float32)
        groups.setdefault((entry.new.device, dtype), []).append(entry)
    results: dict[str, Tensor] = {}
    for (device, dtype), group in groups.items():
        new = [entry.new.detach().to(dtype) for entry in group]
        moved = torch._foreach_sub(new, [entry.old.detach().to(device, dtype) for entry in group])
        torch._foreach_mul_(moved, alpha)
        torch._foreach_add_(moved, new)
        for entry, result in zip(group, moved, strict=True):
            results[entry.name] = result.to((entry.new if entry.out is None else entry.out).dtype)
    _check_finite("out", results, "overflows its dtype")
    written = [(entry.out.detach(), results[entry.name]) for entry in entries if entry.out is not None]
    if written:
        torch._foreach_copy_([out for out, _ in written], [result for _, result in written])
    return {} if written else results


def _stacked(
    factors: list[str], new: dict[str, Tensor], old: dict[str, Tensor], alpha: float, dest: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """(1 + alpha) B A - alpha B' A' as one product of twice the rank."""
    if dest is not None:
        raise ValueError("out is given; lora='stack' doubles the rank, so it makes new tensors")
    results = {}
    for name in factors:
        match = _FACTOR.search(name)
        assert match is not None
        side = match[3]
        other = name[: match.start(3)] + {"A": "B", "B": "A", "a": "b", "b": "a"}[side] + name[match.end(3) :]
        if other not in factors:
            raise ValueError(f"params_new has {name!r} but no {other!r} to extrapolate; lora='stack' needs both")
        one, before = new[name].detach(), old[name].detach().to(new[name].device)
        if side in "Aa":
            results[name] = torch.cat([one, before.to(one.dtype)], 0)
        else:
            wide = torch.promote_types(one.dtype, torch.float32)
            results[name] = torch.cat([one.to(wide) * (1 + alpha), before.to(wide) * -alpha], 1).to(one.dtype)
    return results


# ---- extragradient


class ExtragradientStep:
    """A step whose gradient is taken elsewhere: go ahead, come back, and step from where you were (EGPO).

        half = ExtragradientStep(optimizer)

        loss(model, data_of(model)).backward()
        half.extrapolate()              # a step of the optimizer, to theta_half
        data = data_of(model)           # sampled and judged at theta_half
        half.restore()                  # theta and the optimiser's state as they were, bit for bit
        optimizer.zero_grad()
        loss(model, data).backward()
        half.step()

    For the classic form, whose gradient is that at theta_half, leave out `restore`: `step` does it. Gradients are left alone
    by all three. Losses must be computed after `restore`, or their backward be run before it: it changes weights in place.

    Any optimiser of torch will do that takes a step by itself; LBFGS, whose step evaluates the loss many times, will not. What
    is restored is the parameters, `optimizer.state`, and those options in `param_groups` that the step itself changed: a
    learning rate that a scheduler sets in between stays. Buffers of the model, such as running statistics, are not.

    Args:
        optimizer: its step, with its hooks, is called.
        device: where the copy of parameters and state is kept meanwhile, such as "cpu"; None: where they are.
    """

    def __init__(self, optimizer: Optimizer, *, device: torch.device | str | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; a torch.optim.Optimizer is expected")
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "optimizer is LBFGS, whose step evaluates the loss itself; one that takes a step by itself is expected"
            )
        self.optimizer = optimizer
        self.device = device
        self.phase: Literal["start", "extrapolated", "restored"] = "start"
        self._kept: dict[str, Any] | None = None

    def extrapolate(self) -> None:
        """Keep a copy of everything, and take a step of the optimizer."""
        if self.phase != "start":
            raise RuntimeError(f"extrapolate() was called in phase {self.phase!r}; step() has to come before")
        index = self._index()
        options = [{k: _copied(v, None) for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self._kept = {
            "params": _copied(list(index), self.device),
            "state": {index.get(key, key): _copied(value, self.device) for key, value in self.optimizer.state.items()},
            "options": options,
        }
        self.phase = "extrapolated"
        try:
            self.optimizer.step()
        except BaseException:
            self.restore()
            self.phase = "start"
            raise
        for before, group in zip(options, self.optimizer.param_groups, strict=True):
            absent = [k for k in group if k != "params" and k not in before]
            for k in [k for k, value in before.items() if k in group and _equal(value, group[k])]:
                del before[k]
            before.update(dict.fromkeys(absent, _ABSENT))

    def restore(self) -> None:
        """Put parameters and state back, in place where a tensor is still the same one."""
        if self.phase != "extrapolated" or self._kept is None:
            raise RuntimeError(f"restore() was called in phase {self.phase!r}; extrapolate() has to come before")
        params, state = list(self._index()), self.optimizer.state
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in params], self._kept["params"])
        before = {params[key] if isinstance(key, int) else key: value for key, value in self._kept["state"].items()}
        for key in [key for key in state if key not in before]:
            del state[key]  # made by the step, as the state of most optimisers is by their first
        for key, value in before.items():
            state[key] = _put_back(state.get(key), value, key.device if isinstance(key, Tensor) else None)
        for options, group in zip(self._kept["options"], self.optimizer.param_groups, strict=True):
            for name, value in options.items():
                if _equal(value, _ABSENT):
                    group.pop(name, None)
                else:
                    group[name] = _put_back(group.get(name), value, None)
        self._kept = None
        self.phase = "restored"

    def step(self) -> None:
        """A step of the optimizer from where `extrapolate` started, with the gradients there are now."""
        if self.phase == "extrapolated":
            self.restore()
        if self.phase != "restored":
            raise RuntimeError("step() was called in phase 'start'; extrapolate() has to come before")
        self.optimizer.step()
        self.phase = "start"

    def state_dict(self) -> dict[str, Any]:
        """The phase, and the copy if there is one; to be saved along with the optimizer's own state."""
        return {"phase": self.phase, "kept": _copied(self._kept, None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the phase that `state_dict` was taken in. Load the model's and the optimizer's own state as well."""
        if state.get("phase") not in PHASES:
            raise ValueError(f"state has phase {state.get('phase')!r}; accepted: {', '.join(map(repr, PHASES))}")
        kept = state.get("kept")
        if (kept is not None) != (state["phase"] == "extrapolated"):
            raise ValueError(f"state is {state['phase']} and has {'a' if kept else 'no'} copy of parameters")
        if kept is not None:
            shapes = [list(p.shape) for p in self._index()]
            found = [list(p.shape) for p in kept["params"]]
            if shapes != found:
                raise ValueError(f"state has parameters of shapes {found}; those of the optimizer are {shapes}")
            kept = _copied(dict(kept), self.device)
        self._kept, self.phase = kept, state["phase"]

    def _index(self) -> dict[Any, int]:
        """The parameters, with their places."""
        return {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}


_ABSENT = "prefkern: there was no such option"


def _copied(value: Any, device: torch.device | str | None) -> Any:
    """A deep copy; tensors on the device, if one is named."""
    result: Any
    if isinstance(value, Tensor):
        result = value.detach().clone() if device is None else value.detach().to(device, copy=True)
    elif isinstance(value, dict):
        result = {k: _copied(v, device) for k, v in value.items()}
    elif type(value) in (list, tuple):
        result = type(value)(_copied(v, device) for v in value)
    else:
        result = copy.deepcopy(value)
    return result


def _put_back(current: Any, saved: Any, device: torch.device | None) -> Any:
    """`saved`, in the tensors and dicts of `current` where they fit."""
    if isinstance(saved, Tensor):
        if isinstance(current, Tensor) and current.shape == saved.shape and current.dtype == saved.dtype:
            current.detach().copy_(saved)
            return current
        return saved.to(device) if device is not None and saved.dim() else saved  # counters stay on the host
    if isinstance(saved, dict):
        target = current if isinstance(current, dict) else {}
        for key in target.keys() - saved.keys():
            del target[key]
        for key, value in saved.items():
            target[key] = _put_back(target.get(key), value, device)
        return target
    if type(saved) in (list, tuple):
        known = current if type(current) is type(saved) and len(current) == len(saved) else [None] * len(saved)
        return type(saved)(_put_back(c, s, device) for c, s in zip(known, saved, strict=True))
    return saved


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
