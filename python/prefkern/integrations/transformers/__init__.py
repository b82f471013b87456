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
import inspect
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from ... import ops
from ...ops import LinearLogprobs
from ...ops._arguments import integer, number
from ...ops.logprobs import OUTPUTS
from .._version import check_version
from ._arguments import (
    IGNORED,
    accepts,
    causal_lm,
    labels_of,
    mean,
    names_of,
    positive,
    rounding,
    shift,
    spread,
    spread_rows,
    unwrap,
)
from ._head import KNOWN, InsteadOfProduct, Product, StandIn, Unfit, called, product_of, scale_and_softcap

__all__ = [
    "SUPPORTED",
    "CausalLMLogprobs",
    "Enabled",
    "ShiftLabels",
    "causal_lm_loss",
    "disable",
    "enable",
    "token_logprobs",
]

SUPPORTED = ((5, 0), (6,))
"""From which version of transformers, and to before which, this is tested."""

_ATTRIBUTE = "_prefkern"
_NAMES = ("log_probs", *OUTPUTS)
_LABELS = ("labels", "shift_labels")

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


class _State:
    """What :func:`enable` leaves on a model."""

    def __init__(self) -> None:
        self.options: _Options | None = None  # None: the forward passes through
        self.forward: Any = None  # ours, bound: one object, so that a compiler's guards find it again
        self.inner: Any = None  # the forward that was there before
        self.installed = False  # also where another has wrapped ours since
        self.stand_in = StandIn()
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
    inner = causal_lm(model)
    if isinstance(temperature, Tensor) or not hasattr(temperature, "__float__"):
        raise TypeError(f"temperature is {temperature!r}; a number is expected")
    options = _Options(names_of(outputs), positive(float(temperature)), rounding(logits_dtype), chunk_bytes)
    return Enabled(inner, _set_options(inner, options))


def disable(model: nn.Module) -> None:
    """Give a model its own forward back. Nothing happens to one that is not enabled."""
    _set_options(unwrap(model), None)


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
    inner = causal_lm(model)
    names = names_of(outputs)
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels are both given; one of them is expected")
    if labels is None and shift_labels is None:
        if input_ids is None:
            raise ValueError("input_ids is None; without them labels or shift_labels are expected")
        labels = labels_of(input_ids, attention_mask, position_ids)
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
        temperature = spread(temperature, given.shape[0], width, labels is not None)
    else:
        temperature = positive(number("temperature", temperature, "a number or a tensor"))
    if keep is not None:
        keep = spread_rows(keep, given.shape[0], width, labels is not None)
    options = _Options(names, temperature, rounding(logits_dtype), chunk_bytes, width, keep)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
        "shift_labels": shift_labels,
        "use_cache": False if accepts(type(inner), "use_cache") else None,
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
    targets = shift(labels).to(logits.device)
    logp = ops.logits_logprobs(logits, targets, inplace_backward=inplace_backward).logp
    loss = mean(logp, targets, num_items_in_batch, IGNORED)
    aux = outputs.get("aux_loss")
    return loss if aux is None or aux_loss_coef == 0 else loss + aux_loss_coef * aux.to(loss.device)


class ShiftLabels:
    """A collator that adds ``shift_labels`` to what another collates, so that :func:`causal_lm_loss` needs no logits."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        batch["shift_labels"] = shift(batch["labels"]).contiguous()
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
            raise Unfit("it has no output embeddings")
        if state.unfit is not None and state.unfit[0] is head:
            raise Unfit(state.unfit[1])
        if model.loss_function is not ForCausalLMLoss:
            raise Unfit(f"its loss function is {called(model.loss_function)}, not transformers' ForCausalLMLoss")
        product = product_of(head)
    except Unfit as unfit:
        reason = str(unfit)
    else:
        try:
            call = _WithoutLogits(state, head, product)
            return call.output(_run(model, state, call, kwargs))
        except Unfit as unfit:
            reason = str(unfit)
            state.unfit = head, reason
    if state.options is not None and state.options.keep is not None:
        raise ValueError(f"keep is given, but {type(model).__name__} makes its logits, because {reason}")
    if reason not in state.warned:
        state.warned.add(reason)
        warnings.warn(f"prefkern: {type(model).__name__} makes its logits after all, because {reason}", stacklevel=4)
    eager = _WithLogits(state)
    return eager.output(_run(model, state, eager, kwargs))


class _Call(ABC):
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
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """In place of transformers' ForCausalLMLoss."""
        self.entered = True
        self.score(logits, labels, shift_labels, vocab_size, ignore_index)
        assert self.result is not None
        return mean(self.result.logp, self.targets, num_items_in_batch, ignore_index)

    def score(self, logits: Tensor, labels: Any, shift_labels: Tensor | None, vocab: int | None, ignored: int) -> None:
        self.shifted = shift_labels is not None
        targets = shift(labels, ignored) if shift_labels is None else shift_labels
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

    @abstractmethod
    def source(self, logits: Tensor) -> Tensor:
        """What log-probs are made from."""

    @abstractmethod
    def logprobs(self, source: Tensor, logits: Tensor, vocab: int | None, options: dict[str, Any]) -> LinearLogprobs:
        """Those of the targets."""

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

    def __init__(self, state: _State, head: nn.Module, product: Product) -> None:
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
        except Unfit:
            raise
        except Exception as error:
            in_here = self.entered and self.result is None
            if stand_in.hidden is None or in_here or isinstance(error, torch.OutOfMemoryError):
                raise
            raise Unfit(f"its forward needs them itself ({error})") from error
        finally:
            for parent, name in places:
                parent._modules[name] = self.head
            stand_in.take_the_place_of(None)
        if self.result is None:
            raise Unfit("it does not hand them from its output head to its loss function")

    def source(self, logits: Tensor) -> Tensor:
        hidden = self.state.stand_in.hidden
        if hidden is None or logits.shape != (*hidden.shape[:-1], len(KNOWN)):
            raise Unfit("its loss does not see them as its output head makes them")
        return hidden

    def logprobs(self, source: Tensor, logits: Tensor, vocab: int | None, options: dict[str, Any]) -> LinearLogprobs:
        scale, softcap = scale_and_softcap(logits)
        options.update(logit_scale=scale, softcap=softcap)
        options.update(logits_dtype=self.options.logits_dtype, chunk_bytes=self.options.chunk_bytes)
        product = self.product

        if vocab == len(KNOWN):
            raise Unfit("its forward takes the size of the vocabulary from them")

        def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> LinearLogprobs:
            if x.shape[:-1] != self.targets.shape:
                raise Unfit(f"its output head, {called(self.head)}, changes the shape of what it is given")
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

        with InsteadOfProduct(vocab, head) as instead:
            try:
                out = product.module(source)
            except Exception as error:
                if instead.result is None or isinstance(error, Unfit):
                    raise
                raise Unfit(f"its output head, {called(self.head)}, works on after its product ({error})") from error
        if instead.result is None:
            raise Unfit(f"its output head, {called(self.head)}, does not make them by nn.functional.linear with [V, H]")
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
            self.score(out.logits, self.given["labels"], self.given["shift_labels"], None, IGNORED)
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
