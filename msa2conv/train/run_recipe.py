"""Run a recipe: from a timm model and two folders of images to a trained hybrid on disk."""

from __future__ import annotations

import copy
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..adapters.build import create, example_size, preprocessing
from ..adapters.weights import downloaded, from_checkpoint
from ..api import convert, inspect
from ..conversion import Conversion
from ..data import transform
from ..data.sources import images_at
from ..errors import InvalidArgument
from ..files import MODEL_FILE, check_writable, write_json
from ..gate_search import prepare
from ..gate_training import STATE_FILE as SEARCH_FILE, train_gates
from ..plan import Preprocessing, weights_sha256
from ..search.gates import Gates
from ..search.resume import discard
from ..spvit import config, prepare as prepare_published
from ..spvit.training import start_of_finetuning, train as train_published
from ..targets import parse_target
from ..workbench import own_randomness
from .augment import training_transform
from .data import Batches, classes_of
from .finetune import finetune
from .loop import main_process
from .recipe import Calibrated, Gated, Published, Recipe
from .trainer import STATE_FILE as TRAINING_FILE

SETTINGS_FILE, CONVERTED, SEARCHING, TRAINING = "recipe.json", "converted", "searching", "training"


@own_randomness()
def run_recipe(
    recipe: Recipe,
    train_dir: str | os.PathLike[str],
    val_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    teacher_model: nn.Module | None = None,
    pretrained: bool | None = None,
    workers: int = 4,
    max_steps: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Conversion:
    """Search and fine-tune as a recipe says. Interrupted, the same call continues; finished, it reads the result.

    It runs on the GPU, if there is one. Under `accelerate launch` every process calls it with the same arguments; all
    of them have to see the folder `output`.

    Args:
        recipe: from `read_recipe`.
        train_dir: training images: a folder with one subfolder per class, or what else `images_at` reads.
        val_dir: held-out images; the best epoch on them is kept. None: the last state is.
        output: a folder for the hybrid (as `Conversion.save` writes it), recipe.json, the hybrid before its fine-tuning
            (`converted/`), and the logs and states of what is under way (`searching/`, `training/`).
        checkpoint: weights of the model, .safetensors or .pth; the number of classes is that of its classifier.
        teacher_model: takes the place of the recipe's teacher, where it has one.
        pretrained: False, without a checkpoint, is for trials: the model and a teacher that the recipe names get random
            weights, and the model the classes of the images. None: as the recipe says.
        workers: processes that read images.
        max_steps: end the search and every stage after so many steps, to try a recipe out.
        batch_size: instead of the recipe's, in search and fine-tuning; learning rates stay.
        micro_batch: images that a process runs at a time, if a batch does not fit into memory; not in msa2conv's own
            gate search.
        model_kwargs: of `timm.create_model`, over the recipe's.
        seed: of everything.
        progress: show bars.

    Returns:
        The Conversion that was saved.

    Raises:
        InvalidArgument: no images, no weights, or `output` holds what other arguments left there.
        WeightsUnavailable: weights of the model or of the teacher cannot be downloaded.
        As `convert`, `train_gates`, `msa2conv.spvit.prepare` and `finetune`.

    Example:
        recipe = read_recipe("recipes/imagenet/deit_tiny.yaml", "recommended")
        result = run_recipe(recipe, "imagenet/train", "imagenet/val", "out")
    """
    folder = Path(output)
    check_writable(folder / MODEL_FILE)
    train = images_at(os.fspath(train_dir), None)
    val = None if val_dir is None else images_at(os.fspath(val_dir), None, "val")
    torch.manual_seed(seed)  # the same call means the same model, with random weights too
    model = _network(recipe, checkpoint, pretrained, {**recipe.model.kwargs, **(model_kwargs or {})}, train)
    images = _Images(model, recipe, train, val)
    settings = _settings(
        recipe=recipe.model_dump(mode="json"), weights=weights_sha256(model)[:12], size=images.size, images=len(train),
        batch_size=batch_size, max_steps=max_steps, seed=seed,
    )  # fmt: skip
    if _finished(folder, settings):
        return Conversion.load(folder, original=model)
    model.to(_device())
    search = _Search(recipe, model, images, folder, batch_size, micro_batch, workers, max_steps, seed, progress)
    conversion, stated = search.converted(), recipe.finetune
    teacher: Any = stated.teacher
    if teacher is not None and teacher_model is not None:
        teacher = teacher_model
    elif teacher not in (None, "original"):
        teacher = (
            downloaded(teacher, "pass teacher_model")
            if pretrained is not False
            else create(teacher, num_classes=_classes(model))
        )
    result = finetune(
        conversion,
        images.augmented,
        images.val,
        teacher=teacher,
        stages=stated.stages,
        labels=stated.labels,
        batch_size=batch_size or stated.batch_size,
        micro_batch=micro_batch,
        workers=workers,
        precision=stated.precision,
        max_steps=max_steps,
        seed=seed,
        resume=folder / TRAINING,
        progress=progress,
    )
    if main_process():
        result.save(folder)
        write_json(folder / SETTINGS_FILE, {**settings, "finished": True})
        with suppress(OSError):
            (folder / TRAINING / TRAINING_FILE).unlink()  # larger than the model; the log stays
    return result


def _network(
    recipe: Recipe,
    checkpoint: str | os.PathLike[str] | None,
    pretrained: bool | None,
    kwargs: dict[str, Any],
    data: Any,
) -> nn.Module:
    name = recipe.model.name
    if checkpoint is not None:
        return from_checkpoint(name, checkpoint, **kwargs)
    if pretrained is False:
        return create(name, **{"num_classes": classes_of(data, 0) or 1000, **kwargs}).eval()
    if pretrained is None and not recipe.model.pretrained:
        raise InvalidArgument(
            "checkpoint", "None", f"the weights of your {name}, which this recipe is for",
            "Pass checkpoint=FILE, or pretrained=False to try the recipe out with random weights.",
        )  # fmt: skip
    return downloaded(name, "pass its checkpoint, or pretrained=False to try the recipe out", **kwargs)


def _classes(model: nn.Module) -> int:
    return int(getattr(model, "num_classes", 0))


def _device() -> torch.device:
    """The GPU of this process, if there is one and `accelerate launch` was not told to use the CPU."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _settings(**settings: Any) -> dict[str, Any]:
    """What a result depends on, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether an earlier call with these settings came to its end; notes them down for later ones."""
    path = folder / SETTINGS_FILE
    if not path.exists() and not (folder / CONVERTED).exists():
        if main_process():
            write_json(path, settings)
        return False
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        earlier = {}
    other = [name for name in settings if earlier.get(name) != settings[name]]
    if other:
        raise InvalidArgument(
            str(folder), f"what a run with another {', '.join(other)} left there", "a run with these arguments",
            "Pass the same arguments, or another output folder, or delete this one.",
        )  # fmt: skip
    return bool(earlier.get("finished"))


class _Images:
    """The images, prepared as a model and a recipe want them."""

    def __init__(self, model: nn.Module, recipe: Recipe, train: Any, val: Any) -> None:
        self.size = example_size(model) or (3, 224, 224)
        self._train, self._val, self._augment = train, val, recipe.augment.given
        self._prepared = preprocessing(model) or Preprocessing()

    @property
    def augmented(self) -> Any:
        """For training."""
        return _with(self._train, training_transform(self.size, self._prepared, **self._augment))

    @property
    def still(self) -> Any:
        """Training images as for evaluation."""
        return _with(self._train, transform(self.size, self._prepared))

    @property
    def val(self) -> Any:
        """Held-out images."""
        return None if self._val is None else _with(self._val, transform(self.size, self._prepared))


def _with(data: Any, prepare: Any) -> Any:
    """The same dataset with another transform: a folder of a million images is listed once."""
    data = copy.copy(data)
    data.transform = prepare
    return data


@dataclass(frozen=True)
class _Search:
    """The hybrid before its fine-tuning."""

    recipe: Recipe
    model: nn.Module
    images: _Images
    output: Path
    batch_size: int | None
    micro_batch: int | None
    workers: int
    max_steps: int | None
    seed: int
    progress: bool

    def converted(self) -> Conversion:
        """Of an earlier call, or searched now and kept."""
        path, part = self.output / CONVERTED, self.output / f"{CONVERTED}.part"
        if not path.exists() and (main_process() or not isinstance(self.recipe.search, Calibrated)):
            found = self._searched()  # a calibration is the work of one process
            if main_process():
                found.save(part)
                os.replace(part, path)
        while not path.exists():  # the others wait here: waiting in a collective operation would time out
            time.sleep(0.5)
        if main_process():
            self._tidy()
        return Conversion.load(path, original=self.model)

    def _searched(self) -> Conversion:
        search = self.recipe.search
        if isinstance(search, Calibrated):
            return self._calibrated(search)
        return self._gated(search) if isinstance(search, Gated) else self._published(search)

    def _calibrated(self, search: Calibrated) -> Conversion:
        return convert(
            self.model,
            self.recipe.flops,
            data=self.images.still,
            images=search.images,
            distill_steps=min(search.distill_steps, self.max_steps or search.distill_steps),
            seed=self.seed,
            progress=self.progress,
            resume=self.output / SEARCHING,
        )

    def _gated(self, search: Gated) -> Conversion:
        data, epochs, batch = self.images.augmented, search.epochs, self.batch_size or search.batch_size
        classes = _classes(self.model)
        labelled = self.recipe.finetune.labels is not False and classes_of(data, classes) == classes
        if self.max_steps is not None:
            data, epochs = _some(data, self.max_steps * batch, self.seed), 1
        loader = DataLoader(
            data, min(batch, len(data)), shuffle=True, num_workers=self.workers, drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        steps = Batches(loader, epochs=epochs).steps
        handle = prepare(self.model, self.recipe.flops, steps=steps, gates=Gates(sampling=search.sampling))
        train_gates(
            handle,
            loader,
            epochs=epochs,
            loss=F.cross_entropy if labelled else None,
            lr=search.lr,
            gate_lr=search.gate_lr,
            seed=self.seed,
            resume=self.output / SEARCHING,
            progress=self.progress,
        )
        return handle.finish()

    def _published(self, search: Published) -> Conversion:
        data, classes = self.images.augmented, _classes(self.model)
        if (found := classes_of(data, classes)) != classes:
            raise InvalidArgument(
                "train", f"images of {found} classes", f"the {classes} classes of {self.recipe.model.name}",
                "SPViT's search learns from labels; take a recipe whose search is calibrated.",
            )  # fmt: skip
        target = parse_target(self.recipe.flops, inspect(self.model).costs.base)
        schedule = {"epochs": search.epochs, "lr": search.lr, "final_lr": search.lr}
        stated = config(
            search.name,
            gflops=target / 1e9,
            penalty=search.penalty,
            gate_lr=search.gate_lr,
            batch_size=search.batch_size,
            picked_epoch=search.picked_epoch,
            search={**schedule, "weight_decay": search.weight_decay},
        )
        handle = prepare_published(self.model, stated)
        train_published(
            handle,
            stated,
            data,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            clip=search.clip,
            workers=self.workers,
            precision=self.recipe.finetune.precision,
            max_steps=self.max_steps,
            seed=self.seed,
            resume=self.output / SEARCHING,
            progress=self.progress,
        )
        return start_of_finetuning(handle)

    def _tidy(self) -> None:
        """Delete the state of the search; its log stays."""
        with suppress(OSError):
            (self.output / SEARCHING / SEARCH_FILE).unlink()
        discard(self.output / SEARCHING)


def _some(data: Dataset[Any], count: int, seed: int) -> Dataset[Any]:
    """A random part of it: folders are sorted by class."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return Subset(data, order[:count].tolist())
