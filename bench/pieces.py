"""What more processes would do for a run: its pieces, the longest, and the bound that it sets.

python -m bench.pieces --dataset cifar10 --attack pgd --eps 0.03

Takes the options of run.py and computes nothing of the run: a piece costs what the program expects
of it, in gradients of a batch, and is dealt out as the program does.
"""

import heapq
from pathlib import Path

from l2l_ref.experiment import cli
from l2l_ref.experiment.progress import Progress
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.experiment.queue import Piece, chains
from l2l_ref.experiment.setting import prepare


def time_of(pieces: list[Piece], processes: int) -> float:
    """When the last of them ends, in gradients: that with the longest chain comes first."""
    chain = chains(pieces)
    waiting = sorted(pieces, key=lambda piece: -chain[piece.name])
    done, running, now = set(), [], 0.0
    while waiting or running:
        ready = [piece for piece in waiting if done.issuperset(piece.needs)]
        for piece in ready[: processes - len(running)]:
            waiting.remove(piece)
            heapq.heappush(running, (now + piece.cost, piece.name))
        now, name = heapq.heappop(running)
        done.add(name)
    return now


def main(arguments: list[str]) -> None:
    """Parse, plan, print."""
    experiment = Experiment(prepare(cli.parse(arguments)), Path("nowhere"), Progress())
    pieces = experiment.pieces()
    total = sum(piece.cost for piece in pieces)
    longest = max(pieces, key=lambda piece: piece.cost)
    print(f"{len(pieces)} pieces of {total:,.0f} gradients together")
    print(f"the longest, {longest.cost / total:.1%}: {longest.name}")
    print(f"no faster than {total / max(chains(pieces).values()):.1f} times one process")
    for processes in (2, 4, 8, 16, 32):
        print(f"{processes:4} processes: {total / time_of(pieces, processes):.1f} times")


if __name__ == "__main__":
    cli.run_as_script("pieces.py", main)
