"""Forward and backward passes of routers in training, and of transport solvers, ready to be timed.

Letters: T tokens, D model width, E experts, B sequences, S tokens per sequence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.errors import ConfigError, Mistake
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.routing.newton_sparse import NewtonRule, sinkhorn_newton
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from moe.types import LayerContext, RouterContext, Routing
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.studies.option_lists import split_list

# Sequences of the batch that tokens are of, where they divide into such.
_SEQUENCE = 1024
# Rows of the experts that a router may read; the experts themselves are not run.
_EXPERT_WIDTH = 4
# The temperature of SSR's plans, whose kernel the solvers get.
_XI = 0.05
# Standard deviation of the initial weights of linear routers, and of the experts' offsets of skewed logits.
_INIT_STD, _OFFSET = 0.02, 1.5


@dataclass(frozen=True)
class Shape:
    """Tokens and experts of a router.

    Attributes:
        tokens: T.
        experts: E.
        width: D.
        skewed: If True, tokens give a fresh linear router logits like those of a trained
            one without balance: N(0, 1), and an offset of 1.5 N(0, 1) for each expert. Else tokens have unit
            variance, as behind a norm, and logits are near 0: training as it starts.
    """

    tokens: int
    experts: int
    width: int
    skewed: bool = False

    @property
    def batch_shape(self) -> tuple[int, int]:
        """B and S: sequences of 1024 tokens, or one sequence if T is not a multiple of that."""
        T = self.tokens
        return (T // _SEQUENCE, _SEQUENCE) if T and T % _SEQUENCE == 0 else (1, T)


@dataclass(frozen=True)
class Pass:
    """Pass of a router or solver at a shape, ready to run.

    Attributes:
        run: Runs it once and returns notes as numbers.
        known: The tensors that exist before it runs.
    """

    run: Callable[[], Mapping[str, float]]
    known: tuple[Tensor, ...]


@dataclass(frozen=True)
class Candidate:
    """One row of the benchmark.

    Attributes:
        label: Text of the user.
        config: The router's; None for a solver.
        prepare: Makes the pass at a shape.
    """

    label: str
    config: RouterConfig | None
    prepare: Callable[[Shape, torch.device], Pass]

    def unsupported_reason(self, num_experts: int) -> str | None:
        """Returns the router's reason to reject E experts; None if it accepts them."""
        if self.config is None:
            return None
        found = self.config.check(num_experts)
        return None if found is None else f"{found.rule}. {found.remedy}"


def read_candidates(labels: Sequence[str]) -> list[Candidate]:
    """Reads the rows of the benchmark from their labels.

    Args:
        labels: ``NAME`` or ``NAME[OPTION=VALUE,...]`` with a choice of ``conf/router`` and options of it,
            or a solver of `SOLVERS`.

    Raises:
        ConfigError: Labels that cannot be read, that name nothing, or whose options are wrong; all at once.
    """
    candidates, mistakes = [], list[Mistake]()
    for label in labels:
        if label in SOLVERS:
            candidates.append(Candidate(label, None, SOLVERS[label]))
            continue
        try:
            candidates.append(_router_candidate(label))
        except ConfigError as error:
            mistakes += [dataclasses.replace(m, path=f"--routers {label}: {m.path}") for m in error.mistakes]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    mistakes += [Mistake("--routers", label, "it stands there twice", "Name it once.") for label in repeated]
    if mistakes:
        raise ConfigError(mistakes)
    return candidates


def _router_candidate(label: str) -> Candidate:
    parts = re.fullmatch(r"(\w+)(?:\[(.+)\])?", label)
    if parts is None:
        remedy = "Write NAME or 'NAME[OPTION=VALUE,...]', in quotes for the shell's sake."
        raise ConfigError.one("router", label, "it cannot be read", remedy)
    name, options = parts[1], split_list(parts[2] or "")
    run = ["+recipe=upcycle", f"router={name}"]
    if options:
        _refuse_unknown(options, compose_config(run)["router"])
    config = parse_config(compose_config([*run, *(f"router.{option}" for option in options)])).router

    def prepare(shape: Shape, device: torch.device) -> Pass:
        return router_pass(config, shape, device)

    return Candidate(label, config, prepare)


def _refuse_unknown(options: Sequence[str], router: Mapping[str, Any]) -> None:
    """Rejects unknown options of a router; `compose_config` would suggest those of the default one."""
    given = [option.partition("=")[0] for option in options]
    known = ", ".join(router)
    rule, remedy = "the router has no such option", f"It has: {known}."
    unknown = [path for path in given if path.partition(".")[0] not in router]
    if unknown:
        raise ConfigError([Mistake(f"router.{path}", path, rule, remedy) for path in unknown])


def make_router(config: RouterConfig, shape: Shape, device: torch.device) -> Router[Any]:
    """Makes a router as at the start of training, with the same weights for all that draw alike."""
    router = router_class(config.name)(config, shape.width, shape.experts)
    router.reset_parameters(torch.Generator().manual_seed(0))
    return router.train().to(device)


def batch_context(config: RouterConfig, ids_BS: Tensor, num_experts: int) -> RouterContext:
    """Returns the context of a batch: token ids, and an expert for each token."""
    keys = {getattr(config, "key", "modality"): ids_BS % num_experts}
    return RouterContext(token_ids=ids_BS, keys=keys)


def router_pass(config: RouterConfig, shape: Shape, device: torch.device) -> Pass:
    """Makes the forward and backward pass of a router in training, with its losses.

    The gradient goes to the tokens and to the router's parameters, from whatever carries it into the layer:
    combine weights, losses, and what a routing of the router's own kind holds besides.
    """
    router = make_router(config, shape, device)
    x_TD = _tokens(shape, device).requires_grad_()
    experts = Experts(_few_rows(shape)).to(device)
    router.attach(experts)
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, 32768, shape.batch_shape, generator=generator).to(device)
    ctx = LayerContext(batch_context(config, ids_BS, shape.experts), 0)
    trained = [x_TD, *router.parameters()]

    def run() -> Mapping[str, float]:
        routing: Routing = router(x_TD, ctx)
        carriers = [value for value in _carriers(routing) if value.requires_grad]
        if carriers:
            torch.autograd.backward(carriers, [torch.ones_like(value) for value in carriers])
        for parameter in trained:
            parameter.grad = None
        return _Notes(routing)

    given = (ctx.run.token_ids, *ctx.run.keys.values())
    known = (*trained, *router.buffers(), *experts.parameters(), *(t for t in given if t is not None))
    return Pass(run, known)


class _Notes(Mapping[str, float]):
    """Slots per token and the router's own metrics, copied to the host only when they are read."""

    def __init__(self, routing: Routing) -> None:
        self._slots = routing.expert_ids_TK.shape[1]
        self._metrics = {name: value.detach() for name, value in routing.metrics.items()}

    def __getitem__(self, name: str) -> float:
        return float(self._slots if name == "slots" else self._metrics[name])

    def __iter__(self) -> Any:
        return iter(("slots", *self._metrics))

    def __len__(self) -> int:
        return 1 + len(self._metrics)


def _carriers(routing: Routing) -> Iterable[Tensor]:
    plain = {field.name for field in dataclasses.fields(Routing)}
    own = [getattr(routing, f.name) for f in dataclasses.fields(routing) if f.name not in plain]
    return (routing.weights_TK, *routing.losses.values(), *(v for v in own if isinstance(v, Tensor)))


def _tokens(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(shape.tokens, shape.width, generator=generator)
    if shape.skewed:
        common_D = torch.randn(shape.width, generator=generator)
        x_TD = (x_TD + _OFFSET * common_D) / (_INIT_STD * shape.width**0.5)
    return x_TD.to(device)


def _few_rows(shape: Shape) -> ExpertBank:
    """Returns experts that differ, for routers that read their weights."""
    generator = torch.Generator().manual_seed(3)
    E, D, F = shape.experts, shape.width, _EXPERT_WIDTH
    w_up_EUD = torch.randn(E, 2 * F, D, generator=generator) * D**-0.5
    return ExpertBank(w_up_EUD, torch.zeros(E, D, F), "silu", True)


def _solver(solve: Callable[[Tensor], Mapping[str, float]]) -> Callable[[Shape, torch.device], Pass]:
    def prepare(shape: Shape, device: torch.device) -> Pass:
        generator = torch.Generator().manual_seed(4)
        weight_ED = _INIT_STD * torch.randn(shape.experts, shape.width, generator=generator)
        # Always skewed: plans over logits near 0 are solved before the first Newton step.
        logits_TE = _tokens(dataclasses.replace(shape, skewed=True), device) @ weight_ED.to(device).t()
        kernel_TE = logits_TE.double().softmax(-1) / _XI
        return Pass(lambda: solve(kernel_TE), (kernel_TE,))

    return prepare


def _by_sinkhorn(kernel_TE: Tensor) -> Mapping[str, float]:
    found = sinkhorn(kernel_TE, SinkhornRule(check_every=10))
    return {"iterations": float(found.iterations)}


def _by_newton(rule: NewtonRule) -> Callable[[Tensor], Mapping[str, float]]:
    def solve(kernel_TE: Tensor) -> Mapping[str, float]:
        found = sinkhorn_newton(kernel_TE, rule=rule)
        return {"newton_steps": float(found.newton_steps), "converged": float(found.converged)}

    return solve


#: Transport solvers by themselves, in fp64 over the kernel of an SSR plan of skewed logits: Sinkhorn by SSR's
#: rule (1e-4 tokens), and Sinkhorn-Newton-Sparse, which no router has, to 1e-12.
SOLVERS: Mapping[str, Callable[[Shape, torch.device], Pass]] = {
    "solver:sinkhorn": _solver(_by_sinkhorn),
    "solver:sns_cg": _solver(_by_newton(NewtonRule(solver="sparse_cg"))),
    "solver:sns_schur": _solver(_by_newton(NewtonRule(solver="schur"))),
}
