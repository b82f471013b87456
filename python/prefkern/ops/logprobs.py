"""Log-probabilities of chosen tokens, with entropy and other softmax statistics in the same pass.

``linear_logprobs`` starts from hidden states and the head's weight and never holds a tensor of N x V elements;
``logits_logprobs`` starts from logits. Kernels: ``csrc/logprobs``; formulas: ``csrc/math/logits.h``, ``csrc/math/softmax.h``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._names import nearest_hint
from . import _backward_plan as _plans
from ._arguments import accumulator, check_tensors, integer, is_dtensor, number, positive_int, same_device
from ._backward_plan import BackwardPlan
from ._call import call, differentiated_once, no_double_backward, validation
from .types import LinearLogprobs

_OPS = torch.ops.prefkern
_linear, _linear_fwd = _OPS.linear_logprobs.default, _OPS.linear_logprobs_fwd.default
_ext, _ext_fwd = _OPS.linear_logprobs_ext.default, _OPS.linear_logprobs_ext_fwd.default
_saving, _saving_fwd = _OPS.linear_logprobs_saving.default, _OPS.linear_logprobs_saving_fwd.default
_logits, _logits_fwd = _OPS.logits_logprobs.default, _OPS.logits_logprobs_fwd.default

OUTPUTS = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
_BITS = {name: 1 << i for i, name in enumerate(OUTPUTS)}
_SAVE_STATS = 32
_GRAD_HIDDEN, _GRAD_WEIGHT, _GRAD_BIAS, _GRAD_LORA_A, _GRAD_LORA_B = 1, 2, 4, 8, 16
_ENTROPY, _LSE = _BITS["entropy"], _BITS["lse"]
_DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
    torch.float64: _C.DType.float64,
}
_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as an op takes them

_LOGITS_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    keep: tuple[Tensor, Tensor] | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    logits_dtype: str | None = None,
    chunk_bytes: int | None = None,
    save: str = "auto",
    save_bytes: int | None = None,
    group: Any = None,
    vocab_offset: int | None = None,
    vocab: int | None = None,
) -> LinearLogprobs:
    r"""Log-probability of each target under the softmax of a linear head, without the logits.

    With :math:`z = \mathrm{cap}(s\,(h W^\top + b)) / \tau` and :math:`\mathrm{cap}(x) = c \tanh(x / c)`, returns
    :math:`\log p_y = z_y - \log\sum_v e^{z_v}` and, when asked for, statistics of the same distribution.

    Args:
        hidden: ``[..., H]`` float32, bfloat16 or float16 (float64 on the CPU), any strides.
        weight: ``[V, H]``, same dtype and device. Under autocast both are cast to its dtype.
        targets: ``[...]`` int64 or int32, values in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]``, any floating dtype.
        temperature: :math:`\tau > 0`, a number or one per row (broadcast to ``targets``; not differentiable).
        softcap: :math:`c > 0` (Gemma's final logit soft-capping), or None.
        logit_scale: :math:`s > 0` (Cohere's logit scale, Granite's 1 / logits_scaling).
        ignore_index: rows with this target give 0 in every output and no gradient; on the CPU they cost nothing.
        outputs: any of ``"entropy"`` (nats), ``"lse"`` (log-sum-exp of z), ``"sum_sq_probs"``, ``"mean_logit"`` (mean of z
            over V), ``"is_top1"`` (z_y is the first maximum). Only what is asked for is computed.
        keep: ``(offsets, ids)``: the tokens each row may draw, as a sampler's top-k or top-p left them (CSR). int64 offsets
            ``[N + 1]`` over the N rows of ``targets``, flattened, from 0 to the length of ids; int64 or int32 ids, ascending
            within a row, none twice. Every statistic is that of the softmax over the kept tokens alone: all others count as
            logits of -inf, and ``mean_logit`` is the mean over the kept. Nothing flows to what is not kept. A row that does not
            keep its target has logp -inf, to which no gradient flows; under ``prefkern.set_validation(True)`` it raises. A row
            that keeps nothing is an error, on CUDA NaN; ignored rows may keep nothing.
        lora: ``(a, b, s)``: a low-rank update of the head, as if the weight were :math:`W + s\,b\,a`, with a ``[r, H]`` and b
            ``[V, r]`` of the same dtype and device as ``hidden`` (cast under autocast as the weight is) and a number s. Neither
            that sum nor :math:`b\,a` is formed: :math:`h W^\top + s\,(h a^\top) b^\top` takes :math:`h a^\top` (``[N, r]``) and
            a second product onto each block of logits. On the CPU :math:`h a^\top` is held in the accumulators' type; on CUDA
            it is rounded once to the inputs' dtype, which the second product takes, and so is its gradient.
        logits_dtype: ``"bfloat16"`` or ``"float16"``: the raw logits :math:`h W^\top + b`, ``lora`` in them, are rounded to
            this type, once and after everything has been added (as ``F.linear`` in that type does), and all that follows is
            computed from the rounded ones in float32: what a sampler sees whose head writes that type. The backward takes
            exactly the logits of the forward, and gradients pass straight through the rounding. None or ``"float32"``: logits
            stay as they are accumulated. Rounding is for float32, bfloat16 and float16 inputs.
        chunk_bytes: workspace budget in bytes; None for the default (see ``prefkern.plan_chunks``). Results do not depend
            on it beyond rounding, which is that of ``logits_dtype`` where there is one; equal calls give equal bits.
        save: what the forward leaves for the backward, so that the logits are not computed again. F is a GEMM of 2 N V H flops.

            ``"recompute"``: two numbers per row. 4F in all with the gradients of hidden and weight, 3F with one of them.

            ``"logits"``: the raw logits, N V elements in the dtype of the inputs or of ``logits_dtype``. 3F, or 2F with one
            gradient. Log-probs and statistics are those of the float32 logits all the same; the gradient of bfloat16 and
            float16 inputs is taken from logits rounded to that type, which gives it the accuracy of a head in plain PyTorch.

            ``"u"``: where nothing but hidden needs a gradient, the gradient of each row's logp in its hidden state,
            :math:`u = s/\tau\,(W_y - E_p W)` (with a softcap, its slopes in it), N H elements in the accumulators' type, which
            the backward multiplies with the upstream gradient: 2F in all. With ``"entropy"`` among the outputs a third product
            and N H elements more, with ``"lse"`` N H elements more. On the CPU, without ``lora``; hidden and weight are not
            held. Rounding is that of float32.

            ``"auto"``: the fewest F that ``save_bytes`` has room for, then the fewest bytes; see ``prefkern.plan_backward``.
            With no budget given: ``"u"`` where it can be and neither entropy nor lse is an output, because u is then no
            larger than hidden's gradient in float32; else ``"recompute"``.
        save_bytes: how many bytes ``"auto"`` may hold from the forward to the backward; 0 to save nothing.
        group, vocab_offset, vocab: see below.

    Rows whose upstream gradients are all exactly 0 leave the backward on the CPU as ignored rows do, and nothing of their
    hidden states is looked at: with a part :math:`\rho` of them left, recomputing costs :math:`F + 3\rho F` in all.

    Returns:
        LinearLogprobs with fields shaped like ``targets``, float32 (float64 for float64 input, is_top1 bool), None where
        not asked for. Gradients flow from logp, entropy and lse to hidden, weight and bias, and to a and b of ``lora``; none is
        computed that nobody needs, so a frozen weight costs no gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Targets out of range and temperatures
            that are not positive are always found on the CPU; on CUDA such rows come out NaN, or raise under
            ``prefkern.set_validation(True)``. Likewise offsets and ids of ``keep``; on CUDA wrong ones are never read beyond
            their ends, but their rows have no meaning.

    Memory: one block of logits plus converted operands, O(chunk_bytes), and O((N + V) H) for gradients, with ``"u"`` from the
        forward on; with ``lora`` also ``[N, r]``, twice in the backward; with ``save="logits"`` or a budget what they say.

    A vocabulary over several processes: ``group`` is a process group of ``torch.distributed``, or ``"world"`` (gloo for tensors
    on the CPU, NCCL on GPUs), whose processes hold the weight's rows, and the bias, in ranges ``[V_r, H]`` one after the other
    in the order of their ranks; of any sizes, 0 too. All of them call with the same hidden, targets (ids in the whole
    vocabulary) and options, get the same bits, and compute the same loss from them. As with a column-parallel linear layer and
    a vocabulary-parallel cross entropy, each process's hidden gradient is then that of the whole head, summed over the ranges
    in float32 and equal on all; the gradients of weight and bias are those of its own range. Messages: one all-gather of
    28 N + 28 bytes per process in the forward, one all-reduce of 4 N H bytes in the backward if hidden requires a gradient
    (float64: twice that).

    ``vocab_offset``, the token of the range's first row, and ``vocab``, the V of all ranges, are gathered by a second message
    if they are not given, which the host waits for; ``prefkern.distributed.vocab_shard`` gives them once for many calls. Give
    both on every process or on none. With ``vocab`` alone the ranges must sum to it. Processes that disagree in rows, dtypes,
    options or ranges raise ValueError, all of them, and RuntimeError where another one refuses its arguments; on CUDA, with
    the ranges given and without ``prefkern.set_validation(True)``, they get NaN instead. What cannot be told so, as messages
    of two lengths, ends with an error of the backend or the group's timeout. Such a call cannot be compiled: put it under
    ``torch.compiler.disable``, and it takes no ``keep``, ``lora`` or ``logits_dtype``, and saves nothing: of
    ``save`` it takes ``"auto"`` and ``"recompute"``, without ``save_bytes``.

    A DTensor as weight means its whole, gathered by ``full_tensor()``: each process has rows of its own, as in FSDP2, and the
    weight's gradient, a DTensor of the same placements, is the mean over the processes of its mesh
    (``prefkern.distributed.gathered`` says how else). With ``group`` the processes have the same rows: a weight in ``Shard(0)``
    on a mesh of those processes is used in place, each process its own part, whose place in the vocabulary is known; one in
    other placements is gathered, and every process computes the whole head.
    """
    budget = None if save == "auto" and save_bytes is None else _plans.checked(save, save_bytes)
    if group is not None or vocab_offset is not None or vocab is not None or is_dtensor(weight):
        _plans.check_recomputes(save, save_bytes)
        from ..distributed import vocab_parallel

        return vocab_parallel.linear_logprobs(
            hidden, weight, targets, group=group, vocab_offset=vocab_offset, vocab=vocab, bias=bias, keep=keep, lora=lora,
            logits_dtype=logits_dtype, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            ignore_index=ignore_index, outputs=outputs, chunk_bytes=chunk_bytes,
        )  # fmt: skip
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    keep_offsets, keep_ids = (None, None) if keep is None else _keep(keep)
    lora_a, lora_b, lora_scale = (None, None, 1.0) if lora is None else _lora(lora)
    bits = _output_bits(outputs)
    shape = targets.shape
    _check_rows("hidden", hidden, "H", shape)
    if hidden.is_cuda and weight.ndim == 2:  # another weight is the op's to refuse
        _validate(targets, temperature, weight.shape[0], ignore_index)
    if keep_offsets is not None and keep_ids is not None and weight.ndim == 2:
        _validate_keep(keep_offsets, keep_ids, targets, weight.shape[0], ignore_index)
    tau, row_temperature = _split_temperature(temperature, shape)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, lora_a, lora_b = _autocast(hidden, weight, lora_a, lora_b)
    if targets.ndim != 1:
        hidden, targets = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    args = (tau, _softcap(softcap), number("logit_scale", logit_scale), integer("ignore_index", ignore_index))
    chunk = 0 if chunk_bytes is None else positive_int("chunk_bytes", chunk_bytes)
    rounding = 0 if logits_dtype is None else _logits_dtype(logits_dtype)
    if (
        save != "recompute"
        and torch.is_grad_enabled()
        and (saving := _saved(hidden, weight, bias, lora_a, lora_b, bits, rounding, save, budget))
    ):
        out = call(
            _differentiable(_saving, _LinearLogprobsSaving),
            hidden, weight, targets, bias, row_temperature, lora_a, lora_b, keep_offsets, keep_ids,
            *args, lora_scale, rounding, bits | _SAVE_STATS, chunk, saving,
        )  # fmt: skip
        return _result(out, bits, shape)
    if lora_a is not None or rounding or keep_offsets is not None:
        tensors = (hidden, weight, targets, bias, row_temperature, lora_a, lora_b, keep_offsets, keep_ids)
        numbers = (*args, lora_scale, rounding)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            out = call(_differentiable(_ext, _LinearLogprobsExt), *tensors, *numbers, bits | _SAVE_STATS, chunk)
        else:
            out = call(_ext_fwd, *tensors, *numbers, bits, chunk)
        return _result(out, bits, shape)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        out = call(
            _differentiable(_linear, _LinearLogprobs),
            hidden,
            weight,
            targets,
            bias,
            row_temperature,
            *args,
            bits | _SAVE_STATS,
            chunk,
        )
    else:
        out = call(_linear_fwd, hidden, weight, targets, bias, row_temperature, *args, bits, chunk)
    return _result(out, bits, shape)


def logits_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    inplace_backward: bool = False,
) -> LinearLogprobs:
    """Log-probability of each target from logits, reading them once.

    Args:
        logits: ``[..., V]`` float32, bfloat16 or float16 (float64 on the CPU). ``[B, T, V]`` may have any strides before
            the last axis, so ``logits[:, :-1]`` is not copied.
        targets: ``[...]`` int64 or int32.
        inplace_backward: the backward overwrites ``logits`` with their gradient instead of allocating a second tensor of
            their size. For logits that nothing else reads afterwards; autograd raises if another op saved them. They must
            not be a leaf. Under ``torch.compile`` the gradient is a new tensor (the compiler plans its own memory).
        temperature, softcap, logit_scale, ignore_index, outputs: as in :func:`linear_logprobs`.

    Returns:
        As :func:`linear_logprobs`. Gradients flow from logp, entropy and lse to logits, in the logits' dtype.
    """
    check_tensors(logits=logits, targets=targets)
    bits = _output_bits(outputs)
    shape = targets.shape
    _check_rows("logits", logits, "V", shape)
    if logits.is_cuda:
        _validate(targets, temperature, logits.shape[-1], ignore_index)
    tau, row_temperature = _split_temperature(temperature, shape)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward is {inplace_backward!r}; True or False is expected")
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and needs_grad and (logits if logits._base is None else logits._base).is_leaf:
        raise ValueError(
            "inplace_backward would overwrite logits, which is a leaf that requires a gradient, or a view of one; "
            "pass a result of the model, or False"
        )
    if logits.ndim not in (2, 3):
        logits = logits.reshape(targets.numel(), logits.shape[-1])
    if targets.ndim != 1:
        targets = targets.reshape(-1)
    args = (tau, _softcap(softcap), number("logit_scale", logit_scale), integer("ignore_index", ignore_index))
    op, extra = (_differentiable(_logits, _LogitsLogprobs), _SAVE_STATS) if needs_grad else (_logits_fwd, 0)
    return _result(call(op, logits, targets, row_temperature, *args, bits | extra, inplace), bits, shape)


def plan_chunks(
    rows: int,
    hidden: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backward: bool = False,
    chunk_bytes: int | None = None,
) -> Any:
    """How :func:`linear_logprobs` will cut a call with ``rows`` tokens: ``row_chunk``, ``vocab_block``,
    ``workspace_bytes``, ``fused``. The plan depends on these arguments and, on the CPU, on who makes its matrix products
    (``prefkern.capabilities()["cpu_gemm"]``): where this library does, a forward is ``fused``, every thread folding blocks of
    its own as it makes them, and takes a workspace per thread. With ``lora`` count its rank into ``hidden``. A forward with
    ``lora``, ``keep`` or a ``logits_dtype`` is not fused, and with one that rounds it has the plan of its backward."""
    for name, value in (("rows", rows), ("hidden", hidden), ("vocab", vocab)):
        if integer(name, value) < 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; accepted: {', '.join(map(str, _DTYPES))}")
    budget = 0 if chunk_bytes is None else positive_int("chunk_bytes", chunk_bytes)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; accepted: 'cpu', 'cuda'")
    return _C.plan_chunks(rows, hidden, vocab, _DTYPES[dtype], kind == "cuda", backward, budget)


def plan_backward(
    rows: int,
    hidden: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    needs: Iterable[str] = ("hidden", "weight"),
    outputs: Iterable[str] = (),
    lora: bool = False,
    logits_dtype: str | None = None,
    save: str = "auto",
    save_bytes: int | None = None,
    chunk_bytes: int | None = None,
) -> BackwardPlan:
    """What :func:`linear_logprobs` will save for its backward, and what that costs.

    Args:
        rows, hidden, vocab, dtype, device, chunk_bytes: as in :func:`plan_chunks`.
        needs: what needs a gradient: any of ``"hidden"``, ``"weight"``, ``"bias"``, ``"lora"``.
        outputs: as in :func:`linear_logprobs`; entropy and lse make u larger.
        lora: whether there is a low-rank update, trained or not; ``"lora"`` in ``needs`` says so too.
        logits_dtype, save, save_bytes: as in :func:`linear_logprobs`.

    Returns:
        BackwardPlan: ``save``, ``forward_products`` and ``backward_products`` (of 2 N V H flops each, ``products`` in all),
        ``saved_bytes``, ``workspace_bytes``. It depends on nothing but these arguments.

    Raises:
        ValueError, TypeError: naming the argument; and where ``save="u"`` cannot be.
    """
    forward, backward = (
        plan_chunks(rows, hidden, vocab, dtype=dtype, device=device, backward=b, chunk_bytes=chunk_bytes) for b in (False, True)
    )
    rounding = 0 if logits_dtype is None else _logits_dtype(logits_dtype)
    bits, names = _output_bits(outputs), _plans.needed(needs)
    budget = _plans.checked(save, save_bytes)
    width = 8 if dtype == torch.float64 else 4
    planned = _plans.Call(
        rows, hidden, vocab, width, _plans.kept_bytes(dtype, rounding), torch.device(device).type == "cuda", names,
        lora or "lora" in names, bool(bits & _ENTROPY), bool(bits & _LSE),
    )  # fmt: skip
    chosen = _plans.decide(planned, save, budget) if names else "recompute"
    return BackwardPlan(
        chosen, *_plans.products(planned, chosen), _plans.saved_bytes(planned, chosen),
        _plans.workspace_bytes(planned, chosen, forward, backward),
    )  # fmt: skip


def _saved(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, bits: int, rounding: int,
    save: str, budget: int | None,
) -> int:  # fmt: skip
    """What the forward of these saves, as its op takes it; 0 for nothing."""
    if save == "auto" and budget is None and (weight.requires_grad or bits & (_ENTROPY | _LSE)):
        return 0  # the plan would say so too, later
    grads = {"hidden": hidden, "weight": weight, "bias": bias}
    names = tuple(name for name, t in grads.items() if t is not None and t.requires_grad)
    if any(t is not None and t.requires_grad for t in (lora_a, lora_b)):
        names += ("lora",)
    if not names or hidden.dtype not in _DTYPES or hidden.ndim != 2 or weight.ndim != 2:
        return 0  # of no use, or the op's to refuse
    planned = _plans.Call(
        hidden.shape[0], hidden.shape[1], weight.shape[0], 8 if hidden.dtype == torch.float64 else 4,
        _plans.kept_bytes(hidden.dtype, rounding), hidden.is_cuda, names, lora_a is not None, bool(bits & _ENTROPY),
        bool(bits & _LSE),
    )  # fmt: skip
    return _plans.SAVES.index(_plans.decide(planned, save, budget))


def _differentiable(op: Any, function: type[torch.autograd.Function]) -> Any:
    # Same forward and backward either way. A compiler wants the op; eager saves tens of microseconds a call by not going
    # through the op's Python autograd registration.
    return op if torch.compiler.is_compiling() else function.apply


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_rows(name: str, scores: Tensor, last: str, shape: torch.Size) -> None:
    if scores.ndim == 0:
        raise ValueError(f"{name} has shape []; [..., {last}] is expected")
    if scores.shape[:-1] != shape:
        raise ValueError(
            f"targets has shape {list(shape)}; {name} has shape {list(scores.shape)}, so {list(scores.shape[:-1])} is expected"
        )


def _output_bits(outputs: Iterable[str]) -> int:
    if isinstance(outputs, str):
        raise ValueError(f"outputs is the string {outputs!r}; a tuple of names is expected, e.g. ({outputs!r},)")
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs is {outputs!r}; a tuple of names is expected")
    bits = 0
    for name in outputs:
        bit = _BITS.get(name) if isinstance(name, str) else None
        if bit is None:
            raise ValueError(f"outputs has {name!r}; accepted: {', '.join(map(repr, OUTPUTS))}")
        bits |= bit
    return bits


def _split_temperature(temperature: float | Tensor, shape: torch.Size) -> tuple[float, Tensor | None]:
    if not isinstance(temperature, Tensor):
        return number("temperature", temperature, "a number or a tensor"), None
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, but no gradient flows to it; pass temperature.detach()")
    try:
        return 1.0, temperature.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; a number or a shape that broadcasts to {list(shape)} is expected"
        ) from None


def _softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    value = number("softcap", softcap, "a number or None")
    if not value > 0:
        raise ValueError(f"softcap is {value}; it must be positive and finite, or None")
    return value


def _lora(lora: Any) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise TypeError(f"lora is {_brief(lora)}; a tuple (a, b, scale) or None is expected")
    a, b, scale = lora
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"lora's {name} is a {type(t).__name__}; a torch.Tensor is expected")
    return a, b, number("lora's scale", scale)


def _keep(keep: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(keep, tuple | list) or len(keep) != 2:
        raise TypeError(f"keep is {_brief(keep)}; a tuple (offsets, ids) or None is expected")
    for name, t in zip(("offsets", "ids"), keep, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"keep's {name} is a {type(t).__name__}; a torch.Tensor is expected")
    return keep[0], keep[1]


def _validate_keep(offsets: Tensor, ids: Tensor, targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Under validation, on every device: each row that counts keeps its target. On CUDA also what the op itself finds on the
    CPU. Shapes, dtypes and devices are the op's to refuse."""
    if not validation() or torch.compiler.is_compiling() or targets.is_meta:
        return
    targets = targets.reshape(-1)
    rows = len(targets)
    integers = (
        offsets.dtype == torch.int64 and ids.dtype in (torch.int64, torch.int32) and targets.dtype in (torch.int64, torch.int32)
    )
    if not integers or offsets.shape != (rows + 1,) or ids.ndim != 1 or not offsets.device == ids.device == targets.device:
        return
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((counts < 0).any()):
        raise ValueError(f"keep's offsets must ascend from 0 to the {len(ids)} of keep's ids")
    row_of = torch.arange(rows, device=targets.device).repeat_interleave(counts)
    live = targets != ignore_index
    if bool((empty := live & (counts == 0)).any()):
        raise ValueError(f"keep holds no ids for row {int(empty.nonzero()[0])}; only ignored rows may keep none")
    of_live = live[row_of]
    if bool((bad := of_live & ((ids < 0) | (ids >= vocab))).any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"keep's ids[{at}] is {int(ids[at])} in row {int(row_of[at])}; accepted: 0 to {vocab - 1}")
    if bool((bad := of_live[1:] & (row_of[1:] == row_of[:-1]) & (ids[1:] <= ids[:-1])).any()):
        at = int(bad.nonzero()[0]) + 1
        raise ValueError(
            f"keep's ids[{at}] is {int(ids[at])} after {int(ids[at - 1])} in row {int(row_of[at])}; ids of a row must ascend, "
            "none twice"
        )
    kept = torch.zeros_like(live)
    kept[row_of[ids == targets[row_of]]] = True
    if bool((missing := live & ~kept).any()):
        row = int(missing.nonzero()[0])
        raise ValueError(f"targets has {int(targets[row])} in row {row}, which keep does not hold there; its logp is -inf")


def _logits_dtype(name: Any) -> int:
    if not isinstance(name, str):
        raise TypeError(f"logits_dtype is {name!r}; None or one of {', '.join(map(repr, _LOGITS_DTYPES))} is expected")
    if name not in _LOGITS_DTYPES:
        accepted = ", ".join(map(repr, _LOGITS_DTYPES))
        raise ValueError(f"logits_dtype is {name!r}; accepted: {accepted} or None{nearest_hint(name, _LOGITS_DTYPES)}")
    return _LOGITS_DTYPES[name]


def _brief(value: Any) -> str:
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else f"a {type(value).__name__}"


def _autocast(hidden: Tensor, *others: Any) -> Any:
    if hidden.dtype == torch.float64:
        return (hidden, *others)
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return (hidden.to(dtype), *(t if t is None else t.to(dtype) for t in others))


def _validate(targets: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int) -> None:
    if not validation() or torch.compiler.is_compiling():
        return
    if targets.is_cuda:  # another device is the op's to refuse
        bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
        if bool(bad.any()):
            raise ValueError(
                f"targets has {int(targets[bad][0])}; accepted: 0 to {vocab - 1}, or ignore_index = {ignore_index}"
            )
    if isinstance(temperature, Tensor) and temperature.is_cuda:
        bad = ~((temperature > 0) & temperature.isfinite())
        if bool(bad.any()):
            raise ValueError(f"temperature has {float(temperature[bad][0])}; it must be positive and finite")


def _result(out: tuple[Tensor, ...], bits: int, shape: torch.Size) -> LinearLogprobs:
    if len(shape) != 1:
        out = (out[0].view(shape), *(t.view(shape) if bits >> i & 1 else t for i, t in enumerate(out[1:6])))
    if bits == 0:
        return LinearLogprobs(out[0], None, None, None, None, None)
    return LinearLogprobs(out[0], *(out[i + 1] if bits >> i & 1 else None for i in range(5)))


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _fake_outputs(like: Tensor, rows: Any, outputs: int) -> tuple[Tensor, ...]:
    acc = accumulator(like)
    dtypes = [acc] * 4 + [torch.bool]
    optional = [like.new_empty((rows if outputs >> i & 1 else 0,), dtype=d) for i, d in enumerate(dtypes)]
    stats = like.new_empty((2, rows) if outputs & _SAVE_STATS else (0,), dtype=acc)
    return (like.new_empty((rows,), dtype=acc), *optional, stats)


def _fake_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    outputs: int,
    chunk_bytes: int,
) -> tuple[Tensor, ...]:
    same_device("hidden", hidden, weight=weight, targets=targets, bias=bias, temperature=row_temperature)
    torch._check(hidden.dim() == 2 and weight.dim() == 2, lambda: "hidden must be [N, H] and weight [V, H]")
    torch._check(
        hidden.shape[1] == weight.shape[1],
        lambda: f"hidden has H = {hidden.shape[1]} and weight has H = {weight.shape[1]}",
    )
    return _fake_outputs(hidden, hidden.shape[0], outputs)


def _fake_ext(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_temperature: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, keep_offsets: Tensor | None, keep_ids: Tensor | None, temperature: float, softcap: float,
    logit_scale: float, ignore_index: int, lora_scale: float, logits_dtype: int, outputs: int, chunk_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    others = {"lora's a": lora_a, "lora's b": lora_b, "keep's offsets": keep_offsets, "keep's ids": keep_ids}
    same_device("hidden", hidden, **others)
    return _fake_linear(
        hidden, weight, targets, bias, row_temperature, temperature, softcap, logit_scale, ignore_index, outputs, chunk_bytes
    )


def _fake_logits(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    outputs: int,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    same_device("logits", logits, targets=targets, temperature=row_temperature)
    rows = logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[1]
    return _fake_outputs(logits, rows, outputs)


def _fake_saving(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_temperature: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, keep_offsets: Tensor | None, keep_ids: Tensor | None, temperature: float, softcap: float,
    logit_scale: float, ignore_index: int, lora_scale: float, logits_dtype: int, outputs: int, chunk_bytes: int, save: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    out = _fake_ext(
        hidden, weight, targets, bias, row_temperature, lora_a, lora_b, keep_offsets, keep_ids, temperature, softcap,
        logit_scale, ignore_index, lora_scale, logits_dtype, outputs, chunk_bytes,
    )  # fmt: skip
    rows, width = hidden.shape
    if _plans.SAVES[save] == _plans.LOGITS:
        dtype = (hidden.dtype, torch.bfloat16, torch.float16)[logits_dtype]
        return (*out, hidden.new_empty((rows * weight.shape[0],), dtype=dtype))
    sets = 1 + bool(outputs & _ENTROPY) + bool(outputs & _LSE)
    return (*out, hidden.new_empty((sets, rows, width), dtype=accumulator(hidden)))


for _name in ("linear_logprobs_saving", "linear_logprobs_saving_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_saving)
for _name in ("linear_logprobs", "linear_logprobs_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_linear)
for _name in ("linear_logprobs_ext", "linear_logprobs_ext_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_ext)
for _name in ("logits_logprobs", "logits_logprobs_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_logits)


@torch.library.register_fake("prefkern::linear_logprobs_backward")
def _fake_linear_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, row_temperature: Tensor | None, entropy: Tensor, stats: Tensor, temperature: float, softcap: float,
    logit_scale: float, ignore_index: int, needs: int, chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = hidden.new_empty((0,), dtype=accumulator(hidden))
    return (
        hidden.new_empty(hidden.shape) if needs & _GRAD_HIDDEN else none,
        weight.new_empty(weight.shape) if needs & _GRAD_WEIGHT else none.clone(),
        bias.new_empty(bias.shape) if needs & _GRAD_BIAS and bias is not None else none.clone(),
    )


@torch.library.register_fake("prefkern::linear_logprobs_ext_backward")
def _fake_ext_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, row_temperature: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    keep_offsets: Tensor | None, keep_ids: Tensor | None, entropy: Tensor, stats: Tensor, temperature: float, softcap: float,
    logit_scale: float, ignore_index: int, lora_scale: float, logits_dtype: int, needs: int, chunk_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        hidden.new_empty(0, dtype=accumulator(hidden)) if t is None or not needs & bit else t.new_empty(t.shape)
        for t, bit in zip((hidden, weight, bias, lora_a, lora_b), _EXT_GRADS.values(), strict=True)
    )


@torch.library.register_fake("prefkern::linear_logprobs_kept_backward")
def _fake_kept_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
    bias: Tensor | None, row_temperature: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
    keep_offsets: Tensor | None, keep_ids: Tensor | None, entropy: Tensor, stats: Tensor, logits: Tensor, temperature: float,
    softcap: float, logit_scale: float, ignore_index: int, lora_scale: float, logits_dtype: int, needs: int, chunk_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_ext_backward(
        g_logp, g_entropy, g_lse, hidden, weight, targets, bias, row_temperature, lora_a, lora_b, keep_offsets, keep_ids,
        entropy, stats, temperature, softcap, logit_scale, ignore_index, lora_scale, logits_dtype, needs, chunk_bytes,
    )  # fmt: skip


@torch.library.register_fake("prefkern::linear_logprobs_u_backward")
def _fake_u_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, gradients: Tensor, outputs: int, dtype: int
) -> Tensor:
    return gradients.new_empty(gradients.shape[1:], dtype=next(d for d, n in _DTYPE_NUMBERS.items() if n == dtype))


@torch.library.register_fake("prefkern::logits_logprobs_backward")
def _fake_logits_backward(
    g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, logits: Tensor, targets: Tensor,
    row_temperature: Tensor | None, entropy: Tensor, stats: Tensor, temperature: float, softcap: float, logit_scale: float,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


@torch.library.register_fake("prefkern::logits_logprobs_backward_")
def _fake_logits_backward_inplace(*args: Any) -> None:
    return None


def _mark_outputs(ctx: Any, output: tuple[Tensor, ...], outputs: int, *more: Tensor) -> None:
    _, entropy, lse, sum_sq_probs, mean_logit, is_top1, stats = output
    fixed = [sum_sq_probs, mean_logit, is_top1, stats, *more]
    fixed += [t for t, bit in ((entropy, _ENTROPY), (lse, _LSE)) if not outputs & bit]
    ctx.mark_non_differentiable(*fixed)
    ctx.set_materialize_grads(False)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, row_temperature, *options, outputs, chunk_bytes = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, row_temperature, output[1], output[6])
    ctx.options, ctx.chunk_bytes = options, chunk_bytes
    _mark_outputs(ctx, output, outputs)


def _backward_linear(ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, row_temperature, entropy, stats = ctx.saved_tensors
    wanted = (
        ctx.needs_input_grad[0] * _GRAD_HIDDEN + ctx.needs_input_grad[1] * _GRAD_WEIGHT + ctx.needs_input_grad[3] * _GRAD_BIAS
    )
    if (g_logp is None and g_entropy is None and g_lse is None) or not wanted:
        return (None,) * 11
    d_hidden, d_weight, d_bias = _OPS.linear_logprobs_backward(
        g_logp,
        g_entropy,
        g_lse,
        hidden,
        weight,
        targets,
        bias,
        row_temperature,
        entropy,
        stats,
        *ctx.options,
        wanted,
        ctx.chunk_bytes,
    )
    return (
        d_hidden if wanted & _GRAD_HIDDEN else None,
        d_weight if wanted & _GRAD_WEIGHT else None,
        None,
        d_bias if wanted & _GRAD_BIAS else None,
        *(None,) * 7,
    )


_EXT_GRADS = {0: _GRAD_HIDDEN, 1: _GRAD_WEIGHT, 3: _GRAD_BIAS, 5: _GRAD_LORA_A, 6: _GRAD_LORA_B}  # by place among the inputs
_EXT_TENSORS = 9


def _setup_ext(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *options, outputs, chunk_bytes = inputs[_EXT_TENSORS:]
    ctx.save_for_backward(*inputs[:_EXT_TENSORS], output[1], output[6])
    ctx.options, ctx.chunk_bytes, ctx.inputs = options, chunk_bytes, len(inputs)
    _mark_outputs(ctx, output, outputs)


def _ext_gradients(op: Any, ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any) -> tuple[Tensor | None, ...]:
    wanted = sum(bit for place, bit in _EXT_GRADS.items() if ctx.needs_input_grad[place])
    result: list[Tensor | None] = [None] * ctx.inputs
    if (g_logp is not None or g_entropy is not None or g_lse is not None) and wanted:
        found = op(g_logp, g_entropy, g_lse, *ctx.saved_tensors, *ctx.options, wanted, ctx.chunk_bytes)
        for (place, bit), gradient in zip(_EXT_GRADS.items(), found, strict=True):
            if wanted & bit:
                result[place] = gradient
    return tuple(result)


def _backward_ext(ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any, *_: Any) -> tuple[Tensor | None, ...]:
    return _ext_gradients(_OPS.linear_logprobs_ext_backward, ctx, g_logp, g_entropy, g_lse)


def _setup_saving(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *options, outputs, chunk_bytes, save = inputs[_EXT_TENSORS:]
    ctx.options, ctx.outputs, ctx.chunk_bytes, ctx.inputs = options, outputs, chunk_bytes, len(inputs)
    ctx.keeps_logits, ctx.dtype = _plans.SAVES[save] == _plans.LOGITS, _DTYPE_NUMBERS[inputs[0].dtype]
    if ctx.keeps_logits:
        ctx.save_for_backward(*inputs[:_EXT_TENSORS], output[1], output[6], output[7])
    else:
        ctx.save_for_backward(output[7])
    _mark_outputs(ctx, output[:7], outputs, output[7])


def _backward_saving(ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.keeps_logits:
        return _ext_gradients(_OPS.linear_logprobs_kept_backward, ctx, g_logp, g_entropy, g_lse)
    result: list[Tensor | None] = [None] * ctx.inputs
    if (g_logp is not None or g_entropy is not None or g_lse is not None) and ctx.needs_input_grad[0]:
        d_hidden = _OPS.linear_logprobs_u_backward(g_logp, g_entropy, g_lse, *ctx.saved_tensors, ctx.outputs, ctx.dtype)
        # hidden is not there to say that it requires a gradient: under create_graph the result must not pass for a constant.
        result[0] = differentiated_once(d_hidden, "linear_logprobs cannot be differentiated twice")
    return tuple(result)


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, row_temperature, *options, outputs, inplace = inputs
    ctx.save_for_backward(logits, targets, row_temperature, output[1], output[6])
    ctx.options, ctx.inplace = options, inplace
    _mark_outputs(ctx, output, outputs)


def _backward_logits(ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any, *_: Any) -> tuple[Tensor | None, ...]:
    logits, targets, row_temperature, entropy, stats = ctx.saved_tensors
    if g_logp is None and g_entropy is None and g_lse is None:
        return (None,) * 9
    args = (g_logp, g_entropy, g_lse, logits, targets, row_temperature, entropy, stats, *ctx.options)
    if not ctx.inplace:
        return (_OPS.logits_logprobs_backward(*args), *(None,) * 8)
    if torch.is_grad_enabled():
        raise RuntimeError("inplace_backward cannot be differentiated twice; use it without create_graph")
    _OPS.logits_logprobs_backward_(*args)
    # Whoever else saved these logits, and a second backward through here, must find out that they are gone.
    torch.autograd.graph.increment_version(logits)
    return (logits.detach(), *(None,) * 8)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _linear_fwd(*inputs)
        _setup_linear(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_linear)


class _LinearLogprobsExt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _ext_fwd(*inputs)
        _setup_ext(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_ext)


class _LinearLogprobsSaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _saving_fwd(*inputs)
        _setup_saving(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_saving)


class _LogitsLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _logits_fwd(*inputs)
        _setup_logits(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_logits)


torch.library.register_autograd("prefkern::linear_logprobs", _backward_linear, setup_context=_setup_linear)
torch.library.register_autograd("prefkern::linear_logprobs_ext", _backward_ext, setup_context=_setup_ext)
torch.library.register_autograd("prefkern::linear_logprobs_saving", _backward_saving, setup_context=_setup_saving)
torch.library.register_autograd("prefkern::logits_logprobs", _backward_logits, setup_context=_setup_logits)
no_double_backward("linear_logprobs_backward")
no_double_backward("linear_logprobs_ext_backward")
no_double_backward("linear_logprobs_kept_backward")
no_double_backward("linear_logprobs_u_backward")
no_double_backward("logits_logprobs_backward")
