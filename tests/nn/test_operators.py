"""Every operator of the registry against its float64 definition, gradients included, by every path that takes it."""

import pytest
import torch
from conftest import DEVICE, assert_close, assert_gradients_close, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_hyena.config import FEATURE_MAPS, OPERATORS, OperatorConfig
from sd_hyena.errors import UsageError
from sd_hyena.nn import build
from sd_hyena.nn.teacher import Projections

GRIDS = [(1, 1), (5, 7), (13, 4), (8, 8), (17, 23)]
CHOICES = [
    *({"operator": name} for name in OPERATORS),
    *({"operator": "states", "feature_map": name} for name in FEATURE_MAPS),
    {"operator": "states", "near": 0},
    {"operator": "states", "near": 7, "block": 3},
    {"operator": "states", "block": 0},
    {"operator": "states", "scaling": "extend"},
    {"operator": "states", "form": "core"},
    {"operator": "linear", "form": "core"},
    {"operator": "windows", "block": 5},
    {"operator": "causal", "hyena_order": 3, "hyena_num_heads": 2},
    {"operator": "long", "hyena_short_filter_order": 5},
]


def label(choices):
    return " ".join(map(str, choices.values())) if isinstance(choices, dict) else str(choices)


def layer(grid, choices, **more):
    extent = grid if choices["operator"] == "causal" else (8, 8)
    config = OperatorConfig(12, *extent, attention_heads=3, **({"block": 4} | choices | more))
    given = None
    if config.form == "core":
        torch.manual_seed(2)
        given = Projections(*(torch.nn.Linear(12, 12, bias=i == 3).to(DEVICE) for i in range(4)))
    return trained(config).to(DEVICE), given


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("choices", CHOICES, ids=label)
def test_outputs_and_gradients_equal_the_definition(grid, choices):
    operator, given = layer(grid, choices)
    x = torch.randn(2, grid[0] * grid[1], 12, device=DEVICE)
    with torch.no_grad():
        assert_close("inference", operator.expected(x, grid, None, given), operator(x, grid, given), 1e-5)
    assert_gradients_close(operator, x, grid, given, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 29), st.integers(1, 29), st.integers(1, 9), st.sampled_from(["stretch", "extend"]))
def test_states_at_any_size(h, w, block, scaling):
    operator, _ = layer((h, w), {"operator": "states", "block": block, "scaling": scaling})
    x = torch.randn(1, h * w, 12, device=DEVICE)
    with torch.no_grad():
        assert_close("states", operator.expected(x, (h, w)), operator(x, (h, w)), 1e-5)


@pytest.mark.parametrize("choices", CHOICES, ids=label)
def test_a_branch_left_out_changes_what_comes_out(choices):
    operator, given = layer((8, 8), choices)
    x = torch.randn(1, 64, 12, device=DEVICE)
    with torch.no_grad():
        whole = operator(x, (8, 8), given)
        for branch in operator.branches:
            operator.off = branch
            inert = (operator.off == "near" and not operator.config.near) or (
                operator.off == "states" and not operator.config.block
            )
            assert torch.equal(operator(x, (8, 8), given), whole) == inert, operator.off


def test_states_with_equal_weights_are_linear_attention():
    torch.manual_seed(0)
    linear, _ = layer((13, 9), {"operator": "linear"})
    states, _ = layer((13, 9), {"operator": "states"})
    states.load_state_dict(linear.state_dict(), strict=False)
    states.near.weight.data.zero_()
    states.blocks.weight.data.zero_()
    x = torch.randn(2, 117, 12, device=DEVICE)
    with torch.no_grad():
        assert_close("states", linear(x, (13, 9)), states(x, (13, 9)), 1e-6)


def test_blocks_of_other_grids():
    stretched, _ = layer((8, 8), {"operator": "states"})
    extended, _ = layer((8, 8), {"operator": "states", "scaling": "extend"})
    assert [stretched.block(size) for size in ((8, 8), (16, 16), (32, 8), (5, 7))] == [(4, 4), (8, 8), (8, 8), (3, 3)]
    assert extended.block((64, 64)) == (4, 4)


def test_wrong_calls_are_refused():
    operator, _ = layer((4, 4), {"operator": "states"})
    core, given = layer((4, 4), {"operator": "states", "form": "core"})
    x = torch.randn(1, 16, 12, device=DEVICE)
    for call, message in (
        (lambda: operator(x, (4, 5)), "16 tokens are not a 4 x 5 grid"),
        (lambda: operator(x, (4, 4), given), "has its own projections"),
        (lambda: core(x, (4, 4)), "runs on the teacher's projections"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"operator": "nothing"}, "operator must be one of states, near"),
        ({"near": 4}, "near must be odd"),
        ({"block": True}, "block must be a whole number"),
        ({"operator": "long", "form": "core"}, "has its own projections"),
        ({"attention_heads": 5}, "12 channels cannot be split into 5"),
        ({"operator": "windows", "block": 0}, "at least 1 cell"),
        ({"operator": "long", "hyena_short_filter_order": 2}, "must be odd"),
        ({"operator": "causal", "hyena_num_blocks": 5}, "cannot be cut into 5"),
        ({"hyena_order": 1}, "hyena_order must be a whole number from 2"),
    ],
    ids=label,
)
def test_choices_that_cannot_be_are_refused(choices, message):
    with pytest.raises((UsageError, ValueError), match=message):
        build(OperatorConfig(12, 4, 4, **({"attention_heads": 3} | choices)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choices", CHOICES, ids=label)
def test_half_precision(choices, dtype):
    operator, given = layer((13, 4), choices)
    x = torch.randn(2, 52, 12, device=DEVICE)
    expected = operator.expected(x, (13, 4), None, given)
    half = None if given is None else Projections(*(f.to(dtype) for f in given))
    with torch.no_grad():
        y = operator.to(dtype)(x.to(dtype), (13, 4), half)
    assert y.dtype == dtype
    assert_close("half", expected, y, 4e-2 if dtype == torch.bfloat16 else 5e-3)


def test_more_blocks_than_pay_are_refused():
    operator, _ = layer((8, 8), {"operator": "states", "scaling": "extend"})
    assert "1089 blocks are more than 1024" in operator.refuses((132, 132))
    with pytest.raises(ValueError, match="cannot run on 132 x 132 cells"):
        operator(torch.randn(1, 132 * 132, 12, device=DEVICE), (132, 132))
    stretched, _ = layer((8, 8), {"operator": "states"})
    assert stretched.refuses((512, 512)) == ""


def test_only_the_near_filter_may_be_taught():
    operator, _ = layer((8, 8), {"operator": "states"})
    operator.requires_grad_(False).near.requires_grad_(True)
    operator(torch.randn(1, 64, 12, device=DEVICE), (8, 8)).sum().backward()
    assert operator.near.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["linear", "near", "states", "windows"])
def test_what_training_takes_apart_is_folded_again(name):
    operator, _ = layer((8, 8), {"operator": name})
    x = torch.randn(2, 64, 12, device=DEVICE)
    with torch.no_grad():
        before = operator(x, (8, 8))
        operator.unfold()
        operator.to(DEVICE)
        assert_close("unfolded", before, operator(x, (8, 8)), 1e-6)
        for parameter in (*operator.query.parameters(), *operator.key.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
        taught = operator(x, (8, 8))
        folded = operator.folded()
        assert not any(key.startswith(("query.", "key.")) for key in folded.state_dict())
        assert_close("folded", taught, folded(x, (8, 8)), 1e-5)
        assert_close("untouched", taught, operator(x, (8, 8)), 1e-6)
