"""What a user can do wrong with the authors' files, in full texts; and their training files."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from authors_code import assert_close, build, fixture
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from msa2conv import spvit
from msa2conv.errors import (
    ArchitectureMismatch,
    InvalidArgument,
    InvalidCheckpoint,
    Msa2ConvError,
    NonFiniteValue,
)

State = dict[str, Tensor]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "num_classes": 10}
GEOMETRY = "Build the model with the width, depth, classes and image size that the checkpoint was trained with."
WHOLE = "Build the model that the checkpoint was trained from, and read the file whole."


def deit(**changes: Any) -> nn.Module:
    return VisionTransformer(**{**VIT, **changes})


def state_of(name: str = "deit_finetune") -> State:
    return dict(fixture(name)["state_dict"])


def text_of(kind: type[Msa2ConvError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def refused(kind: type[Msa2ConvError], state: Any, model: nn.Module, text: str) -> None:
    assert text_of(kind, lambda: spvit.load_checkpoint(state, model)) == text


def test_wrong_family() -> None:
    refused(
        ArchitectureMismatch, state_of(), build(fixture("swin_finetune_A")["constructor"]),
        "state_dict: found a DeiT checkpoint (blocks.0.norm1.weight, blocks.0.norm1.bias, blocks.0.norm2.weight); "
        "expected a Swin checkpoint (layers.0...), as the model is one. Give a DeiT of timm's as the model.",
    )  # fmt: skip
    refused(
        ArchitectureMismatch, state_of("swin_finetune_A"), deit(),
        "state_dict: found a Swin checkpoint (layers.0.blocks.0.norm1.weight, layers.0.blocks.0.norm1.bias, "
        "layers.0.blocks.0.attn.head_probs); expected a DeiT checkpoint (blocks.0...), as the model is one. "
        "Give a Swin of timm's as the model.",
    )  # fmt: skip


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(1)}])
def test_none_of_the_three_forms(state: State) -> None:
    refused(
        InvalidCheckpoint, state, deit(),
        f"state_dict: found keys ({', '.join(state) or 'none'}); expected SPViT's search, fine-tune or merged form "
        "(attn.kernel_thresholds, attn.qk or attn.bconv). Load a dense checkpoint with model.load_state_dict, and "
        "apply msa2conv.spvit.plan to the model.",
    )  # fmt: skip


def test_a_dense_checkpoint() -> None:
    refused(
        InvalidCheckpoint, deit().state_dict(), deit(),
        "state_dict: found a dense checkpoint (blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias, "
        "blocks.1.attn.qkv.weight); expected SPViT's search, fine-tune or merged form (attn.kernel_thresholds, "
        "attn.qk or attn.bconv). Load a dense checkpoint with model.load_state_dict, and apply msa2conv.spvit.plan to "
        "the model.",
    )  # fmt: skip


def test_missing_keys() -> None:
    refused(
        InvalidCheckpoint, {name: value for name, value in state_of().items() if "norm2" not in name}, deit(),
        "state_dict: found no blocks.0.norm2.weight, blocks.0.norm2.bias, blocks.1.norm2.weight and 5 more; expected "
        "the tensors of a DeiT in SPViT's fine-tune form with blocks.0.norm2.weight (48,), blocks.0.norm2.bias (48,), "
        f"blocks.1.norm2.weight (48,). {WHOLE}",
    )  # fmt: skip
    search = state_of("deit_search_eval")
    del search["blocks.2.attn.kernel_thresholds"], search["blocks.1.mlp.ffn_thresholds"]
    refused(
        InvalidCheckpoint, search, deit(),
        "state_dict: found no blocks.2.attn.kernel_thresholds, blocks.1.mlp.ffn_thresholds; expected the tensors of a "
        "DeiT in SPViT's search form with blocks.2.attn.kernel_thresholds (3,), blocks.1.mlp.ffn_thresholds (96,). "
        f"{WHOLE}",
    )  # fmt: skip


def test_unknown_keys() -> None:
    refused(
        InvalidCheckpoint, {**state_of(), "blocks.9.attn.qk.weight": torch.zeros(2), "foo": torch.zeros(1)}, deit(),
        "state_dict: found unknown keys blocks.9.attn.qk.weight, foo; expected the tensors of a DeiT in SPViT's "
        f"fine-tune form. {WHOLE}",
    )  # fmt: skip


def test_a_model_that_is_too_deep() -> None:
    refused(
        InvalidCheckpoint, state_of(), deit(depth=6),
        "state_dict: found no blocks.4.norm1.weight, blocks.4.norm1.bias, blocks.4.norm2.weight and 13 more; expected "
        "the tensors of a DeiT in SPViT's fine-tune form with blocks.4.norm1.weight (48,), blocks.4.norm1.bias (48,), "
        f"blocks.4.norm2.weight (48,). {WHOLE}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"embed_dim": 64, "num_heads": 4},
            "cls_token (1, 1, 48), pos_embed (1, 17, 48), patch_embed.proj.weight (48, 3, 8, 8) and 48 more; expected "
            "cls_token (1, 1, 64), pos_embed (1, 17, 64), patch_embed.proj.weight (64, 3, 8, 8)",
        ),
        (
            {"num_heads": 4},
            "blocks.1.attn.head_probs (3, 9), blocks.1.attn.bn_1x1.weight (16,), blocks.1.attn.bn_1x1.bias (16,) and 7 "
            "more; expected blocks.1.attn.head_probs (4, 9), blocks.1.attn.bn_1x1.weight (12,), "
            "blocks.1.attn.bn_1x1.bias (12,)",
        ),
        (
            {"mlp_ratio": 1.125},
            "blocks.0.mlp.fc1.weight (55, 48), blocks.0.mlp.fc1.bias (55,), blocks.0.mlp.fc2.weight (48, 55) and 9 "
            "more; expected blocks.0.mlp.fc1.weight (54, 48), blocks.0.mlp.fc1.bias (54,), "
            "blocks.0.mlp.fc2.weight (48, 54)",
        ),
        ({"num_classes": 7}, "head.weight (10, 48), head.bias (10,); expected head.weight (7, 48), head.bias (7,)"),
    ],
)
def test_mismatched_widths(changes: dict[str, Any], text: str) -> None:
    refused(ArchitectureMismatch, state_of(), deit(**changes), f"state_dict: found {text} for this model. {GEOMETRY}")


def test_an_ffn_that_contradicts_itself() -> None:
    refused(
        ArchitectureMismatch, {**state_of(), "blocks.1.mlp.fc2.weight": torch.zeros(48, 5)}, deit(),
        "state_dict: found blocks.1.mlp.fc2.weight (48, 5); expected blocks.1.mlp.fc2.weight (48, 68) for this model. "
        f"{GEOMETRY}",
    )  # fmt: skip


def test_a_merged_kernel_of_another_size() -> None:
    state = state_of("deit_paramopt")
    state["blocks.2.attn.bconv.0.weight"] = torch.zeros(16, 48, 5, 5)
    refused(
        ArchitectureMismatch, state, deit(),
        "state_dict: found blocks.2.attn.bconv.0.weight (16, 48, 5, 5); expected blocks.2.attn.bconv.0.weight "
        f"(16, 48, 3, 3) for this model. {GEOMETRY}",
    )  # fmt: skip


def test_two_branches_and_no_thresholds() -> None:
    refused(
        InvalidCheckpoint, {**state_of(), "blocks.1.attn.bn_3x3.weight": torch.zeros(16)}, deit(),
        "state_dict: found blocks.1.attn.bn_1x1.weight and blocks.1.attn.bn_3x3.weight, but no thresholds; expected "
        "one of them in the fine-tune form, or attn.kernel_thresholds in the search form. Read the file whole.",
    )  # fmt: skip


def test_bad_weights() -> None:
    refused(
        NonFiniteValue, {**state_of(), "norm.weight": torch.full((48,), torch.nan)}, deit(),
        "norm.weight: found 48 NaN or Inf values in the weights; expected finite numbers. "
        "Load a checkpoint that trained well.",
    )  # fmt: skip


def test_queries_and_keys_that_nothing_reads_do_no_harm() -> None:
    """The released DeiT-S keeps them in its convolutional block."""
    data, state = fixture("deit_finetune"), state_of()
    state |= {"blocks.1.attn.qk.weight": torch.zeros(96, 48), "blocks.1.attn.qk.bias": torch.zeros(96)}
    assert_close(spvit.load_checkpoint(state, deit().eval()).model(data["input"]), data["output"])


# ---------------------------------------------------------------------------------------------------------- files


class Trap:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch unpickled",)


@pytest.fixture
def config_node(monkeypatch: pytest.MonkeyPatch) -> type[dict[str, Any]]:
    """A class that pickles as yacs' CfgNode does, and that notes when it is used to read one."""

    class CfgNode(dict):  # type: ignore[type-arg]
        code_was_run: ClassVar[list[Any]] = []

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

        def __setstate__(self, state: Any) -> None:
            self.code_was_run.append(state)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


def test_training_file_of_the_deit_code(tmp_path: Path) -> None:
    """It carries an argparse.Namespace, and an average that the authors do not evaluate."""
    data, path = fixture("deit_finetune"), tmp_path / "checkpoint.pth"
    average = {name: torch.zeros_like(value) for name, value in state_of().items()}
    args = argparse.Namespace(lr=1e-4, batch_size=128, resume="", msa_indicators=[[1.0, 0.0, 0.0]])
    torch.save({"model": state_of(), "model_ema": average, "optimizer": {}, "epoch": 129, "args": args}, path)
    result = spvit.load_checkpoint(path, deit().eval())
    assert_close(result.model(data["input"]), data["output"])
    assert result.report.calibration == f"{path} (SPViT's fine-tune form)"


def test_training_file_of_the_swin_code(tmp_path: Path, config_node: Any) -> None:
    """It carries a yacs CfgNode; yacs need not be installed, and none of its code is run."""
    data, path = fixture("swin_finetune_A"), tmp_path / "ckpt_epoch_129.pth"
    config = config_node({"MODEL": config_node({"NAME": "swin", "SWIN": config_node({"DEPTHS": [2, 2]})}), "AMP": "O0"})
    torch.save({"model": state_of("swin_finetune_A"), "lr_scheduler": {}, "max_accuracy": 81.0, "config": config}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    result = spvit.load_checkpoint(path, build(data["constructor"]))
    assert_close(result.model(data["input"]), data["output"])
    assert config_node.code_was_run == []
    torch.load(path, weights_only=False)
    assert len(config_node.code_was_run) == 3


@pytest.mark.parametrize("hidden_in", ["args", "config", "the file"])
def test_nothing_else_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_node: Any, hidden_in: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trap.pth"
    holder = {"args": argparse.Namespace(x=Trap()), "config": config_node({"x": Trap()}), "the file": Trap()}[hidden_in]
    torch.save({"model": state_of(), hidden_in: holder}, path)
    text = text_of(InvalidCheckpoint, lambda: spvit.load_checkpoint(path, deit()))
    assert text == (
        f"{path}: found a file that cannot be read without unpickling (it holds {os.system.__module__}.system); "
        "expected tensors only. Unpickling can run code and is refused: save the plain state dict with "
        "safetensors.torch.save_file."
    )
    assert not (tmp_path / "unpickled").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "unpickled").exists()  # the trap works where files are trusted


def test_reading_leaves_no_permission_behind(tmp_path: Path, config_node: Any) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state_of(), "args": argparse.Namespace()}, path)
    before = set(torch.serialization.get_safe_globals())  # PyTorch keeps them in no order
    spvit.load_checkpoint(path, deit())
    assert set(torch.serialization.get_safe_globals()) == before


def test_other_ways_to_hold_a_state_dict(tmp_path: Path) -> None:
    data = fixture("deit_finetune")
    save_file({f"module.{name}": value for name, value in state_of().items()}, tmp_path / "a.safetensors")
    torch.save({"state_dict": state_of()}, tmp_path / "b.pth")
    half = {name: value.half() if value.is_floating_point() else value for name, value in state_of().items()}
    assert_close(spvit.load_checkpoint(half, deit().eval()).model(data["input"]), data["output"], 1e-2)
    save_file({name.removeprefix("module."): value for name, value in state_of().items()}, tmp_path / "c.safetensors")
    for source in (tmp_path / "b.pth", str(tmp_path / "c.safetensors"), {"model": state_of()}):
        assert_close(spvit.load_checkpoint(source, deit().eval()).model(data["input"]), data["output"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert text_of(InvalidCheckpoint, lambda: spvit.load_checkpoint(tmp_path / "no.pth", deit())) == (
        f"{tmp_path / 'no.pth'}: found no file; expected a .safetensors or .pth file. Check the path."
    )
    torch.save({"model": state_of(), "x": 1}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    text = text_of(InvalidCheckpoint, lambda: spvit.load_checkpoint(tmp_path / "cut.pth", deit()))
    assert text.startswith(f"{tmp_path / 'cut.pth'}: found a file that cannot be read without unpickling (")
    assert text_of(InvalidArgument, lambda: spvit.load_checkpoint(3, deit())) == (
        "source: found int; expected a path, or a state dict {name: tensor}. Pass the .pth file itself."
    )
    assert text_of(InvalidCheckpoint, lambda: spvit.load_checkpoint({"epoch": 3}, deit())) == (
        "state_dict: found dict with entries that are not tensors; expected a state dict {name: tensor}, plain or "
        "under 'state_dict', 'model' or 'model_ema'. Save model.state_dict() alone."
    )


# ---------------------------------------------------------------------------------------------------- load_search


def test_a_search_cannot_be_continued_from_another_form() -> None:
    recipe = spvit.config("deit_tiny", gflops=0.001)
    for name, form in (("deit_finetune", "fine-tune"), ("deit_paramopt", "merged")):
        text = text_of(InvalidCheckpoint, lambda name=name: spvit.load_search(state_of(name), deit(), recipe))
        assert text == (
            f"state_dict: found SPViT's {form} form; expected its search form (attn.kernel_thresholds). Read it with "
            "msa2conv.spvit.load_checkpoint."
        )


def test_a_search_of_the_wrong_size() -> None:
    recipe = spvit.config("deit_tiny", gflops=0.001)
    model = deit(mlp_ratio=3)
    text = text_of(ArchitectureMismatch, lambda: spvit.load_search(state_of("deit_search_eval"), model, recipe))
    assert text == (
        "state_dict: found blocks.0.mlp.ffn_thresholds (96,), blocks.0.mlp.fc2.weight (48, 96), "
        "blocks.1.mlp.ffn_thresholds (96,) and 13 more; expected blocks.0.mlp.ffn_thresholds (144,), "
        f"blocks.0.mlp.fc2.weight (48, 144), blocks.1.mlp.ffn_thresholds (144,) for this model. {GEOMETRY}"
    )
