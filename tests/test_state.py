"""prefkern._state: states that are looked at before they are taken over."""

import pytest
import torch

from prefkern._state import checked_state, generator, save_state


class Owner:
    pass


FIELDS = {"counts": torch.arange(3.0), "step": 4, "rate": 0.5, "name": "a", "on": True}


def test_round_trip_copies():
    counts = torch.arange(3.0)
    state = save_state(Owner(), 2, {**FIELDS, "counts": counts})
    counts += 1
    assert state["counts"].tolist() == [0, 1, 2]
    taken = checked_state(Owner(), 2, state, FIELDS)
    assert {name: value for name, value in taken.items() if name != "counts"} == {
        "step": 4,
        "rate": 0.5,
        "name": "a",
        "on": True,
    }
    state["counts"] += 1
    assert taken["counts"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "Other"}, r"state is of 'Other', version 2; one of 'Owner', version 2"),
        ({"version": 1}, r"version 1; one of 'Owner', version 2"),
        ({"extra": 1}, r"missing \[\], unknown \['extra'\]"),
        ({"step": None}, r"state\['step'\] is a NoneType; a int"),
        ({"step": True}, r"state\['step'\] is a bool"),
        ({"step": 1.5}, r"state\['step'\] is a float; a int"),
        ({"on": 1}, r"state\['on'\] is a int; a bool"),
        ({"counts": torch.zeros(4)}, r"state\['counts'\] is torch.float32 \[4\]; torch.float32 \[3\]"),
        ({"counts": torch.zeros(3).double()}, r"state\['counts'\] is torch.float64 \[3\]"),
        ({"counts": [0.0] * 3}, r"state\['counts'\] is a list"),
    ],
)
def test_corrupted_states(change, message):
    state = {**save_state(Owner(), 2, FIELDS), **change}
    with pytest.raises(ValueError, match=message):
        checked_state(Owner(), 2, state, FIELDS)


def test_missing_field_and_no_mapping():
    state = save_state(Owner(), 2, FIELDS)
    del state["rate"]
    with pytest.raises(ValueError, match=r"missing \['rate'\]"):
        checked_state(Owner(), 2, state, FIELDS)
    with pytest.raises(TypeError, match="state is a list"):
        checked_state(Owner(), 2, [], FIELDS)


def test_generators_of_neighbours_are_unrelated():
    draws = torch.stack([torch.rand(4, generator=generator(seed, key)) for seed in range(3) for key in range(50)])
    assert len(draws[:, 0].unique()) == 150
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.25
    assert torch.equal(torch.rand(4, generator=generator(1, 7)), draws[57])
