"""pytest-benchmark of the operators and their peers: `pytest bench --benchmark-only`.

One thread. The names of the groups say operator, N and T; `extra_info` has ns per coordinate-step.
`bench/operators.py` clocks all peers of a row in turn and is fairer on a noisy machine.
"""

import gc
from itertools import product

import pytest
import torch

from bench import peers
from bench.case import Unavailable, make_case
from l2l_ref.backend import built

pytest.importorskip("pytest_benchmark")

SIZES, UNROLLS = (1000, 10_000, 100_000), (1, 20)
BACKENDS = ["reference", "fused"] if built() else ["reference"]
NAMES = [*BACKENDS, "nn.LSTM", "torch.compile", peers.FLOOR]


@pytest.mark.parametrize("steps", UNROLLS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("operator, name", list(product(peers.OPERATORS, NAMES)))
def test_operator(benchmark, operator: str, name: str, n: int, steps: int):
    torch.set_num_threads(1)
    case = make_case(n, steps)
    table = peers.builders(operator, name if name in BACKENDS else "reference")
    try:
        peer = table[peers.OURS if name in BACKENDS else name](case)
    except Unavailable as error:
        pytest.skip(str(error))
    peers.check(operator, case, name, peer)
    gc.collect()
    benchmark.group = f"{operator} N={n} T={steps}"
    benchmark.pedantic(peer.run, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["ns_per_coordinate_step"] = peer.scale * benchmark.stats.stats.median
