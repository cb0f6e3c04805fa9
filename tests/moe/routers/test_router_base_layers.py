"""BASE layers: by hand, exact balance under padding, and the released formula through our layer.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe.routers.base_layers import BaseLayersRouter
from moe.routers.configs.base_layers_config import BaseLayersConfig
from moe.routers.configs.topk_config import TopKConfig
from tests.moe.routers.routing_cases import make_context, make_layer, make_router
from tests.moe.routing.test_transport import normal

pytestmark = pytest.mark.usefixtures("one_thread")


def of_logits(E: int, **fields: float) -> BaseLayersRouter:
    """A router whose logits are its input, in fp64."""
    router = BaseLayersRouter(BaseLayersConfig(**fields), E, E).double()  # type: ignore[arg-type]
    router.weight_ED = nn.Parameter(torch.eye(E, dtype=torch.float64))
    return router


def test_two_tokens_that_want_the_same_expert() -> None:
    # Apart they score 3 and 4 at expert 0; one each, 1 + 4 beats 3 + 1.
    logits_TE = torch.tensor([[3.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    router = of_logits(2)
    routing = router(logits_TE, make_context())
    assert routing.expert_ids_TK.tolist() == [[1], [0]]
    torch.testing.assert_close(routing.weights_TK[:, 0], torch.tensor([1.0, 4.0]).double().sigmoid())
    assert routing.metrics["choice_agreement"].item() == 0.5
    assert routing.metrics["auction_rounds"].item() <= 2
    plain = router.eval()(logits_TE, make_context())
    assert plain.expert_ids_TK.tolist() == [[0], [0]] and not plain.metrics
    assert router.top_k == 1 and not router.weights_sum_to_one


@pytest.mark.parametrize("max_rounds", [100, 1])
@pytest.mark.parametrize(("T", "E"), [(64, 8), (61, 8), (5, 8), (30, 3)])
def test_every_expert_gets_its_share_of_real_tokens(T: int, E: int, max_rounds: int) -> None:
    logits_TE = normal(T, E) + 3 * normal(E, seed=1)
    mask_T = torch.arange(T) % 5 != 2
    router = of_logits(E, max_rounds=max_rounds)
    for mask, num in ((None, T), (mask_T.view(1, T), int(mask_T.sum()))):
        ids_T = router(logits_TE, make_context(padding_mask=mask)).expert_ids_TK[:, 0]
        real_N = ids_T if mask is None else ids_T[mask_T]
        counts_E = torch.bincount(real_N, minlength=E)
        assert counts_E.min() == num // E and counts_E.max() == -(-num // E)
    # Padding takes no one's place and goes to its best expert.
    assert torch.equal(ids_T[~mask_T], logits_TE[~mask_T].argmax(-1))


def test_only_the_sigmoid_carries_a_gradient() -> None:
    x_TE = normal(12, 4).requires_grad_()
    routing = of_logits(4)(x_TE, make_context())
    (grad_TE,) = torch.autograd.grad(routing.weights_TK.sum(), x_TE)
    scores_TE = x_TE.sigmoid()
    chosen_TE = torch.zeros_like(x_TE).scatter(1, routing.expert_ids_TK, 1.0)
    torch.testing.assert_close(grad_TE, chosen_TE * scores_TE * (1 - scores_TE))


def test_initial_embeddings_are_orthogonal() -> None:
    router = make_router(BaseLayersConfig(), D=32, E=8)
    # The test's helper multiplies by 30; the gain is 0.1.
    torch.testing.assert_close(router.weight_ED @ router.weight_ED.t(), 9.0 * torch.eye(8))


def test_the_released_formula() -> None:
    # With f(x) = x + g(x) the release computes s f(x) + (1 - s) x = x + s g(x). The residual x is the
    # block's, outside our layer, which is left with s g(x); g comes from copies under weights of sum 1.
    x_TD = normal(20, 6)
    g_TD = make_layer(TopKConfig())(x_TD)
    layer = make_layer(BaseLayersConfig())
    s_T1 = layer.router(x_TD, layer.context).weights_TK
    released_TD = s_T1 * (x_TD + g_TD) + (1 - s_T1) * x_TD
    torch.testing.assert_close(x_TD + layer(x_TD), released_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fields", [{"init_gain": 0.0}, {"max_rounds": -1}])
def test_configs_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Set it"):
        BaseLayersConfig(**fields)  # type: ignore[arg-type]
