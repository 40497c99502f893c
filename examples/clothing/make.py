"""Make the clothing example: a fine-tuned ViT-Ti/16, its test photos, and the package's calibration photos.

    python make.py --weights vit_tiny_patch16_224.safetensors --photos clothing10.npz --scenes FOLDER

``FOLDER`` has the photos of other things that calibrate, by the names in ``msa2conv/data/README.md``.
``clothing10.npz`` packs the JPEG files of three splits: image ``i`` of ``train`` is the bytes
``train_jpeg[train_offsets[i]:train_offsets[i + 1]]``, and likewise for ``validation`` and ``test``.
"""

import argparse
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.lib.npyio import NpzFile
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

ARCHITECTURE = "vit_tiny_patch16_224"
MEAN = STD = (0.5, 0.5, 0.5)  # what the augreg ViT weights were trained with, not the ImageNet statistics
CALIBRATION_PHOTOS = 70  # of clothing: 7 of each class
SCENE_SIDE = 448  # of the other photos, of which parts are seen

to_input = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
train_transform = transforms.Compose(
    [
        # Mild crops: the default scale, down to 0.08, often leaves nothing but cloth.
        transforms.RandomResizedCrop(224, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        *to_input,
    ]
)
eval_transform = transforms.Compose(
    [transforms.Resize(248, InterpolationMode.BICUBIC), transforms.CenterCrop(224), *to_input]
)


class Photos(Dataset):
    """One split: the original JPEG files, decoded on demand."""

    def __init__(self, archive: NpzFile, split: str, transform: Callable[[Image.Image], Tensor]) -> None:
        data, offsets = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_offsets"]
        self.jpegs = [data[start:end] for start, end in pairwise(offsets)]
        self.labels = archive[f"{split}_labels"].astype(np.int64)
        self.names = archive[f"{split}_names"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.jpegs[i])).convert("RGB")
        return self.transform(image), int(self.labels[i])


@torch.inference_mode()
def top1(model: nn.Module, photos: Photos) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    loader = DataLoader(photos, batch_size=32)
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return 100 * correct / len(photos)


def build_model(weights: Path, num_classes: int) -> nn.Module:
    """The ImageNet model with a fresh head for ``num_classes``."""
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=num_classes)
    body = {key: value for key, value in load_file(weights).items() if not key.startswith("head.")}
    missing, unexpected = model.load_state_dict(body, strict=False)
    if unexpected or set(missing) != {"head.weight", "head.bias"}:
        raise ValueError(f"{weights} is no {ARCHITECTURE}: missing {missing}, unexpected {unexpected}")
    return model


def fine_tune(model: nn.Module, train: Photos, validation: Photos, epochs: int) -> None:
    """AdamW with a cosine schedule. The last epoch counts: the validation split selects nothing."""
    head = list(model.head.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    # The head starts from noise and needs large steps; the body only has to adapt.
    groups = [{"params": body, "lr": 5e-5}, {"params": head, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for images, labels in loader:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        accuracy = top1(model, validation)
        loss = total / len(loader)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, validation top-1 {accuracy:.2f} %", flush=True)


def write_weights(args: argparse.Namespace, archive: NpzFile) -> None:
    """The fine-tuned model, in float16 because it is only read from here on."""
    torch.manual_seed(args.seed)  # draws the head, the order of the photos, and their crops
    classes = archive["classes"].tolist()
    train = Photos(archive, "train", train_transform)
    validation, test = (Photos(archive, split, eval_transform) for split in ("validation", "test"))
    model = build_model(args.weights, len(classes))
    fine_tune(model, train, validation, args.epochs)
    model.half().float()  # what a reader of the float16 file gets, so that the accuracies below are theirs
    accuracy = {"validation": top1(model, validation), "test": top1(model, test)}
    print("float16 weights: " + ", ".join(f"{name} top-1 {value:.2f} %" for name, value in accuracy.items()))
    metadata = {
        "format": "pt",
        "architecture": ARCHITECTURE,
        "classes": json.dumps(classes),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "torch": torch.__version__,
        "timm": timm.__version__,
        **{f"{name}_top1": f"{value:.2f}" for name, value in accuracy.items()},
    }
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, args.out / "vit_tiny_clothing10.safetensors", metadata=metadata)


def write_test_photos(args: argparse.Namespace, archive: NpzFile) -> None:
    """An ImageFolder tree of the original files."""
    # Folder names that hold on every file system, in an order that keeps the labels.
    folders = [re.sub(r"[^\w.-]+", "_", name) for name in archive["classes"].tolist()]
    if len(set(folders)) < len(folders) or sorted(folders) != folders:
        raise ValueError(f"ImageFolder would number these classes in another order: {folders}")
    test = Photos(archive, "test", eval_transform)
    for jpeg, label, name in zip(test.jpegs, test.labels, test.names, strict=True):
        path = args.out / "test" / folders[label] / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)


def write_calibration_photos(args: argparse.Namespace, archive: NpzFile) -> None:
    """A draw of the train split, the classes taking turns, so that its first n photos are balanced too; then scenes."""
    train = Photos(archive, "train", eval_transform)
    order = np.random.default_rng(args.seed).permutation(len(train.labels))
    turn = np.empty_like(order)  # turn[j]: how many photos of the same class come before order[j]
    for label in np.unique(train.labels):
        same = train.labels[order] == label
        turn[same] = np.arange(same.sum())
    chosen = order[np.lexsort((train.labels[order], turn))][:CALIBRATION_PHOTOS]
    scenes = [smaller(path) for path in sorted(args.scenes.iterdir())]
    jpegs = [*(train.jpegs[i] for i in chosen), *scenes]
    offsets = np.cumsum([0, *map(len, jpegs)], dtype=np.int64)
    args.package_data.mkdir(parents=True, exist_ok=True)
    jpeg = np.frombuffer(b"".join(jpegs), np.uint8)
    np.savez(args.package_data / "photos.npz", jpeg=jpeg, offsets=offsets, scenes=np.int64(len(scenes)))


def smaller(path: Path) -> bytes:
    image, file = Image.open(path).convert("RGB"), io.BytesIO()
    scale = min(1.0, SCENE_SIDE / min(image.size))
    size = (round(scale * image.width), round(scale * image.height))
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=85, optimize=True)
    return file.getvalue()


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help=f"ImageNet {ARCHITECTURE}, timm key names, safetensors")
    parser.add_argument("--photos", type=Path, required=True, help="clothing10.npz")
    parser.add_argument("--scenes", type=Path, help="folder of other photos for calibration")
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--package-data", type=Path, default=here.parents[1] / "msa2conv" / "data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    for part in ("training", "test-photos", "calibration-photos"):
        parser.add_argument(f"--skip-{part}", action="store_true")
    args = parser.parse_args()
    if not args.skip_training and args.weights is None:
        parser.error("training needs --weights")
    if not args.skip_calibration_photos and args.scenes is None:
        parser.error("calibration photos need --scenes")

    args.out.mkdir(parents=True, exist_ok=True)
    with np.load(args.photos, allow_pickle=False) as archive:
        if not args.skip_test_photos:
            write_test_photos(args, archive)
        if not args.skip_calibration_photos:
            write_calibration_photos(args, archive)
        if not args.skip_training:
            write_weights(args, archive)


if __name__ == "__main__":
    main()
