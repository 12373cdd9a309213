"""Engines that draw many images: this process, several processes of accelerate, or the workers of a Ray cluster."""

import json
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain, groupby, takewhile
from typing import Any

import psutil
import pyarrow as pa
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..endpoints.spending import Spend
from .jobs import DrawingError, DrawnImage, ImageJob, Painter
from .painters import check_spec, make_painter
from .settings import published_family


ENGINES = ("local", "ray")
_MAX_ATTEMPTS = 4  # at a unit whose worker dies: its image may be the cause
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE = 512 * 2**20  # bytes for images in transit, in a cluster started here
_SECONDS_TO_END = 10  # for the workers of a cluster started here to exit


def draw_jobs(
    spec: Mapping[str, Any],
    jobs: Sequence[ImageJob],
    *,
    engine: str = "local",
    num_workers: int | None = None,
    address: str | None = None,
    spend: Spend | None = None,
    progress: bool = True,
) -> Iterator[DrawnImage]:
    """
    Draws images and yields each as soon as it is ready, in any order. On the CPU, both engines give the same files.

    Jobs with the same prompt should be next to each other: the same worker then draws them, and encodes the prompt once.

    Args:
        spec (`Mapping[str, Any]`):
            The generator, as [`~generation.painters.make_painter`] takes it.
        jobs (`Sequence[ImageJob]`):
            The images that are still to be drawn.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"`: this process; if it is one of several that accelerate launched, each draws its share of the jobs and
            yields that only. `"ray"`: workers of a Ray cluster, which load the model once each. A worker that dies is
            replaced, and the images of a prompt or two that it was drawing are drawn again.
        num_workers (`int`, *optional*):
            Workers of the engine `"ray"`. If not set, one per GPU of the cluster, or per core where no GPU is or is needed.
        address (`str`, *optional*):
            Address of an existing Ray cluster, such as `"auto"` or `"HOST:6379"`, whose machines have this package and the
            variables for its keys. If not set, the cluster that this process is connected to, or else one on this machine
            that listens on loopback and ends with the iteration.
        spend ([`~endpoints.Spend`], *optional*):
            To which the caller adds the cost of each image. Once its limit is reached, no further image is begun, and the iteration
            ends after those that are on their way and have to be paid; with the engine `"ray"`, after the prompts that were begun.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `Iterator[DrawnImage]`: The images. Closing it ends the workers.

    Raises:
        `ValueError`: If the generator, the engine or its options make no sense, or two jobs share an id.
        `ImportError`: If Ray or what the generator needs is not installed.
        [`DrawingError`]: While iterating, after whatever was finished, if an image could not be drawn.
    """
    if engine not in ENGINES:
        raise ValueError(f"The engine is {engine!r}. Use one of {', '.join(ENGINES)}.")
    _check_jobs(jobs, engine, num_workers, address)
    painter = make_painter(spec)
    if engine == "ray":
        if find_spec("ray") is None:
            raise ImportError('The engine "ray" needs Ray: `pip install "trl-spatial[ray]"`.')
        images, total = _draw_with_ray(spec, painter, jobs, num_workers, address, spend), len(jobs)
    else:
        state = process_state()
        units = _split(jobs, painter.batch_size)[state.process_index :: state.num_processes]
        share = chain.from_iterable(units)
        images, total = painter.stream(takewhile(lambda _: _is_affordable(spend), share)), sum(map(len, units))
        progress = progress and state.is_local_main_process
    return _show_progress(images, total, painter.name) if progress else images


def _check_jobs(jobs: Sequence[ImageJob], engine: str, num_workers: int | None, address: str | None) -> None:
    if engine == "local" and (num_workers is not None or address is not None):
        raise ValueError(
            "`num_workers` and `address` belong to the engine 'ray'. For several GPUs without Ray, start the command with "
            "`accelerate launch`."
        )
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` is {num_workers}. It must be at least 1.")
    if twice := [id for id, number in Counter(job.id for job in jobs).items() if number > 1]:
        raise ValueError(f"Two images have the id {twice[0]!r}.")


def process_state() -> PartialState:
    """Returns this process's place among those that accelerate launched; without an accelerator, they communicate on the CPU."""
    return PartialState(cpu=torch.accelerator.current_accelerator(check_available=True) is None)


def estimate(spec: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """
    Estimates what drawing images costs. It needs no network, no key and no GPU.

    Args:
        spec (`Mapping[str, Any]`):
            The generator, as [`~generation.painters.make_painter`] takes it.
        num_images (`int`):
            Number of images.

    Returns:
        `dict`: `images`, `calls` (to a server), `gpu_hours` (on H100s) and `cost` (US dollars, of calls); the last two are
        `None` where they are unknown.

    Raises:
        `ValueError`: If the generator makes no sense.
    """
    numbers: dict[str, Any] = {"images": num_images, "calls": 0, "gpu_hours": 0.0, "cost": 0.0}
    if check_spec(spec) == "endpoint":
        price = spec.get("price_per_image")
        return numbers | {"calls": num_images, "cost": None if price is None else price * num_images}
    if make_painter(spec).uses_gpu:
        family = published_family(spec["name"])
        seconds = None if family is None else family.seconds(spec)
        numbers["gpu_hours"] = None if seconds is None else seconds * num_images / 3600
    return numbers


def _is_affordable(spend: Spend | None) -> bool:
    return spend is None or not spend.is_reached


def _show_progress(images: Iterator[DrawnImage], total: int, name: str) -> Iterator[DrawnImage]:
    with tqdm(total=total, desc=name, unit="image") as bar:
        for image in images:
            yield image
            bar.update()


def _split(jobs: Iterable[ImageJob], size: int) -> list[list[ImageJob]]:
    """Splits jobs into units of work of up to `size`. Adjacent jobs with the same prompt stay together, however many."""
    units: list[list[ImageJob]] = []
    for _, group in groupby(jobs, key=lambda job: job.prompt):
        same = list(group)
        if not units or len(units[-1]) + len(same) > size:
            units.append([])
        units[-1] += same
    return units


def _draw_with_ray(
    spec: Mapping[str, Any],
    painter: Painter,
    jobs: Sequence[ImageJob],
    num_workers: int | None,
    address: str | None,
    spend: Spend | None,
) -> Iterator[DrawnImage]:
    if not jobs or not _is_affordable(spend):
        return
    units = {unit[0].id: unit for unit in _split(jobs, painter.batch_size)}
    with _cluster(address, num_workers) as ray:
        resources = ray.cluster_resources()
        num_gpus = 1 if painter.uses_gpu and resources.get("GPU", 0) >= 1 else 0
        most = int(resources["GPU"] if num_gpus else resources.get("CPU", 1))
        # A block per unit: a block is what a worker is given, and what is redone if the worker dies.
        rows = [{"jobs": json.dumps([asdict(job) for job in unit])} for unit in units.values()]
        attempts = ray.remote(num_cpus=0)(_Attempts).remote()
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(json.dumps(dict(spec)), attempts),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(num_workers or most, len(units))),
            num_cpus=1,
            num_gpus=num_gpus,
        )
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        missing, errors, begun = {id: {job.id for job in unit} for id, unit in units.items()}, [], None
        try:
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                for unit, result in _read_table(table):
                    if isinstance(result, DrawingError):
                        errors.append(result)
                        missing[unit].clear()  # nothing more will come of it
                    else:
                        missing[unit].discard(result.id)
                        yield result
                if begun is None and (errors or not _is_affordable(spend)):
                    begun = ray.get(attempts.close.remote())
                if begun is not None and not any(missing[unit] for unit in begun):
                    break
        except ray.exceptions.RayError as error:
            raise DrawingError(f"The workers that draw with {painter.name} failed: {error}") from error
        if errors:
            raise errors[0]


class _Attempts:
    """
    Counts how often each unit was begun. Ray replaces a worker that dies and retries the same unit forever, even if that unit
    is what kills it.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.is_closed = False

    def begin(self, unit: str) -> int:
        """
        Counts an attempt at the unit whose first job has this id. Returns the number of attempts, or 0 if the unit may not
        begin: after `close`, only one that a worker left unfinished may.
        """
        if self.is_closed and unit not in self.counts:
            return 0
        self.counts[unit] += 1
        return self.counts[unit]

    def close(self) -> list[str]:
        """Lets no further unit begin. Returns those that were begun."""
        self.is_closed = True
        return list(self.counts)


class _Worker:
    """A Ray worker: makes its painter once and draws units of jobs."""

    def __init__(self, spec: str, attempts: Any):
        torch.set_num_threads(1)  # the same on every machine
        self.painter = make_painter(json.loads(spec))
        self.attempts = attempts

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table["jobs"].to_pylist():
            jobs = [ImageJob(**job) for job in json.loads(row)]
            try:
                for image in self._draw(jobs):
                    record = asdict(image)
                    yield _make_table(jobs[0].id, record.pop("png"), record)
            except Exception as error:  # sent instead of raised: Ray would wrap it, and drop finished images
                message = str(error) if isinstance(error, DrawingError) else f"{type(error).__name__}: {error}"
                yield _make_table(jobs[0].id, None, {"error": message})

    def _draw(self, jobs: list[ImageJob]) -> Iterator[DrawnImage]:
        import ray

        attempt = ray.get(self.attempts.begin.remote(jobs[0].id))
        if attempt > _MAX_ATTEMPTS:
            died = RuntimeError(f"the worker died, {_MAX_ATTEMPTS} times")
            raise self.painter.error(jobs, died)
        if attempt:
            yield from self.painter.stream(jobs)


def _make_table(unit: str, png: bytes | None, record: Mapping[str, Any]) -> pa.Table:
    return pa.table({"unit": [unit], "png": pa.array([png], pa.binary()), "record": [json.dumps(record)]})


def _read_table(table: pa.Table) -> Iterator[tuple[str, DrawnImage | DrawingError]]:
    """Yields images and errors, each with the unit that it belongs to."""
    for row in table.to_pylist():
        record = json.loads(row["record"])
        yield row["unit"], DrawingError(record["error"]) if "error" in record else DrawnImage(png=row["png"], **record)


@contextmanager
def _cluster(address: str | None, num_workers: int | None) -> Iterator[Any]:
    """Yields Ray, connected to a cluster. What the context starts or connects ends with it."""
    import ray
    import ray.data
    import ray.util

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if address is None and ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    with ExitStack() as settings:
        settings.enter_context(_kept_signal_handler())
        settings.enter_context(_no_stderr())
        if address is None:
            # Otherwise Ray would replace 127.0.0.1 with the address of the machine, and let anyone in.
            settings.enter_context(_changed(ray._private.ray_constants.__dict__, ENABLE_RAY_CLUSTER=False))
            variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the same for its processes
            options |= {
                "_node_ip_address": _LOOPBACK,
                "include_dashboard": False,
                "num_cpus": max(num_workers or 1, os.cpu_count() or 1),
                "object_store_memory": _OBJECT_STORE,
            }
        settings.enter_context(_changed(os.environ, **variables))
        ray.init(address or "local", **options)
    try:
        if address is None and ray.util.get_node_ip_address() != _LOOPBACK:
            raise RuntimeError(
                f"Ray {ray.__version__} does not stay on loopback, so others could send its workers commands. Start a "
                "cluster yourself, `ray start --head`, and pass its address."
            )
        yield ray
    finally:
        workers = _worker_processes() if address is None else []
        ray.shutdown()
        # Some hang on exit, on a mutex that Ray locks twice, and would keep their memory.
        for process in psutil.wait_procs(workers, timeout=_SECONDS_TO_END)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _worker_processes() -> list[psutil.Process]:
    """Worker processes of the cluster that this process started."""
    with suppress(psutil.NoSuchProcess):
        raylets = [process for process in psutil.Process().children() if process.name() == "raylet"]
        return [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    return []


@contextmanager
def _changed(mapping: MutableMapping[str, Any], **values: Any) -> Iterator[None]:
    before = {name: mapping[name] for name in values if name in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del mapping[name]
        mapping.update(before)


@contextmanager
def _kept_signal_handler() -> Iterator[None]:
    # Ray sets a SIGTERM handler, which only the main thread can do.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _no_stderr() -> Iterator[None]:
    # Ray's C++ part reports on stderr that it was told to be quiet.
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
