"""``LinearAttention``, the rival that is trained like the students, and its feature maps."""

import copy

import pytest
import torch
from conftest import assert_close

from sd_hyena.nn import LinearAttention, OperatorConfig
from sd_hyena.nn.linear_attention import FeatureMap
from sd_hyena.ops import naive


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (13, 4)])
@pytest.mark.parametrize(("feature_map", "num_features"), [("elu", 1), ("exp", 1), ("exp", 3)])
def test_it_is_linear_attention_between_projections(grid, feature_map, num_features):
    torch.manual_seed(0)
    operator = LinearAttention(12, attention_heads=3, feature_map=feature_map, num_features=num_features)
    x = torch.randn(2, grid[0] * grid[1], 12)
    exact = copy.deepcopy(operator).double()
    q, k, v = (t.transpose(1, 2).unflatten(1, (3, 4)) for t in exact.in_proj(x.double()).chunk(3, -1))
    if feature_map == "exp":
        maps = exact.features
        q, k = maps.query.weight @ q + maps.query.bias, maps.key.weight @ k + maps.key.bias
    else:
        q, k = q * 4**-0.25, k * 4**-0.25
    expected = exact.out_proj(naive.linear_attention(q, k, v, feature_map).flatten(1, 2).transpose(1, 2))
    assert_close("y", expected, operator(x, grid).double(), 1e-5)


def test_features_start_at_the_channels_their_negatives_and_rotations():
    torch.manual_seed(0)
    features = FeatureMap(2, 4, 3)
    x = torch.randn(1, 2, 4, 5)
    plain, negative, rotated = features(x).split(4, dim=2)
    assert_close("channels", x * 4**-0.25, plain, 1e-6)
    assert torch.equal(plain, -negative)
    assert_close("lengths", plain.norm(dim=2), rotated.norm(dim=2), 1e-5)
    assert (rotated[:, 0] - rotated[:, 1]).abs().max() > 1e-3
    assert_close("some heads", features(x)[:, 1:], features(x[:, 1:], slice(1, 2)), 1e-6)


def test_config_builds_it_and_files_without_a_feature_map_mean_elu():
    config = OperatorConfig(8, 4, 6, operator="linear", attention_heads=2, num_features=3)
    operator = config.build()
    assert operator.features.query.weight.shape == (2, 12, 4)
    assert OperatorConfig.from_dict(config.to_dict()) == config
    old = {k: v for k, v in config.to_dict().items() if k not in ("feature_map", "num_features")}
    assert OperatorConfig.from_dict(old).feature_map == "elu"
    assert not hasattr(OperatorConfig.from_dict(old).build().features, "query")


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="heads"):
        LinearAttention(8, attention_heads=3)
    with pytest.raises(ValueError, match="grid"):
        LinearAttention(8, attention_heads=2)(torch.randn(1, 5, 8), (2, 2))
    with pytest.raises(ValueError, match="form must be full"):
        OperatorConfig(8, 4, 4, operator="linear", form="core")
