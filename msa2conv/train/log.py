"""What a training says about itself: a bar with images per second, train_log.jsonl, TensorBoard if installed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..errors import InvalidOutputPath
from ..files import write_text
from ..progress import bar

LOG_FILE = "train_log.jsonl"
OnFullDisk = Literal["stop", "continue"]


class Log:
    """Lines of train_log.jsonl, kept in memory too.

    Args:
        folder: where the log is written; None: nowhere. Lines of an interrupted run are kept as far as `resume` says.
        every: steps between two lines of a training.
        show: whether to show bars.
        main: whether this process writes and shows; of several, one does.
        mean: of a tensor over all processes.
        on_full_disk: "stop", or "continue" and say so in the end.

    A line of a step: {"stage", "step", "images", "loss", further parts of the loss, "lr", "images_per_second"}; of a
    validation: {"stage", "epoch", "step", "val": {...}}. Losses are means since the last line.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        every: int = 50,
        show: bool = True,
        main: bool = True,
        mean: Callable[[Tensor], Tensor] | None = None,
        on_full_disk: OnFullDisk = "stop",
    ) -> None:
        self.on_full_disk, self.failed = on_full_disk, list[str]()
        self.folder, self.every, self.show = folder if main else None, every, show and main
        self.mean = mean or (lambda value: value)
        self.lines: list[dict[str, Any]] = []
        self.images, self.seconds = 0, 0.0
        self._board: Any = None

    def resume(self, lines: list[dict[str, Any]]) -> None:
        """Begin with what an interrupted run had logged when its state was saved."""
        self.lines = list(lines)
        if self.folder is not None and (lines or (self.folder / LOG_FILE).exists()):
            write_text(self.folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, line: Mapping[str, Any]) -> None:
        """One more line."""
        self.lines.append(dict(line))
        if self.folder is not None:
            self.attempt(lambda: self._append(self.folder or Path(), line))

    def attempt(self, write: Callable[[], None]) -> None:
        """Write something; where that fails, stop with InvalidOutputPath or note it and go on, as told."""
        try:
            write()
        except InvalidOutputPath as error:
            if self.on_full_disk == "stop":
                raise
            text = f"{error.where} was not written ({error.found})"
            self.failed += [text] if text not in self.failed else []

    def _append(self, folder: Path, line: Mapping[str, Any]) -> None:
        path = folder / LOG_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._to_board(line)
        except OSError as error:
            raise InvalidOutputPath(
                str(path), error.strerror or str(error), "a file that can be appended to",
                "Free some space: the same call continues.",
            ) from error  # fmt: skip

    def _to_board(self, line: Mapping[str, Any]) -> None:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard")) if self.folder else False
            except ImportError:  # not installed
                self._board = False
        if self._board:
            numbers = {**line, **{f"val_{name}": value for name, value in line.get("val", {}).items()}}
            for name, value in numbers.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{line.get('stage', 'train')}/{name}", value, line.get("step", 0))
            self._board.flush()

    @contextmanager
    def bar(self, stage: str, steps: int, done: int) -> Iterator[Bar]:
        """A bar over the steps of one stage."""
        shown = bar(stage, self.show, steps, initial=done, unit="step")
        meter = Bar(self, stage, steps, shown)
        try:
            yield meter
        finally:
            shown.close()
            self.seconds += time.perf_counter() - meter.started

    def close(self) -> None:
        """Close what TensorBoard has open."""
        if self._board:
            self._board.close()
            self._board = None


class Bar:
    """Of one stage; see `Log.bar`."""

    def __init__(self, log: Log, stage: str, steps: int, shown: Any) -> None:
        self.log, self.stage, self.steps, self.shown = log, stage, steps, shown
        self.started = self._since = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0

    def update(self, images: int, parts: Mapping[str, Tensor], lr: float, done: int) -> None:
        """After an optimiser step over so many images (of all processes)."""
        for name, value in parts.items():
            self._sums[name] = value if name not in self._sums else self._sums[name] + value
        self._steps += 1
        self._images += images
        self.log.images += images
        self.shown.update()
        if done % self.log.every == 0 or done == self.steps:
            self._line(lr, done)

    def _line(self, lr: float, done: int) -> None:
        now = time.perf_counter()
        rate = self._images / max(1e-9, now - self._since)
        means = {name: float(self.log.mean(value)) / self._steps for name, value in self._sums.items()}
        self.shown.set_postfix(loss=f"{means['loss']:.4g}", lr=f"{lr:.1e}", images_per_s=f"{rate:.0f}")
        self.log.write(
            {"stage": self.stage, "step": done, "images": self._images, **means, "lr": lr, "images_per_second": rate}
        )
        self._since, self._steps, self._images, self._sums = now, 0, 0, {}
