"""What a fine-tuning did, for the report of its Conversion."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Training(BaseModel):
    """Args:
    stages: what was done, in order; fields of `Stage` that are not defaults.
    max_steps: after which every stage was ended, None for no such limit.
    teacher: who taught.
    labels: whether labels were used.
    images: how many there were to train on; 0 where batches were given.
    batch_size: images of a step over all processes; 0 where batches were given.
    processes, precision, seed: circumstances.
    curve: lines of train_log.jsonl: losses of every few steps, and {"val": ...} after epochs.
    metric: what the validation compared, "top1" or "distance"; None without one.
    best: {"stage", "epoch", "val"} of the state that was kept; None: the last one.
    seconds, images_per_second: of the training steps.
    warnings: what the user should know.
    versions: of the packages used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: list[dict[str, Any]]
    max_steps: int | None = None
    teacher: str
    labels: bool
    images: int
    batch_size: int
    processes: int
    precision: str
    seed: int
    curve: list[dict[str, Any]]
    metric: str | None
    best: dict[str, Any] | None
    seconds: float
    images_per_second: float
    warnings: list[str] = []
    versions: dict[str, str]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """{"stage", "epoch", "step", "val"} in order."""
        return [line for line in self.curve if "val" in line]

    def __str__(self) -> str:
        what = " + ".join(f"{stage.get('epochs', 1)} x {stage['kind']}" for stage in self.stages)
        count = f"{self.images:,} images, batch {self.batch_size}" if self.images else "the batches given"
        if self.max_steps is not None:
            what += f" (at most {self.max_steps} steps of each)"
        teachers = [name for name, there in (("labels", self.labels), (self.teacher, self.teacher != "none")) if there]
        lines = [f"fine-tuned: epochs {what}, {count}; taught by {' and '.join(teachers)}"]
        precision = "float32" if self.precision == "no" else self.precision  # as accelerate calls it
        lines.append(
            f"{self.images_per_second:,.0f} images/s on {self.processes} "
            f"process{'es' if self.processes > 1 else ''} ({precision}), {self.seconds:,.0f} s"
        )
        for line in self.validations:
            kept = self.best is not None and (line["stage"], line["epoch"]) == (self.best["stage"], self.best["epoch"])
            lines.append(
                f"  {line['stage']:<8}epoch {line['epoch']:>3}   {_figures(line['val'])}{'  < kept' if kept else ''}"
            )
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _figures(val: dict[str, float]) -> str:
    if "distance" in val:
        return f"distance to the teacher {val['distance']:.4f}"
    return f"top-1 {100 * val['top1']:.2f} %, loss {val['loss']:.4f}"
