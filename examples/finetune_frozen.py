"""Fine-tuning: a network that knows the digits 0 to 4 learns 5 to 9, with all of it frozen but a new last layer.

Only the new layer travels. The frozen parameters must have the same values in all workers, so they come from one
file: `--pretrain` makes it, and it is to be copied to all machines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import loscar_worker as loscar


def digits(classes: range) -> tuple[Tensor, Tensor]:
    """Images and labels of those digits; labels count from 0."""
    found = load_digits()
    kept = [i for i, label in enumerate(found.target) if label in classes]
    return torch.tensor(found.data[kept] / 16, dtype=torch.float32), torch.tensor(found.target[kept] - classes.start)


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    return nn.Sequential(body, nn.Linear(128, 5))


def pretrain(file: Path, steps: int) -> None:
    """Train the whole network on the digits 0 to 4, here and alone."""
    images, labels = digits(range(5))
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (64,))
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), file)
    print(f"wrote {file}")


def finetune(args: argparse.Namespace) -> None:
    images, labels = digits(range(5, 10))
    test, train = slice(0, 200), slice(200, None)
    model = network()
    model.load_state_dict(torch.load(args.base, weights_only=True))
    model.requires_grad_(False)
    model[1] = nn.Linear(128, 5)  # new, and the only part that is trained
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)

    with loscar.join(args.server, model) as session:
        data = torch.Generator().manual_seed(session.slot)  # each worker its own samples
        while not session.finished:
            batch = torch.randint(0, len(labels[train]), (32,), generator=data)
            loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step(loss=loss)

    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    share = sum(p.numel() for p in trainable) / sum(p.numel() for p in model.parameters())
    print(f"{session.name}: the run is over after {session.steps} steps; {share:.1%} of the parameters were trained")
    print(f"test accuracy {accuracy:.3f}")
    if args.save:
        torch.save(model.state_dict(), args.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", metavar="HOST:PORT", help="fine-tune as a worker")
    parser.add_argument("--base", required=True, type=Path, metavar="FILE", help="the pretrained network")
    parser.add_argument("--pretrain", action="store_true", help="make that file instead")
    parser.add_argument("--save", metavar="FILE", help="write the final model here")
    parser.add_argument("--short", action="store_true", help="pretrain for a moment only")
    args = parser.parse_args()
    if args.pretrain:
        pretrain(args.base, 50 if args.short else 2000)
    elif args.server:
        finetune(args)
    else:
        parser.error("either --server or --pretrain is needed")


if __name__ == "__main__":
    main()
