"""A small GPT that learns the characters of a text, and writes some of its own at the end.

Every worker needs the same text, since its characters are the vocabulary. Tiny Shakespeare is one of 1.1 MB; any
other UTF-8 text does as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional

import loscar_worker as loscar
from loscar_worker.tasks.models import Gpt

BATCH = 16


@torch.no_grad()
def sample(model: Gpt, tokens: list[int], count: int, temperature: float = 0.8) -> list[int]:
    """Continue the tokens by `count` drawn ones; returns all of them."""
    for _ in range(count):
        logits = model(torch.tensor([tokens[-model.context :]]))[0, -1] / temperature
        tokens = [*tokens, int(torch.multinomial(logits.softmax(0), 1))]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, metavar="HOST:PORT")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="a UTF-8 text, everywhere the same")
    parser.add_argument("--characters", type=int, default=500, help="how many to write at the end")
    parser.add_argument("--save", metavar="FILE", help="write the final model here")
    parser.add_argument("--short", action="store_true", help="a small model, for a try")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    vocabulary = sorted(set(text))
    codes = torch.tensor([vocabulary.index(character) for character in text])
    if args.short:
        model = Gpt(len(vocabulary), context=32, width=32, layers=1, heads=2)
    else:
        model = Gpt(len(vocabulary), context=128, width=128, layers=4, heads=4)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    with loscar.join(args.server, model) as session:
        data = torch.Generator().manual_seed(session.slot)  # each worker reads in another order
        span = torch.arange(model.context + 1)
        while not session.finished:
            starts = torch.randint(0, len(codes) - model.context, (BATCH, 1), generator=data)
            windows = codes[starts + span]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(windows[:, :-1])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            session.step(loss=loss)

    print(f"{session.name}: the run is over after {session.steps} steps")
    if args.save:
        torch.save(model.state_dict(), args.save)
    torch.manual_seed(0)
    print("".join(vocabulary[token] for token in sample(model, [int(codes[0])], args.characters)))


if __name__ == "__main__":
    main()
