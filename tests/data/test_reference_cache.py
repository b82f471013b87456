"""The cache of reference log-probs: what changes a fingerprint, what is stored, and what happens to damaged files."""

import os
import sys
import warnings

import pytest
import torch
from torch import nn

import prefkern
from prefkern.data import CorruptedCacheError, ReferenceCache, data_fingerprint, model_fingerprint, reference, refresh_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))


class Counting:
    """A compute function that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return torch.log_softmax(model(batch), -1)


BATCHES = [torch.arange(10.0).view(2, 5) / 7, torch.arange(15.0).view(3, 5).sin()]


# ---- fingerprints of models


def test_equal_models_have_equal_fingerprints() -> None:
    first = model_fingerprint(small_model())
    assert first == model_fingerprint(small_model()) and len(first) == 64
    state = small_model().state_dict()
    assert model_fingerprint(dict(reversed(state.items()))) == first  # the order of names does not matter
    assert model_fingerprint({k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in state.items()}) == first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 9, 70_001])
def test_one_bit_changes_the_fingerprint(dtype, n) -> None:
    weight = torch.randn(n).mul(3).to(dtype)
    before = model_fingerprint({"w": weight})
    for place in {0, n // 2, n - 1}:
        changed = weight.clone()
        bits = changed.view(torch.uint8)
        bits[place * weight.element_size()] ^= 1
        assert model_fingerprint({"w": changed}) != before
    assert model_fingerprint({"w": weight.clone()}) == before


def test_what_else_changes_the_fingerprint() -> None:
    weight = torch.randn(4, 6)
    words = weight.view(torch.int64)
    others = {
        "swapped rows": weight[[1, 0, 2, 3]],
        "shape": weight.view(6, 4),
        "dtype": weight.view(torch.int32),
        "all bits": (~words).view(torch.float32),
        "sign": -weight,
        "two signs": torch.where(torch.arange(24).view(4, 6) < 2, -weight, weight),
        "longer by zero": torch.cat([weight, torch.zeros(1, 6)]),
    }
    found = {name: model_fingerprint({"w": value}) for name, value in others.items()}
    found["same"] = model_fingerprint({"w": weight})
    found["name"] = model_fingerprint({"v": weight})
    found["tag"] = model_fingerprint({"w": weight}, tag="adapter off")
    assert len(set(found.values())) == len(found)


def test_places_in_memory_do_not_matter() -> None:
    memory = torch.zeros(41, dtype=torch.uint8)
    value = torch.arange(17, dtype=torch.uint8)
    fingerprints = set()
    for start in range(9):
        memory[start : start + 17] = value
        fingerprints.add(model_fingerprint({"w": memory[start : start + 17]}))
    assert fingerprints == {model_fingerprint({"w": value})}


def test_large_tensors_are_hashed_block_by_block(monkeypatch) -> None:
    block = reference._BLOCK
    weight = torch.randn(3 * block + 17, dtype=torch.float64)
    found = model_fingerprint({"w": weight})
    for blocks in (2, 3, 64):  # as many as a GPU takes at once, say
        monkeypatch.setattr(reference, "_BLOCKS", {"cpu": blocks})
        assert model_fingerprint({"w": weight}) == found
    swapped = torch.cat([weight[block : 2 * block], weight[:block], weight[2 * block :]])
    assert model_fingerprint({"w": swapped}) != found


def test_names_and_configuration_can_be_left_out() -> None:
    model = small_model()

    class Config:
        softcap = 30.0
        version = "5.0"

        def to_dict(self):
            return {"softcap": self.softcap, "_name_or_path": self.version, "transformers_version": self.version}

    bare = model_fingerprint(model)
    model.config = Config()
    with_config = model_fingerprint(model)
    assert with_config != bare == model_fingerprint(model, config=False)
    Config.version = "6.0"
    assert model_fingerprint(model) == with_config
    Config.softcap = 50.0
    assert model_fingerprint(model) != with_config
    weights = model_fingerprint(model, include=lambda name: not name.startswith("1."))
    model[1](torch.randn(4, 7))  # moves the running statistics
    assert model_fingerprint(model, include=lambda name: not name.startswith("1.")) == weights
    with pytest.raises(ValueError, match="model has no tensors"):
        model_fingerprint(model, include=lambda name: False)
    with pytest.raises(TypeError, match=r"model\['w'\] is a torch.strided tensor on meta"):
        model_fingerprint({"w": torch.empty(2, device="meta")})


def test_fingerprints_do_not_change_between_versions() -> None:
    """A value that was stored: a change here would silently cost everyone their caches."""
    assert model_fingerprint({"w": torch.arange(5, dtype=torch.float32), "n": torch.tensor(3)})[:16] == "9bbf04eb977a9271"
    assert data_fingerprint([{"x": torch.arange(3), "y": "text"}, 1.5, None])[:16] == "cf908b396b8561d5"


def test_the_fingerprint_of_a_model_on_a_gpu(device) -> None:
    model = small_model()
    expected = model_fingerprint(model)
    assert model_fingerprint(model.to(device)) == expected


# ---- fingerprints of data


def test_data_that_differs() -> None:
    x = torch.arange(4.0)
    values = [
        [x], [x, x], [[x]], x, x.double(), x.view(2, 2), {"a": x}, {"b": x}, {"a": x, "b": 1}, [], [[]], None, 0, 0.0, False,
        "", b"", "0", ["a", "b"], ["ab"], [["a"], "b"], [["a", "b"]], {}, float("nan"),
    ]  # fmt: skip
    assert len({data_fingerprint(value) for value in values}) == len(values)
    assert data_fingerprint(x, x) != data_fingerprint(x)


def test_data_that_is_the_same() -> None:
    x = torch.arange(4.0)
    assert data_fingerprint({"a": 1, "b": x}) == data_fingerprint({"b": x.clone(), "a": 1})
    assert data_fingerprint(x.numpy()) == data_fingerprint(x) == data_fingerprint(torch.arange(8.0)[::2] / 2)
    assert data_fingerprint([1, 2]) == data_fingerprint((1, 2)) == data_fingerprint(iter([1, 2]))
    with pytest.raises(TypeError, match="data holds a object; tensors, arrays"):
        data_fingerprint([object()])


# ---- the cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype) -> None:
    cache = ReferenceCache(tmp_path / "deep" / "er")
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8).view(dtype)  # some are NaN with a payload
    stored = {"logp": bits, "empty": bits[:0], "part": bits.view(-1, 2)[:, 0]}
    assert cache.get("m", "d") is None
    path = cache.put("m", "d", stored)
    found = cache.get("m", "d")
    assert found is not None and set(found) == set(stored)
    for name, value in stored.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        assert found[name].contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert cache.get("m", "other") is None and cache.get("other", "d") is None and cache.get("md", "") is None


def test_a_second_put_replaces_the_first(tmp_path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.put("m", "d", {"x": torch.ones(2)})
    before = cache.get("m", "d")
    cache.put("m", "d", {"x": torch.zeros(2)})
    assert cache.get("m", "d")["x"].tolist() == [0, 0] and before["x"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="tensors is empty"):
        cache.put("m", "d", {})


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    cache = ReferenceCache(tmp_path)
    cache.put("m", "d", {"x": torch.ones(2)})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("m", "d", {"x": torch.zeros(2)})
    assert cache.get("m", "d")["x"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def damage(path, how) -> None:
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[-3] ^= 1
    elif how == "cut":
        content = content[:-5]
    elif how == "header":
        content[3] = 0xFF
    elif how == "empty":
        content = bytearray()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path, how) -> None:
    cache = ReferenceCache(tmp_path)
    path = cache.put("m", "d", {"x": torch.ones(8)})
    damage(path, how)
    with pytest.raises(CorruptedCacheError, match=f"{path.name} (is damaged: its checksum|cannot be read)"):
        cache.get("m", "d")


def test_a_file_of_another_model_is_refused(tmp_path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.put("m", "d", {"x": torch.ones(8)}).rename(cache.path("n", "d"))
    with pytest.raises(ValueError, match="is damaged: its model is 'm', not 'n'"):
        cache.get("n", "d")


def test_safetensors_is_asked_for_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'prefkern\[data\]'"):
        ReferenceCache(tmp_path).put("m", "d", {"x": torch.ones(8)})


# ---- refreshing


def same(results, others) -> bool:
    return len(results) == len(others) and all(a.equal(b) for a, b in zip(results, others, strict=True))


def test_computed_once_and_read_bitwise(tmp_path) -> None:
    model, compute, cache = small_model(), Counting(), ReferenceCache(tmp_path)
    first = refresh_reference(model, BATCHES, compute, cache)
    again = refresh_reference(model, BATCHES, compute, cache)
    assert compute.calls == 2 and same(first, again)
    elsewhere = refresh_reference(small_model(), iter(BATCHES), compute, ReferenceCache(tmp_path))
    assert compute.calls == 2 and same(first, elsewhere)
    model.eval()
    assert same(first, [torch.log_softmax(model(batch), -1).detach() for batch in BATCHES])


def test_another_model_or_other_data_is_computed(tmp_path) -> None:
    model, compute, cache = small_model(), Counting(), ReferenceCache(tmp_path)
    before = refresh_reference(model, BATCHES, compute, cache)
    with torch.no_grad():  # a stage of training
        model[0].weight[2, 3] += 0.1
    after = refresh_reference(model, BATCHES, compute, cache)
    assert compute.calls == 4 and not same(before, after)
    refresh_reference(model, BATCHES[::-1], compute, cache)
    refresh_reference(model, BATCHES, compute, cache, tag="mean")
    assert compute.calls == 8
    assert same(refresh_reference(model, BATCHES, compute, cache), after)
    assert same(refresh_reference(small_model(), BATCHES, compute, cache), before)  # both stages are kept
    assert compute.calls == 8


def test_known_fingerprints_are_taken_as_given(tmp_path) -> None:
    model, compute, cache = small_model(), Counting(), ReferenceCache(tmp_path)
    for model_hash, data_hash in (("a", "b"), ("a", "b"), ("a", "c"), ("c", "b")):
        refresh_reference(model, BATCHES, compute, cache, model_hash=model_hash, data_hash=data_hash)
    assert compute.calls == 6


def test_without_a_cache_it_always_computes() -> None:
    compute = Counting()
    one, other = (refresh_reference(small_model(), BATCHES, compute) for _ in range(2))
    assert compute.calls == 4 and same(one, other)


def test_several_tensors_by_name(tmp_path) -> None:
    def compute(model, batch):
        return {"chosen": batch.sum(1), "rejected": model(batch)}

    cache, batches = ReferenceCache(tmp_path), BATCHES * 6  # more than ten: "10" sorts before "2"
    first, again = (refresh_reference(small_model(), batches, compute, cache) for _ in range(2))
    assert len(again) == 12 and all(set(a) == {"chosen", "rejected"} for a in again)
    for one, other, batch in zip(first, again, batches, strict=True):
        assert one["rejected"].equal(other["rejected"]) and other["chosen"].equal(batch.sum(1))


def test_it_runs_without_gradient_and_without_dropout() -> None:
    model = small_model()
    model[3].eval()
    seen = []

    def compute(m, batch):
        seen.append((torch.is_grad_enabled(), [module.training for module in m.modules()]))
        return m(batch)

    result = refresh_reference(model, BATCHES, compute)
    assert seen == [(False, [False] * 5)] * 2
    assert not any(r.requires_grad for r in result)
    assert [module.training for module in model.modules()] == [True, True, True, True, False]

    def fails(m, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        refresh_reference(model, BATCHES, fails)
    assert [module.training for module in model.modules()] == [True, True, True, True, False]


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_a_damaged_file_is_computed_again(tmp_path, how) -> None:
    model, compute, cache = small_model(), Counting(), ReferenceCache(tmp_path)
    first = refresh_reference(model, BATCHES, compute, cache)
    (path,) = tmp_path.iterdir()
    damage(path, how)
    with pytest.warns(UserWarning, match=f"{path.name} .*It is computed again now"):
        again = refresh_reference(model, BATCHES, compute, cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, again) and same(first, refresh_reference(model, BATCHES, compute, cache))
    assert compute.calls == 4


def test_refreshing_refuses(tmp_path) -> None:
    for wrong in (3.0, {}, {"x": 1}, [torch.ones(1)]):
        with pytest.raises(TypeError, match=r"compute gave .* for batch 0; a tensor, or several by name, is expected"):
            refresh_reference(small_model(), BATCHES, lambda m, b, wrong=wrong: wrong, ReferenceCache(tmp_path))
    assert refresh_reference(small_model(), [], Counting(), ReferenceCache(tmp_path)) == [] == list(tmp_path.iterdir())


def test_the_package_is_loaded_when_asked_for(run_python) -> None:
    script = "import sys, prefkern; before = 'prefkern.data' in sys.modules; prefkern.data.ranked_pairs; print(before)"
    assert run_python(script) == "False"
    assert all(getattr(prefkern.data, name).__doc__ for name in prefkern.data.__all__)
