"""
Programs that start with the libraries imported, where the start itself is not what is tested.

A child process imports what takes seconds, and forks for each program. The program has its own folder and environment: the
address of the Hub and the folder of its cache, which libraries read when they are imported, are put in their place there. The
other variables of Hugging Face's libraries are those that the child was started with: there is one for each set of them.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import psutil


# Module → what is looked up in it, as some import their parts when they are asked for them.
WARM = {
    "torch": (), "torch._inductor.compile_fx": (), "torch._inductor.lowering": (), "torch.distributed.fsdp": (),
    "torch.distributed.tensor": (), "torch.utils.data": (), "scipy.stats": (), "scipy.optimize": (), "PIL.Image": (),
    "networkx": (), "pandas": (), "datasets": (), "peft": (), "accelerate": (),
    "transformers": ("Trainer", "AutoProcessor", "Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessor"),
    "trl": ("RewardTrainer",),
    "diffusers": ("FluxPipeline",),
}  # fmt: skip
# What stands for the values of a program until there is one; neither works, should one be left.
STAND_INS = {"HF_ENDPOINT": "http://warm.invalid", "HF_HOME": "/dev/null/home-of-hugging-face"}
DEFAULTS = {"HF_ENDPOINT": "https://huggingface.co", "HF_HOME": os.path.expanduser("~/.cache/huggingface")}
PREFIXES = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "TRL_", "OMP_", "TOKENIZERS_")


class Program:
    """
    `python WORDS` in the background, where the words are `-m MODULE ...`, `-c PROGRAM ...` or `FILE ...`. A program that takes
    longer than `timeout` seconds is killed. As a context, what still runs at its end is killed.
    """

    def __init__(self, words, *, cwd=None, env=None, timeout=600):
        self.words = [str(word) for word in words]
        env = dict(os.environ if env is None else env)
        self._server = _server(tuple(sorted((name, value) for name, value in env.items() if _is_read_early(name))))
        self._outputs = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        job = {"words": self.words, "cwd": str(cwd or os.getcwd()), "env": env, "timeout": timeout,
               "outputs": [file.name for file in self._outputs]}  # fmt: skip
        self.pid, self._is_gone = self._ask(job), False

    def wait(self):
        """Waits for its end: a [`subprocess.CompletedProcess`] with what was printed."""
        code, self._is_gone = self._ask({"pid": self.pid}), True
        return subprocess.CompletedProcess([sys.executable, *self.words], code, *self.printed())

    def printed(self):
        """What it has printed to standard output and to standard error."""
        return [Path(file.name).read_text() for file in self._outputs]

    def is_running(self):
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def _ask(self, question):
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self._is_gone:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def run_python(words, **options):
    """Runs a [`Program`] to its end."""
    return Program(words, **options).wait()


def _is_read_early(name):
    return name.startswith(PREFIXES) and not (name in STAND_INS or _is_read_later(name))


def _is_read_later(name):
    return name == "HF_TOKEN" or name.startswith("TRL_SPATIAL_")  # the package is imported by the programs


@lru_cache
def _server(variables):
    others = {name: value for name, value in os.environ.items() if not (_is_read_early(name) or _is_read_later(name))}
    server = subprocess.Popen(
        [sys.executable, "-c", "import tests.warm as warm; warm.run(warm.serve())"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=os.path.dirname(os.path.dirname(__file__)), env=others | dict(variables) | STAND_INS,
    )  # fmt: skip
    atexit.register(server.communicate)  # it ends with its input
    return server


def serve():
    """Forks for each job; in the new process, it returns the code that is to run there."""
    gc.disable()  # it would take a third of the time of the imports, and find nothing
    for name, parts in WARM.items():
        module = import_module(name)
        for part in parts:
            getattr(module, part)
    assert threading.active_count() == 1  # a fork has only one
    places = list(_find_stand_ins())
    gc.collect()
    gc.freeze()  # what is shared is not looked through again
    gc.enable()
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            _, status = os.waitpid(job["pid"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if not child:
            return _become(job, places)
        print(child, flush=True)
    raise SystemExit


def _find_stand_ins():
    """Triples of an object, an attribute and its value, in all modules and in the classes and objects there."""
    seen = set()
    for module in list(sys.modules.values()):
        for holder in (module, *list(getattr(module, "__dict__", {}).values())):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, (str, Path)) and any(stand_in in str(value) for stand_in in STAND_INS.values()):
                    yield holder, name, value


def _put_in(value, values):
    """The value with the program's in the place of the stand-ins."""
    text = str(value)
    for name, stand_in in STAND_INS.items():
        text = text.replace(stand_in, values[name])
    return type(value)(text)


def _become(job, places):
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((name, os.O_WRONLY) for name in job["outputs"])]
    ):
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    values = {name: job["env"].get(name, default) for name, default in DEFAULTS.items()}
    for holder, name, value in places:
        setattr(holder, name, _put_in(value, values))
    signal.alarm(job["timeout"])
    option, *arguments = job["words"]
    sys.argv, sys.path[0] = job["words"], os.path.dirname(os.path.abspath(option))
    sys.path[1:1] = [folder for folder in job["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    if option == "-c":
        code, *arguments = arguments
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        return code
    if option == "-m":
        name, *arguments = arguments
        sys.argv, sys.path[0] = ["-m", *arguments], job["cwd"]
        return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return f"import runpy; runpy.run_path({option!r}, run_name='__main__')"


def run(code):
    """Runs the code and ends the process, without taking down what was imported, which takes as long as a short program."""
    status = 0
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
