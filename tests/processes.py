"""Python programs in processes of their own, forked from one that has imported torch and Transformers already.

Their import takes longer than what most tests run. Each process is as fresh as one that has just imported them: this
package, PEFT and lm-eval are not imported. Where a program's environment variables are read by those imports, or the
interpreter itself is what is tested, it needs `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(  # bitsandbytes is most of PEFT's import, which is most of the Trainer's
    ["transformers.models.llama.modeling_llama", "transformers.data", "accelerate", "datasets", "bitsandbytes"]
)


def _run(words: list[str], environment: dict[str, str], output: list[str]) -> None:
    """`python WORDS` from here on; the process ends with its exit status."""
    for descriptor, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # else this process would start others from the same server
    first, *others = words
    if first == "-c":
        code, sys.argv = compile(others[0], "<string>", "exec"), ["-c", *others[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(code, vars(main))
    elif first == "-m":
        sys.argv = others
        sys.path.insert(0, "")
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


class PythonProcess:
    """A started `python WORDS`.

    Args:
        words: what stands behind `python`: a file, `-m` and a module or `-c` and code, and the program's arguments.
        environment: environment variables beside the present ones, for what the program itself reads.
    """

    def __init__(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        self._words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._output:
            path.touch()
        given = {**os.environ, **(environment or {})}  # the server has those of its start
        self._process = _CONTEXT.Process(target=_run, args=(self._words, given, [str(path) for path in self._output]))
        self._process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its exit status (the negative signal where one ended it), and what it printed.

        Raises:
            subprocess.TimeoutExpired: it ran longer than `timeout` seconds, and was killed.
        """
        self._process.join(timeout)
        running = self._process.is_alive()
        if running:
            self._process.kill()
            self._process.join()
        printed, said = (path.read_text(encoding="utf-8") for path in self._output)
        self._folder.cleanup()
        if running:
            raise subprocess.TimeoutExpired(self._words, timeout, printed, said)
        assert self._process.exitcode is not None
        return subprocess.CompletedProcess(self._words, self._process.exitcode, printed, said)


def run_python(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end, as `subprocess.run` does with its output captured as text."""
    return PythonProcess(*words).wait()


def run_processes(number: int, *words: object) -> list[subprocess.CompletedProcess[str]]:
    """Run `python WORDS` as that many processes of one group, with the variables that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    group |= {name: str(number) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    started = [PythonProcess(*words, environment=group | rank) for rank in ranks]
    return [process.wait() for process in started]
