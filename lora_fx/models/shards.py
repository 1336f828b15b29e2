"""Tensors of which each process holds a part (DTensor), as FSDP2 leaves them; and what processes do together.

A function that is said to be *collective* is called by every process of the mesh, in the same order, or none of them
comes back from it.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, of a module that not every torch has."""
    return is_kind_of_shards(type(tensor))


def is_kind_of_shards(kind: type) -> bool:
    """Whether tensors of a class are sharded."""
    return kind.__module__.startswith("torch.distributed")


def _dtensors() -> Any:
    return importlib.import_module("torch.distributed.tensor")


def sharded_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of which this process holds a part."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in tensors if is_sharded(tensor)]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its gradient, gathered on every process where it is sharded: collective then."""
    if not is_sharded(tensor):
        return tensor.detach()
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    part: Any = tensor.detach()
    local, mesh = part.to_local(), part.device_mesh
    sent = local.view(torch.uint8) if _is_float8(tensor) else local  # gloo knows no such floats
    if sent.device.type != mesh.device_type:  # CPUOffloadPolicy keeps it where its mesh sends nothing
        sent = sent.to(mesh.device_type)
    if sent is not local:
        part = type(part).from_local(
            sent, mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
    gathered: Tensor = part.full_tensor()
    return gathered if gathered.dtype is tensor.dtype else gathered.view(tensor.dtype)


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


def processes_of(tensor: Tensor) -> int:
    """Return how many processes share a sharded tensor."""
    number: int = tensor.detach().device_mesh.size()  # type: ignore[attr-defined]
    return number


def gather_held(module: nn.Module) -> None:
    """Put whole tensors in the place of those that a module itself holds sharded, in place; collective then."""
    for name, parameter in module._parameters.items():
        if parameter is not None and is_sharded(parameter):
            module._parameters[name] = nn.Parameter(whole(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and is_sharded(buffer):
            module._buffers[name] = whole(buffer)


def part_held(module: nn.Module, like: Tensor, but: Collection[str] = ()) -> None:
    """Shard what a module itself holds whole in parameters, but for some names, as another tensor is; in place."""
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in but:
            module._parameters[name] = nn.Parameter(part_of(parameter, like), parameter.requires_grad)


def unsharded(tensor: Tensor) -> Tensor:
    """Return the tensor itself; where it is sharded, gathered and without its gradient: collective then."""
    return whole(tensor) if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor, of_first: bool = False) -> Tensor:
    """Return a tensor that every process has whole as `like` is: sharded in the same way, or as it is.

    A part has memory of its own, so that nothing of the rest stays.  Nothing is sent; but with `of_first` the values
    are those of the first process: collective then.
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    other: Any = like.detach()
    mesh, placements = other.device_mesh, other.placements
    if not is_sharded_plainly(like):
        return _part_in_strides(tensor.detach(), other, of_first)
    source = 0 if of_first else None
    made: Any = _dtensors().distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=source)
    local, device = made.to_local(), other.to_local().device
    own = local.to(device) if local.device != device else _of_its_own(local)
    if own is not local:
        shape, stride = made.shape, made.stride()
        made = type(made).from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)
    shared: Tensor = made
    return shared


def _of_its_own(part: Tensor) -> Tensor:
    """Return the tensor itself, or a copy where it keeps the memory of more than itself."""
    return part if part.untyped_storage().nbytes() <= part.nbytes else part.clone()


def _part_in_strides(tensor: Tensor, like: Any, of_first: bool) -> Tensor:
    """Return what `part_of` does of a tensor that FSDP2 parts after tensor parallelism, evenly or not."""
    library, mesh = _dtensors(), like.device_mesh
    if of_first:
        tensor = library.distribute_tensor(tensor, mesh, [library.Replicate()] * mesh.ndim).to_local()
    for dim in range(like.dim()):
        tensor = tensor.index_select(dim, _places_of(like, dim).to(tensor.device))
    made: Tensor = library.DTensor.from_local(
        tensor.to(like.to_local().device),
        mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made


def local_part(tensor: Tensor, alone: bool) -> Tensor:
    """Return what this process has of a sharded tensor, as a plain one.

    Its gradients reach the tensor; of what every process has whole they are parts of a sum.  To be used `alone` it is a
    parameter of its own.
    """
    held: Any = tensor
    wanted = tensor.requires_grad and torch.is_grad_enabled()
    if wanted and not alone:
        slopes = [_dtensors().Partial() if one.is_replicate() else one for one in held.placements]
        here: Any = held.to_local(grad_placements=slopes)
        here.register_hook(_of_its_own)  # siblings' are views of one tensor, and torch copies no DTensor that is a view
        part: Tensor = here
        return part
    with torch.no_grad():
        part = held.to_local()
    return nn.Parameter(part, requires_grad=wanted) if alone else part


def split(tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Return a tensor that every process has whole with placements on a mesh; nothing is sent."""
    made: Tensor = _dtensors().distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return made


def summed(values: Tensor, like: Tensor) -> Tensor:
    """Return the sum of what the processes have, which share the sharded tensor `like`; collective."""
    library, other = _dtensors(), like.detach()
    mesh: Any = other.device_mesh  # type: ignore[attr-defined]
    partial = [library.Partial("sum")] * mesh.ndim
    total: Tensor = library.DTensor.from_local(
        values.to(mesh.device_type), mesh, partial, run_check=False
    ).full_tensor()
    return total


def added_up(tensor: Tensor) -> Tensor:
    """Return the tensor itself; where processes hold parts of a sum, the sum, through which gradients pass: collective.

    torch takes the parts that an embedding sharded by rows gives once, and not twice.
    """
    if not is_sharded(tensor):
        return tensor
    held: Any = tensor
    if not any(placement.is_partial() for placement in held.placements):
        return tensor
    whole_ones = [_dtensors().Replicate() if one.is_partial() else one for one in held.placements]
    total: Tensor = held.redistribute(placements=whole_ones)
    return total


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, of a sharded tensor on every process: collective then."""
    if not is_sharded(tensor):
        return bool(torch.isfinite(tensor).all())
    part: Any = tensor.detach()
    wrong = torch.logical_not(torch.isfinite(part.to_local())).any().reshape(1).to(torch.int32)
    return not bool(summed(wrong, tensor))


def values_at(weight: Tensor, positions: Sequence[int]) -> Tensor:
    """Return in float64 what a sharded weight has at places of the flat one; nothing else is sent.  Collective."""
    part: Any = weight.detach()
    local = part.to_local()
    places = [_places_of(part, dim) for dim in range(weight.dim())]
    found = torch.zeros(len(positions), 2, dtype=torch.float64)
    for number, position in enumerate(positions):
        index = torch.unravel_index(torch.tensor(position), weight.shape)
        here = [(own == at).nonzero().flatten().tolist() for own, at in zip(places, index, strict=True)]
        if all(here):
            found[number, 0] = local[tuple(at[0] for at in here)].double().cpu()
            found[number, 1] = 1
    total = summed(found, weight).cpu()  # the same value from each process that holds it
    return total[:, 0] / total[:, 1]


def _places_of(part: Any, dim: int) -> Tensor:
    """Return which indices of a dimension this process holds.

    Tensor parallel parts that FSDP2 parts again are placed in strides: later dimensions of the mesh come first there.
    """
    mesh = part.device_mesh
    at = [number for number, one in enumerate(part.placements) if getattr(one, "dim", None) in (dim, dim - part.dim())]
    plain = [number for number in at if type(part.placements[number]) is _dtensors().Shard]
    own = torch.arange(part.shape[dim])
    for number in (*plain, *reversed([number for number in at if number not in plain])):
        pieces = own.chunk(mesh.size(number))
        here = mesh.get_coordinate()[number]
        own = pieces[here] if here < len(pieces) else own[:0]
    return own


def by_first(like: Tensor, work: Callable[[], None]) -> None:
    """Let the first of the processes that share a sharded tensor do something, and the others wait for it.  Collective.

    Raises:
        Exception: what the work raises, on every process.
    """
    dist, part = torch.distributed, like.detach()
    mesh: Any = part.device_mesh  # type: ignore[attr-defined]
    outcome: list[BaseException | None] = [None]
    if not any(mesh.get_coordinate()):
        try:
            work()
        except BaseException as error:
            outcome = [error]
    raised = outcome[0]
    for dim in reversed(range(mesh.ndim)):
        dist.broadcast_object_list(outcome, group=mesh.get_group(dim), group_src=0)
    if raised is not None:
        raise raised
    if outcome[0] is not None:
        raise outcome[0]


def is_sharded_plainly(tensor: Tensor) -> bool:
    """Whether each process has one piece of a tensor, or all of it, along each dimension of its mesh."""
    if not is_sharded(tensor):
        return True
    library, held = _dtensors(), tensor.detach()
    return all(type(one) in (library.Shard, library.Replicate) for one in held.placements)  # type: ignore[attr-defined]


def is_sharded_by_rows(tensor: Tensor) -> bool:
    """Whether each process has one piece of a sharded tensor's first dimension, or all of it."""
    held: Any = tensor.detach()
    return is_sharded_plainly(tensor) and all(getattr(one, "dim", 0) == 0 for one in held.placements)


def follows(weight: Tensor, along: Mapping[int, int]) -> list[Any]:
    """Return the placements of a tensor that has some dimensions of a sharded weight: by the weight's, its own.

    Along all other dimensions of the mesh it is whole on every process.
    """
    library, held = _dtensors(), weight.detach()
    made = []
    for placement in held.placements:  # type: ignore[attr-defined]
        own = along.get(placement.dim % held.dim()) if type(placement) is library.Shard else None
        made.append(library.Replicate() if own is None else library.Shard(own))
    return made


def placed(tensor: Tensor, like: Tensor, placements: Sequence[Any]) -> Tensor:
    """Return a tensor with placements on the mesh of a sharded one, with the first process's values.  Collective."""
    mesh: Any = like.detach().device_mesh  # type: ignore[attr-defined]
    shared: Tensor = _dtensors().distribute_tensor(tensor.detach(), mesh, placements)
    return shared
