"""Reliabilities of annotators: the moving average, its checkpoints, and several ranks."""

import math

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import AnnotatorReliability
from ranks import run_ranks

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def ids(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("w", "expected"), [((0.9127133692, 0.8856668772), 0.8999190123), ((0.9999385500, 0.0049531040), 0.8602445827)]
)
def test_worked_update(w, expected) -> None:
    reliability = AnnotatorReliability(1)
    assert reliability.eta.tolist() == [0.9]
    assert_close(reliability.update(vector(*w)), vector(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", [0.5, 0.9, 1.0])
def test_worked_fixed_point_of_em(start) -> None:
    p = vector(0.9, 0.8, 0.7, 0.2, 0.95, 0.1)
    reliability = AnnotatorReliability(1, init=start, ema=1.0)
    for _ in range(400):
        reliability.update(torch.sigmoid(torch.logit(p) + torch.logit(reliability.eta)))
    assert_close(reliability.eta, vector(0.7202198552), rtol=0, atol=1e-10)


def test_each_annotator_by_itself() -> None:
    reliability = AnnotatorReliability(4, init=vector(0.6, 0.7, 0.8, 0.9), ema=0.5)
    eta = reliability.update(vector(1, 0, 0.5, 0.3), ids(2, 0, 2, 3))
    assert_close(eta, vector(0.3, 0.7, (0.8 + 0.75) / 2, 0.6), rtol=0, atol=1e-15)
    assert reliability.K == 4
    eta[0] = 7
    assert reliability.eta[0] == pytest.approx(0.3)  # what comes out is a copy


def test_micro_batches_count_as_one_batch() -> None:
    whole, parts = AnnotatorReliability(3), AnnotatorReliability(3)
    w, annotator = torch.rand(12, dtype=F64), torch.randint(3, (12,))
    for i in range(0, 12, 4):
        parts.accumulate(w[i : i + 4], annotator[i : i + 4])
    assert parts.eta.equal(torch.full((3,), 0.9, dtype=F64))  # nothing moves before the update
    assert_close(parts.update(), whole.update(w, annotator), rtol=0, atol=1e-15)
    before = parts.eta
    assert parts.update().equal(before)  # nothing accumulated: nothing moves
    mixed = AnnotatorReliability(3)
    mixed.accumulate(w[:5], annotator[:5])
    assert_close(mixed.update(w[5:], annotator[5:]), before, rtol=0, atol=1e-15)


def test_eta_stays_where_its_logit_is_finite() -> None:
    reliability = AnnotatorReliability(2, init=1.0, ema=1.0)
    assert (1 - reliability.eta).tolist() == pytest.approx([1e-6] * 2)
    reliability.update(vector(0, 1), ids(0, 1))
    assert reliability.eta.tolist() == pytest.approx([1e-6, 1 - 1e-6], rel=1e-12)
    assert torch.logit(reliability.eta).isfinite().all()


def test_inputs_of_any_precision_and_gradient() -> None:
    reliability = AnnotatorReliability(1)
    reliability.update(torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, dtype=torch.int32))
    assert reliability.eta.dtype == F64 and not reliability.eta.requires_grad
    assert reliability.eta.item() == pytest.approx(0.885)
    assert reliability.update(vector()).item() == pytest.approx(0.885)


def test_it_finds_annotators() -> None:
    """Labels of two annotators by Bradley-Terry, flipped as often as they are unreliable; the true margins are known."""
    generator = torch.Generator().manual_seed(0)
    margin = 3 * torch.randn(20_000, dtype=F64, generator=generator)
    annotator = torch.randint(2, (20_000,), generator=generator)
    truth = vector(0.95, 0.65)
    agree = torch.rand(20_000, dtype=F64, generator=generator) < torch.sigmoid(margin)
    correct = torch.rand(20_000, dtype=F64, generator=generator) < truth[annotator]
    d = torch.where(agree == correct, margin, -margin)
    reliability = AnnotatorReliability(2)
    for _ in range(200):
        reliability.update(torch.sigmoid(d + torch.logit(reliability.eta)[annotator]), annotator)
    assert_close(reliability.eta, truth, rtol=0, atol=0.03)


# ---- checkpoints


def test_saved_and_loaded(tmp_path) -> None:
    first = AnnotatorReliability(3, ema=0.2)
    first.update(vector(0.1, 0.9), ids(0, 2))
    first.accumulate(vector(0.3, 0.4), ids(1, 1))
    torch.save(first.state_dict(), tmp_path / "state")
    second = AnnotatorReliability(3)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert second.eta.equal(first.eta) and second.ema == 0.2
    assert second.update().equal(first.update())
    state = first.state_dict()
    state["eta"][0] = 0.5
    assert first.eta[0] != 0.5
    with pytest.raises(ValueError, match=r"state has eta of shape \[3\]; \[2\] is expected, for K = 2"):
        AnnotatorReliability(2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state has sums of shape None"):
        first.load_state_dict({"eta": state["eta"]})
    with pytest.raises(ValueError, match=r"state has eta \[nan, .*numbers in \(0, 1\)"):
        first.load_state_dict({**state, "eta": vector(math.nan, 0.5, 0.5)})


# ---- several ranks


def test_a_hook_sums_over_ranks() -> None:
    w, annotator = torch.rand(10, dtype=F64), torch.randint(3, (10,))
    whole = AnnotatorReliability(3).update(w, annotator)
    other = AnnotatorReliability(3)
    other.accumulate(w[:4], annotator[:4])
    theirs = other.state_dict()["sums"]

    def in_place(total):
        total += theirs

    for hook in (in_place, lambda total: total + theirs):
        found = AnnotatorReliability(3, reduce=hook).update(w[4:], annotator[4:])
        assert_close(found, whole, rtol=0, atol=1e-15)


def updates_of_a_share(rank: int) -> list[torch.Tensor]:
    w, annotator = torch.rand(3, 10, dtype=torch.float64), torch.randint(4, (3, 10))  # the same on each rank
    share = slice(0, 7) if rank == 0 else slice(7, 10)
    results = []
    for reduce in ("world", torch.distributed.group.WORLD):
        ranks, whole = AnnotatorReliability(5, reduce=reduce), AnnotatorReliability(5)
        for step in range(3):
            found, expected = ranks.update(w[step, share], annotator[step, share]), whole.update(w[step], annotator[step])
        assert_close(found, expected, rtol=0, atol=1e-15)
        results.append(found)
    return results


def test_two_ranks_stay_equal() -> None:
    for one, other in zip(*run_ranks(updates_of_a_share, 2), strict=True):
        assert one.equal(other)


def of_different_sizes(rank: int) -> None:
    reliability = AnnotatorReliability(3 + rank, reduce="world")
    with pytest.raises(ValueError, match=rf"disagree; rank {rank} has packed_sum of tensor 0 float64 \[2, {3 + rank}\]"):
        reliability.update(torch.full((2,), 0.5), torch.tensor([0, 2]))


def test_ranks_that_know_different_annotators() -> None:
    run_ranks(of_different_sizes, 2, timeout=20)


# ---- refusals


def test_a_bad_batch_changes_nothing() -> None:
    reliability = AnnotatorReliability(2)
    before = reliability.state_dict()
    for w, annotator, message in (
        (vector(0.5, math.nan), ids(0, 1), r"w\[1\] is nan; a probability is expected"),
        (vector(1.5, 0.5), ids(0, 1), r"w\[0\] is 1.5"),
        (vector(0.5, 0.5), ids(0, 2), r"annotator\[1\] is 2; ids are 0 to 1"),
        (vector(0.5, 0.5), ids(-1, 0), r"annotator\[0\] is -1"),
        (vector(0.5, 0.5), None, "annotator is None; ids of 2 annotators are expected"),
        (vector(0.5, 0.5), ids(0), r"annotator is torch.int64 \[1\]; int64 or int32 \[2\]"),
        (vector(0.5, 0.5), vector(0, 1), r"annotator is torch.float64 \[2\]"),
        (vector(0.5)[None], ids(0), r"w has shape \[1, 1\]; \[P\] is expected"),
    ):
        with pytest.raises(ValueError, match=message):
            reliability.update(w, annotator)
        assert all(torch.equal(torch.as_tensor(reliability.state_dict()[k]), torch.as_tensor(v)) for k, v in before.items())


def test_on_a_gpu(device) -> None:
    reliability = AnnotatorReliability(3, device=device)
    w, annotator = torch.tensor([0.5, 1.0, 0.25], device=device), torch.tensor([0, 0, 2], device=device)
    assert_close(reliability.update(w, annotator).cpu(), vector(0.885, 0.9, 0.835), rtol=0, atol=1e-12)
    assert reliability.eta.device.type == device and reliability.to("cpu").eta.device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_on_a_gpu_a_nan_leaves_its_annotator(device) -> None:
    reliability = AnnotatorReliability(3, device=device)
    w, annotator = torch.tensor([0.5, math.nan, 0.25], device=device), torch.tensor([0, 1, 2], device=device)
    assert_close(reliability.update(w, annotator).cpu(), vector(0.86, 0.9, 0.835), rtol=0, atol=1e-12)
    assert reliability.update(w[:1], annotator[1:2]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"K": 0}, ValueError, "K is 0; a positive integer"),
        ({"K": 2.0}, ValueError, "K is 2.0"),
        ({"K": 1, "ema": 0}, ValueError, r"ema is 0; a number in \(0, 1\]"),
        ({"K": 1, "ema": 1.5}, ValueError, "ema is 1.5"),
        ({"K": 2, "init": 0.4}, ValueError, r"init is 0.4; numbers in \[0.5, 1\]"),
        ({"K": 2, "init": vector(0.5, math.nan)}, ValueError, "init is "),
        ({"K": 2, "init": vector(0.5, 0.6, 0.7)}, ValueError, r"init has shape \[3\]; a number or \[2\]"),
        ({"K": 1, "reduce": "all"}, TypeError, "reduce is 'all'; 'world', a process group, a function or None"),
    ],
)
def test_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        AnnotatorReliability(**arguments)


def test_it_is_at_the_top() -> None:
    assert {"AnnotatorReliability", "ExtragradientStep"} <= set(prefkern.__all__)
