"""Whole models on the checkpoint of this repository, traces and replays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import phase_moe
from phase_moe import Model, Router, Trace, replay

ROOT = Path(__file__).resolve().parents[3]
PATH = ROOT / "models/tiny-moe"
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((PATH / "eval").glob("*.txt"))]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(PATH)


@pytest.fixture(scope="module")
def trace(model: Model) -> Trace:
    model.set_router("top-k")
    return model.trace(TEXTS, tokens=1536)


def test_sizes(model: Model) -> None:
    sizes = model.sizes
    assert (model.name, sizes["family"], sizes["experts"], sizes["top_k"]) == ("tiny-moe", "olmoe", 32, 4)
    assert sizes["active_parameters"] < sizes["parameters"]
    assert model.cache is None


def test_text_goes_through_the_tokenizer_and_back(model: Model) -> None:
    ids = model.encode("And God said, Let there be light")
    assert ids.dtype == np.uint32
    assert model.decode(ids[3:], before=ids[:3]) == "And God said, Let there be light"[len(model.decode(ids[:3])) :]


def test_the_iterator_gives_what_the_logits_say(model: Model) -> None:
    model.set_router("top-k")
    prompt = model.encode("And God said")
    generation = model.generate("And God said", new_tokens=12)
    assert generation.prompt_tokens == len(prompt) and generation.prefill_tokens_per_second is None
    text = "".join(generation)
    ids = list(prompt)
    for new in generation.ids:
        # Without keys and values that were kept: the whole text again for every token.
        assert new == model.logits(ids)[-1].argmax()
        ids.append(new)
    assert len(generation.ids) == 12 and text == model.decode(generation.ids, before=prompt)
    assert generation.prefill_tokens_per_second > 0 and generation.decode_tokens_per_second > 0
    assert next(iter(generation), None) is None, "it is over"


def test_draws_depend_on_the_seed_and_on_nothing_else(model: Model) -> None:
    def text(seed: int, model: Model) -> str:
        return "".join(model.generate("The ", new_tokens=16, temperature=1.0, top_p=0.95, seed=seed))

    assert text(1, model) == text(1, Model(PATH, threads=1)) != text(2, model)
    assert "".join(model.generate("The ", new_tokens=0)) == ""


def test_measurements_say_what_limits_cost(model: Model) -> None:
    model.set_router("top-k")
    free = model.measure(TEXTS, tokens=4096)
    assert free.survival == 1.0 and free.gate_mass == pytest.approx(1.0, abs=1e-9)
    costs = {}
    for router in ("phase", "top-k-arrival"):
        model.set_router(router, capacity_factor=1.0, devices=4)
        limited = model.measure(TEXTS, tokens=4096)
        costs[router] = limited.perplexity / free.perplexity - 1
        assert (limited.survival == 1.0) == (router == "phase") and limited.gate_mass < 1.0
    model.set_router("top-k", top_k=2)
    fewer = model.measure(TEXTS, tokens=4096)
    model.set_router("top-k")
    assert 0 < costs["phase"] < 0.01 < costs["top-k-arrival"] and fewer.perplexity > free.perplexity
    assert model.measure(TEXTS, tokens=4096) == free


def test_an_expert_cache_gives_the_same_logits_and_counts() -> None:
    cached, held = Model(PATH, expert_cache=1 << 20), Model(PATH)
    ids = held.encode(TEXTS[0])[:40]
    np.testing.assert_allclose(cached.logits(ids), held.logits(ids), rtol=1e-5, atol=1e-5)
    cache = cached.cache
    assert cache is not None and cache["hits"] + cache["misses"] == cache["requests"] > 0
    assert cache["bytes_read"] > 0 and 0 < cache["bytes"] <= cache["peak_bytes"]
    before = cache["requests"]
    cached.set_router("cache", cache_bonus=0.2)
    assert len("".join(cached.generate("The ", new_tokens=4))) > 0
    assert cached.cache is not None and cached.cache["requests"] > before


def test_a_trace_is_arrays_and_a_file(trace: Trace, tmp_path: Path) -> None:
    assert (trace.experts, trace.top_k, trace.layers) == (32, 4, [0, 1, 2, 3])
    assert len(trace.logits) == 4 and trace.logits[0].shape == (trace.tokens, 32) and trace.logits[0].dtype == np.float32
    assert trace.token_ids is not None and trace.token_ids.shape == (trace.tokens,)
    trace.save(tmp_path / "t.safetensors")
    again = Trace.read(tmp_path / "t.safetensors")
    assert again.model == "tiny-moe" and all((a == b).all() for a, b in zip(again.logits, trace.logits, strict=True))
    made = Trace(trace.logits, 4, normalize=False, token_ids=trace.token_ids.tolist())
    counts = [(made.requests, made.hits) for made in (replay(made, "top-k"), replay(trace, "top-k"))]
    assert counts[0] == counts[1]


def test_a_trace_of_unequal_layers_wants_one_number(trace: Trace, tmp_path: Path) -> None:
    """The number of experts of each layer is in the file's metadata, as the command writes it."""
    trace.save(tmp_path / "t.safetensors")
    file = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"]["layer_top_k"] = "4,2,1,4"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "u.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + file[8 + length :])
    unequal = Trace.read(tmp_path / "u.safetensors")
    assert unequal.layer_top_k == [4, 2, 1, 4] and trace.layer_top_k == []
    with pytest.raises(ValueError, match="top_k: expected one number"):
        replay(unequal, "top-k")
    assert replay(unequal, "top-k", top_k=2).requests == replay(trace, "top-k", top_k=2).requests


def test_replays_count_as_a_plain_simulation_does(trace: Trace) -> None:
    """Least recently used, every miss admitted, by hand."""
    cached, hits, requests = 12, 0, 0
    for logits in trace.logits:
        order: list[int] = []
        for row in logits:
            chosen = np.argsort(-row, kind="stable")[:4]
            requests += 4
            hits += sum(expert in order for expert in chosen)
            # A step's experts stay together; what leaves was used longest ago.
            order = [expert for expert in order if expert not in chosen] + [int(expert) for expert in sorted(chosen)]
            order = order[-cached:]
    figures = replay(trace, "top-k", cached_experts=cached, policy="lru", admission="all")
    assert (figures.requests, figures.hits, figures.misses) == (requests, hits, requests - hits)
    assert figures.gate_mass_kept == figures.agreement == 1.0


def test_policies_stay_below_belady_and_the_bonus_saves_reads(trace: Trace) -> None:
    plain = {policy: replay(trace, "top-k", cached_experts=8, policy=policy, admission="all") for policy in ("lru", "lfu", "lfru", "affinity")}
    rates = {policy: figures.hit_rate for policy, figures in plain.items()}
    best = {figures.belady_hit_rate for figures in plain.values()}
    assert len(best) == 1 and all(0 < rate < min(best) for rate in rates.values()) and len(set(rates.values())) > 1
    swapped = replay(trace, "cache", cached_experts=8, cache_bonus=0.2, max_mass_loss=0.1, admission="all")
    assert swapped.misses < plain["lru"].misses and 0.9 <= swapped.gate_mass_kept < 1.0
    assert replay(trace, "cache", cached_experts=8, cache_bonus=0.0, admission="all").misses == plain["lru"].misses
    steered = replay(trace, "cache", cached_experts=8, target_hit_rate=0.9)
    assert steered.bonus is not None and steered.bonus > 0


def test_forced_routes_are_given_again() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 64, 16)).astype(np.float32)
    router = Router("top-k-arrival", 4, capacity_factor=0.75, normalize=True)
    recorded = []
    for batch in logits:
        ids, weights, report = router.route(batch)
        assert report.survival < 1.0
        recorded.append((ids, weights, phase_moe.Route(ids, report.selection)))
    forced = Router.forced([route for _, _, route in recorded], experts=16, normalize=True)
    for _ in range(2):
        for batch, (ids, weights, _) in zip(logits, recorded, strict=True):
            again = forced.route(batch)
            assert (again[0] == ids).all() and (again[1] == weights).all()
        with pytest.raises(ValueError, match="expected at most the 2 batches that were recorded of layer 0, got one more"):
            forced.route(logits[0])
        forced.reset()
    # Ids alone, and other logits: weights are of these.
    ids, weights, _ = Router.forced([[[3, 5]]], experts=16).route(logits[0, :1])
    scores = np.exp(logits[0, 0] - logits[0, 0].max())
    assert ids.tolist() == [[3, 5]] and weights[0] == pytest.approx((scores / scores.sum())[[3, 5]], rel=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, t: Model(PATH, dtype="f8"), "f32, f16 or bf16"),
        (lambda m, t: Model(PATH, expert_cache=1), "expected"),
        (lambda m, t: Model(PATH, expert_cache=1 << 20, policy="mru"), "policy"),
        (lambda m, t: m.set_router("phase", capacities=[1] * 32), "capacity_factor"),
        (lambda m, t: m.set_router("phase", normalize=True), "normalize"),
        (lambda m, t: m.set_router("top-k", top_k=33), "33"),
        (lambda m, t: m.set_router("top-k", cache_bonus=0.1), "cache"),
        (lambda m, t: m.logits([]), "sequence"),
        (lambda m, t: m.logits([10**6]), "1000000"),
        (lambda m, t: m.logits([-1]), "-1"),
        (lambda m, t: m.generate("", new_tokens=3), "prompt"),
        (lambda m, t: m.generate("x", temperature=-1.0), "temperature"),
        (lambda m, t: m.trace([]), "text"),
        (lambda m, t: replay(t, cached_experts=33), "33"),
        (lambda m, t: replay(t, batch_tokens=0), "batch tokens"),
        (lambda m, t: replay(t, admission="none"), "admission"),
        (lambda m, t: replay(t, "phase", scale=2.0), "scale"),
        (lambda m, t: Trace([], 2), "at least one layer"),
        (lambda m, t: Trace([np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)], 2), "layer 1"),
        (lambda m, t: Trace([np.full((3, 4), np.nan, np.float32)], 2), "NaN"),
        (lambda m, t: Trace([np.zeros((3, 4), np.float32)], 5), "top_k is 5"),
        (lambda m, t: Router.forced([], experts=4), "at least one batch"),
        (lambda m, t: Router.forced([[[0, 4]]], experts=4), "expert 4"),
        (lambda m, t: Router.forced([[[0.5, 1.0]]], experts=4), "whole numbers"),
        (lambda m, t: Router.forced([[[0, 0]]], experts=4), "distinct"),
        (lambda m, t: Router.forced([phase_moe.Route([[0, 1]], [[0, 2]])], experts=4), "expert 2 or -1"),
        (lambda m, t: Router.forced([[[0, 1]]], experts=4).route(np.zeros((2, 4), np.float32)), "expected 2 tokens"),
    ],
)
def test_what_makes_no_sense_says_so(model: Model, trace: Trace, call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(model, trace)


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Model(tmp_path / "nowhere")
    shutil.copytree(PATH, tmp_path / "short")
    weights = tmp_path / "short/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        Model(tmp_path / "short")
    with pytest.raises(ValueError, match="t.safetensors"):
        (tmp_path / "t.safetensors").write_bytes(b"0123456789")
        Trace.read(tmp_path / "t.safetensors")
