"""ZeRO 1 and 2 by DeepSpeed: every process keeps a part of Adam's moments, with 2 of the gradients too.

One engine a player. Each backward pass is one forward of its engine, of a module that only calls what it is given: the
step uses T's output in both stages and several modules in one loss, and a second forward of an engine before its
backward breaks ZeRO 2. Weights stay float32; bf16 is the step's autocast, as without DeepSpeed. Nothing is compiled:
Adam is torch's own, and DeepSpeed's operators, which it would build with a C++ compiler for minutes on first use (a
build that is killed leaves a lock that every later one waits for), are switched off.

Checkpoints have torch's form and all of the state, so that a run can go on with another world size or strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import BUCKET_BYTES, World


class _Calls(nn.Module):
    """Owns a player's modules; its forward calls what it is given, so that an engine can watch over it."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__()
        self.owned = modules

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


class ZeroRedundancy:
    """See :class:`training.strategies.Player`."""

    def __init__(
        self, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, world: World, *, stage: int, clip: float | None
    ) -> None:
        deepspeed = _deepspeed(world)
        self.optimizer, self._world = optimizer, world
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # The engine takes over what requires gradients at this moment; F and D do so in the first stage alone.
        wanted = [p.requires_grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        training = [m.training for m in modules.modules()]
        self._engine, *_ = deepspeed.initialize(
            model=_Calls(modules),
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # nominal: losses come scaled
                "gradient_accumulation_steps": 1,
                "gradient_clipping": clip or 0.0,
                "steps_per_print": None,
                "zero_optimization": {
                    "stage": stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": BUCKET_BYTES // 4,
                    "allgather_bucket_size": BUCKET_BYTES // 4,
                },
            },
        )
        self._zero = self._engine.optimizer
        self._zero.check_grad_overflow = True  # off in float32 by default; it is what makes all skip alike
        for module, mode in zip(modules.modules(), training, strict=True):
            module.training = mode
        for parameter, before in zip(self._parameters, wanted, strict=True):
            parameter.requires_grad_(before)

    def begin(self) -> None:
        self._zero.zero_grad()

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        value = self._engine(loss)
        self._engine.backward(value * self._world.size, scale_wrt_gas=False)  # DeepSpeed averages, we sum
        return value.detach()

    def update(self) -> bool:
        self._engine.step()
        return not self._zero.overflow

    def weights_were_set(self) -> None:
        self._zero.refresh_fp32_params()

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        step = self._step()
        if step > 0:
            for i, parameter in enumerate(self._parameters):
                state[i] = {"step": torch.tensor(float(step))}
                for key in ("exp_avg", "exp_avg_sq"):
                    value = safe_get_full_optimizer_state(parameter, key)
                    state[i][key] = value.detach().reshape(parameter.shape).clone()
        (group,) = self.optimizer.param_groups
        numbered = {k: v for k, v in group.items() if k != "params"} | {"params": list(range(len(self._parameters)))}
        return {"state": state, "param_groups": [numbered]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self.weights_were_set()
        if not state["state"]:
            return
        step = max(float(kept["step"]) for kept in state["state"].values())
        # Adam makes its state in its first step, and DeepSpeed maps parameters to it only then.
        for group, partition in zip(
            self.optimizer.param_groups, self._zero.single_partition_of_fp32_groups, strict=True
        ):
            self.optimizer.state[partition] = {
                "step": torch.tensor(step, device=partition.device if group["fused"] else None),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        self._zero._lazy_init_hp_params_optimizer_state()
        for i, parameter in enumerate(self._parameters):
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, state["state"][i][key].to(parameter.device), key)

    def _step(self) -> float:
        return max((float(s["step"]) for s in self.optimizer.state.values() if "step" in s), default=0.0)


def _deepspeed(world: World) -> Any:
    """DeepSpeed, told to compile nothing, on the processes that have met already."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would look for a GPU's toolkit
    os.environ.setdefault("DS_BUILD_OPS", "0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # one process without torchrun
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed
