"""Inside Hugging Face models. Wants torch and transformers, which are large: skipped where they are not.

    pip install torch 'transformers>=5.20,<6' && pytest tests/test_transformers.py
"""

from __future__ import annotations

import numpy as np
import pytest

import phase_moe

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch 'transformers>=5.20,<6'")
transformers = pytest.importorskip("transformers", minversion="5.20", reason="transformers from 5.20 on is not installed")

from phase_moe.transformers import attach, perplexity  # noqa: E402

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def models() -> dict[str, object]:
    mixture = {"num_experts": 8, "num_experts_per_tok": 2}
    return {
        "olmoe": transformers.OlmoeConfig(**SIZES, **mixture, intermediate_size=24),
        "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, intermediate_size=24),
        "qwen2_moe": transformers.Qwen2MoeConfig(**SIZES, **mixture, moe_intermediate_size=24, shared_expert_intermediate_size=16),
        "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **mixture, head_dim=8, moe_intermediate_size=24, norm_topk_prob=True),
        "gpt_oss": transformers.GptOssConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, intermediate_size=24, head_dim=8),
        "deepseek_v3": transformers.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=24, n_group=4, topk_group=2, first_k_dense_replace=0,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1, routed_scaling_factor=2.5,
        ),
    }


def build(family: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(models()[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


def ids(batch: int = 4, length: int = 32):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", list(models()))
def test_without_limits_it_is_the_model_itself(family: str) -> None:
    model, tokens = build(family), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        with attach(model, "top-k", record=True) as routing:
            got = model(tokens).logits
        again = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (again == expected).all(), "the model has its own routing back"
    assert len(routing.layers) == 2 and routing.survival == 1.0 and routing.gate_mass == pytest.approx(1.0)
    assert routing.layers[0].routes[0].experts.shape == (128, 2)
    with attach(model, "top-k"):
        assert perplexity(model, [tokens]) == pytest.approx(perplexity_of(model, tokens), rel=1e-6)


def perplexity_of(model, tokens) -> float:
    """By transformers alone, with nothing attached."""
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    for module, _ in hooks:
        module._forward_hooks.clear()
    value = perplexity(model, [tokens])
    for module, held in hooks:
        module._forward_hooks.update(held)
    return value


@pytest.mark.parametrize("family", list(models()))
def test_limits_hold_and_nothing_is_dropped(family: str) -> None:
    model, tokens = build(family), ids()
    with torch.no_grad():
        with attach(model, "phase", capacity_factor=1.0, devices=4) as phase:
            model(tokens)
            kept = phase.gate_mass
        with attach(model, "top-k-arrival", capacity_factor=1.0, devices=4) as dropping:
            model(tokens)
    assert dropping.survival < phase.survival and kept > dropping.gate_mass
    if family == "deepseek_v3":
        return  # Its tokens may use two of four groups, which are the devices here: not all that they ask for fits.
    assert phase.survival == 1.0
    for layer in phase.layers:
        assert (layer.reports[0].loads.reshape(4, 2).sum(axis=1) == 64).all()


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
def test_gradients_pass_and_dropped_slots_have_none(family: str) -> None:
    model, tokens = build(family).train(), ids()
    with attach(model, "phase", capacity_factor=1.0):
        model(tokens, labels=tokens).loss.backward()
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight")]
    assert weights and all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.parametrize("family", list(models()))
def test_recorded_routes_are_replayed(family: str) -> None:
    model, tokens = build(family), ids()
    batches = (tokens, tokens.flip(0))
    with torch.no_grad():
        with attach(model, "top-k-arrival", capacity_factor=1.0, record=True) as first:
            expected = [model(batch).logits for batch in batches]
        assert first.survival < 1.0, "nothing was dropped"
        with attach(model, forced=[layer.routes for layer in first.layers]) as again:
            for batch, logits in zip(batches, expected, strict=True):
                assert (model(batch).logits == logits).all()
            with pytest.raises(ValueError, match="got one more"):
                model(tokens)
        assert again.survival == first.survival
    with pytest.raises(ValueError, match="expected routes for 2 layers"):
        attach(model, forced=[[]])


def test_other_experts_can_be_forced_and_gradients_pass() -> None:
    model, tokens = build("olmoe"), ids()
    fixed = np.tile(np.array([[3, 1]]), (128, 1))
    with attach(model, forced=[[fixed], [fixed]], record=True) as routing:
        model(tokens, labels=tokens).loss.backward()
    assert (routing.layers[1].routes[0].experts == fixed).all()
    gates = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == 2 and all(grad is not None and grad.abs().sum() > 0 for grad in gates)


def test_padding_takes_no_room() -> None:
    model, tokens = build("olmoe"), ids()
    mask = np.zeros((4, 32), dtype=bool)
    mask[:, 20:] = True
    with torch.no_grad(), attach(model, "phase", capacity_factor=1.0) as routing:
        routing.padding = mask
        model(tokens)
    assert routing.layers[0].reports[0].demand == 4 * 20 * 2
    routing.clear()
    assert not routing.layers[0].reports


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="expected router modules"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="top-k"):
        attach(build("olmoe"), "top-k", capacity_factor=1.0)
    assert phase_moe.ROUTERS
