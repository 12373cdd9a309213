"""Oracles: the engines against each other and against images drawn one at a time; the processes of the machine."""

import atexit
import json
import re
import signal
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import pairwise

import psutil
import pyarrow
import pytest
import torch

from tests import openai_stub as stubs
from tests.launching import Launched
from trl_spatial.endpoints import Spend
from trl_spatial.generation import engines
from trl_spatial.generation.engines import draw_jobs
from trl_spatial.generation.jobs import DrawingError, ImageJob


ray = pytest.importorskip("ray", reason="the engine needs the extra `ray`")

COLORS = ("red", "blue", "green", "yellow")
SCRIPT = """
from pathlib import Path

from accelerate import PartialState

state = PartialState(cpu=True)
from tests.generation.test_engines import FLAT, make_jobs
from trl_spatial.generation.engines import draw_jobs

ids = [image.id for image in draw_jobs(FLAT, make_jobs(200))]
Path(__file__).with_name(f"share{state.process_index}").write_text(" ".join(ids))
"""
FLAT = {"name": "flat", "image_size": 64}


def make_jobs(num_jobs):
    """Two images of each prompt."""
    prompts = [
        f"A {color} circle is left of a {other} square." for color in COLORS for other in COLORS if color != other
    ]
    return [ImageJob(f"{number:04}", prompts[number // 2 % len(prompts)], number) for number in range(num_jobs)]


def collect(images):
    """Id → PNG file, of images of which none comes twice."""
    found = {}
    for image in images:
        assert image.id not in found
        found[image.id] = image.png
    return found


class Hanging:
    """A worker that leaves Ray and then takes ten minutes to exit."""

    def leave(self):
        atexit.register(time.sleep, 600)
        ray.actor.exit_actor()


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores on loopback. No process of it is left at the end, not even a worker that hangs in its exit."""
    this = psutil.Process()
    before = set(this.children(recursive=True))
    with engines._cluster(None, 2):
        yield
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ray.remote(num_cpus=0)(Hanging).remote().leave.remote())
        of_ray = set(this.children(recursive=True)) - before
    assert of_ray and not psutil.wait_procs(of_ray, timeout=120)[1]


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "_Worker" in process.name() else []
    return found


def has_ended(worker):
    """Whether Ray has ended a worker, whose process may hang on exit, on a mutex of Ray's own."""
    states = {actor["Pid"]: actor["State"] for actor in ray._private.state.actors().values()}
    return not worker.is_running() or states.get(worker.pid) == "DEAD"


def test_a_killed_worker_costs_nothing_but_time(cluster):
    spec, jobs = FLAT | {"image_size": 192}, make_jobs(256)
    images = draw_jobs(spec, jobs, engine="ray", num_workers=2, progress=False)
    drawn = [next(images)]
    deadline = time.monotonic() + 120
    while len(running := workers()) < 2:  # the first one may have drawn something before the second one is there
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running[0].send_signal(signal.SIGKILL)
    drawn += images
    assert running[0] not in workers()
    assert {image.id for image in drawn} == {job.id for job in jobs} and len(drawn) == len(jobs)
    local = draw_jobs(spec, jobs[::-1], progress=False)
    assert collect(drawn) == collect(local)


def test_ray_listens_on_loopback_only(cluster):
    listening = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # one that ended meanwhile
            connections = process.net_connections("inet")
            listening |= {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}
    assert listening and {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


def test_two_workers_draw_the_files_of_one_process_with_a_pipeline(cluster, flux_folder):
    spec = {"name": str(flux_folder), "dtype": "float32", "height": 32, "width": 32, "num_inference_steps": 2}
    jobs = make_jobs(12)
    torch.set_num_threads(2)
    try:
        local = list(draw_jobs(spec, jobs, progress=False))
    finally:
        torch.set_num_threads(1)
    shared = list(draw_jobs(spec, jobs[::-1], engine="ray", num_workers=2, progress=False))
    assert collect(local) == collect(shared)
    recipes = [{image.id: image.recipe for image in images} for images in (local, shared)]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_error_ends_the_engine_after_what_is_finished(request, engine):
    options = {}
    if engine == "ray":
        request.getfixturevalue("cluster")
        options = {"engine": "ray", "num_workers": 1}
    jobs = [*make_jobs(40), ImageJob("dog", "a photo of a dog", 0), *make_jobs(200)[40:]]
    others = workers()  # of earlier tests, which may hang on exit
    images = draw_jobs(FLAT, jobs, progress=False, **options)
    finished, running = [next(images).id], [worker for worker in workers() if worker not in others]
    with pytest.raises(DrawingError, match="SceneGenerator could not draw the image dog: ValueError"):
        finished.extend(image.id for image in images)
    if engine == "local":
        assert finished == [job.id for job in jobs[:40]]
    else:  # where a worker may begin with any of the prompts
        assert running and len(finished) == len(set(finished)) < len(jobs)
    deadline = time.monotonic() + 120
    while any(not has_ended(worker) for worker in running):
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


@pytest.mark.parametrize("end", ["error", "cap"])
def test_what_was_paid_for_is_not_lost(cluster, end):
    """Workers end with the prompts that they have begun, in any order. A server draws no more than 30 images before the end is near."""
    is_near = threading.Event()

    def behaviour(request, usual):
        if request.number >= 30:
            assert is_near.wait(120)
        return stubs.error(403, "It is forbidden.") if (end, request.number) == ("error", 29) else usual(request)

    drawn, spend = [], Spend(10.0 if end == "cap" else 1e9)
    with stubs.OpenAIStub(behaviour) as stub:
        spec = {"endpoint": stub.url, "model": "m", "size": "64x64", "price_per_image": 1.0, "concurrency": 1}
        images = draw_jobs(spec, make_jobs(400), engine="ray", num_workers=2, spend=spend, progress=False)
        with pytest.raises(DrawingError, match="forbidden") if end == "error" else nullcontext():
            for image in images:
                drawn.append(image.id)
                spend.add(image.cost)
                if len(drawn) == 10:
                    is_near.set()
        num_drawn = stub.num_calls - (end == "error")  # the request that fails draws nothing
        assert 10 <= len(set(drawn)) == len(drawn) == num_drawn < 400


def test_images_that_kill_their_workers_are_given_up_and_named(cluster):
    attempts = ray.remote(num_cpus=0)(engines._Attempts).remote()
    worker = engines._Worker(json.dumps(FLAT), attempts)
    table = pyarrow.table({"jobs": [json.dumps([asdict(job) for job in make_jobs(2)])]})

    def results():
        found = [pair for part in worker(table) for pair in engines._read_table(part)]
        assert {unit for unit, _ in found} == {"0000"}
        return [result for _, result in found]

    for _ in range(4):  # as often as workers began with it, and none came back
        assert [image.id for image in results()] == ["0000", "0001"]
    (error,) = results()
    assert isinstance(error, DrawingError)
    assert re.search(r"SceneGenerator could not draw the image 0000, 0001: .* died, 4 times", str(error))


def test_after_the_end_only_what_was_begun_is_repeated():
    attempts = engines._Attempts()
    assert attempts.begin("0000") == 1
    assert attempts.close() == ["0000"]
    assert (attempts.begin("0002"), attempts.begin("0000")) == (0, 2)  # the second one after its worker has died


def test_launched_processes_share_the_jobs_and_keep_prompts_together(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with Launched([tmp_path / "script.py"], tmp_path / "log") as launched:
        code, log = launched.wait()
    assert code == 0, log
    shares = [set((tmp_path / f"share{rank}").read_text().split()) for rank in range(2)]
    prompts = {job.id: job.prompt for job in make_jobs(200)}
    assert not shares[0] & shares[1] and shares[0] | shares[1] == prompts.keys()
    assert 80 <= len(shares[0]) <= 120
    # neighbours of the same prompt
    assert all((f"{number:04}" in shares[0]) == (f"{number + 1:04}" in shares[0]) for number in range(0, 200, 2))


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_units_keep_the_images_of_a_prompt_together(size):
    jobs = make_jobs(20)
    units = engines._split(jobs, size)
    assert [job for unit in units for job in unit] == jobs
    assert all(len(unit) <= max(size, 2) for unit in units)
    assert all(unit[0].prompt != other[-1].prompt for other, unit in pairwise(units))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "The engine is 'spark'. Use one of local, ray"),
        ({"num_workers": 2}, "belong to the engine 'ray'"),
        ({"address": "auto"}, "belong to the engine 'ray'"),
        ({"engine": "ray", "num_workers": 0}, "`num_workers` is 0"),
        ({"jobs": make_jobs(1) * 2}, "Two images have the id '0000'"),
        ({"spec": {"name": "flat", "colour": 1}}, "unknown key 'colour'"),
    ],
)
def test_wrong_options_are_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        draw_jobs(**{"spec": FLAT, "jobs": make_jobs(2)} | options)
    assert list(draw_jobs(FLAT, [], engine="ray")) == []
