"""A second device that is pretended: its tensors are held by the CPU, and go with their own alone.

Torch refuses to compute with tensors of two devices. Where there is but one, nothing shows that a
tensor was left behind; here it does. The device is called meta, which every build of torch knows.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
_ATEN = torch.ops.aten
# An index may be on the CPU whatever it takes from.
_TAKES_AN_INDEX = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)


class Away(torch.Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, called, types, args=(), kwargs=None):
        return _result(called, args, kwargs or {})

    def item(self):
        return self.held.item()

    def tolist(self):
        return self.held.tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()


class _Pretence(TorchDispatchMode):
    def __torch_dispatch__(self, called, types, args=(), kwargs=None):
        return _result(called, args, kwargs or {})


@contextlib.contextmanager
def device(monkeypatch):
    """Pretend that there is a second device inside."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with monkeypatch.context() as changed, _Pretence():
        for name in ("tensor", "as_tensor"):
            changed.setattr(torch, name, _made_on_the_cpu(getattr(torch, name)))
        # The pretended device has no autocast: the CPU's stands in.
        changed.setattr(torch, "autocast", _Autocast)
        enabled = torch.is_autocast_enabled
        changed.setattr(torch, "is_autocast_enabled", lambda *of: enabled(*map(_with_autocast, of)))
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__(_with_autocast(device_type), *args, **kwargs)


def _with_autocast(device_type):
    return "cpu" if device_type == DEVICE else device_type


def _made_on_the_cpu(make):
    """Let torch make a tensor of numbers, which it would hide from the pretence, and move it."""

    def made(*args, device=None, **kwargs):
        found = make(*args, **kwargs)
        return found if device is None else found.to(device)

    return made


def _result(called, args, kwargs):
    given = tree_leaves((args, kwargs))
    leaves = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    if called is _ATEN.copy_.default:
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    if away and called.overloadpacket not in (_ATEN.to, _ATEN._to_copy):
        # Numbers, which have no dimension, go everywhere.
        left = [leaf for leaf in leaves if not isinstance(leaf, Away) and leaf.dim() > 0]
        if called in _TAKES_AN_INDEX and isinstance(args[0], Away):
            left = [leaf for leaf in left if leaf.dtype not in (torch.int64, torch.bool)]
        if left:
            raise RuntimeError(f"{called}: a tensor of shape {tuple(left[0].shape)} is on the CPU")
    goes_away = bool(away)
    for asked in (leaf for leaf in given if isinstance(leaf, torch.device)):
        goes_away = asked.type == DEVICE
    found = called(*tree_map(_held, args), **tree_map(_held, kwargs))
    written = [
        kwargs[said.name] if said.name in kwargs else args[place]
        for place, said in enumerate(called._schema.arguments)
        if said.alias_info is not None and said.alias_info.is_write
    ]
    returned = called._schema.returns
    if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:
        return written[0] if len(returned) == 1 else tuple(written)
    return tree_map(lambda made: Away(made) if _moves(made, goes_away) else made, found)


def _held(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, Away) else value


def _moves(made, goes_away):
    return goes_away and isinstance(made, torch.Tensor)
