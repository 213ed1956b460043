#!/usr/bin/env python3
"""Trains the `digits` model and writes what ferry serves and tests.

Run from anywhere, in an environment of its own; the server needs none of this:

    python3 -m venv "$VENV" && "$VENV/bin/pip" install torch scikit-learn safetensors
    "$VENV/bin/python" tools/train_digits.py

Writes, below the repository root (or --root):
    models/digits/1/weights.safetensors    parameters, f32, PyTorch's names and layouts
    models/digits/README.md                architecture, data, the accuracy measured
    tests/fixtures/digits.safetensors      the held-out images, labels and PyTorch's logits

Always true
- One seed decides split, initial weights, order and augmentation; one thread computes. The same versions on the
  same machine give the same bytes; elsewhere the last digits may differ, so the fixture is written in the same run.
- The held-out fifth decides nothing: the number of epochs is fixed and the last weights are the ones kept.
- Nothing is written when the held-out accuracy is under 97 %.

Exit status: 0 written, 1 training missed its accuracy, 2 wrong use or a package is missing.
"""

import argparse
import platform
import sys
from pathlib import Path

SEED = 20
TEST_SHARE = 0.2
EPOCHS = 60
BATCH = 64
ACCURACY_MIN = 0.97
# A pixel of the data set counts the set cells of a 4x4 block, so 16 is white. The model divides by it itself:
# a caller sends raw values and cannot forget.
PIXEL_MAX = 16.0

try:
    import sklearn
    import torch
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn
    from torch.nn import functional as F
except ImportError as missing:
    print(f"train_digits: {missing}; see the head of this file for the environment it needs", file=sys.stderr)
    sys.exit(2)


class Digits(nn.Module):
    """The same operations, in the same order, as src/models/digits.rs."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, image):  # [n, 8, 8], raw values 0..16
        x = (image / PIXEL_MAX).unsqueeze(1)
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).flatten(1)
        # Dropout is the identity when serving; with 1,437 training images it is worth about half a point.
        x = F.dropout(F.relu(self.fc1(x)), 0.3, self.training)
        return self.fc2(x)


def shifted(images, generator):
    """Each image moved by -1, 0 or 1 pixel in each direction, empty pixels coming in."""
    padded = F.pad(images, (1, 1, 1, 1))
    down = torch.randint(0, 3, (len(images),), generator=generator)
    right = torch.randint(0, 3, (len(images),), generator=generator)
    return torch.stack([p[d : d + 8, r : r + 8] for p, d, r in zip(padded, down.tolist(), right.tolist())])


def train(images, labels):
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        model.train()
        loss_sum = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            # Half of each batch as it is, half moved: moved images alone teach the wrong centre.
            batch = images[rows].clone()
            half = len(rows) // 2
            batch[:half] = shifted(batch[:half], generator)
            loss = F.cross_entropy(model(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(rows)
        schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3} of {EPOCHS}: mean loss {loss_sum / len(images):.4f}", flush=True)
    return model.eval()


README = """# digits

A small convolutional network that reads one handwritten digit of 8×8 pixels.

| | |
| --- | --- |
| input | `image` f32 [8, 8], raw pixel values 0 to 16 (the model divides by 16 itself) |
| output | `logits` f32 [10]; the largest one names the digit |
| parameters | {parameters:,} f32, {size:,} bytes in `1/weights.safetensors` |
| data | scikit-learn's bundled `load_digits` (UCI Optical Recognition of Handwritten Digits, test part, 1,797 images) |
| split | stratified, {share:.0%} held out ({held} images), `random_state={seed}` |
| **held-out accuracy** | **{accuracy:.2%}** ({right} of {held}) |

Layers: conv 3×3 pad 1, 1→16, ReLU · conv 3×3 pad 1, 16→32, ReLU · max-pool 2 · conv 3×3 pad 1, 32→32, ReLU ·
flatten (channel, row, column) 512 · linear 64, ReLU · linear 10. Tensor names are PyTorch's: `conv1.weight` is [out, in, 3, 3].

Made by

    python3 tools/train_digits.py

({epochs} epochs of AdamW, batch {batch}, half of each batch shifted by up to one pixel, dropout 0.3 before the last layer;
seed {seed}; torch {torch}, scikit-learn {sklearn}, Python {python}). The held-out images took no part in any choice: epochs are fixed and the
last weights are kept. `tests/fixtures/digits.safetensors` holds them with PyTorch's logits, and `tests/models.rs` compares.
"""


def main():
    parser = argparse.ArgumentParser(description="Train the digits model and write weights, README and fixture.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="repository root")
    root = parser.parse_args().root
    if not root.is_dir():
        parser.error(f"--root {root} is not a directory")

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train_rows, test_rows = train_test_split(
        range(len(labels)), test_size=TEST_SHARE, random_state=SEED, stratify=data.target
    )
    print(f"{len(train_rows)} images to train on, {len(test_rows)} held out")

    model = train(images[train_rows], labels[train_rows])
    with torch.inference_mode():
        logits = model(images[test_rows])
    right = int((logits.argmax(1) == labels[test_rows]).sum())
    accuracy = right / len(test_rows)
    print(f"held-out accuracy {accuracy:.4f} ({right} of {len(test_rows)})")
    if accuracy < ACCURACY_MIN:
        print(f"train_digits: expected at least {ACCURACY_MIN}, nothing is written", file=sys.stderr)
        return 1

    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    weights_path = root / "models/digits/1/weights.safetensors"
    fixture_path = root / "tests/fixtures/digits.safetensors"
    for path in (weights_path, fixture_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, weights_path)
    save_file(
        {
            "images": images[test_rows].contiguous(),
            "labels": labels[test_rows].to(torch.uint32),
            "logits": logits.contiguous(),
        },
        fixture_path,
    )
    (root / "models/digits/README.md").write_text(
        README.format(
            parameters=sum(t.numel() for t in weights.values()),
            size=weights_path.stat().st_size,
            share=TEST_SHARE,
            held=len(test_rows),
            seed=SEED,
            accuracy=accuracy,
            right=right,
            epochs=EPOCHS,
            batch=BATCH,
            torch=torch.__version__,
            sklearn=sklearn.__version__,
            python=platform.python_version(),
        ),
        encoding="utf-8",
    )
    print(f"wrote {weights_path.relative_to(root)}, {fixture_path.relative_to(root)} and models/digits/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
