"""A plain training loop as a worker: handwritten digits, DataLoader workers, Adam with a schedule, accumulated and
clipped gradients.

What makes it a worker are the `with` line, `session.step()` and `session.finished`; the rest is what it was before.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import loscar_worker as loscar

ACCUMULATE = 2  # batches for one optimizer step


def digits() -> tuple[Dataset[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
    """The training set, and the images and labels of the test set."""
    found = load_digits()
    images = torch.tensor(found.data / 16, dtype=torch.float32)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return TensorDataset(images[train], labels[train]), images[test], labels[test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, metavar="HOST:PORT")
    parser.add_argument("--workers", type=int, default=2, help="how many workers the run has, to divide the data")
    parser.add_argument("--save", metavar="FILE", help="write the final model here")
    parser.add_argument("--short", action="store_true", help="a small model, for a try")
    args = parser.parse_args()

    width = 16 if args.short else 256
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=200)
    train, test_images, test_labels = digits()

    with loscar.join(args.server, model) as session:
        own = Subset(train, range(session.slot, 1500, args.workers))  # each worker its part of the data
        loader = DataLoader(own, batch_size=32, shuffle=True, drop_last=True, num_workers=1 if args.short else 2)
        batches = 0
        while not session.finished:
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                (loss / ACCUMULATE).backward()
                batches += 1
                if batches % ACCUMULATE:
                    continue
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                session.step(loss=loss)
                if session.finished:
                    break

    model.eval()
    accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
    print(f"{session.name}: the run is over after {session.steps} steps; test accuracy {accuracy:.3f}")
    if args.save:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
