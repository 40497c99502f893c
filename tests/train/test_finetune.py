"""Fine-tuning a converted model: what it learns, what it keeps, and how it goes on after an interruption."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from models import images, replaced, same, seeded, swin, vit
from safetensors.torch import load_file, save_file
from sampled import sampled
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import msa2conv
from msa2conv import Conversion, Stage, count_flops, finetune
from msa2conv.errors import (
    ArchitectureMismatch,
    InvalidArgument,
    InvalidOutputPath,
    InvalidTrainingData,
    NonFiniteValue,
)
from msa2conv.files import read_state
from msa2conv.ops import TokenMixer
from msa2conv.search.measure import distance, outputs
from msa2conv.train.lessons import changed
from msa2conv.train.log import LOG_FILE
from msa2conv.train.trainer import STATE_FILE

LABELS = torch.arange(40) % 10
TRAIN = TensorDataset(images(40, seed=1), LABELS)
VAL = TensorDataset(images(30, seed=2), LABELS[:30])
SHORT: dict[str, Any] = {"batch_size": 8, "progress": False}
STAGES = [{"kind": "local"}, {"kind": "distill", "epochs": 2, "ema": 0.9, "mixup": 0.4}, {"kind": "labels"}]


def tuned(conversion: Conversion | None = None, train: Any = TRAIN, val: Any = None, **other: Any) -> Conversion:
    return finetune(conversion or replaced(), train, val, **{**SHORT, "stages": STAGES, **other})


@pytest.fixture(scope="module")
def complete() -> Conversion:
    """What a training that nothing interrupts ends in."""
    return tuned(val=VAL)


def far(model: nn.Module) -> float:
    return distance(outputs(vit(), VAL.tensors[0]), outputs(model, VAL.tensors[0]), "kl")


# What it learns


def test_imitation_brings_a_hybrid_closer_to_its_original() -> None:
    before = replaced()
    after = finetune(before, images(256, seed=1), epochs=4, lr=2e-4, **SHORT)
    assert far(after.model) < 0.7 * far(before.model)
    training = after.report.training
    assert training is not None and training.teacher == "the original" and not training.labels
    assert [stage["kind"] for stage in training.stages] == ["local", "distill"]
    assert training.warnings == ["trained without labels: there are none"]


def test_one_epoch_at_every_site_by_itself_helps_already() -> None:
    """The sites that a closed-form fit of few images left imperfect."""
    before = msa2conv.convert(vit(), 0.5, data=images(16), levers=("mixer", "ffn"), progress=False)
    after = finetune(before, images(256, seed=1), stages=[Stage(kind="local", epochs=2)], **SHORT)
    assert far(after.model) < 0.95 * far(before.model)
    others = {name for name, value in after.model.state_dict().items() if "blocks" not in name}
    assert others and all(torch.equal(after.model.state_dict()[n], before.model.state_dict()[n]) for n in others)


def test_labels_are_learned() -> None:
    before = replaced()
    after = finetune(before, TRAIN, teacher=None, epochs=12, lr=2e-3, **SHORT)
    right = [(outputs(result.model, TRAIN.tensors[0]).argmax(1) == LABELS).float().mean() for result in (before, after)]
    assert right[1] > right[0] + 0.3
    assert after.report.training is not None and after.report.training.teacher == "none"


def test_what_a_plan_says_stays_true(complete: Conversion) -> None:
    """The same plan, class and cost; a saved result comes back bit for bit."""
    before = replaced()
    assert complete.plan == before.plan and type(complete.model) is type(before.model)
    assert count_flops(complete.model, images(1)) == complete.plan.flops
    assert not complete.model.training and {type(m) for m in complete.model.modules()} == {
        type(m) for m in before.model.modules()
    }


def test_nothing_that_was_given_is_touched() -> None:
    conversion = msa2conv.convert(vit(), 0.5, data=images(16), progress=False)
    teacher, model = conversion.original, conversion.model
    assert teacher is not None
    next(model.parameters()).requires_grad_(False)
    before = [{name: value.clone() for name, value in m.state_dict().items()} for m in (teacher, model)]
    drawn = torch.get_rng_state()
    after = tuned(conversion)
    for module, state in zip((teacher, model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert not module.training and not any(len(m._forward_hooks) for m in module.modules())
        assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    (first, *rest), flags = after.model.parameters(), [p.requires_grad for p in after.model.parameters()]
    assert torch.equal(first, next(model.parameters())) and flags == [False] + [True] * len(rest), "frozen stays frozen"


def test_half_precision_and_mode_are_given_back() -> None:
    half = msa2conv.convert(vit().bfloat16().train(), 0.5, data=images(16), progress=False)
    after = tuned(half, precision="bf16")
    assert next(after.model.parameters()).dtype == torch.bfloat16 and after.model.training
    assert after.report.training is not None and after.report.training.precision == "bf16"
    assert tuned(precision="no").report.training.precision == "no", "another precision in the same process"  # type: ignore[union-attr]


def test_the_best_state_is_kept(complete: Conversion) -> None:
    training = complete.report.training
    assert training is not None and training.best is not None and training.metric == "top1"
    found = [(line["val"]["top1"], -line["val"]["loss"]) for line in training.validations]
    assert [line["stage"] for line in training.validations] == ["start", "local", "distill", "distill", "labels"]
    assert max(found) == (training.best["val"]["top1"], -training.best["val"]["loss"])
    right = (outputs(complete.model, VAL.tensors[0]).argmax(1) == VAL.tensors[1]).float().mean()
    assert float(right) == pytest.approx(training.best["val"]["top1"])


def test_a_training_that_only_harms_returns_the_start() -> None:
    after = finetune(replaced(), TRAIN, VAL, stages=["distill"], labels=False, lr=0.5, **SHORT)
    training = after.report.training
    assert training is not None and training.best is not None and training.best["stage"] == "start"
    assert training.metric == "top1" or training.metric == "distance"
    assert same(after.model, replaced().model)


def test_attention_fades_out_and_is_gone() -> None:
    stages = [Stage(kind="distill", epochs=2, anneal=0.6, labels=0.0)]
    after = tuned(stages=stages, val=VAL)
    assert after.model.state_dict().keys() == replaced().model.state_dict().keys()
    assert any(isinstance(module, TokenMixer) for module in after.model.modules())
    assert not same(
        tuned(stages=stages).model,
        tuned(
            stages=[
                "distill",
            ]
        ).model,
    )


def test_hidden_states_are_taught_where_shapes_allow() -> None:
    stages = [Stage(kind="distill", hidden=1.0)]
    curve = tuned(stages=stages).report.training.curve  # type: ignore[union-attr]
    assert 0 < curve[-1]["hidden"] < 1 and {"labels", "teacher", "loss"} <= curve[-1].keys()


@pytest.mark.parametrize("family", sampled(["hf_swinv2", "torch_encoder", "twins", "levit", "tv_maxvit"], 2))
def test_backbones_of_every_kind(family: str) -> None:
    """Nested lists of blocks, BatchNorms, sites around other sites, shared rows, sequences that come first."""
    if family not in backbones.TINY:
        pytest.skip("transformers is not installed")
    model, data = backbones.build(family), backbones.images(family)
    conversion = msa2conv.convert(model, 0.9, data=data, example_inputs=data[:1], progress=False)
    stages = ["local", {"kind": "distill", "hidden": 0.5, "anneal": 0.5}]
    after = finetune(conversion, data, data, stages=stages, batch_size=4, progress=False)
    assert after.report.training is not None and after.report.training.metric == "distance"
    assert all(
        0 < line["hidden"] < 1 for line in after.report.training.curve if line["stage"] == "distill" and "loss" in line
    )
    assert count_flops(after.model, data[:1]) == after.plan.flops


def test_hidden_states_that_do_not_agree_are_said_aloud() -> None:
    other = vit(embed_dim=24)
    result = tuned(teacher=other, stages=[Stage(kind="distill", hidden=1.0)], max_steps=1)
    assert result.report.training is not None
    assert result.report.training.warnings == ["no hidden states were taught: none agree in shape"]


def test_another_teacher_with_the_same_classes() -> None:
    other = seeded(swin(img_size=32, window_size=4), seed=3)
    after = finetune(replaced(), TRAIN, teacher=other, stages=[Stage(kind="distill", hard=True)], **SHORT)
    assert after.report.training is not None and after.report.training.teacher == "SwinTransformer"
    with pytest.raises(
        ArchitectureMismatch, match=r"^teacher: found outputs of shape \(3,\); expected \(10,\), as the"
    ):
        finetune(replaced(), TRAIN, teacher=vit(num_classes=3), **SHORT)


def test_swin_and_feature_maps() -> None:
    """Windows, shifted and padded; a backbone without a classifier imitates features."""
    after = finetune(replaced("swin"), images(24, 56, seed=1), stages=["local", "distill"], **SHORT)
    assert count_flops(after.model, images(1, 56)) == after.plan.flops
    model = vit(num_classes=0)
    plain = msa2conv.convert(model, 0.5, data=images(16), progress=False)
    after = finetune(plain, TRAIN, images(20, seed=2), epochs=4, lr=2e-4, **SHORT)
    training = after.report.training
    assert training is not None and training.metric == "distance" and training.best is not None
    assert training.best["val"]["distance"] < training.validations[0]["val"]["distance"]


def test_batch_norms_are_settled_at_the_end() -> None:
    """After a gate search convolutions have BatchNorms: their statistics are measured anew for the final weights."""
    search = msa2conv.prepare(vit(), 0.5, steps=5)
    msa2conv.train_gates(search, [(images(8), LABELS[:8])] * 5, gate_lr=1.0, progress=False)
    conversion = search.finish()
    norms = [m for m in conversion.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms, "the plan has convolutions with BatchNorm"
    after = finetune(conversion, TRAIN, stages=["distill"], **SHORT)
    seen: list[Tensor] = []
    name, norm = next((n, m) for n, m in after.model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    after.model.eval()
    outputs(after.model, TRAIN.tensors[0])
    mean = torch.cat(seen).mean((0, 2, 3))
    assert torch.allclose(mean, norm.running_mean, atol=1e-4), name


def test_frozen_batch_norms_stay_frozen() -> None:
    search = msa2conv.prepare(vit(), 0.5, steps=5)
    msa2conv.train_gates(search, [(images(8), LABELS[:8])] * 5, gate_lr=1.0, progress=False)
    conversion = search.finish()
    norms = [(name, m) for name, m in conversion.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0][1].requires_grad_(False)
    after = dict(finetune(conversion, TRAIN, stages=["distill"], **SHORT).model.named_modules())
    for index, (name, norm) in enumerate(norms):
        kept = [torch.equal(value, after[name].state_dict()[key]) for key, value in norm.state_dict().items()]
        assert all(kept) if index == 0 else not any(kept), name


def test_checkpointed_gradients_are_the_same() -> None:
    plain, saving = vit(), vit()
    saving.set_grad_checkpointing(True)
    calibration = msa2conv.calibrate(plain, images(16), progress=False)
    one, other = (msa2conv.convert(m, 0.5, calibration=calibration, progress=False) for m in (plain, saving))
    assert same(tuned(one, stages=["distill"]).model, tuned(other, stages=["distill"]).model)


def test_micro_batches_add_up() -> None:
    whole, parts = (tuned(stages=["distill"], micro_batch=size, lr=1e-5) for size in (None, 3))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name


def test_steps_may_be_limited() -> None:
    training = tuned(max_steps=2, val=VAL).report.training
    assert training is not None
    assert [line["step"] for line in training.curve if "loss" in line] == [2, 2, 2]


def test_a_new_classifier(tmp_path: Path) -> None:
    from msa2conv.train.head import reset_head

    conversion = msa2conv.convert(vit(), 0.5, data=images(16), progress=False)
    three = reset_head(conversion, 3)
    assert three.plan.flops == count_flops(three.model, images(1)) and three.plan.edits == conversion.plan.edits
    assert three.plan.base.flops == count_flops(vit(num_classes=3), images(1))
    train = TensorDataset(images(24, seed=1), torch.arange(24) % 3)
    after = finetune(three, train, stages=["local", "distill"], **SHORT)
    assert after.report.training is not None and after.report.training.labels
    assert after.report.training.warnings == ["the original has other classes: it taught the local stage only"]
    after.save(tmp_path)
    assert same(msa2conv.load(tmp_path, vit(num_classes=3)), after.model)
    assert conversion.model.num_classes == 10
    with pytest.raises(InvalidArgument, match=r"^classes: found 0; expected an integer >= 1\. Pass the number of"):
        reset_head(conversion, 0)


# Files


def test_a_conversion_comes_back_and_can_learn_on(tmp_path: Path, complete: Conversion) -> None:
    complete.save(tmp_path)
    back = Conversion.load(tmp_path, original=vit())
    assert back.report == complete.report and back.plan == complete.plan and same(back.model, complete.model)
    assert same(tuned(back, max_steps=1).model, tuned(complete, max_steps=1).model)
    card = (tmp_path / "README.md").read_text()
    assert (
        "fine-tuned: epochs 1 x local + 2 x distill + 1 x labels" in card
        and "taught by labels and the original" in card
    )


def test_a_conversion_without_its_original(tmp_path: Path) -> None:
    replaced().save(tmp_path)
    back = Conversion.load(tmp_path / "model.safetensors", vit())
    assert back.report.flops_after == back.plan.flops and back.original is None
    text = (
        r"^original: found none: the conversion was read from a file; expected the timm\.models\.vision_transformer\."
        r"VisionTransformer that was converted, with its weights\. Conversion\.load\(path, original=model\), or teach"
    )
    with pytest.raises(ArchitectureMismatch, match=text):
        tuned(back)
    assert same(tuned(back, teacher=vit(), stages=["local"]).model, tuned(stages=["local"]).model), "that is it"
    assert tuned(back, teacher=None, stages=["labels"]).report.training.teacher == "none"  # type: ignore[union-attr]
    with pytest.raises(
        ArchitectureMismatch, match=r"^original: found a VisionTransformer with other weights; expected "
    ):
        Conversion.load(tmp_path, original=seeded(vit(), 5))


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    result = tuned(val=VAL, resume=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert result.report.training is not None and lines == result.report.training.curve
    steps = [line for line in lines if "loss" in line]
    assert [(line["stage"], line["step"]) for line in steps] == [("local", 5), ("distill", 10), ("labels", 5)]
    assert all(line["images_per_second"] > 0 and line["lr"] >= 0 for line in steps)


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tuned(val=VAL, resume=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert result.report.training is not None
    lines = [line for line in result.report.training.curve if line["stage"] == "distill"]
    losses, right = (events.Scalars(f"distill/{name}") for name in ("loss", "val_top1"))
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in lines if "loss" in line])
    assert [event.value for event in right] == pytest.approx([line["val"]["top1"] for line in lines if "val" in line])


def test_without_tensorboard_there_is_no_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tuned(max_steps=1, resume=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_FILE, STATE_FILE]


def test_a_bar_for_people_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    tuned(progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    tuned(progress=True, val=VAL)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("local", "distill", "labels", "validate", "images_per_s", "/10"))


# Interruptions


class Stop(Exception):
    pass


class Interrupting(Dataset[Any]):
    """TRAIN, until an image is asked for the `count + 1`st time."""

    def __init__(self, count: int, error: Callable[[], BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error, self.targets = count, error, LABELS.tolist()

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error()
        return TRAIN[index]


@pytest.mark.parametrize("count", [33, 75, 110, 180, 215])
def test_interrupted_it_goes_on_as_if_nothing_had_happened(complete: Conversion, tmp_path: Path, count: int) -> None:
    """Within the stages, with averages of the weights, mixed images and validation."""
    with pytest.raises(KeyboardInterrupt):
        tuned(train=Interrupting(count), val=VAL, resume=tmp_path)
    again = tuned(val=VAL, resume=tmp_path)
    assert same(again.model, complete.model)
    one, other = ([line.get("val") for line in r.report.training.curve] for r in (again, complete))  # type: ignore[union-attr]
    assert one == other


def test_what_is_done_is_not_done_again(complete: Conversion, tmp_path: Path) -> None:
    tuned(val=VAL, resume=tmp_path)
    probes = 32 + 2 * 0
    assert same(tuned(train=Interrupting(probes), val=VAL, resume=tmp_path).model, complete.model)


def test_another_training_is_not_continued(tmp_path: Path) -> None:
    tuned(resume=tmp_path, max_steps=1)
    before = (tmp_path / STATE_FILE).read_bytes()
    for other, named in (
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch, steps of an epoch"),
        ({"stages": ["local"]}, "stages"),
        ({"labels": False, "stages": STAGES[:2]}, "stages, labels"),
        ({"max_steps": None}, "max_steps"),
        ({"precision": "bf16"}, "precision"),
        ({"teacher": seeded(vit(), 3), "stages": STAGES}, "teacher"),
        ({"conversion": tuned(max_steps=1)}, "model"),
    ):
        with pytest.raises(ArchitectureMismatch) as error:
            tuned(**{"max_steps": 1, "resume": tmp_path, **other})
        assert str(error.value) == (
            f"{tmp_path / STATE_FILE}: found a training with other {named}; expected the training of this call. "
            "Pass the same model, data and arguments, or another folder."
        )
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path: Path) -> None:
    pictures = images(40, seed=1)
    pictures[7] = float("nan")
    with pytest.raises(NonFiniteValue) as error:
        tuned(train=TensorDataset(pictures, LABELS), stages=["distill"], resume=tmp_path)
    step = int(str(error.value).split()[2].rstrip(":"))
    assert str(error.value) == (
        f"distill step {step}: found a loss of nan; expected a finite loss. Lower the lr of stage 'distill'; the state "
        "before this step is kept."
    )
    state = read_state(tmp_path / STATE_FILE)
    assert state["done"] == step and all(torch.isfinite(value).all() for value in state["student"].values())


def test_a_full_disk_stops_and_leaves_the_last_state_whole(
    complete: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa2conv import files

    saves, save = 0, torch.save

    def full(state: Any, file: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > 4:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(files.torch, "save", full)
    with pytest.raises(InvalidOutputPath) as error:
        tuned(val=VAL, resume=tmp_path, save_every=2)
    assert str(error.value) == (
        f"{tmp_path / STATE_FILE}: found a file that could not be written whole ([Errno 28] No space left on device); "
        "expected a disk with room for it. Free some space, or choose another output path."
    )
    assert not list(tmp_path.glob("*.part")) and read_state(tmp_path / STATE_FILE)["stage"] == 1
    monkeypatch.undo()
    assert same(tuned(val=VAL, resume=tmp_path, save_every=2).model, complete.model)


def test_a_full_disk_need_not_stop(complete: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa2conv import files
    from msa2conv.train import log

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.torch, "save", full)
    monkeypatch.setattr(log.json, "dumps", full)
    result = tuned(val=VAL, resume=tmp_path, on_full_disk="continue")
    assert same(result.model, complete.model) and result.report.training is not None
    assert result.report.training.warnings == [
        f"{tmp_path / LOG_FILE} was not written (No space left on device)",
        f"{tmp_path / STATE_FILE} was not written (a file that could not be written whole ([Errno 28] No space left on "
        "device))",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("times", sampled([5, 20], 1))
def test_killed_again_and_again(complete: Conversion, tmp_path: Path, times: int) -> None:
    """At any moment: between steps, while files are written, before they are moved. The result is the same bits."""
    moments, kills, finished = random.Random(0), 0, 0
    while kills < times:
        child = os.fork()
        if not child:
            same_result = False
            try:
                _die_after(moments.randrange(20))
                same_result = same(tuned(val=VAL, resume=tmp_path, save_every=2).model, complete.model)
            finally:  # whatever happens, no second process goes on with the tests
                os._exit(0 if same_result else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        assert not (tmp_path / STATE_FILE).exists() or read_state(tmp_path / STATE_FILE)
        moments.random()
        kills += status != 0
        if not status:  # done in spite of it all, and rightly: begin anew
            finished += 1
            (tmp_path / STATE_FILE).unlink()
    assert finished or times < 20
    assert same(tuned(val=VAL, resume=tmp_path, save_every=2).model, complete.model)


def _die_after(moments: int) -> None:
    """Kill this process at the given moment, counting optimiser steps, files about to be written, and files moved."""
    from msa2conv import files

    left = moments

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    torch.optim.AdamW.step = counted(torch.optim.AdamW.step)  # type: ignore[method-assign]
    files.torch.save = counted(torch.save)  # type: ignore[attr-defined]
    files.os.replace = counted(os.replace)  # type: ignore[attr-defined]


# Several processes

TWO = """
import os, sys
import torch
torch.set_num_threads(1)
from test_finetune import on_any_number_of_processes
on_any_number_of_processes(sys.argv[1])
"""


def on_any_number_of_processes(folder: str) -> None:
    """Two steps of every stage and of a gate search; the first process writes what came out."""
    result = tuned(stages=["local", {"kind": "distill", "hidden": 0.5, "ema": 0.9, "warmup": 0.0}], max_steps=2)
    search = msa2conv.prepare(vit(), 0.7, steps=2, levers="ffn")
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(TRAIN, range(16)), 8, shuffle=True)
    loss = nn.functional.cross_entropy
    msa2conv.train_gates(search, loader, loss=loss, gate_lr=0.1, same_gates=True, progress=False)
    found = search.finish()
    if os.environ.get("RANK", "0") == "0":
        for name, conversion in (("tuned", result), ("searched", found)):
            state = {key: value.contiguous() for key, value in conversion.model.state_dict().items()}
            save_file(state, f"{folder}/{name}.safetensors")
        Path(folder, "plan.json").write_text(found.plan.model_dump_json())
        assert result.report.training is not None
        Path(folder, "processes").write_text(str(result.report.training.processes))


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """The same weights to 1e-5 as one process with the joined batch, and the same plan."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    on_any_number_of_processes(str(tmp_path / "one"))
    tests = Path(__file__).parents[1]
    (tmp_path / "main.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "main.py"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "train")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "processes").read_text() == "2"
    assert (tmp_path / "one" / "plan.json").read_text() == (tmp_path / "two" / "plan.json").read_text()
    for name in ("tuned", "searched"):
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam makes a whole step
                third = len(value) // 3
                value[third : 2 * third] = two[key][third : 2 * third]
            assert torch.allclose(value, two[key], atol=1e-5, rtol=0), (name, key, (value - two[key]).abs().max())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"epochs": 0},
            InvalidArgument,
            "epochs: found 0; expected an integer >= 1. Leave epochs out for its default.",
        ),
        (
            {"batch_size": "8"},
            InvalidArgument,
            "batch_size: found '8'; expected an integer >= 1. Leave batch_size out fo",
        ),
        (
            {"stages": []},
            InvalidArgument,
            "stages: found none; expected at least one. For example stages=['local', 'dis",
        ),
        (
            {"stages": ["lokal"]},
            InvalidArgument,
            "stages, kind: found 'lokal' (input should be 'local', 'distill' or 'la",
        ),
        (
            {"stages": [{"kind": "local", "rate": 1}]},
            InvalidArgument,
            "stages, rate: found 1 (extra inputs are not permi",
        ),
        (
            {"train": images(8), "labels": True},
            InvalidArgument,
            "labels: found True, but there are none; expected labels of the model's classes. Pass labels=False.",
        ),
        (
            {"train": images(8), "stages": ["labels"]},
            InvalidArgument,
            "stages: found only stages that cannot be done (trained without labels: there are none); expected labels "
            "of the model's classes, or a teacher. Give labelled images, or leave teacher='original'.",
        ),
        (
            {"train": images(8), "teacher": None, "stages": ["distill"]},
            InvalidArgument,
            "stages: found only stages that cannot be done (trained without labels: there are none); expected labels",
        ),
        (
            {"val": images(8), "teacher": None, "stages": ["labels"]},
            InvalidArgument,
            "val: found images without labels; expected labels, or a teacher. Leave val out.",
        ),
        (
            {"batch_size": 7},
            InvalidArgument,
            "batch_size: found 7 images of a process at a time; expected an even number, since mixup and cutmix are",
        ),
        (
            {"micro_batch": 3},
            InvalidArgument,
            "micro_batch: found 3 images of a process at a time; expected an even number, since mixup and cutmix are",
        ),
        (
            {"val": TensorDataset(images(0), LABELS[:0])},
            InvalidTrainingData,
            "val: found no images; expected at least one. Check the path, or the dataset.",
        ),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as found:
        tuned(**arguments)
    assert str(found.value).startswith(text)


def test_more_classes_than_the_model_has() -> None:
    """Then it learns without labels, and says so; told to use them, it refuses."""
    train = TensorDataset(images(16), torch.arange(16))
    result = tuned(train=train, stages=["distill"])
    assert result.report.training is not None and not result.report.training.labels
    assert result.report.training.warnings == ["trained without labels: there are 16 classes, and 10 of the model"]
    with pytest.raises(InvalidArgument, match=r"^labels: found True, but there are 16 classes, and 10 of the model; "):
        tuned(train=train, labels=True)


def test_a_hybrid_in_which_nothing_may_learn() -> None:
    frozen = msa2conv.convert(vit(), 0.5, data=images(16), progress=False)
    frozen.model.requires_grad_(False)
    with pytest.raises(
        InvalidArgument, match=r"^conversion\.model: found requires_grad=False for every parameter; exp"
    ):
        tuned(frozen)


def test_which_sites_learn_by_themselves() -> None:
    paths = changed(replaced())
    assert paths and set(paths) <= set(replaced().plan.choices)
    kept = [site for site, option in replaced().plan.choices.items() if option in ("attention", "skip")]
    assert not set(paths) & set(kept)
