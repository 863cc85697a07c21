"""Trains the small classifier of 8x8 digits, whose features are used for the Frechet distances in this repository.

The data are those of the teacher, `sklearn.datasets.load_digits`. A quarter of them is held out. Turned, scaled and shifted copies
prepare the classifier for the digits that the other teachers draw. The shipped classifier was made with the defaults:

    OMP_NUM_THREADS=1 python examples/teachers/digits/train_classifier.py --output_dir my_classifier
"""

import argparse
import math

import torch
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="digits_classifier")
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="Peak of the one-cycle schedule.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images, training labels and test labels; images of shape `(n, 1, 8, 8)` in [0, 1]."""
    data = load_digits()
    parts = train_test_split(data.images / 16, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train, test, train_labels, test_labels = map(torch.from_numpy, parts)
    return train.float().unsqueeze(1), test.float().unsqueeze(1), train_labels, test_labels


def distort(images: Tensor) -> Tensor:
    """Images turned by up to 10 degrees, scaled to 80 to 105 % and shifted by up to 0.4 pixels."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images)) * (high - low) + low

    angle, zoom = uniform(-math.pi / 18, math.pi / 18), uniform(0.95, 1.25)
    rows = [zoom * angle.cos(), -zoom * angle.sin(), uniform(-0.1, 0.1)]
    rows += [zoom * angle.sin(), zoom * angle.cos(), uniform(-0.1, 0.1)]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, 16, 16], align_corners=False)
    return functional.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    train, test, train_labels, test_labels = split_digits()
    model = SmallClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_train_steps)
    print(f"Training {model.num_parameters():,} parameters on {len(train):,} images, {len(test)} are held out")
    progress = tqdm(range(args.max_train_steps), desc="Training")
    for _ in progress:
        index = torch.randint(len(train), (args.train_batch_size,))
        images, labels = train[index], train_labels[index]
        logits = torch.cat([model(images), model(distort(images))])
        loss = functional.cross_entropy(logits, labels.repeat(2), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().save_pretrained(args.output_dir)

    model = SmallClassifier.from_pretrained(args.output_dir)
    clean, distorted = (model.accuracy(images, test_labels) for images in (test, distort(test)))
    print(f"Saved {args.output_dir}; on held-out images {clean:.2%} are right, {distorted:.2%} when distorted")


if __name__ == "__main__":
    main()
