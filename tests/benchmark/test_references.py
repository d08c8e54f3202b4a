"""The float64 definitions that whole generations are held to, for every operator a Hyena file may hold."""

import pytest
import torch
from conftest import assert_close

from sd_hyena.benchmark import references
from sd_hyena.nn import OperatorConfig


@pytest.mark.parametrize("branch", ["none", "mean", "linear"])
@pytest.mark.parametrize("feature_map", ["elu", "exp"])
def test_hyena2d(branch, feature_map):
    torch.manual_seed(0)
    operator = OperatorConfig(8, 6, 5, attention_heads=2, global_branch=branch, feature_map=feature_map).build().eval()
    x, tokens = torch.randn(2, 42, 8), torch.tensor([0, 7, 41])
    with torch.no_grad():
        got = operator(x, (6, 7))[:, tokens]
        assert_close("y", references.hyena2d(operator, x.double(), (6, 7), tokens), got.double(), 1e-4)


@pytest.mark.parametrize("feature_map", ["elu", "exp"])
def test_linear_attention(feature_map):
    torch.manual_seed(0)
    operator = OperatorConfig(8, 6, 5, operator="linear", attention_heads=2, feature_map=feature_map).build()
    x, tokens = torch.randn(2, 42, 8), torch.tensor([0, 7, 41])
    with torch.no_grad():
        got = operator(x, (6, 7))[:, tokens]
        assert_close("y", references.linear_operator(operator, x.double(), tokens), got.double(), 1e-5)
