"""Reference log-probs on disk: computed once per model and data, read back bit for bit.

    cache = ReferenceCache("reference-logps")
    ref = refresh_reference(model, batches, lambda m, batch: logps(m, batch), cache)   # once per stage

What is stored is found by two fingerprints: of the model's weights and of the data. Train the model or change a token, and the
log-probs are computed again; leave both alone, and they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FORMAT = "prefkern-reference-1"
# Odd multipliers, as signed 64-bit integers: their sums and products wrap around, on every device alike.
_STEP, _MIX1, _MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BLOCK = 1 << 16  # words of 8 bytes; half a megabyte, which stays in a CPU's cache
_BLOCKS = {"cpu": 1, "cuda": 64}  # at once


class CorruptedCacheError(ValueError):
    """A file of the cache does not hold what was written."""


# ---- fingerprints


def model_fingerprint(
    model: nn.Module | Mapping[str, Tensor],
    *,
    include: Callable[[str], bool] | None = None,
    config: bool = True,
    tag: str = "",
) -> str:
    """64 hexadecimal digits that change when a weight does.

    Every bit of every tensor of the state enters, hashed on the device that it lies on: 8 bytes per tensor come to the host.
    Equal for equal weights, on whatever device and in whatever order of names. It finds changes, not forgeries.

    Args:
        model: a module, or its state by name. Buffers that its `state_dict` leaves out do not count.
        include: which names count; None: all.
        config: for a module with a `config` that has `to_dict`, as those of transformers have, let that count too, apart from
            private entries and the version of the library.
        tag: anything else that the log-probs depend on. An adapter that is switched off leaves the weights as they are: say so
            here.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and (include is None or include(name)))
    if not names:
        raise ValueError("model has no tensors to take the fingerprint of")
    digest = hashlib.sha256(f"{_FORMAT} {tag!r}".encode())
    sums: dict[torch.device, list[Tensor]] = {}
    places = []
    for name in names:
        found = sums.setdefault(state[name].device, [])
        found.append(_bits(name, state[name].detach()))
        places.append((state[name].device, len(found) - 1))
    on_host = {device: torch.stack(found).tolist() for device, found in sums.items()}  # one wait per device
    for name, (device, place) in zip(names, places, strict=True):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {on_host[device][place]};".encode())
    settings = getattr(model, "config", None)
    if config and settings is not None and hasattr(settings, "to_dict"):
        entries = {k: v for k, v in settings.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
        digest.update(json.dumps(entries, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _bits(name: str, tensor: Tensor) -> Tensor:
    """A hash of the tensor's bits, int64 []: 8 bytes at a time are mixed with their place and summed, block by block, and so
    are the blocks."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TypeError(f"model[{name!r}] is a {tensor.layout} tensor on {tensor.device}; a strided one with data is expected")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    places = torch.arange(1, min(_BLOCK, flat.numel() // 8 + 1) + 1, device=flat.device).mul_(_STEP)
    size = 8 * _BLOCK * _BLOCKS.get(flat.device.type, 1)
    blocks = []
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        if piece.numel() % 8:
            piece = torch.cat([piece, piece.new_zeros(-piece.numel() % 8)])
        elif piece.storage_offset() % 8:
            piece = piece.clone()
        words = piece.view(torch.int64)
        whole = words.numel() // _BLOCK * _BLOCK
        for part in (words[:whole].view(-1, _BLOCK), words[None, whole:]):
            if part.numel():
                blocks.append(_mixed(part + places[: part.shape[1]]))
    if not blocks:
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    sums = torch.cat(blocks)
    return _mixed(sums + torch.arange(1, len(sums) + 1, device=flat.device).mul_(_STEP))


def _mixed(x: Tensor) -> Tensor:
    """The sum of hashes along the last dimension; overwrites x. A multiplication comes before each shift, which fills with the
    sign and so makes the same of a number and its complement."""
    x *= _MIX1
    x ^= x >> 32
    x *= _MIX2
    x ^= x >> 29
    return x.sum(-1)


def data_fingerprint(*data: Any) -> str:
    """64 hexadecimal digits that change when the data does.

    data: tensors, arrays, texts, bytes, numbers, None, and mappings and iterables of them. A mapping's order does not count;
    that of all else does, so take it of batches in the order they are computed in. A loader that shuffles has another
    fingerprint each time.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for part in data:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """The value into the digest, so that no two different values feed the same bytes."""
    if isinstance(value, Tensor):
        _feed_bytes(digest, f"tensor {value.dtype} {list(value.shape)}", _bytes(value))
    elif value is None or isinstance(value, (bool, int, float)):
        _feed_bytes(digest, type(value).__name__, repr(value).encode())
    elif isinstance(value, (str, bytes)):
        _feed_bytes(digest, type(value).__name__, value.encode() if isinstance(value, str) else value)
    elif hasattr(value, "__array__"):
        _feed(digest, torch.as_tensor(value))
    elif isinstance(value, Mapping):
        keys = sorted(value, key=repr)
        digest.update(f"mapping {len(keys)};".encode())
        for key in keys:
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, Iterable):
        digest.update(b"items;")
        for item in value:
            digest.update(b"item;")
            _feed(digest, item)
        digest.update(b"end;")
    else:
        raise TypeError(
            f"data holds a {type(value).__name__}; tensors, arrays, texts, bytes, numbers, None, and mappings and iterables of "
            "them are accepted"
        )


def _feed_bytes(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind} {len(content)};".encode())
    digest.update(content)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- the cache


class ReferenceCache:
    """Tensors on disk, found by the fingerprints of a model and of data; one safetensors file for each two.

    A file is written aside and renamed into place: a reader finds all of it or nothing, also if a run is killed while it
    writes (which may leave a hidden `.part` file), or if several processes write at once. With it goes a checksum, so that a
    damaged file is noticed rather than read. Old files stay until they are deleted.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def path(self, model: str, data: str) -> Path:
        """Where the tensors of these two fingerprints are, or would be."""
        return self.directory / f"{hashlib.sha256(f'{model} {data}'.encode()).hexdigest()[:40]}.safetensors"

    def put(self, model: str, data: str, tensors: Mapping[str, Tensor]) -> Path:
        """Store tensors by name, in place of what was there. Returns the file."""
        save = _safetensors().torch.save
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        if not kept:
            raise ValueError("tensors is empty; at least one is expected")
        metadata = {"format": _FORMAT, "model": model, "data": data, "checksum": _checksum(kept)}
        target = self.path(model, data)
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.stem}.{os.getpid()}.{uuid.uuid4().hex}.part")
        try:
            with open(aside, "wb") as file:
                file.write(save(kept, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return target

    def get(self, model: str, data: str) -> dict[str, Tensor] | None:
        """The tensors, on the CPU and bit for bit as they were; None if there are none.

        Raises CorruptedCacheError, a ValueError, if the file is damaged, or was stored for another model or data.
        """
        path = self.path(model, data)
        if not path.exists():
            return None
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        except FileNotFoundError:  # deleted since
            return None
        except safetensors.SafetensorError as error:
            raise CorruptedCacheError(f"{path} cannot be read ({error}); delete it to have it computed again") from error
        expected = {"format": _FORMAT, "model": model, "data": data, "checksum": _checksum(tensors)}
        for key, value in expected.items():
            if metadata.get(key) != value:
                raise CorruptedCacheError(
                    f"{path} is damaged: its {key} is {metadata.get(key)!r}, not {value!r}; delete it to have it computed again"
                )
        return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return data_fingerprint({name: tensors[name] for name in tensors})


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("prefkern.data.ReferenceCache needs safetensors: pip install 'prefkern[data]'") from None
    return safetensors


# ---- the helper that methods with stages use


def refresh_reference(
    model: nn.Module,
    batches: Iterable[Any],
    compute: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]],
    cache: ReferenceCache | None = None,
    *,
    model_hash: str | None = None,
    data_hash: str | None = None,
    tag: str = "",
) -> list[Any]:
    """Log-probs of every batch under the model as it is now; computed, or read if this model and data were seen before.

    Methods that move their reference, from stage to stage or from iteration to iteration, call this when they do. It is one
    pass over the data without gradients, after which the model may be trained: no second one is held in memory.

    Args:
        model: run in evaluation mode, so without dropout; each of its modules gets its own mode back.
        batches: what `compute` takes, in an order that is the same each time. An iterator is read into a list first, since
            the data is looked at once for its fingerprint and once more to compute.
        compute: given the model and a batch, a tensor or several by name.
        cache: None: always compute.
        model_hash, data_hash: the fingerprints, where the caller knows them; None: :func:`model_fingerprint` of the model, and
            :func:`data_fingerprint` of the batches.
        tag: tells apart what several `compute` functions put into one cache, such as sums and means, or an adapter switched
            off: fingerprints see weights and data only.

    Returns:
        For each batch what `compute` gave, on the CPU and detached; the same bits whether computed or read. A damaged file is
        computed again and replaced, with a warning.
    """
    if isinstance(batches, Iterator):
        batches = list(batches)
    keys = None
    if cache is not None:
        keys = (model_hash or model_fingerprint(model), data_fingerprint(data_hash or data_fingerprint(batches), tag))
        try:
            found = cache.get(*keys)
        except CorruptedCacheError as error:
            warnings.warn(f"{error}. It is computed again now.", stacklevel=2)
            found = None
        if found is not None:
            return _unpacked(found)
    results: list[Any] = []
    with _evaluating(model), torch.no_grad():
        for i, batch in enumerate(batches):
            result = compute(model, batch)
            if isinstance(result, Tensor):
                results.append(result.detach().cpu())
            elif isinstance(result, Mapping) and result and all(isinstance(value, Tensor) for value in result.values()):
                results.append({name: value.detach().cpu() for name, value in result.items()})
            else:
                raise TypeError(f"compute gave {result!r} for batch {i}; a tensor, or several by name, is expected")
    if cache is not None and keys is not None and results:
        cache.put(*keys, _packed(results))
    return results


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; some of its modules may have been in it before, so each has its own mode restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _packed(results: list[Any]) -> dict[str, Tensor]:
    """One mapping: "3" for the tensor of batch 3, "3/name" for a named one."""
    packed: dict[str, Tensor] = {}
    for i, result in enumerate(results):
        packed.update({str(i): result} if isinstance(result, Tensor) else {f"{i}/{name}": t for name, t in result.items()})
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> list[Any]:
    results: dict[int, Any] = {}
    for key, tensor in packed.items():
        number, slash, name = key.partition("/")
        if slash:
            results.setdefault(int(number), {})[name] = tensor
        else:
            results[int(number)] = tensor
    return [results[i] for i in sorted(results)]
