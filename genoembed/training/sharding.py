"""Models of which each process holds a part (FSDP 2 of PyTorch), and whole again.

In: a model, its optimizer, and the processes of a run. Out: the same objects, parameters and states spread
over the processes; or whole, as one process has them. Promised: names and shapes stay, so that groups by rate
and weight decay are those of one process; gradients are means over the processes; what is saved is whole, so
that checkpoints have one form, whoever wrote them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from genoembed.models.layers import find_blocks
from genoembed.training.distributed import num_processes, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a model's parameters over all processes: block by block, then what is around the blocks."""
    # Not by accelerate: it gives the embedding a unit of its own, whose weight is gone when the scores of
    # tokens, a product with that weight, are computed; and it does not shard on CPUs, where tests run.
    mesh = init_device_mesh(device.type, (num_processes(),))
    # each block is moved to the device and cut before the next one: no device ever holds the whole model
    for block in model.get_submodule(find_blocks(model)).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.register_load_state_dict_pre_hook(_spread_weights)


def gather(model: nn.Module, *, is_kept: bool) -> None:
    """Make every parameter whole again, on the CPU, in the processes that keep it; a collective call.

    Parameters that modules share stay shared. For saving: the model does not run any more.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    kept: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in kept:
                    kept[parameter] = _as_parameter(whole(parameter, is_kept=is_kept), like=parameter)
                setattr(module, name, kept[parameter])
        if isinstance(module, FSDPModule):
            # the class that it had: FSDP puts one before it, whose name would get into config.json
            module.__class__ = type(module).__mro__[2]


def _as_parameter(value: Tensor | None, *, like: nn.Parameter) -> nn.Parameter:
    value = torch.empty(0) if value is None else value
    return nn.Parameter(value, requires_grad=like.requires_grad)


def spread_states_on_load(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of a spread model take states that are whole."""
    optimizer.register_load_state_dict_pre_hook(_spread_states)


def _spread_weights(model: nn.Module, state: dict[str, Any], *_: object) -> None:
    like = model.state_dict()
    state.update({name: _spread(value, like[name]) for name, value in state.items() if name in like})


def _spread_states(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # states are numbered as the parameters of all groups are, one after the other
    moments = {
        number: {name: _spread(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return {**state, "state": moments}


def _spread(value: Any, like: Tensor) -> Any:
    """Cut a whole tensor as another of its shape is cut; every process has the whole, so none sends it."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value  # the count of an optimizer's steps, say
    if isinstance(value, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device_mesh.device_type), like.device_mesh, like.placements, src_data_rank=None
    )
