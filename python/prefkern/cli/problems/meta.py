"""The inner loss of a learned policy update, and its recurrent network."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prefkern.cli.problems.base import Problem, problem

ROWS, STEPS, ACTIONS, WIDTH, INPUTS, HIDDEN = 5, 7, 4, 6, 3, 11


def meta_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Random distributions, with both signs; a network with and without terminal steps."""
    probs, y, y_hat = (torch.randn(ROWS, STEPS, n).softmax(-1).to(dtype) for n in (ACTIONS, WIDTH, WIDTH))
    leaves = {"probs": probs, "y": y, "pi_hat": torch.randn(ROWS, STEPS).to(dtype), "y_hat": y_hat}
    for sign in ("code", "paper"):
        yield problem("lpg_inner_loss", sign, leaves, {"actions": torch.randint(ACTIONS, (ROWS, STEPS)), "sign": sign})
    weights = {
        "weight_ih": (3 * HIDDEN, INPUTS),
        "weight_hh": (3 * HIDDEN, HIDDEN),
        "bias_ih": (3 * HIDDEN,),
        "bias_n": (HIDDEN,),
    }
    network = {"x": torch.randn(ROWS, STEPS, INPUTS).to(dtype)}
    network |= {name: (0.4 * torch.randn(shape)).to(dtype) for name, shape in weights.items()}
    yield problem("reverse_gru_reset", "no terminals", network, {"done": None})
    yield problem("reverse_gru_reset", "terminals", network, {"done": torch.rand(ROWS, STEPS) < 0.3})
