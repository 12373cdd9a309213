"""Self-tests of judges: they find out who does not look, and let pass who does."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from tests.vision_models import save_vision_model
from trl_spatial.endpoints import Answer, BadAnswer
from trl_spatial.judges.flat import FlatDepth, FlatDetector
from trl_spatial.judges.geneval import Detection
from trl_spatial.judges.self_test import JudgeError, check_depth, check_detector, check_vision
from trl_spatial.judges.vision import LocalVision
from trl_spatial.scenes import locate_objects


def reply(text, data=None):
    return Answer(text, data, "judge", 1, 1, 0.0, is_cached=False)


def look(picture, question):
    """The right answer, from the pixels: who stands left is the smaller x."""
    names = [f"{each.color} {each.shape}" for each in sorted(locate_objects(picture), key=lambda each: each.x)]
    text, *options = question.split("\n")
    if "Is there" in text:
        return "Yes" if any(name in text for name in names) else "No"
    if "to the left of" in text:
        first, second = (name.split()[1] for name in names)
        return "Yes" if text.index(first) < text.index(second) else "No"
    wanted = names if "Which of these" in text else [names["right" in text.split("side")[0]].split()[1]]
    return next(option[0] for option in options[:4] if any(option.endswith(name) for name in wanted))


@dataclass
class Judge:
    """Answers with a function of the picture and the question; `chance` gives the one of Yes."""

    answers: object = look
    chance: object = lambda picture, question: 0.9 if look(picture, question) == "Yes" else 0.2
    mass: float = 0.8
    name: str = "my-judge"
    asked: list = field(default_factory=list)

    def answer(self, image, text, *, max_tokens=None, temperature=None, vote=0):
        self.asked.append(text)
        said = self.answers(image, text)
        if said is None:
            raise BadAnswer("nothing", raw="", served_model=None)
        return reply(said)

    def probabilities(self, image, text, spellings):
        self.asked.append(text)
        yes = self.chance(image, text)
        chances = {"Yes": self.mass * yes, " no": self.mass * (1 - yes), "Hello": 1 - self.mass}
        return reply("", {"probabilities": chances, "tokens": {spelling: [spelling] for spelling in spellings}})


@pytest.mark.parametrize("form", ["{}", "**{}**.", "The answer is {}.", "No doubt, yes.\n\nAnswer: {}"])
def test_a_judge_that_looks_passes(form):
    judge = Judge(lambda picture, question: form.format(look(picture, question)))
    if form.startswith("No"):
        judge.answers = lambda picture, question: "Let me see, yes or no, A or D?\n" + look(picture, question)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vision(judge, kinds=("text", "probabilities"))
    assert len(judge.asked) == 14 + 4


def test_right_answers_are_balanced():
    """Whoever always says the same is right half of the time, in each kind of question."""
    judge, right = Judge(), []
    judge.answers = lambda picture, question: right.append(look(picture, question)) or right[-1]
    check_vision(judge)
    assert {answer: right.count(answer) for answer in right} == {"Yes": 4, "No": 4, "A": 3, "D": 3}


def is_choice(question):
    return "\nA. " in question


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda picture, question: look(picture, question) if is_choice(question) else "Yes", "8 times, it always said yes"),
        (lambda picture, question: look(picture, question) if is_choice(question) else "no.", "8 times, it always said no"),
        (lambda picture, question: "C" if is_choice(question) else look(picture, question), "6 times, it always said C"),
        (lambda picture, question: "A cat sits there." if is_choice(question) else "?", "14 answers about two pictures, 0 can be read"),
        (lambda picture, question: None, "14 answers about two pictures, 0 can be read"),
        (lambda picture, question: ("A", "D")[len(question) % 2] if is_choice(question) else
         ("Yes", "No")[len(question.split("?")[0]) % 2], "the same answers about two different pictures"),
    ],
)  # fmt: skip
def test_a_judge_that_does_not_look_is_found_out(answers, message):
    with pytest.raises(JudgeError, match=f"my-judge fails the self-test: .*{message}"):
        check_vision(Judge(answers))


def test_a_weak_judge_is_warned_about():
    """It sees what is there, and takes left for right."""
    swapped = {"Yes": "No", "No": "Yes", "A": "D", "D": "A"}

    def answers(picture, question):
        right = look(picture, question)
        return swapped[right] if "left" in question.split("?")[0] or "side" in question else right

    with pytest.warns(UserWarning, match=r"my-judge is a weak judge: it answers 43% of 14 easy questions"):
        check_vision(Judge(answers))


def test_chances_have_to_move():
    with pytest.raises(JudgeError, match=r"my-judge .* chance of Yes changes by at most 0.0000"):
        check_vision(Judge(chance=lambda picture, question: 0.7), kinds=("probabilities",))
    with pytest.raises(JudgeError, match=r"my-judge .* chances of the two together are 0.0010"):
        check_vision(Judge(mass=0.001), kinds=("probabilities",))
    with pytest.warns(UserWarning, match=r"my-judge is a weak judge: .* changes by -0.70, -0.70"):
        check_vision(
            Judge(chance=lambda *asked: 1.1 - (0.9 if look(*asked) == "Yes" else 0.2)), kinds=("probabilities",)
        )


def test_a_model_of_random_weights_does_not_pass(tmp_path, backbone_folder, monkeypatch):
    monkeypatch.setattr("trl_spatial.judges.vision._MOST_TOKENS", 16)  # what it says has no end
    model = LocalVision(str(save_vision_model(tmp_path, backbone_folder)), device="cpu")
    with pytest.raises(JudgeError, match="fails the self-test: of its 14 answers"):
        check_vision(model)
    with pytest.warns(UserWarning, match="is a weak judge: its chance of Yes changes"):  # by chance, up and down
        check_vision(model, kinds=("probabilities",))


@dataclass
class Finds:
    """A detector that finds what it is told to, once for each side of the picture."""

    label: str | None
    takes_classes: bool = False
    name: str = "my-detector"
    asked: object = None

    def __call__(self, images, classes=None):
        self.asked = classes
        score, boxes = 0.9, [(0, 0, 1, 1), (2, 0, 3, 1)]
        return [[Detection(self.label, score, box) for box in boxes] if self.label else [] for _ in images]


def test_detectors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_detector(FlatDetector())
        check_detector(detector := Finds("person", takes_classes=True))
    assert detector.asked == [["person"]]
    for label in (None, "dog"):
        with pytest.raises(
            JudgeError, match=r"my-detector fails the self-test of detectors. .* does not find the person"
        ):
            check_detector(Finds(label))
    with pytest.warns(UserWarning, match="does not count"):
        check_detector(Finds("person"), counting_threshold=0.95)


def person_is_near(image):
    """Brighter towards the bottom."""
    return np.repeat(np.linspace(0, 255, image.height)[:, None], image.width, axis=1)


def test_depth():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_depth(FlatDepth())
        check_depth(person_is_near)
    with pytest.warns(UserWarning, match="my-depth sees the person .* as farther away than the corner"):
        check_depth(lambda image: 255 - person_is_near(image), "my-depth")
    for wrong, message in (
        (lambda image: np.full((image.height, image.width), 7.0), "the same depth everywhere"),
        (lambda image: person_is_near(image).T, "of shape"),
        (lambda image: 2 * person_is_near(image), "from 0.0 to 510.0"),
        (lambda image: person_is_near(image) * np.nan, "from nan to nan"),
        (lambda image: Image.new("RGB", image.size), "of shape"),
    ):
        with pytest.raises(JudgeError, match=f"my-depth returns .*{message}"):
            check_depth(wrong, "my-depth")
