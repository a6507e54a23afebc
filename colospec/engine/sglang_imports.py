"""Make SGLang importable: stand-ins for packages that a prefill of hidden states never calls.

SGLang imports some packages at its top level whether they are used or not. Where one is absent, an
empty stand-in takes its place: importing from it works, calling anything in it raises. With a
complete installation on CUDA nothing is replaced. Call `prepare` before anything imports sglang;
only the modules `colospec.engine.sglang*` do.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from colospec.engine.sglang_install import INSTALL
from colospec.log import ConsoleHandler

log = logging.getLogger(__name__)

# Sampling, grammars, notebooks and images: nothing of it runs here.
ABSENT_ANYWHERE = ("flashinfer", "xgrammar", "IPython", "torchvision")
# Kernels that SGLang does without on a CPU.
ABSENT_ON_CPU = ("sgl_kernel",)
# Code asks whether this submodule is there; a stand-in would say yes.
REALLY_ABSENT = frozenset({"flashinfer.norm", "sgl_kernel.scalar_type"})


def prepare(device_type: str, *, also_absent: Sequence[str] = ()) -> None:
    """Import SGLang's runner, with stand-ins where packages are absent; idempotent.

    `also_absent` names further packages that the caller does not need. Raises RuntimeError, with
    what to type, where SGLang cannot be imported.
    """
    if "sglang.srt.model_executor.model_runner" in sys.modules:
        return
    os.environ.setdefault("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "false")
    # GPUs whose free memory differs: beside trainers they always may.
    os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false")
    names = [*ABSENT_ANYWHERE, *also_absent]
    if device_type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        names += ABSENT_ON_CPU
        _stand_in_for_triton()
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if "flashinfer" in missing:
        os.environ["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
    if "deep_gemm" in missing:
        os.environ["SGLANG_ENABLE_JIT_DEEPGEMM"] = "false"
    # transformers remembers its answer: it must not take the stand-in for the package.
    importlib.import_module("transformers.utils").is_torchvision_available()
    if missing:
        sys.meta_path.append(StandIns(missing))
        log.debug("engine sglang: stand-ins for %s", ", ".join(missing))
    try:
        with lenient_registration(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("sglang.srt.model_executor.model_runner")
    except (AttributeError, ImportError, OSError) as error:
        raise RuntimeError(
            f"SGLang cannot be imported ({type(error).__name__}: {error}); install what it needs "
            f"with {INSTALL}, or set engine=hf"
        ) from error
    _send_log_to_file()


class StandIns(MetaPathFinder, Loader):
    """Imports `names` and all their submodules as empty modules."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, fullname: str, _path: object = None, _target: object = None
    ) -> ModuleSpec | None:
        """Claim what lies in one of our packages."""
        if fullname.partition(".")[0] not in self._names or fullname in REALLY_ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, _spec: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module an answer to every name: a class for CamelCase, else a function."""
        content: dict[str, Any] = vars(module)
        content["__version__"] = "0.0.0"
        content["__getattr__"] = lambda name: _stand_in(module.__name__, name)
        if module.__name__ == "IPython":
            content["get_ipython"] = lambda: None
        if module.__name__ == "xgrammar":
            # It is subclassed by a pydantic model.
            base = importlib.import_module("pydantic").BaseModel
            content["StructuralTag"] = type("StructuralTag", (base,), {"__module__": "xgrammar"})


def _stand_in(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name[:1].isupper():
        return type(name, (), {"__module__": module})

    def call(*_args: object, **_kwargs: object) -> NoReturn:
        raise RuntimeError(f"{module}.{name} was called, but {module} is not installed")

    return call


def _stand_in_for_triton() -> None:
    """Install the stand-in that SGLang brings for machines without triton."""
    if importlib.util.find_spec("triton") is not None:
        return
    # These must have seen that triton is absent.
    importlib.import_module("torch._inductor.compile_fx")
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("_triton_stub.py")
    spec = importlib.util.spec_from_file_location("_sglang_triton_stub", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


@contextmanager
def lenient_registration() -> Iterator[None]:
    """Let SGLang register model configs that this version of transformers has by itself."""
    mapping: Any = importlib.import_module(
        "transformers.models.auto.configuration_auto"
    )._LazyConfigMapping
    register = mapping.register

    def replace(self: Any, key: Any, value: Any, exist_ok: bool = False) -> None:  # noqa: ARG001
        register(self, key, value, exist_ok=True)

    mapping.register = replace
    try:
        yield
    finally:
        mapping.register = register


def _send_log_to_file() -> None:
    """Let SGLang's messages go where ours go, but not to the console."""
    ours = logging.getLogger("colospec").handlers
    files = [handler for handler in ours if not isinstance(handler, ConsoleHandler)]
    logger = logging.getLogger("sglang")
    logger.handlers = list(files) or [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
