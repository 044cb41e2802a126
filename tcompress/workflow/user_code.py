"""Somebody's Python file: run as a module, its functions called, and what they raise told in one line.

While such code runs, the folder of its file can be imported from, and no bytecode is left there. Nothing here protects
from what it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tcompress.errors import Stopped, TaskError, TcompressError, UsageError

_MOST = 1000  # characters of somebody else's message


def call(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function: at home in its folder, and with every exception turned into a line.

    What it prints goes to stderr. Raises TaskError for whatever it raises; KeyboardInterrupt, Stopped and errors of
    this package pass.
    """
    try:
        with _at_home(path), contextlib.redirect_stdout(sys.stderr):
            return function(*arguments)
    except (KeyboardInterrupt, Stopped, TcompressError):
        raise
    except BaseException as error:  # sys.exit() among them: it must not end the command without a word
        raise failed(error, path) from error


@contextlib.contextmanager
def _at_home(path: Path) -> Iterator[None]:
    home, wrote_none = str(path.resolve().parent), sys.dont_write_bytecode
    sys.path.insert(0, home)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = wrote_none
        with contextlib.suppress(ValueError):  # the user's code may have changed it
            sys.path.remove(home)


def load(path: Path) -> ModuleType:
    """Run a file as a module of a private name: classes in it find their module there, as dataclasses must.

    Raises UsageError, with the line, for what is no Python, and whatever the file raises.
    """
    full = path.resolve()
    name = f"_tcompress_task_{hashlib.sha256(str(full).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None, "its suffix is .py"  # noqa: S101
    loader = spec.loader
    assert isinstance(loader, importlib.machinery.SourceFileLoader)  # noqa: S101
    try:
        # Apart from running it: an error of syntax is told by its own line, not by the line that imports.
        loader.source_to_code(full.read_bytes(), str(full))
    except SyntaxError as error:
        raise UsageError(
            f"is no Python: {error.msg}", path=path if error.lineno is None else f"{path}:{error.lineno}"
        ) from error
    except ValueError as error:
        raise UsageError(f"is no Python: {error}", path=path) from error
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", path=path) from error
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find_object(path: Path, module: ModuleType, name: str) -> Any:
    """Return the object of that name, made if it is a class. Raises UsageError, and TaskError as ``call``."""
    found = call(path, getattr, module, name, None)
    if found is None:
        known = sorted(each for each in vars(module) if not each.startswith("_"))
        raise UsageError(f"has no object {name}; it has {', '.join(known) or 'nothing'}", path=path)
    if not isinstance(found, type):
        return found
    if not accepts(found, 0):
        raise UsageError("is a class that cannot be made without arguments", path=f"{path}:{name}")
    return call(path, found)


def accepts(function: Callable[..., Any], count: int) -> bool:
    """Tell whether a function can be called with so many arguments, as far as it says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # one written in C may not tell
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def failed(error: BaseException, path: Path, why: str = "") -> TaskError:
    """Return the one line that stands for an exception of a user's code: file:line, ``why``, type and message."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - it is the user's __str__
        message = ""
    message = message if len(message) <= _MOST else message[:_MOST] + "..."
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return TaskError(why + said, path=path if line is None else f"{path}:{line}")
