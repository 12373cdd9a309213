"""The queue by itself: what is joined, what is refused, and that nothing that waits is lost."""

import threading
import time

import pytest

from trl_spatial.serving.batching import Batcher, QueueFullError


class Gate:
    """Scores the length of a prompt, when it is let."""

    def __init__(self):
        self.prepared, self.batches, self.open, self.entered = [], [], threading.Event(), threading.Event()

    def prepare(self, prompts, images):
        self.prepared.append(list(prompts))
        if "damaged" in prompts:
            raise ValueError("no file")
        return list(prompts)

    def score(self, prompts):
        self.batches.append(prompts)
        self.entered.set()
        assert self.open.wait(120)
        if "bad" in prompts:
            raise ValueError("no image")
        return [(len(prompt), 1.0) for prompt in prompts]


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def submit_while_busy(batcher, gate, *requests):
    first = batcher.submit(["first"], [None])
    assert gate.entered.wait(120)
    return [first, *(batcher.submit(list(prompts), [None] * len(prompts)) for prompts in requests)]


def test_what_waits_is_joined_up_to_a_batch(gate):
    batcher = Batcher(gate.prepare, gate.score, max_batch_size=3)
    requests = submit_while_busy(batcher, gate, ["a", "bb"], ["ccc", "dddd"], ["eeeee"])
    assert batcher.num_waiting == 5
    gate.open.set()
    results = [[future.result(120) for future in futures] for futures in requests]
    assert results == [[(5, 1.0)], [(1, 1.0), (2, 1.0)], [(3, 1.0), (4, 1.0)], [(5, 1.0)]]
    assert gate.batches == [["first"], ["a", "bb", "ccc"], ["dddd", "eeeee"]]
    batcher.close()
    assert (batcher.counts.images, batcher.counts.batches, batcher.counts.failures) == (6, 3, 0)
    assert batcher.counts.seconds_per_image > 0


def test_a_full_queue_takes_all_or_nothing(gate):
    batcher = Batcher(gate.prepare, gate.score, max_queue=3)
    submit_while_busy(batcher, gate, ["a", "b"])
    with pytest.raises(QueueFullError, match="2 images are waiting, of at most 3"):
        batcher.submit(["c", "d"], [None, None])
    assert batcher.num_waiting == 2
    batcher.submit(["c"], [None])


def test_a_bad_image_costs_no_other_its_score(gate):
    batcher = Batcher(gate.prepare, gate.score)
    (first,), (good, bad), (other,) = submit_while_busy(batcher, gate, ["good", "bad"], ["other"])
    gate.open.set()
    assert [future.result(120) for future in (first, good, other)] == [(5, 1.0), (4, 1.0), (5, 1.0)]
    with pytest.raises(ValueError, match="no image"):
        bad.result(120)
    batcher.close()
    assert (batcher.counts.images, batcher.counts.failures) == (3, 1)


def test_a_full_batch_is_prepared_while_the_one_before_is_scored(gate):
    batcher = Batcher(gate.prepare, gate.score, max_batch_size=2, max_queue=5)
    first, one, rest, last = submit_while_busy(batcher, gate, ["a"], ["b", "c", "d"], ["e"])
    wait_until(lambda: len(gate.prepared) == 2)
    assert batcher.num_waiting == 5  # what is prepared waits too
    with pytest.raises(QueueFullError, match="5 images are waiting, of at most 5"):
        batcher.submit(["f"], [None])
    time.sleep(0.05)
    assert gate.prepared == [["first"], ["a", "b"]] and gate.batches == [["first"]]  # one batch ahead, not more
    batcher.cancel(rest[:1])
    gate.open.set()
    assert [future.result(120) for future in (*first, *one, *rest[1:], *last)] == [(5, 1.0)] + [(1, 1.0)] * 4
    batcher.close()
    assert gate.batches == [["first"], ["a"], ["c", "d"], ["e"]]  # nobody asked for b any longer
    assert batcher.num_waiting == 0


def test_an_image_that_cannot_be_prepared_costs_no_other_its_score(gate):
    batcher = Batcher(gate.prepare, gate.score, max_batch_size=2)
    (first,), (good, damaged) = submit_while_busy(batcher, gate, ["good", "damaged"])
    gate.open.set()
    assert [future.result(120) for future in (first, good)] == [(5, 1.0), (4, 1.0)]
    with pytest.raises(ValueError, match="no file"):
        damaged.result(120)
    batcher.close()
    assert gate.batches == [["first"], ["good"]]
    assert (batcher.counts.images, batcher.counts.failures) == (2, 1)


def test_closing_finishes_what_waits(gate):
    batcher = Batcher(gate.prepare, gate.score, max_batch_size=1)
    _, (waiting, cancelled) = submit_while_busy(batcher, gate, ["waiting", "nobody asks any more"])
    assert cancelled.cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher.is_closed:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(["late"], [None])
    assert closing.is_alive()
    gate.open.set()
    closing.join(120)
    assert waiting.result(0) == (7, 1.0)
    assert gate.batches == [["first"], ["waiting"]]


@pytest.mark.parametrize("name", ["max_batch_size", "max_queue"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        Batcher(lambda prompts, images: [], lambda prepared: [], **{name: 0})
