"""An interrupted calibration continues: nothing is done twice, and the result is that of an uninterrupted one."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import TARGET, Case, case_of
from models import files, same
from sampled import sampled

import msa2conv
from msa2conv.errors import InvalidArgument, InvalidOutputPath, Msa2ConvError
from msa2conv.levers import resolve_levers
from msa2conv.levers.ffn import FFNStatistics
from msa2conv.levers.mixer import MixerStatistics
from msa2conv.search import calibrate as module, resume
from msa2conv.search.calibrate import calibrate_sites
from msa2conv.search.calibration import Calibration
from msa2conv.transforms.lift import Supernet

WORK = {
    "listen": (module, "_prefix_weight"),
    "observe": (MixerStatistics, "update"),
    "fit": (FFNStatistics, "fit"),
    "score": (Supernet, "branch"),
}
LEVERS = ("mixer", "ffn")
ALL = {"listen": 3, "observe": 3, "fit": 3, "score": 39}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of work was begun; `done["stop at score"] = 20` interrupts the 20th scoring."""
    uninterrupted()
    counts: Counter[str] = Counter()

    def watched(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            if counts[kind] == counts[f"stop at {kind}"]:
                raise KeyboardInterrupt
            return work(*args, **kwargs)

        return call

    for kind, (owner, name) in WORK.items():
        monkeypatch.setattr(owner, name, watched(kind, getattr(owner, name)))
    return counts


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration of the plain ViT that ran to its end."""
    folder = tmp_path_factory.mktemp("resume") / "complete"
    calibrate(folder)
    return folder


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    """A copy of it, to alter."""
    return shutil.copytree(complete, tmp_path / "calibrating")


def calibrate(folder: Path | None, name: str = "vit", **other: Any) -> Calibration:
    case = case_of(name)
    levers = resolve_levers(other.pop("levers", LEVERS))
    given = {"model": case.work, "images": case.images, "source": case.calibration.source, **other}
    return calibrate_sites(
        claims=case.seen.claims, costs=case.seen.costs, levers=levers, progress=False, resume=folder, **given
    )


@cache
def uninterrupted() -> Calibration:
    return calibrate(None)


def facts(calibration: Calibration) -> dict[str, Any]:
    """Everything but the time that it took, comparable bit for bit."""
    kept = {name: value for name, value in vars(calibration).items() if name not in ("seconds", "records", "_options")}
    for record in calibration.records:
        meta, tensors = record.state()
        kept[f"{record.site} {meta['lever']}"] = meta
        kept |= {f"{record.site} {meta['lever']}|{name}": value for name, value in tensors.items()}
    return {name: value.numpy().tobytes() if torch.is_tensor(value) else value for name, value in kept.items()}


def sites(folder: Path) -> list[Path]:
    return sorted(folder.glob("site-*.safetensors"))


def test_the_comparison_can_fail(vit: Case) -> None:
    assert facts(calibrate(None)) == facts(uninterrupted()) != facts(calibrate(None, seed=1))


@pytest.mark.parametrize(
    ("kind", "at", "again"),
    [
        ("listen", 2, {"listen": 2, "observe": 3, "fit": 3, "score": 39}),
        ("observe", 2, {"observe": 3, "fit": 3, "score": 39}),
        ("fit", 2, {"observe": 1, "fit": 2, "score": 39}),
        ("score", 20, {"score": 20}),
        ("score", 36, {"score": 4}),
    ],
)
def test_what_was_done_before_an_interruption_is_not_done_again(
    vit: Case, tmp_path: Path, done: Counter[str], kind: str, at: int, again: dict[str, int]
) -> None:
    done[f"stop at {kind}"] = at
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "deep" / "folder")
    assert not list(tmp_path.rglob("*.part"))
    done.clear()
    assert facts(calibrate(tmp_path / "deep" / "folder")) == facts(uninterrupted())
    assert {kind: done[kind] for kind in ALL if done[kind]} == again
    done.clear()
    assert facts(calibrate(tmp_path / "deep" / "folder")) == facts(uninterrupted())
    assert not done.total()


def test_sites_fitted_in_an_earlier_pass_over_the_images_are_not_observed_again(
    vit: Case, tmp_path: Path, done: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STATISTICS_BYTES", 1)
    done["stop at observe"] = 3
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path)
    assert len(sites(tmp_path)) == 4
    done.clear()
    assert facts(calibrate(tmp_path)) == facts(uninterrupted())
    assert (done["observe"], done["fit"]) == (1, 1)


def test_convert_continues_and_finds_the_same_plan(vit: Case, tmp_path: Path, done: Counter[str]) -> None:
    done["stop at score"] = 10
    with pytest.raises(KeyboardInterrupt):
        msa2conv.convert(vit.model, TARGET, data=vit.images, resume=tmp_path, **vit.keywords)
    done.clear()
    result = msa2conv.convert(vit.model, TARGET, data=vit.images, resume=tmp_path, **vit.keywords)
    assert result.plan == vit.result.plan and same(result.model, vit.result.model)
    assert done["score"] > 0 == done["fit"]


KILLED = """
import os, signal, sys
import tiny, torch
import msa2conv
from msa2conv.search import resume

torch.set_num_threads(1)
resume._EVERY = -1  # write after every measurement
left, replace = int(sys.argv[2]), os.replace

def replace_or_die(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = replace_or_die
msa2conv.calibrate(tiny.build("vit"), tiny.images("vit"), levers=("mixer", "ffn"), resume=sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("file", "again"),
    sampled([(26, {"score": 24}), (8, {"observe": 1, "fit": 2, "score": 39})], 1),
    ids=["between scores", "between sites"],
)
def test_killed_in_the_middle_of_a_file(
    vit: Case, tmp_path: Path, done: Counter[str], file: int, again: dict[str, int]
) -> None:
    """kill -9 before a file gets its name; in order 1 at the start, 3 prefix weights, 6 sites, 39 scores."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(file)]
    tests = Path(tiny.__file__).parent
    result = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert facts(calibrate(tmp_path)) == facts(uninterrupted())
    assert {kind: done[kind] for kind in ALL if done[kind]} == again
    resume.discard(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize(("every", "writes"), [(1e9, 2), (-1, 2 + 3 + 39)], ids=["never due", "always due"])
def test_measurements_are_written_when_due_and_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, writes: int
) -> None:
    written: list[Path] = []
    write = resume.write_text
    monkeypatch.setattr(resume, "write_text", lambda path, text: written.append(path) or write(path, text))
    monkeypatch.setattr(resume, "_EVERY", every)
    calibrate(tmp_path)
    assert written == [tmp_path / "progress.json"] * writes


def test_seconds_are_those_of_all_runs(folder: Path) -> None:
    first = resume._read(folder / "progress.json")
    assert first is not None and 0 < first.seconds < calibrate(folder).seconds


def forbid(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("work was done")


def test_without_a_folder_nothing_is_hashed_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_sha256", "weights_sha256", "write_text", "write_tensors", "read_tensors"):
        monkeypatch.setattr(resume, name, forbid)
    monkeypatch.chdir(tmp_path)
    calibrate(None, levers=("mixer",))
    assert files(tmp_path) == {}


# ------------------------------------------------------------------------------------------------- other inputs


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"model": tiny.build("vit", seed=1)}, "weights"),
        ({"name": "registers"}, "model, weights, sites"),
        ({"images": tiny.images("vit", seed=2)}, "images"),
        ({"images": tiny.images("vit").flip(0)}, "images"),
        ({"levers": ("ffn",)}, "levers"),
        ({"levers": ("mixer", msa2conv.FFN(round_to=16))}, "levers"),
        ({"seed": 1}, "seed"),
        ({"images": tiny.images("vit", count=16), "seed": 1}, "images, seed"),
    ],
    ids=["weights", "model", "images", "order", "levers", "lever", "seed", "two"],
)
def test_other_inputs_are_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], names: str
) -> None:
    case_of(other.get("name", "vit"))  # made with `lift`
    monkeypatch.setattr(module, "lift", forbid)
    before = files(folder)
    with pytest.raises(Msa2ConvError) as caught:
        calibrate(folder, **other)
    assert type(caught.value) is InvalidArgument
    assert str(caught.value) == (
        f"{folder}: found the progress of a calibration with other {names}; expected one with the same model, images, "
        "levers and seed. Pass another folder, or delete this one to calibrate anew."
    )
    assert files(folder) == before


def test_progress_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "__version__", "9.9")
    with pytest.raises(InvalidArgument, match="a calibration with other version of msa2conv; expected"):
        calibrate(folder)


def test_sites_of_other_inputs_are_not_used(folder: Path) -> None:
    """The file that names the inputs is gone, the fitted sites are still there."""
    (folder / "progress.json").unlink()
    model = tiny.build("vit", seed=1)
    assert facts(calibrate(folder, model=model)) == facts(calibrate(None, model=model))


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "lift", forbid)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidOutputPath, match="expected a path where a file can be written"):
        calibrate(tmp_path / "file")
    assert files(tmp_path) == {"file": b"mine"}


# ------------------------------------------------------------------------------------------------- damaged files


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "one bit": flipped,
    "a pickle": lambda content: pickle.dumps(Malicious(Path("ran"))),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "swapped", "missing"])
def test_a_damaged_site_is_fitted_again(
    vit: Case, folder: Path, done: Counter[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(folder.parent)
    ffn = [path for path in sites(folder) if b"covariance_KK" in path.read_bytes()]
    good = ffn[0].read_bytes()
    if damage == "missing":
        ffn[0].unlink()
    else:
        ffn[0].write_bytes(DAMAGE[damage](good) if damage in DAMAGE else ffn[1].read_bytes())
    assert facts(calibrate(folder)) == facts(uninterrupted())
    assert {kind: done[kind] for kind in ALL if done[kind]} == {"fit": 1}
    assert files(folder.parent).keys() == {"calibrating"} | {f"calibrating/{path.name}" for path in folder.iterdir()}
    assert ffn[0].stat().st_size == len(good)


DAMAGE_OF_TEXT: dict[str, Callable[[bytes], bytes]] = {
    **DAMAGE,
    "one digit": lambda content: content.replace(b"0.1", b"0.2", 1),
    "not finite": lambda content: content.replace(b"3000.0", b"NaN"),
    "other JSON": lambda content: b'{"inputs": 3}',
    "deep": lambda content: b"[" * 100_000,
    "not text": lambda content: b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE_OF_TEXT)
def test_damaged_measurements_are_made_again(
    vit: Case, folder: Path, done: Counter[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """And the fitted sites, which carry their own checksum, are kept."""
    monkeypatch.chdir(folder.parent)
    path = folder / "progress.json"
    good = path.read_bytes()
    path.write_bytes(DAMAGE_OF_TEXT[damage](good))
    assert path.read_bytes() != good
    assert facts(calibrate(folder)) == facts(uninterrupted())
    assert {kind: done[kind] for kind in ALL if done[kind]} == {"listen": 3, "score": 39}
    assert not Path("ran").exists()


def test_the_pickle_is_malicious(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_other_adapters_sites_come_back_too(tmp_path: Path) -> None:
    for _ in range(2):
        assert facts(calibrate(tmp_path, "foreign", levers=None)) == facts(case_of("foreign").calibration)


# ------------------------------------------------------------------------------------------------------ clean-up


def test_only_what_was_written_is_discarded(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".site-0.safetensors.x.part").write_text("left by a kill")
    resume.discard(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    os.remove(folder / "notes.txt")
    resume.discard(folder)
    assert not folder.exists()
    resume.discard(folder)
