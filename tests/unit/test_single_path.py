"""The supernode of a gate search against its definition, and the supernet under everything that a user's loop does."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from models import swin, vit
from sampled import sampled
from searches import assert_close, prepared, run, scramble
from torch import Tensor, nn

import msa2conv
from msa2conv import Gates, Search
from msa2conv.transforms.gates import Gate
from msa2conv.transforms.single_path import NAMES, OPEN, GatedLinear, SharedSupernode

SETTINGS = [torch.tensor(bits, dtype=torch.float) for bits in itertools.product((0, 1), repeat=3)]
GATES = {
    "registers": Gates(offsets="columns", alpha=0.5),
    "non_square": Gates(offsets="rows", alpha=0.01),
    "swin": Gates(offsets="centre first", alpha=100),
    "swin_padded": Gates(offsets="centre first", windowed=True),
    "foreign": Gates(),
}


@cache
def searched(name: str) -> tuple[Search, dict[str, tuple[Any, Any]]]:
    """A scrambled search and {path of a supernode: (arguments, keywords) that reach it}."""
    search = scramble(prepared(name, gates=GATES.get(name)))
    heard: dict[str, tuple[Any, Any]] = {}
    handles = [
        node.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: heard.update({path: (args, kwargs)}), with_kwargs=True
        )
        for path, node in search.nodes.items()
    ]
    run(search.model, tiny.images(name, 3))
    for handle in handles:
        handle.remove()
    return search, heard


@pytest.fixture(params=[(name, index) for name in GATES for index in (0, 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def node_and_call(request: pytest.FixtureRequest) -> tuple[SharedSupernode, Any, Any]:
    """Copies of the first two supernodes (of Swin: without and with a shift), and how they are called."""
    search, heard = searched(request.param[0])
    path = list(search.nodes)[request.param[1]]
    return copy.deepcopy(search.nodes[path]), *heard[path]


def token_argument(node: SharedSupernode, args: Any, kwargs: Any) -> Tensor:
    x: Tensor = args[0] if args else kwargs[node.io.x]
    return x


def branch(node: SharedSupernode, x: Tensor, kernel: int) -> tuple[Tensor, nn.BatchNorm2d]:
    """P . relu(BN(conv(x; V_p) + b)) + b_o as the paper writes it, prefix tokens unchanged; and the BatchNorm after."""
    named, heads = node.named, node.named.heads
    (v, v_bias), (out, out_bias) = named.v.read(node.host), named.out.read(node.host)
    v_KDC, bias_KD, out_OKD = (
        v.unflatten(0, (heads, -1)),
        v_bias.unflatten(0, (heads, -1)),
        out.unflatten(1, (heads, -1)),
    )
    mixture_KS = (node.head_probs / node.alpha).softmax(0)
    centre = 0 if node.offsets == "centre first" else 4
    places = {  # column of the mixture: (row, column) of a 3x3 kernel
        "rows": [(p // 3, p % 3) for p in range(9)],
        "columns": [(p % 3, p // 3) for p in range(9)],
        "centre first": [(1, 1), *((p % 3, p // 3) for p in range(9) if p != 4)],
    }[node.offsets]
    columns = range(9) if kernel == 3 else [centre]
    weight = x.new_zeros(*v_KDC.shape[1:], 3, 3)
    bias, expand = 0.0, 0.0
    for p in columns:
        weight[:, :, places[p][0], places[p][1]] = torch.einsum("k,kdc->dc", mixture_KS[:, p], v_KDC)
        bias = bias + torch.einsum("k,kd->d", mixture_KS[:, p], bias_KD)
        expand = expand + torch.einsum("k,okd->od", mixture_KS[:, p], out_OKD)
    prefix_BPC, map_BCHW = node.layout.to_map(x)
    norm = copy.deepcopy(node.bn_3x3 if kernel == 3 else node.bn_1x1)
    hidden = norm(F.conv2d(map_BCHW, weight, bias, padding=1)).relu()
    out_BCHW = torch.einsum("od,bdhw->bohw", expand, hidden) + out_bias[:, None, None]
    return node.layout.from_map(prefix_BPC, out_BCHW), norm


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_supernode_computes_what_it_is_defined_as(node_and_call: Any, training: bool) -> None:
    """out = z2 MSA + z1 (1 - z2) C3 + z0 (1 - z1)(1 - z2) C1 with z = cumprod(z'), for hard and soft gates."""
    node, args, kwargs = node_and_call
    node.train(training)
    x = token_argument(node, args, kwargs)
    attended, (c1, norm_1), (c3, norm_3) = first(node.host(*args, **kwargs)), branch(node, x, 1), branch(node, x, 3)
    soft = torch.tensor([0.9, 0.6, 0.3])
    for opened in [*SETTINGS, soft]:
        fresh = copy.deepcopy(node)
        with fresh.gate.pinned(opened):
            found = fresh(*args, **kwargs)
        z0, z1, z2 = opened.cumprod(0)
        assert_close(first(found), z2 * attended + z1 * (1 - z2) * c3 + z0 * (1 - z1) * (1 - z2) * c1)
        for own, expected in ((fresh.bn_1x1, norm_1), (fresh.bn_3x3, norm_3)):
            torch.testing.assert_close(own.state_dict(), expected.state_dict())
    assert isinstance(found, tuple) == isinstance(node.host(*args, **kwargs), tuple)


@torch.no_grad()
def test_each_setting_is_one_branch_and_merged_is_its_mixer(node_and_call: Any) -> None:
    node, args, kwargs = node_and_call
    node.eval()
    x = token_argument(node, args, kwargs)
    expected = {"skip": torch.zeros_like(x), "attention": first(node.host(*args, **kwargs))}
    for kernel in (1, 3):
        expected[f"conv{kernel}x{kernel}"] = branch(node, x, kernel)[0]
        merged = node.merged(kernel)
        weights = {tensor.data_ptr() for tensor in node.state_dict().values()}
        assert not weights & {tensor.data_ptr() for tensor in merged.values()}, "a copy, not the host's weights"
    assert tuple(expected) != NAMES and set(expected) == set(NAMES) == set(OPEN)
    for name, values in OPEN.items():
        with node.gate.pinned(torch.tensor(values, dtype=torch.float)):
            assert_close(first(node(*args, **kwargs)), expected[name])


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("uniforms", SETTINGS, ids=lambda bits: "".join(str(int(b)) for b in bits))
def test_skipping_inactive_branches_changes_no_output_and_no_gradient(node_and_call: Any, uniforms: Tensor) -> None:
    """For every sample; what is not run with autograd has no gradient instead of a zero."""
    node, args, kwargs = node_and_call
    lean = copy.deepcopy(node)
    lean.skip_inactive = True
    results = []
    for each in (node, lean):
        each.train().gate.theta.data.zero_()
        each.gate.uniforms = 0.1 + 0.8 * uniforms
        x = token_argument(each, args, kwargs).clone().requires_grad_()
        out = first(each(*((x, *args[1:]) if args else ()), **(kwargs if args else {**kwargs, each.io.x: x})))
        slopes = gradients(each, (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum())
        results.append((out, x.grad, slopes, each.state_dict()))
    (out, slope_x, full, state), (out_lean, slope_x_lean, some, state_lean) = results
    assert torch.equal(out, out_lean)
    torch.testing.assert_close(torch.zeros_like(out) if slope_x_lean is None else slope_x_lean, slope_x)
    torch.testing.assert_close(state, state_lean, rtol=0, atol=0)
    assert bool(some["gate.theta"].any()), "the gate always learns"
    absent = {name for name, slope in some.items() if slope is None}
    for name, slope in full.items():
        if name in absent:
            assert not slope.any()
        else:
            torch.testing.assert_close(some[name], slope, rtol=1e-5, atol=1e-6)
    branches = {"bn_1x1.weight": (1, 0, 0), "bn_3x3.weight": (1, 1, 0)}
    active = tuple(uniforms.cumprod(0).int().tolist())
    assert {name for name in branches if name not in absent} == {n for n, bits in branches.items() if bits == active}


def test_no_branch_is_skipped_unless_asked(node_and_call: Any) -> None:
    node, args, kwargs = node_and_call
    with node.train().gate.pinned(torch.ones(3)):
        slopes = gradients(node, first(node(*args, **kwargs)).square().sum())
    assert [name for name, slope in slopes.items() if slope is None] == ["gate.theta"]


def test_gradients_reach_every_active_part(node_and_call: Any) -> None:
    node, args, kwargs = node_and_call
    for opened, parts in (((1, 0, 0), "bn_1x1.weight"), ((1, 1, 0), "bn_3x3.weight")):
        with node.train().gate.pinned(torch.tensor(opened, dtype=torch.float)):
            slopes = gradients(node, first(node(*args, **kwargs)).square().sum())
        assert bool(slopes[parts].any()) and bool(slopes["head_probs"].any())
        out = node.host.get_submodule(node.named.out.path).weight
        assert out.grad is not None and bool(out.grad.any())


def test_a_gated_layer_is_the_layer_on_gated_units() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    layer, hidden = GatedLinear(linear, Gate(6)), torch.randn(2, 3, 6)
    values = torch.tensor([1.0, 0, 1, 0, 0.5, 1])
    with layer.gate.pinned(values):
        torch.testing.assert_close(layer(hidden), linear(hidden * values))
    without = GatedLinear(nn.Linear(6, 4, bias=False), Gate(6)).eval()
    torch.testing.assert_close(without(hidden), without.linear(hidden))


def test_a_new_window_size_reaches_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    node, told = next(iter(searched("swin")[0].nodes.values())), list[Any]()
    monkeypatch.setattr(node.host, "set_window_size", told.append)
    node.set_window_size((4, 4))
    assert told == [(4, 4)]


# The whole supernet


@pytest.fixture(params=["vit", "swin", "foreign"])
def search(request: pytest.FixtureRequest) -> Search:
    """Scrambled, in train mode; its own copy."""
    found = copy.deepcopy(searched(request.param)[0])
    found.name = request.param  # type: ignore[attr-defined]
    found.model.train()
    return found


def images(search: Search) -> Tensor:
    return tiny.images(search.name, 4)  # type: ignore[attr-defined]


def step(model: nn.Module, data: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One forward and backward pass -> (output, gradients)."""
    torch.manual_seed(seed)
    out = model(data)
    return out.detach(), gradients(model, out.float().square().mean())


def assert_same_step(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert_close(found[0], expected[0], tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, slope in expected[1].items():
        assert_close(found[1][name], slope, tolerance)


def test_every_gate_is_drawn_once_a_forward_pass(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    values = Gate._values
    monkeypatch.setattr(Gate, "_values", lambda gate: drawn.append(id(gate)) or values(gate))
    search.model(images(search))
    assert sorted(drawn) == sorted(id(gate) for gate in search.named_gates.values())


def test_training_is_random_and_evaluation_is_not(search: Search) -> None:
    data = images(search)
    torch.manual_seed(0)
    outputs = [search.model(data) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert torch.equal(run(search.model, data), run(search.model, data))


def test_injected_uniforms_decide(search: Search) -> None:
    data, dense = images(search), run(search.dense(), images(search))
    search.model.eval()  # nothing is random but the gates
    for gate in search.named_gates.values():
        gate.train().uniforms = torch.rand(len(gate.theta), generator=torch.Generator().manual_seed(0))
    assert_same_step(step(search.model, data, seed=0), step(search.model, data, seed=1), 0)
    assert float((search.model(data) - dense).detach().abs().max()) > 0.05
    for gate in search.named_gates.values():
        gate.uniforms = (-gate.theta.detach()).sigmoid() + 1e-3  # just enough to open
    assert_close(search.model(data).detach(), dense)


def test_the_same_seed_gives_the_same_step(search: Search) -> None:
    expected = step(copy.deepcopy(search.model), images(search))
    assert_same_step(step(search.model, images(search)), expected, 0)


@pytest.mark.parametrize("search", ["vit", "swin"], indirect=True)
def test_checkpointing_changes_no_gradient(search: Search) -> None:
    expected = step(search.model, images(search))
    search.model.set_grad_checkpointing(True)
    assert_same_step(step(search.model, images(search)), expected, 1e-6)


def test_mixed_precision(search: Search) -> None:
    expected, _ = step(search.model, images(search))
    with torch.autocast("cpu", torch.bfloat16):
        out, slopes = step(search.model, images(search))
    assert float((out.float() - expected).norm() / expected.norm()) < 0.1
    assert all(slope.dtype == torch.float32 and torch.isfinite(slope).all() for slope in slopes.values())


def test_double_precision(search: Search) -> None:
    for gate in search.named_gates.values():
        gate.uniforms = torch.rand(len(gate.theta), generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(search.model).double()
    out, slopes = step(twin, images(search).double())
    assert out.dtype == torch.float64 and all(slope.dtype == torch.float64 for slope in slopes.values())
    assert_same_step(step(search.model, images(search)), (out, slopes), 1e-4)


def test_a_copy_is_independent(search: Search) -> None:
    step(search.model, images(search))
    twin, before = copy.deepcopy(search.model), copy.deepcopy(search.model.state_dict())
    assert_same_step(step(twin, images(search)), step(copy.deepcopy(search.model), images(search)), 0)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    torch.testing.assert_close(dict(search.model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_moving_average(search: Search) -> None:
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(search.model, decay=0.75)
    before = run(average.module, images(search))
    with torch.no_grad():
        for gate in search.named_gates.values():
            gate.theta.add_(4)
    start = {name: value.clone() for name, value in average.module.state_dict().items()}
    average.update(search.model)
    for name, value in search.model.state_dict().items():
        if name.endswith("theta"):
            torch.testing.assert_close(average.module.state_dict()[name], 0.75 * start[name] + 0.25 * value)
    assert not torch.equal(run(average.module, images(search)), before)


def test_a_state_dict_holds_everything(search: Search) -> None:
    name = search.name  # type: ignore[attr-defined]
    other = prepared(name, model=tiny.build(name, seed=5), gates=GATES.get(name))
    assert not torch.equal(run(other.model, images(search)), run(search.model, images(search)))
    other.model.load_state_dict(search.model.state_dict())
    assert torch.equal(run(other.model, images(search)), run(search.model, images(search)))


@pytest.mark.parametrize("name", sampled(["vit", "swin"], 1))
def test_it_compiles_into_one_graph(name: str) -> None:
    """In train mode, without graph breaks; the gradients are those of the plain model."""
    model = vit(depth=1) if name == "vit" else swin(depths=(2,), num_heads=(3,))
    search = scramble(msa2conv.prepare(model, 0.9))
    twin, data = copy.deepcopy(search.model), tiny.images(name, 2)
    compiled = torch.compile(search.model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled(data).square().mean().backward()
    expected = step(twin, data)[1]
    for path, parameter in search.model.named_parameters():
        assert_close(parameter.grad, expected[path])
