"""What `test_distributed.py` runs in two processes: all ways to train go where one process goes.

Usage: torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from l2l_ref.meta_optimizer import MetaOptimizer
from l2l_ref.optimizer import LearnedOptimizer

warnings.simplefilter("ignore")


def phi() -> MetaOptimizer:
    generator = torch.Generator().manual_seed(0)
    meta = MetaOptimizer(odd=True, theta_input=True, nominal=True, generator=generator)
    nn.init.normal_(meta.head.weight, generator=generator)
    return meta


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def steps(model, optimizer, seeds, *, part=None):
    """Trains on a batch of each seed, or on one of two parts of it."""
    for seed in seeds:
        x = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed))
        x = x if part is None else x.chunk(2)[part]
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def sharded():
    model, mesh = net(), init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, LearnedOptimizer(model.parameters(), phi())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    alone = net()
    optimizer = LearnedOptimizer(alone.parameters(), phi())
    steps(alone, optimizer, range(3))
    halfway = {name: p.detach().clone() for name, p in alone.named_parameters()}
    states = get_optimizer_state_dict(alone, optimizer)["state"]
    halfway_states = {k: {n: t.clone() for n, t in s.items()} for k, s in states.items()}
    expected = steps(alone, optimizer, range(3, 6))

    replicated = nn.parallel.DistributedDataParallel(net())
    optimizer = LearnedOptimizer(replicated.parameters(), phi())
    torch.testing.assert_close(steps(replicated, optimizer, range(6), part=rank), expected)

    model, optimizer = sharded()
    steps(model, optimizer, range(3), part=rank)
    weight = model[0].weight
    state = optimizer.state[weight]["lstm"]
    assert state.to_local().shape == (2, 2, 20, 2, *weight.to_local().shape)
    assert state.shape == (2, 2, 20, 2, *weight.shape) and weight.to_local().shape[0] < 7
    assert model[4].bias.to_local().numel() == (rank == 0)  # one of them holds nothing

    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=folder)
    whole = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )["state"]
    for name, held in halfway_states.items():
        for kind, tensor in held.items():
            torch.testing.assert_close(whole[name][kind], tensor)
    end = steps(model, optimizer, range(3, 6), part=rank)
    torch.testing.assert_close(end, expected)

    resumed, optimizer = sharded()
    saved = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizer), strict=True))
    assert torch.equal(resumed[0].weight.full_tensor(), net()[0].weight)  # asking moves nothing
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        resumed, optimizer,
        model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
    )  # fmt: skip
    torch.testing.assert_close(resumed[0].weight.full_tensor(), halfway["0.weight"])
    assert torch.equal(steps(resumed, optimizer, range(3, 6), part=rank), end)
    print(f"rank {rank}: as one process", flush=True)
    dist.barrier()
    os._exit(0)  # threads of PyTorch's may still run, which now and then aborts a clean exit


if __name__ == "__main__":
    main(sys.argv[1])
