"""Our routers inside Hugging Face MoE models on the CPU, in real forward passes (transformers from 5.20 on, below 6).

>>> with phase_moe.transformers.attach(model, "phase", capacity_factor=1.0, devices=4) as routing:   # doctest: +SKIP
...     loss = model(ids, labels=ids).loss
>>> routing.survival, routing.gate_mass                                                              # doctest: +SKIP

Every router module of the model goes on making its logits; which experts each token gets is then ours to say, and combine weights are made of the logits by the model's own
formula, so that gradients pass. Families: OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, DeepSeek-V3, and others whose router modules are made the same way. With ``"top-k"`` and no
limits the experts are the model's own, but where two are within rounding of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ._phase_moe import Report
from .routing import Route, Router

try:
    import torch
except ImportError as error:
    raise ImportError("phase_moe.transformers wants torch and transformers: pip install torch 'transformers>=5.20,<6'") from error

__all__ = ["Layer", "Routing", "attach", "perplexity"]


@dataclass
class Layer:
    """One router module of the model, and what was done there."""

    #: Its name in the model.
    name: str
    router: Router
    #: What the router did, pass by pass.
    reports: list[Report] = field(default_factory=list)
    #: What was selected and what was dropped of it, pass by pass; kept where asked for.
    routes: list[Route] = field(default_factory=list)


class Routing:
    """Routers attached to a model, and what they did. Made by :func:`attach`; leaves the model as it was when closed."""

    def __init__(self, layers: list[Layer], handles: list[Any]) -> None:
        self.layers = layers
        self._handles = handles
        #: True for tokens that are padding, ``[batch, length]`` or flat; set it before a pass, ``None`` for none.
        self.padding: Any = None

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model its own routing back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forgets reports and routes; what routers have learnt stays."""
        for layer in self.layers:
            layer.reports.clear()
            layer.routes.clear()

    def _sum(self, of: Any) -> float:
        return float(sum(of(report) for layer in self.layers for report in layer.reports))

    @property
    def survival(self) -> float:
        """Slots that got an expert, of those asked for, over all layers and passes."""
        return self._sum(lambda report: report.kept) / max(self._sum(lambda report: report.demand), 1.0)

    @property
    def gate_mass(self) -> float:
        """Gate scores of kept slots, of those of the gate's own choice without a limit, over all layers and passes."""
        most = self._sum(lambda report: report.masses[1])
        return self._sum(lambda report: report.masses[0]) / most if most else 1.0


@dataclass(frozen=True)
class _Gate:
    """How a router module makes weights of logits."""

    sigmoid: bool
    normalize: bool
    scale: float
    groups: tuple[int, int] | None
    #: Softmax over the selected logits alone, in the model's dtype (gpt-oss); the same numbers as normalised scores.
    over_selected: bool
    #: Weights are given in float32 whatever the model's dtype.
    in_float: bool

    @staticmethod
    def of(module: Any) -> _Gate:
        name = type(module).__name__
        if hasattr(module, "e_score_correction_bias"):
            groups = (int(module.num_group), int(module.topk_group))
            return _Gate(True, bool(module.norm_topk_prob), float(module.routed_scaling_factor), groups, False, True)
        if name.startswith("GptOss"):
            return _Gate(False, True, 1.0, None, True, False)
        if name.startswith("Mixtral"):
            return _Gate(False, True, 1.0, None, False, True)
        if hasattr(module, "norm_topk_prob"):
            return _Gate(False, bool(module.norm_topk_prob), 1.0, None, False, False)
        raise ValueError(f"router module {name}: expected one of OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss or DeepSeek-V3, got another")

    def weights(self, logits: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Combine weights of the selected experts by the model's own formula; gradients pass."""
        if self.over_selected:
            return torch.softmax(logits.gather(1, selected), dim=1, dtype=logits.dtype)
        scores = logits.float().sigmoid() if self.sigmoid else torch.softmax(logits, dim=-1, dtype=torch.float)
        weights = scores.gather(1, selected)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + (1e-20 if self.sigmoid else 0.0))
        weights = weights * self.scale if self.scale != 1.0 else weights
        return weights if self.in_float else weights.to(logits.dtype)


def attach(
    model: torch.nn.Module,
    router: str = "phase",
    *,
    record: bool = False,
    forced: Sequence[Sequence[Route | npt.ArrayLike]] | None = None,
    **settings: Any,
) -> Routing:
    """Puts a router into every MoE layer of a model; ``settings`` are those of :class:`phase_moe.Router`. As a context manager it takes them out again.

    ``record`` keeps what each layer did in every pass (``Layer.routes``). ``forced`` are such records, or ids alone, one sequence of passes per layer: those experts
    are taken in place of a router's, in training with routing replayed (see :meth:`phase_moe.Router.forced`). Raises ``ValueError`` for a model without router modules that are known.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")]
    if not found:
        raise ValueError(f"model {type(model).__name__}: expected router modules (.. TopKRouter), got none")
    if forced is not None and len(forced) != len(found):
        raise ValueError(f"forced: expected routes for {len(found)} layers, got {len(forced)}")
    routing = Routing([], [])
    for index, (name, module) in enumerate(found):
        gate = _Gate.of(module)
        scored: dict[str, Any] = {"scoring": "sigmoid" if gate.sigmoid else "softmax", "normalize": gate.normalize, "scale": gate.scale, "layer": index}
        if forced is None:
            made = Router(router, int(module.top_k), groups=gate.groups, **scored, **settings)
        else:
            experts = int(getattr(module, "num_experts", 0) or module.weight.shape[0])
            made = Router.forced(forced[index], experts=experts, **scored, **settings)
        layer = Layer(name, made)
        routing.layers.append(layer)
        routing._handles.append(module.register_forward_hook(_hook(routing, layer, gate, record)))
    return routing


def _hook(routing: Routing, layer: Layer, gate: _Gate, record: bool) -> Any:
    def hook(module: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        logits = output[0]
        if logits.device.type != "cpu":
            raise ValueError(f"{layer.name}: expected a model on the CPU, got one on {logits.device}")
        values = logits.detach().float().contiguous().numpy()
        bias = getattr(module, "e_score_correction_bias", None)
        padding = None if routing.padding is None else np.asarray(routing.padding, dtype=np.bool_).reshape(-1)
        ids, _, report = layer.router.route(
            values,
            selection_bias=None if bias is None else bias.detach().float().numpy(),
            padding=padding,
        )
        if ids.shape[1] != int(module.top_k):
            raise ValueError(f"{layer.name}: expected {module.top_k} slots a token, got {ids.shape[1]} of router {layer.router.name}")
        selection = report.selection
        layer.reports.append(report)
        if record:
            layer.routes.append(Route(ids, selection))
        selected = torch.from_numpy(np.maximum(selection, 0).astype(np.int64))
        weights = gate.weights(logits, selected)
        # A slot that was dropped weighs nothing; its neighbours' weights stay what they are.
        if (ids < 0).any():
            weights = weights * torch.from_numpy(ids >= 0).to(weights.dtype)
        return logits, weights, selected

    return hook


def perplexity(model: Any, batches: Iterable[torch.Tensor]) -> float:
    """``exp`` of the mean cross-entropy of the next token over batches of ids ``[batch, length]``, with whatever is attached to the model."""
    total, count = 0.0, 0
    for ids in batches:
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses.double()), count + ids[:, 1:].numel()
    if count == 0:
        raise ValueError("batches: expected at least one of two tokens or more, got none")
    return float(np.exp(total / count))
