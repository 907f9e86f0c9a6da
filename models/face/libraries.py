"""The libraries that only the face nodes need, imported when one of them runs."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..common.errors import LikenessError

INSTALL = ('install it into ComfyUI\'s own Python with: python -m pip install "insightface>=2.0" onnx2torch, then restart '
           "ComfyUI; no other node needs it")


def _onnx() -> Any:
    import onnx
    return onnx


def _onnx2torch() -> Any:
    import onnx2torch
    return onnx2torch


def _insightface() -> Any:
    import insightface.model_zoo.model_zoo as zoo
    return zoo


def _onnxruntime() -> Any:
    import onnxruntime
    return onnxruntime


LIBRARIES: dict[str, Callable[[], Any]] = {"onnx": _onnx, "onnx2torch": _onnx2torch, "insightface": _insightface,
                                           "onnxruntime": _onnxruntime}


def there(name: str) -> bool:
    """Whether a library is installed and can be imported."""
    try:
        LIBRARIES[name]()
    except Exception:  # a broken build raises what it likes
        return False
    return True


def need(name: str) -> Any:
    """The library (of insightface its model zoo), or a LikenessError that says how to install it."""
    try:
        return LIBRARIES[name]()
    except Exception as error:
        raise LikenessError(f"The face nodes need the package {name}, which is missing or broken ({error}): {INSTALL}."
                            ) from error
