"""Plan -> hybrid: a small pure interpreter of Edits. Checks every path and shape first, then works on a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import ArchitectureMismatch, InvalidPlan
from ..hub import guard
from ..kernels import SharedStart
from ..merging import Merged
from ..ops import Conv
from ..plan import Edit, Plan, Replace, SetAttr, Shorten, Slice, Wrap, fingerprint

_HINT = "Apply a Plan only to the model it was made for; do not edit Plans by hand."
_SLICEABLE = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
_SLICEABLE_TEXT = (
    "Linear, LayerNorm, BatchNorm, a convolution that is ungrouped or depthwise, a module of vectors, or a vector or "
    "table that a composed module holds itself"
)
_LARGEST_GROWTH = 64  # a new mixer may hold so many times the parameters of the module that it replaces


def apply(plan: Plan, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build the hybrid that `plan` describes from `model`, which is left untouched.

    Args:
        plan: what to do.
        model: the original (its weights are used where `tensors` has none).
        tensors: {state-dict name in the hybrid: values}: the fitted parameters, or a whole state dict. Without them new
            mixers start as their edit says (from the host's own weights, or PyTorch's default initialisation under the
            current random state) and kept weights are the original's.

    Returns:
        A new module of the model's own class, on its device, in its dtype and training mode.

    Raises:
        ArchitectureMismatch: the model is not the one that the plan was made for.
        InvalidPlan: a path, shape or attribute of the plan does not fit the model.
    """
    check_base(plan, model)
    hybrid = copy.deepcopy(model)
    apply_edits(hybrid, plan.edits)
    if tensors is not None:
        load_tensors(hybrid, tensors)
    guard(hybrid, plan)
    return hybrid


def check_base(plan: Plan, model: nn.Module) -> None:
    """Raise ArchitectureMismatch unless the model has the parameters that the plan was made for."""
    if fingerprint(model) == plan.base.fingerprint:
        return
    count = sum(parameter.numel() for parameter in model.parameters())
    raise ArchitectureMismatch(
        "model",
        f"{type(model).__name__} with {count:,} parameters",
        f"the architecture of {plan.base.name} ({plan.base.model_class}, {plan.base.parameters:,} parameters, "
        f"input {plan.base.input_size})",
        "Give the same architecture (name, num_classes, image size) that was converted.",
    )


def apply_edits(model: nn.Module, edits: Iterable[Edit], root: str = "") -> None:
    """Run edits on `model` in place; paths are taken relative to `root`. All are checked before the first is run."""
    edits = tuple(edits)
    for edit in edits:
        _check(model, edit, relative(edit.path, root))
    for edit in edits:
        path = relative(edit.path, root)
        _check(model, edit, path)  # again: an earlier edit may have changed what this one meets
        if isinstance(edit, Replace):
            _replace(model, path, edit)
        elif isinstance(edit, Slice):
            _slice(model, path, edit)
        elif isinstance(edit, Wrap):
            _put_around(model, path, edit.spec.build(submodule(model, path), edit.io))
        elif isinstance(edit, Shorten):
            _put_around(model, path, edit.spec.build(submodule(model, path)))
        else:
            owner = submodule(model, path)
            setattr(owner, edit.name, type(getattr(owner, edit.name))(edit.value))


def relative(path: str, root: str) -> str:
    """`path` as seen from the module at `root`; "" is the root itself."""
    if not root:
        return path
    if path != root and not path.startswith(root + "."):
        raise InvalidPlan(path, f"a path outside {root}", f"a path under {root}", _HINT)
    return path[len(root) + 1 :]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The registered submodule at `path` ("" is the model itself); never an arbitrary attribute."""
    module = model
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise InvalidPlan(path, f"no submodule {part!r} in {type(module).__name__}", "an existing module", _HINT)
        module = child
    return module


def replace_submodule(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the submodule at `path` is."""
    parent, _, name = path.rpartition(".")
    submodule(model, path)
    submodule(model, parent)._modules[name] = new


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into parameters and buffers; every name must exist with the same shape."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, value in tensors.items():
        target = own.get(name)
        if target is None or target.shape != value.shape:
            found = "no such parameter" if target is None else f"shape {tuple(target.shape)} in the model"
            raise InvalidPlan(name, found, f"a tensor of shape {tuple(value.shape)}", _HINT)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _check(model: nn.Module, edit: Edit, path: str) -> None:
    if isinstance(edit, Replace):
        old = submodule(model, path)
        with torch.device("meta"):
            new = edit.spec.build(edit.io)
        size, limit = _numel(new), _LARGEST_GROWTH * max(_numel(old), 4096)
        if size > limit:
            raise InvalidPlan(edit.path, f"a mixer of {size:,} parameters", f"at most {limit:,} here", _HINT)
        if edit.start is not None:
            _check_start(model, path, edit, edit.start)
    elif isinstance(edit, Slice):
        owner, parameter = _parameter(model, path)
        if edit.dim >= parameter.ndim or edit.kept[-1][1] > parameter.shape[edit.dim]:
            raise InvalidPlan(
                edit.path,
                f"a slice of dimension {edit.dim} up to {edit.kept[-1][1]}",
                f"something inside the shape {tuple(parameter.shape)}",
                _HINT,
            )
        if not _sliceable(owner, parameter, edit.dim):
            raise InvalidPlan(edit.path, f"a parameter of {type(owner).__name__}", _SLICEABLE_TEXT, _HINT)
    elif isinstance(edit, Wrap):
        if isinstance(submodule(model, path), Merged):
            raise InvalidPlan(edit.path, "a module whose tokens are merged already", "one merge at a module", _HINT)
    elif isinstance(edit, Shorten):
        _check_stream(submodule(model, path), edit)
    else:
        _check_attribute(submodule(model, path), edit)


def _check_stream(blocks: nn.Module, edit: Shorten) -> None:
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise InvalidPlan(edit.path, f"a {type(blocks).__name__}", "a Sequential or a ModuleList of blocks", _HINT)
    for drop in edit.spec.drops:
        submodule(blocks, drop.block)
    for block in blocks:
        for path in (*edit.spec.attention.paths, *edit.spec.ffn.paths):
            submodule(block, path)


def _check_start(model: nn.Module, path: str, edit: Replace, start: SharedStart) -> None:
    shapes = []
    for rows in (start.v, start.out):
        parent, _, name = f"{path}.{rows.path}".rpartition(".")
        if submodule(model, parent)._parameters.get(name) is None:
            linear = submodule(model, f"{path}.{rows.path}".lstrip("."))
            if not isinstance(linear, nn.Linear):
                raise InvalidPlan(f"{edit.path}.{rows.path}", f"a {type(linear).__name__}", "a Linear layer", _HINT)
        shapes.append(tuple(rows.read(submodule(model, path))[0].shape))
    spec = edit.spec
    if isinstance(spec, Conv) and spec.norm and spec.kernel in (1, 3):
        inner = start.heads * spec.rank
        if shapes == [(inner, spec.dim), (spec.dim, inner)]:
            return
    raise InvalidPlan(
        edit.path, f"a start from weights of shape {shapes[0]} and {shapes[1]} in {start.heads} heads",
        "a convolution with a norm, of side 1 or 3 and as wide as one head of them", _HINT,
    )  # fmt: skip


def _check_attribute(owner: nn.Module, edit: SetAttr) -> None:
    old = vars(owner).get(edit.name)
    same_type = type(edit.value) is (tuple if type(old) is list else type(old))
    if not same_type or not isinstance(old, (int, float, tuple, list)) or isinstance(old, bool):
        raise InvalidPlan(
            f"{edit.path}.{edit.name}",
            f"{type(edit.value).__name__} for {type(old).__name__ if old is not None else 'a missing attribute'}",
            "an existing int, float, tuple or list attribute and a value of the same type",
            _HINT,
        )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sliceable(owner: nn.Module, parameter: Tensor, dim: int) -> bool:
    """Whether it is known what else must change; nothing, where a composed module holds a vector, a table of heads or
    channels of positions itself, or a module scales by vectors."""
    if isinstance(owner, nn.Conv2d):
        return owner.groups in (1, owner.weight.shape[0])
    if any(owner.children()):
        channels = dim == parameter.ndim - 1 and sum(side > 1 for side in parameter.shape) <= 2
        return parameter.ndim <= 2 or channels or parameter.numel() == max(parameter.shape)
    return isinstance(owner, _SLICEABLE) or (parameter.ndim == 1 and all(own.ndim == 1 for own in owner.parameters()))


def _parameter(model: nn.Module, path: str) -> tuple[nn.Module, Tensor]:
    """A parameter or a buffer, and the module that owns it."""
    parent, _, name = path.rpartition(".")
    owner = submodule(model, parent)
    parameter = {**owner._buffers, **owner._parameters}.get(name)
    if parameter is None:
        raise InvalidPlan(path, f"no parameter {name!r} in {type(owner).__name__}", "an existing parameter", _HINT)
    return owner, parameter


def _replace(model: nn.Module, path: str, edit: Replace) -> None:
    old = submodule(model, path)
    new = edit.spec.build(edit.io)
    like = next(old.parameters(), None)
    if like is not None:
        new = new.to(device=like.device, dtype=like.dtype)
    if edit.start is not None and isinstance(edit.spec, Conv):
        load_tensors(new, {name: value.detach() for name, value in edit.start.tensors(old, edit.spec.kernel).items()})
    replace_submodule(model, path, new.train(old.training))


def _put_around(model: nn.Module, path: str, wrapper: nn.Module) -> None:
    wrapper.training = submodule(model, path).training  # alone: what it stands around has modes of its own
    replace_submodule(model, path, wrapper)


def _slice(model: nn.Module, path: str, edit: Slice) -> None:
    owner, parameter = _parameter(model, path)
    name = path.rpartition(".")[2]
    kept = [parameter.detach().narrow(edit.dim, start, stop - start) for start, stop in edit.kept]
    sliced = torch.cat(kept, edit.dim).clone()
    if name in owner._buffers:
        owner._buffers[name] = sliced
    else:
        owner._parameters[name] = nn.Parameter(sliced, requires_grad=parameter.requires_grad)
    if isinstance(owner, nn.Linear) and sliced.ndim == 2:
        owner.out_features, owner.in_features = sliced.shape
    elif isinstance(owner, nn.Conv2d) and sliced.ndim == 4:
        owner.groups = len(sliced) if owner.groups > 1 else 1  # more than one means depthwise
        owner.out_channels, owner.in_channels = len(sliced), sliced.shape[1] * owner.groups
    elif isinstance(owner, nn.LayerNorm):
        owner.normalized_shape = tuple(sliced.shape)
    elif isinstance(owner, nn.modules.batchnorm._BatchNorm):
        owner.num_features = len(sliced)
