"""A tiny FSDP2 training run to save and resume: what the checkpoint tests share."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from colospec.checkpoint.dcp import Checkpointer
from colospec.checkpoint.rng import capture_rng


class Net(nn.Module):
    """Sizes that do not divide by the number of ranks, and buffers like those of a draft."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(7, width)
        self.down = nn.Linear(width, 3, bias=False)
        self.register_buffer("t2d", torch.rand(11) < 0.5)
        self.register_buffer("d2t", torch.randint(50, (5,)))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Run:
    """One rank of a job: model, optimizer, generator and checkpoints."""

    def __init__(self, directory, *, seed=0, keep=2, width=13, limit_s=60.0, device="cpu"):
        torch.manual_seed(seed)
        mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        self.model = fully_shard(Net(width).to(device), mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.rank, self.device = dist.get_rank(), device
        self.generator = torch.Generator(device).manual_seed(seed * 1000 + self.rank)
        self.checkpointer = Checkpointer(
            directory,
            group=dist.new_group(backend="gloo"),
            rank=self.rank,
            world_size=dist.get_world_size(),
            keep=keep,
            best_metric="train/loss",
            limit_s=limit_s,
        )

    def step(self):
        loss = (
            self.model(torch.randn(4, 7, generator=self.generator, device=self.device))
            .square()
            .mean()
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rng = capture_rng(self.generator, rank=self.rank)
        return {"model": model, "optimizer": optimizer, "rng": rng}

    def save(self, step, loss=1.0, **meta):
        self.checkpointer.save(step, self.state(), meta, metrics={"train/loss": loss})

    def load(self, path):
        state = self.state()
        meta = self.checkpointer.load(path, state)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return meta, state["rng"]

    def snapshot(self):
        """All weights and Adam states, whole, by name (a call of all ranks)."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        named = {f"model.{key}": value for key, value in model.items()}
        for name, state in optimizer["state"].items():
            named |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value)
            .cpu()
            .clone()
            .numpy()
            for name, value in named.items()
        }
        return whole, optimizer["param_groups"]


def assert_same(one, other):
    (tensors, groups), (other_tensors, other_groups) = one, other
    assert groups == other_groups
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype, name
        assert tensor.tobytes() == other_tensors[name].tobytes(), name
