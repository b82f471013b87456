r"""Causal language models of ``transformers`` whose labelled forward makes no logits.

:func:`enable` leaves the model's own forward in charge, and only its output head is not applied: the forward runs with a
stand-in for the head, which keeps the hidden states and answers with a few known numbers instead of ``[B, T, V]`` logits. What
the model's code makes of these numbers until it hands them to its loss function is what it makes of logits (Gemma's soft cap,
Cohere's and Granite's scale, nothing at all for most), so that is read off instead of being assumed from a list of
architectures. Then the real head is called, with its product replaced by :func:`prefkern.linear_logprobs`, so hooks
that bring its weight into place (FSDP's, an offloading accelerate's) work, and everything else the model adds to its loss and
its outputs stays as it is (router losses, caches, hidden states).

Where that cannot be exact, the model makes its logits as ever and :func:`prefkern.logits_logprobs` reads them; one warning
says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from .. import ops
from ..ops import LinearLogprobs
from ..ops._arguments import integer, number
from ..ops.logprobs import OUTPUTS, _keep, _logits_dtype, _output_bits
from ._version import check_version

SUPPORTED = ((5, 0), (6,))
"""From which version of transformers, and to before which, this is tested."""

_ATTRIBUTE = "_prefkern"
_NAMES = ("log_probs", *OUTPUTS)
_LABELS = ("labels", "shift_labels")
_IGNORED = -100  # what transformers ignores

check_version("transformers", *SUPPORTED)


@dataclasses.dataclass
class CausalLMLogprobs(ModelOutput):
    """What an enabled model returns when it is given labels. None where not asked for.

    ``log_probs`` and the statistics are float32 (float64 for a float64 model), 0 where the label is ignored: ``[B, T - 1]`` for
    ``labels``, where column t belongs to ``labels[:, t + 1]``, and ``[B, T]`` for ``shift_labels``. Whatever else the model's
    own output has (``aux_loss``, ``router_logits``, a cache, ``hidden_states``, ...) is there too, in a subclass of this one.
    """

    loss: Tensor | None = None
    """The model's own: mean negative log-prob of the labels that count, or their sum over ``num_items_in_batch``, plus what
    the model adds (router losses)."""
    log_probs: Tensor | None = None
    """Log-prob of each label under softmax(logits / temperature)."""
    entropy: Tensor | None = None
    """In nats, of the same distribution."""
    lse: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    """bool, shaped like ``log_probs``: which labels count."""
    logits: Tensor | None = None
    """Only where the model had to make them."""


class _Options(NamedTuple):
    outputs: tuple[str, ...]
    temperature: float | Tensor
    logits_dtype: str | None
    chunk_bytes: int | None
    last: int | None = None  # how many log-probs are wanted, from the end
    keep: tuple[Tensor, Tensor] | None = None


class _Unfit(Exception):
    """Why a model has to make its logits."""


class _State:
    """What :func:`enable` leaves on a model."""

    def __init__(self) -> None:
        self.options: _Options | None = None  # None: the forward passes through
        self.forward: Any = None  # ours, bound: one object, so that a compiler's guards find it again
        self.inner: Any = None  # the forward that was there before
        self.installed = False  # also where another has wrapped ours since
        self.stand_in = _StandIn()
        self.places: list[tuple[nn.Module, str]] = []  # where the head hangs
        self.unfit: tuple[nn.Module, str] | None = None  # a head, and why its logits have to be made
        self.warned: set[str] = set()


class Enabled:
    """What :func:`enable` returns. ``with enable(model, ...):`` puts things back at the end of the block."""

    def __init__(self, model: nn.Module, before: _Options | None) -> None:
        self.model, self._before = model, before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        _set_options(self.model, self._before)

    def disable(self) -> None:
        """As :func:`disable`."""
        disable(self.model)


def enable(
    model: nn.Module,
    *,
    outputs: Iterable[str] = (),
    temperature: float = 1.0,
    logits_dtype: str | None = None,
    chunk_bytes: int | None = None,
) -> Enabled:
    """Make the labelled forward of a causal language model compute log-probs from hidden states, without logits.

    Afterwards ``model(..., labels=labels)`` returns a :class:`CausalLMLogprobs`, whose loss at temperature 1 is the model's own
    within the precision of its logits. So it does for ``shift_labels``, which are shifted already, alone or beside ``labels``.
    ``num_items_in_batch`` and -100 mean what they mean to the model. Calls without labels, and so ``generate()``, are
    untouched.

    Args:
        model: any causal LM of transformers (a ``PreTrainedModel`` that can generate and has no encoder), also inside PEFT,
            DDP, FSDP2 or ``torch.compile``; before or after it is wrapped. Changed in place.
        outputs: further statistics per token, any of ``"entropy"``, ``"lse"``, ``"sum_sq_probs"``, ``"mean_logit"``,
            ``"is_top1"``, as of :func:`prefkern.linear_logprobs`.
        temperature: above 0. Logits are divided by it, for the loss too, unless the model computes that itself.
        logits_dtype: ``"bfloat16"`` or ``"float16"`` rounds the head's product to that, as a sampler whose head writes it; see
            :func:`prefkern.linear_logprobs`. None: it stays as it is accumulated. (Logits that the model has to make have the
            model's precision.)
        chunk_bytes: workspace of the head, as of :func:`prefkern.linear_logprobs`.

    Returns:
        A handle with ``disable()``, which is also a context manager. Enabling an enabled model changes its settings.

    Raises:
        TypeError, ValueError: for a model that is no causal LM of transformers, and for wrong settings.

    The model makes its own logits after all, and one warning names the reason, where the head's product is not what the loss
    sees: a head that is quantised or does more than one product, a weight that is split between devices, a loss function of
    one's own, logits that are changed by more than a factor and a soft cap, a model that computes its loss itself.

    Under ``torch.compile`` the layers are compiled and the head runs as it is, between two graphs, so ``fullgraph=True`` is not
    supported. Nor is ``nn.DataParallel``, whose replicas share a forward.
    """
    inner = _causal_lm(model)
    if isinstance(temperature, Tensor) or not hasattr(temperature, "__float__"):
        raise TypeError(f"temperature is {temperature!r}; a number is expected")
    options = _Options(_names(outputs), _positive(float(temperature)), _rounding(logits_dtype), chunk_bytes)
    return Enabled(inner, _set_options(inner, options))


def disable(model: nn.Module) -> None:
    """Give a model its own forward back. Nothing happens to one that is not enabled."""
    _set_options(_unwrap(model), None)


def _set_options(model: nn.Module, options: _Options | None) -> _Options | None:
    state: _State | None = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        if options is None:
            return None
        state = model.__dict__[_ATTRIBUTE] = _State()
        state.forward = types.MethodType(_forward_of(type(model)), model)
    before, state.options = state.options, options
    if options is not None and not state.installed:
        state.inner = model.forward
        model.forward, state.installed = state.forward, True
    elif options is None and model.__dict__.get("forward") is state.forward:  # where another has wrapped it, it passes through
        if getattr(state.inner, "__func__", None) is type(model).forward:
            del model.forward
        else:
            model.forward = state.inner
        state.installed = False
    return before


# ---- one call


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int | None = None,
    temperature: float | Tensor = 1.0,
    outputs: Iterable[str] = (),
    keep: tuple[Tensor, Tensor] | None = None,
    logits_dtype: str | None = None,
    chunk_bytes: int | None = None,
    **inputs: Any,
) -> LinearLogprobs:
    """Log-probs of tokens under a causal language model, without logits: what a trainer needs of a policy or a reference.

    Column t of the result belongs to ``input_ids[:, t + 1]``: its log-prob given ``input_ids[:, : t + 1]``. So the result is
    ``[B, T - 1]``, and the first token has none.

    Args:
        model: as of :func:`enable`; enabled or not, and left as it was. Call it under ``torch.no_grad()`` for a reference.
        input_ids: ``[B, T]``; None with ``inputs_embeds`` among the inputs, and labels.
        attention_mask: ``[B, T]``. Tokens that are padding, and those right after padding on the left, which nothing predicts,
            get 0 in every field and no gradient.
        labels: ``[B, T]``, as transformers takes them: column t of the result belongs to ``labels[:, t + 1]``; -100 gives 0.
            Default: ``input_ids`` where they count.
        shift_labels: ``[B, T]``, shifted already: position t predicts ``shift_labels[:, t]``, and the result is ``[B, T]``. For
            sequences that are split between devices.
        position_ids: ``[B, T]``. Where they are 0, a packed sequence begins, whose first token gets 0, since nothing before it
            belongs to it. That attention stays inside a sequence is the model's affair (transformers sees to it where
            ``attention_mask`` is None).
        logits_to_keep: only the last so many columns of the result are computed and returned: completions behind prompts.
        temperature: a number, or a tensor that broadcasts to the result; above 0.
        keep: ``(offsets, ids)``, the tokens that the sampler could draw at each place of the result, row by row: int64 offsets
            ``[R + 1]`` for the R elements of the result, and ids that ascend within each; see
            :func:`prefkern.linear_logprobs`. Places that are ignored may keep nothing.
        outputs, logits_dtype, chunk_bytes: as of :func:`enable`.
        inputs: what else the model's forward takes.

    Returns:
        LinearLogprobs of ``[B, T - 1]``; ``[B, T]`` for ``shift_labels``; the last ``logits_to_keep`` columns of that.
        Gradients flow as from :func:`prefkern.linear_logprobs`, through the whole model.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Like :func:`enable` it falls back to logits, with a warning, where it has to; with ``keep`` that is a ValueError. With
    ``torch.compile`` enable the model first.
    """
    inner = _causal_lm(model)
    names = _names(outputs)
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels are both given; one of them is expected")
    if labels is None and shift_labels is None:
        if input_ids is None:
            raise ValueError("input_ids is None; without them labels or shift_labels are expected")
        labels = _labels_of(input_ids, attention_mask, position_ids)
    given = shift_labels if labels is None else labels
    assert given is not None
    if given.dim() != 2 or (input_ids is not None and given.shape != input_ids.shape):
        name = "shift_labels" if labels is None else "labels"
        expected = "[B, T]" if input_ids is None else str(list(input_ids.shape))
        raise ValueError(f"{name} has shape {list(given.shape)}; {expected} is expected")
    width = given.shape[1] - (labels is not None)
    if logits_to_keep is not None:
        if integer("logits_to_keep", logits_to_keep) < 1:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; at least 1 is expected, or None for all")
        width = min(width, logits_to_keep)
    if isinstance(temperature, Tensor):
        temperature = _spread(temperature, given.shape[0], width, labels is not None)
    else:
        temperature = _positive(number("temperature", temperature, "a number or a tensor"))
    if keep is not None:
        keep = _spread_rows(keep, given.shape[0], width, labels is not None)
    options = _Options(names, temperature, _rounding(logits_dtype), chunk_bytes, width, keep)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
        "shift_labels": shift_labels,
        "use_cache": False if _accepts(type(inner), "use_cache") else None,
    }
    inputs.update({name: value for name, value in arguments.items() if value is not None})
    before = _set_options(inner, options)
    try:
        out = model(**inputs, return_dict=True)
    finally:
        _set_options(inner, before)
    # a prompt of PEFT's comes before the tokens
    fields = {name: out[name][:, -width:] for name in _NAMES if name in out}
    return LinearLogprobs(fields.pop("log_probs"), **fields)


def causal_lm_loss(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    aux_loss_coef: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """The loss of a causal language model, for ``Trainer(compute_loss_func=causal_lm_loss)``.

    Trainer takes ``labels`` out of the batch before it calls the model, for a loss function's sake. An enabled model then sees
    no labels and makes logits, which this reads once, without the float32 copy that transformers makes. To have no logits
    either, let the collator put ``shift_labels`` into the batch too (:class:`ShiftLabels`), which Trainer leaves there.

    Args:
        outputs: of the model. If they have a ``loss``, of an enabled model that got ``shift_labels``, it is the result: it
            was normalised by the same ``num_items_in_batch``.
        labels: ``[B, T]``, shifted in here; -100 is ignored.
        num_items_in_batch: what the sum is divided by; None: the labels that count.
        aux_loss_coef: how much of ``outputs.aux_loss`` is added, where the loss is made from logits.
        inplace_backward: let the gradient overwrite the logits, as of :func:`prefkern.logits_logprobs`.
    """
    loss = outputs.get("loss")
    if loss is not None:
        return loss
    logits = outputs.get("logits")
    if logits is None or labels is None:
        missing = "labels is None" if labels is None else "outputs has no logits"
        raise ValueError(f"{missing}; labels and outputs with logits are expected, or outputs with a loss")
    targets = _shift(labels).to(logits.device)
    logp = ops.logits_logprobs(logits, targets, inplace_backward=inplace_backward).logp
    loss = _mean(logp, targets, num_items_in_batch, _IGNORED)
    aux = outputs.get("aux_loss")
    return loss if aux is None or aux_loss_coef == 0 else loss + aux_loss_coef * aux.to(loss.device)


class ShiftLabels:
    """A collator that adds ``shift_labels`` to what another collates, so that :func:`causal_lm_loss` needs no logits."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        batch["shift_labels"] = _shift(batch["labels"]).contiguous()
        return batch


# ---- the forward


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    # No reference to the model in here, so that a deep copy of it is enabled in its own right. The signature stays, since
    # generate() and Trainer look at it.
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[_ATTRIBUTE]
        if state.options is None:
            return state.inner(*args, **kwargs)
        return _forward(self, state, args, kwargs)

    return forward


@functools.partial(torch.compiler.disable, recursive=False)
def _forward(model: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if all(kwargs.get(name) is None for name in _LABELS):
        return state.inner(**kwargs)
    return_dict = kwargs.pop("return_dict", None)
    if kwargs.get("labels") is None:
        kwargs["labels"] = kwargs["shift_labels"]  # only so that the model calls its loss function
    out = _labelled(model, state, kwargs)
    return out.to_tuple() if return_dict is False else out


def _labelled(model: Any, state: _State, kwargs: dict[str, Any]) -> CausalLMLogprobs:
    head = model.get_output_embeddings()
    try:
        if head is None:
            raise _Unfit("it has no output embeddings")
        if state.unfit is not None and state.unfit[0] is head:
            raise _Unfit(state.unfit[1])
        if model.loss_function is not ForCausalLMLoss:
            raise _Unfit(f"its loss function is {_called(model.loss_function)}, not transformers' ForCausalLMLoss")
        product = _product_of(head)
    except _Unfit as unfit:
        reason = str(unfit)
    else:
        try:
            call = _WithoutLogits(state, head, product)
            return call.output(_run(model, state, call, kwargs))
        except _Unfit as unfit:
            reason = str(unfit)
            state.unfit = head, reason
    if state.options is not None and state.options.keep is not None:
        raise ValueError(f"keep is given, but {type(model).__name__} makes its logits, because {reason}")
    if reason not in state.warned:
        state.warned.add(reason)
        warnings.warn(f"prefkern: {type(model).__name__} makes its logits after all, because {reason}", stacklevel=4)
    eager = _WithLogits(state)
    return eager.output(_run(model, state, eager, kwargs))


class _Call:
    """One labelled call: what the model's loss function is meanwhile."""

    def __init__(self, state: _State) -> None:
        assert state.options is not None
        self.options = state.options
        self.result: LinearLogprobs | None = None
        self.targets: Tensor
        self.mask: Tensor
        self.shifted = False  # whether targets were given as they are
        self.entered = False  # the loss function

    @torch.compiler.disable
    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """In place of transformers' ForCausalLMLoss."""
        self.entered = True
        self.score(logits, labels, shift_labels, vocab_size, ignore_index)
        assert self.result is not None
        return _mean(self.result.logp, self.targets, num_items_in_batch, ignore_index)

    def score(self, logits: Tensor, labels: Any, shift_labels: Tensor | None, vocab: int | None, ignored: int) -> None:
        self.shifted = shift_labels is not None
        targets = _shift(labels, ignored) if shift_labels is None else shift_labels
        source = self.source(logits)
        if source.shape[:-1] != targets.shape:
            raise ValueError(
                f"{'shift_labels' if self.shifted else 'labels'} has shape {list(targets.shape)}, but the head is applied to "
                f"{list(source.shape[:-1])} positions; one label per position is expected"
            )
        if self.options.last is not None:
            last = self.options.last + (not self.shifted)
            source, targets = source[:, -last:], targets[:, -last:]
        self.targets = targets.to(source.device)
        self.mask = self.targets != ignored
        options = {
            "temperature": self.options.temperature,
            "ignore_index": ignored,
            "outputs": self.options.outputs,
        }
        self.result = self.logprobs(source, logits, vocab, options)

    def source(self, logits: Tensor) -> Tensor:
        """What log-probs are made from."""
        raise NotImplementedError

    def logprobs(self, source: Tensor, logits: Tensor, vocab: int | None, options: dict[str, Any]) -> LinearLogprobs:
        raise NotImplementedError

    def output(self, out: Any) -> CausalLMLogprobs:
        assert self.result is not None
        own = {name: value for name, value in out.items() if name != "logits"}
        found = {"log_probs": self.result.logp, **self.result._asdict(), "label_mask": self.mask.to(self.result.logp.device)}
        del found["logp"]
        if not self.shifted:  # the last position predicts nothing that is known
            found = {name: None if t is None else t[:, :-1] for name, t in found.items()}
        kind: Any = type(out)
        return _output_type(kind)(**own, **found)


class _WithoutLogits(_Call):
    """With a stand-in for the head."""

    def __init__(self, state: _State, head: nn.Module, product: _Product) -> None:
        super().__init__(state)
        self.state, self.head, self.product = state, head, product

    @contextlib.contextmanager
    def running(self, model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        stand_in, places = self.state.stand_in, self.state.places
        if not places or any(parent._modules.get(name) is not self.head for parent, name in places):
            places[:] = [(m, name) for m in model.modules() for name, child in m._modules.items() if child is self.head]
        stand_in.take_the_place_of(self.head)
        for parent, name in places:
            parent._modules[name] = stand_in
        try:
            with _loss_function(model, self.loss):
                yield
        except _Unfit:
            raise
        except Exception as error:
            in_here = self.entered and self.result is None
            if stand_in.hidden is None or in_here or isinstance(error, torch.OutOfMemoryError):
                raise
            raise _Unfit(f"its forward needs them itself ({error})") from error
        finally:
            for parent, name in places:
                parent._modules[name] = self.head
            stand_in.take_the_place_of(None)
        if self.result is None:
            raise _Unfit("it does not hand them from its output head to its loss function")

    def source(self, logits: Tensor) -> Tensor:
        hidden = self.state.stand_in.hidden
        if hidden is None or logits.shape != (*hidden.shape[:-1], len(_KNOWN)):
            raise _Unfit("its loss does not see them as its output head makes them")
        return hidden

    def logprobs(self, source: Tensor, logits: Tensor, vocab: int | None, options: dict[str, Any]) -> LinearLogprobs:
        scale, softcap = _scale_and_softcap(logits)
        options.update(logit_scale=scale, softcap=softcap)
        options.update(logits_dtype=self.options.logits_dtype, chunk_bytes=self.options.chunk_bytes)
        product = self.product

        if vocab == len(_KNOWN):
            raise _Unfit("its forward takes the size of the vocabulary from them")

        def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> LinearLogprobs:
            if x.shape[:-1] != self.targets.shape:
                raise _Unfit(f"its output head, {_called(self.head)}, changes the shape of what it is given")
            here: dict[str, Any] = {
                "targets": self.targets.to(x.device),
                "lora": product.factors(x.dtype),
                "bias": product.bias(bias),
            }
            if self.options.keep is not None:
                here["keep"] = tuple(t.to(x.device) for t in self.options.keep)
            if isinstance(self.options.temperature, Tensor):
                here["temperature"] = self.options.temperature.to(x.device)
            return ops.linear_logprobs(x, weight, **{**options, **here})

        with _InsteadOfProduct(vocab, head) as instead:
            try:
                out = product.module(source)
            except Exception as error:
                if instead.result is None or isinstance(error, _Unfit):
                    raise
                raise _Unfit(f"its output head, {_called(self.head)}, works on after its product ({error})") from error
        if instead.result is None:
            raise _Unfit(f"its output head, {_called(self.head)}, does not make them by nn.functional.linear with [V, H]")
        return instead.handed_over(out, product.module, self.head)


class _WithLogits(_Call):
    """The model as it is."""

    @contextlib.contextmanager
    def running(self, model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        self.given = {name: kwargs.get(name) for name in _LABELS}
        with _loss_function(model, self.loss) if model.loss_function is ForCausalLMLoss else contextlib.nullcontext():
            yield

    def source(self, logits: Tensor) -> Tensor:
        return logits

    def logprobs(self, source: Tensor, logits: Tensor, vocab: int | None, options: dict[str, Any]) -> LinearLogprobs:
        return ops.logits_logprobs(source, self.targets, **options)

    def output(self, out: Any) -> CausalLMLogprobs:
        if self.result is None:  # a loss of the model's own; it stays as it is
            self.score(out.logits, self.given["labels"], self.given["shift_labels"], None, _IGNORED)
        found = super().output(out)
        found.logits = out.logits
        return found


def _run(model: Any, state: _State, call: _WithoutLogits | _WithLogits, kwargs: dict[str, Any]) -> Any:
    with call.running(model, kwargs):
        return state.inner(**kwargs)


@contextlib.contextmanager
def _loss_function(model: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    before = model.__dict__.get("_loss_function")
    model._loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model._loss_function = before


@functools.cache
def _output_type(own: Any) -> type[CausalLMLogprobs]:
    """CausalLMLogprobs with the further fields of a model's own output."""
    ours = {field.name for field in dataclasses.fields(CausalLMLogprobs)}
    further = [(field.name, Any, None) for field in dataclasses.fields(own) if field.name not in ours]
    return dataclasses.make_dataclass(f"{CausalLMLogprobs.__name__}Of{own.__name__}", further, bases=(CausalLMLogprobs,))


# ---- the head

# What the stand-in answers in place of logits. The smallest gives the scale of capped logits, the largest the cap.
# Powers of two, which no floating dtype rounds.
_SMALL, _LARGE = 2.0**-13, 2.0**100
_KNOWN = torch.tensor([0.0, _SMALL, 1.0, -1.0, 4.0, -32.0, 256.0, _LARGE], dtype=torch.float64, device="cpu")


class _StandIn(nn.Module):
    """In the place of an output head: keeps the hidden states and answers with known numbers, on the CPU, where to read them
    is to wait for nothing."""

    hidden: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.take_the_place_of(None)

    def take_the_place_of(self, head: nn.Module | None) -> None:
        self.__dict__.update(head=head, hidden=None)  # no module of this one

    def __getattr__(self, name: str) -> Any:
        head = self.__dict__.get("head")
        if head is None:
            return super().__getattr__(name)
        return getattr(head, name)

    @torch.compiler.disable
    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if self.hidden is not None:
            raise _Unfit("its forward applies its output head more than once")
        self.__dict__["hidden"] = hidden
        return _KNOWN.expand(*hidden.shape[:-1], -1)


def _scale_and_softcap(answer: Tensor) -> tuple[float, float | None]:
    """s and c (or None) if `answer` is c tanh(s x / c), or s x, of the known numbers x, in every row."""
    rows = answer.detach().reshape(-1, len(_KNOWN)).to("cpu", torch.float64)
    if not len(rows):
        return 1.0, None
    found = dict(zip(_KNOWN.tolist(), rows[0].tolist(), strict=True))
    limit = found[_LARGE]
    softcap = limit if abs(limit) < 2.0**50 else None
    scale = found[1.0] if softcap is None else found[_SMALL] / _SMALL
    expected = [scale * x if softcap is None else softcap * math.tanh(scale * x / softcap) for x in found] if limit else []
    right = torch.tensor(expected, dtype=torch.float64)
    if not (scale > 0 and limit > 0 and torch.allclose(rows, right.expand_as(rows), rtol=1e-5, atol=1e-9)):
        raise _Unfit("it changes them by more than a factor and a soft cap")
    return (1.0 if abs(scale - 1) < 1e-6 else scale), softcap


class _Adapter(NamedTuple):
    """One LoRA adapter of a head: W + scale B A, with the bias that B may have."""

    a: Any  # linear modules without their forward
    b: Any
    scale: float


class _Product(NamedTuple):
    """What to call so that a head's product happens, and what is to be added to its weight."""

    module: nn.Module
    adapters: tuple[_Adapter, ...] = ()

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """All adapters as one: their ranks add up."""
        pairs = [(adapter.a.weight.to(dtype), adapter.b.weight.to(dtype), adapter.scale) for adapter in self.adapters]
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        return torch.cat([a for a, _, _ in pairs]), torch.cat([b * scale for _, b, scale in pairs], 1), 1.0

    def bias(self, bias: Tensor | None) -> Tensor | None:
        for adapter in self.adapters:
            if adapter.b.bias is not None:
                further = adapter.b.bias * adapter.scale
                bias = further if bias is None else bias + further
        return bias


class _InsteadOfProduct(TorchFunctionMode):
    """Log-probs in the place of ``linear(x, weight)`` with a weight of V rows. A head is called under it, so that what brings
    its weight into place does so, for the backward too: the log-probs come out of the head packed, ``[..., n]``."""

    def __init__(self, vocab: int | None, logprobs: Callable[[Tensor, Tensor, Tensor | None], LinearLogprobs]) -> None:
        super().__init__()
        self.vocab, self.logprobs = vocab, logprobs
        self.result: LinearLogprobs | None = None
        self.packed: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.linear:
            return func(*args, **kwargs)
        x, weight, bias = _linear_arguments(*args, **kwargs)
        if weight.shape[0] != self.vocab:
            return func(*args, **kwargs)
        if type(weight) not in (Tensor, nn.Parameter):
            raise _Unfit(f"its output head's weight is a {type(weight).__name__}")
        self.result = self.logprobs(x, weight, bias)
        fields = [t for t in self.result if t is not None]
        self.packed = torch.stack([t.to(fields[0].dtype) for t in fields], -1)
        return self.packed

    def handed_over(self, out: Any, module: nn.Module, head: nn.Module) -> LinearLogprobs:
        """The result as `out`, which `module` returned, hands it over."""
        assert self.result is not None
        if out is not self.packed and not (
            isinstance(out, Tensor) and out.shape == self.packed.shape and torch.equal(out, self.packed)
        ):
            raise _Unfit(f"its output head, {_called(head)}, works on after its product")
        if out is self.packed and not any(_hooked(m) for m in module.modules()):
            return self.result
        # A hook may hang on the tensor that came out: the gradient has to come by it.
        fields = iter(out.unbind(-1))
        return LinearLogprobs(next(fields), *(None if t is None else next(fields).to(t.dtype) for t in self.result[1:]))


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _hooked(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def _product_of(head: nn.Module) -> _Product:
    """How to have the product of a head. Only LoRA needs to be known, which adds a second product; all others are called as
    they are, whatever they put in front of the product: merged or disabled adapters, copies of the head that are trained."""
    if "peft" not in sys.modules:
        return _Product(head)
    lora: Any = importlib.import_module("peft.tuners.lora")
    if not isinstance(head, lora.LoraLayer) or head.disable_adapters or head.merged:
        return _Product(head)
    names = [name for name in head.active_adapters if name in head.lora_A]
    if not names:
        return _Product(head)
    if type(head) is not lora.Linear or head.fan_in_fan_out:
        raise _Unfit(f"its output head is a LoRA layer of {_called(head.get_base_layer())}")
    for name in names:
        variant, dropout = head.lora_variant.get(name), head.lora_dropout[name]
        if variant is not None:
            raise _Unfit(f"the LoRA adapter {name!r} of its output head is {_called(variant)}")
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            raise _Unfit(f"the LoRA adapter {name!r} of its output head has a dropout of {dropout.p}")
        for part in (head.lora_A[name], head.lora_B[name]):
            if type(part.weight) is not nn.Parameter or not part.weight.numel():
                raise _Unfit(f"the LoRA adapter {name!r} of its output head is not in one piece")
    if _hooked(head):  # a batch that mixes adapters, for one
        raise _Unfit("its output head is a LoRA layer with hooks")
    adapters = (_Adapter(head.lora_A[name], head.lora_B[name], head.scaling[name]) for name in names)
    return _Product(head.base_layer, tuple(adapters))


# ---- arguments


def _unwrap(model: Any) -> Any:
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


def _causal_lm(model: Any) -> Any:
    inner = _unwrap(model)
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(f"model is a {type(inner).__name__}; a model of transformers is expected, or one inside of a wrapper")
    if inner.config.is_encoder_decoder or not inner.can_generate():
        kind = "has an encoder" if inner.config.is_encoder_decoder else "cannot generate"
        raise ValueError(f"model is a {type(inner).__name__}, which {kind}; a causal language model is expected")
    return inner


def _names(outputs: Iterable[str]) -> tuple[str, ...]:
    outputs = outputs if isinstance(outputs, str) else tuple(outputs)
    _output_bits(outputs)
    return tuple(outputs)


def _rounding(logits_dtype: str | None) -> str | None:
    if logits_dtype is not None:
        _logits_dtype(logits_dtype)
    return logits_dtype


def _positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    return temperature


def _spread(temperature: Tensor, rows: int, width: int, padded: bool) -> Tensor:
    """One temperature for each position that the head sees, of one for each column of the result."""
    try:
        temperature = temperature.expand(rows, width)
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; a number is expected, or what broadcasts to {[rows, width]}"
        ) from None
    return functional.pad(temperature, (0, int(padded)), value=1.0)


def _spread_rows(keep: Any, rows: int, width: int, padded: bool) -> tuple[Tensor, Tensor]:
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


def _labels_of(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    labels = input_ids
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        counts = attention_mask.bool()
        counts = counts & functional.pad(counts[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~counts, _IGNORED)
    if position_ids is not None and position_ids.shape == input_ids.shape:
        labels = labels.masked_fill(position_ids == 0, _IGNORED)
    return labels


def _shift(labels: Tensor, ignored: int = _IGNORED) -> Tensor:
    return functional.pad(labels, (0, 1), value=ignored)[..., 1:]


def _mean(logp: Tensor, targets: Tensor, items: Tensor | int | None, ignored: int) -> Tensor:
    if items is None:
        items = (targets != ignored).sum()
    return -logp.sum() / (items.to(logp.device) if isinstance(items, Tensor) else items)


def _accepts(kind: type[nn.Module], name: str) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _called(thing: Any) -> str:
    return getattr(thing, "__name__", None) or f"a {type(thing).__name__}"
