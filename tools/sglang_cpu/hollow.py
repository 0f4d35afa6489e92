"""Hollow packages: modules that import and decorate like the real ones and compute nothing. See setup.sh.

Change here: which packages are hollow, when a newer SGLang imports another CUDA-only one. The finder comes last, so an
installed package always wins over its hollow twin.

Also, SGLang's processes are forked from its first one. It asks for `spawn`, which CUDA needs; then each of three processes
imports the same modules, and a server takes twice as long to start.
"""

from __future__ import annotations

import multiprocessing
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = frozenset({"sgl_kernel", "triton", "torchvision", "soundfile", "IPython"})


class _AttributesOfTheClass(type):
    """`Hollow.anything`, as constants of a hollow class need it. `Hollow | None` stays Python's own union."""

    def __getattr__(cls, name: str) -> Hollow | str:
        return Hollow()._attribute(name)


class Hollow(metaclass=_AttributesOfTheClass):
    """Takes what module-level code does to a name: call, decorate, subscript, subclass, look up attributes."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __call__(self, *args: object, **kwargs: object) -> object:
        as_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if as_decorator else self

    def _attribute(self, name: str) -> Hollow | str:
        if name == "backend":  # of triton's current target; some versions of SGLang look it up in torch
            return "cpu"
        if name.startswith("__"):  # a protocol that Python probes for: the honest answer is no
            raise AttributeError(name)
        return self

    def __getattr__(self, name: str) -> Hollow | str:
        return self._attribute(name)

    def __getitem__(self, key: object) -> Hollow:
        return self

    def __or__(self, other: object) -> Hollow:
        return self

    __ror__ = __or__


class HollowModule(ModuleType):
    """Every attribute exists; a capitalised one is a class, since it may become a base class or go to isinstance."""

    __version__ = "0.0.0"

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Hollow,), {}) if name[0].isupper() else Hollow()
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return HollowModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":  # the two helpers that are called while modules are imported
            module.cdiv = lambda a, b: -(a // -b)
            module.next_power_of_2 = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1


sys.meta_path.append(_Finder())

_set_start_method = multiprocessing.set_start_method
multiprocessing.set_start_method = lambda method, force=False: _set_start_method("fork", force)
