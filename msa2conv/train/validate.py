"""How good a student is on held-out images, shared among processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ..errors import InvalidTrainingData
from ..progress import track
from ..search.measure import Measure, OutputFn, distances, first_tensor, tensor_of
from .data import length, split
from .objectives import checked
from .teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator


class Validation:
    """Held-out images, and what is asked of them.

    Args:
        data: as for training; a Dataset is read in its order.
        classes: how many the labels may have; None: compare with the teacher instead.
        teacher, measure, output_fn: for that.
        accelerator: whose processes share the images.
        batch_size, workers: of a Dataset.
        show: whether to show a bar.

    A call gives {"top1": share of images, "loss": cross entropy} or {"distance": to the teacher}.
    """

    def __init__(
        self,
        data: Any,
        classes: int | None,
        teacher: Teacher | None,
        measure: Measure,
        accelerator: Accelerator,
        *,
        output_fn: OutputFn | None = None,
        batch_size: int = 64,
        workers: int = 0,
        show: bool = True,
    ) -> None:
        self.classes, self.teacher, self.measure, self.output_fn = classes, teacher, measure, output_fn
        self.accelerator, self.show = accelerator, show and accelerator.is_main_process
        data = TensorDataset(data) if isinstance(data, Tensor) else data
        if hasattr(data, "__getitem__") and not isinstance(data, (list, tuple, dict, DataLoader)):
            if not len(data):
                raise InvalidTrainingData("val", "no images", "at least one", "Check the path, or the dataset.")
            mine = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
            self.batches: Any = DataLoader(mine, batch_size, num_workers=workers)
            self.shared = True
        else:
            self.batches, self.shared = data, False
            length(data)

    @property
    def metric(self) -> str:
        """The figure that decides which state is best."""
        return "top1" if self.classes is not None else "distance"

    def better(self, found: dict[str, float], than: dict[str, float] | None) -> bool:
        """Whether the one validation beats the other; of equal top-1, the lower loss."""
        if than is None:
            return True
        if self.metric == "distance":
            return found["distance"] < than["distance"]
        return (found["top1"], -found["loss"]) > (than["top1"], -than["loss"])

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> dict[str, float]:
        """Judge it in eval mode; its mode is given back."""
        modes = {module: module.training for module in student.modules()}
        student.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        try:
            for images, labels in track(self._mine(), "validate", self.show, len(self.batches)):
                sums += self._judge(student, images.to(self.accelerator.device), labels)
        finally:
            for module, mode in modes.items():
                module.training = mode
        device = self.accelerator.device
        total: Any = self.accelerator.reduce(sums.to(device, torch.float32 if device.type == "mps" else torch.float64))
        count = float(total[2])
        if self.metric == "distance":
            return {"distance": float(total[0]) / count}
        return {"top1": float(total[1]) / count, "loss": float(total[0]) / count}

    def _mine(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for index, batch in enumerate(self.batches):
            if self.shared or index % self.accelerator.num_processes == self.accelerator.process_index:
                yield split(batch)

    def _judge(self, student: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        with self.accelerator.autocast():
            output = student(images)
        if self.classes is not None:
            logits = first_tensor(output).float().cpu()
            wanted = checked(labels, self.classes)
            right = float((logits.argmax(1) == wanted.cpu()).sum())
            loss = F.cross_entropy(logits, wanted.cpu(), reduction="sum")
            return torch.tensor([float(loss), right, len(images)], dtype=torch.float64)
        assert self.teacher is not None
        found, reference = tensor_of(output, self.output_fn).double(), self.teacher(images).double()
        each = distances(reference, found, self.measure)
        return torch.tensor([float(each.sum()), 0.0, len(images)], dtype=torch.float64)
