"""Programs that start with torch imported, where the start itself is not what is tested.

A child process imports what takes seconds and does not depend on the environment, and forks for each program. The program
has its own folder and environment, and huggingface_hub, transformers and the rest are yet to be imported there.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib import import_module

import psutil


# none of them imports huggingface_hub, which reads the address of the Hub and the place of its cache when it is imported
WARM = (
    "torch", "torch._inductor.compile_fx", "torch._inductor.lowering", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.utils.data", "scipy.stats", "scipy.optimize", "PIL.Image", "networkx",
)  # fmt: skip


def run_python(words, *, cwd=None, env=None, timeout=300):
    """
    `python WORDS`, where the words are `-m MODULE ...` or `-c PROGRAM ...`: a [`subprocess.CompletedProcess`] with what was
    printed. A program that takes longer than `timeout` seconds is killed.
    """
    words = [str(word) for word in words]
    server = _server()
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        job = {
            "words": words,
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "outputs": [stdout.name, stderr.name],
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [file.read().decode() for file in (stdout, stderr)]
    return subprocess.CompletedProcess([sys.executable, *words], code, *texts)


@lru_cache
def _server():
    server = subprocess.Popen(
        [sys.executable, "-c", "import tests.warm as warm; exec(warm.serve())"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    atexit.register(server.communicate)  # it ends with its input
    return server


def serve():
    """Forks for each job; in the new process, it returns the code that is to run there."""
    for name in WARM:
        import_module(name)
    assert "huggingface_hub" not in sys.modules
    assert psutil.Process().num_threads() == 1  # a fork has only one
    gc.freeze()  # what is shared is not looked through again
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


def _become(job):
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((name, os.O_WRONLY) for name in job["outputs"])]
    ):
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    signal.alarm(job["timeout"])
    option, name, *arguments = job["words"]
    sys.argv = [option, *arguments]
    sys.path[0] = job["cwd"] if option == "-m" else ""
    if option == "-c":
        return name
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
