"""A reward by its name: a checkpoint, the rules, or a function of a module; mistakes are named."""

import re
import shutil
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from trl_spatial import SpatialScore
from trl_spatial.rewards import GenEvalReward, SceneRules, load_reward
from trl_spatial.scenes import parse_description, render_scene


MODULE = """
import functools

def redness(prompts, images, **columns):
    return [image.getpixel((0, 0))[0] / 255 for image in images]

class Aesthetics:
    created = 0
    def __init__(self):
        Aesthetics.created += 1
    def __call__(self, prompts, images, **columns):
        return [None] * len(images)

half = functools.partial(redness)
LIMIT = 3
"""


@pytest.fixture
def module_folder(tmp_path, monkeypatch):
    """The current folder, with a module of rewards in it that is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import not_installed_anywhere\n")
    yield tmp_path
    for name in ("my_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scorer(official_checkpoints, processor):
    from trl_spatial.gaussian_reward.modeling import GaussianRewardModel

    folder, _ = official_checkpoints["qwen2_5_vl"]
    torch.manual_seed(0)
    model = GaussianRewardModel.from_backbone(
        folder, reward_token_id=processor.reward_token_id, head_hidden_sizes=(16, 8)
    )
    return SpatialScore(model, processor)


def test_rules():
    assert isinstance(load_reward("rules"), SceneRules)
    assert load_reward("rules").__name__ == "rules"


def test_functions_objects_and_classes_of_a_module(module_folder, images):
    import importlib

    redness = load_reward("my_rewards:redness")
    module = importlib.import_module("my_rewards")
    assert redness is module.redness
    assert load_reward("my_rewards:half") is module.half
    aesthetics = load_reward("my_rewards:Aesthetics")
    assert isinstance(aesthetics, module.Aesthetics) and module.Aesthetics.created == 1
    assert load_reward("trl_spatial.rewards.rules:SceneRules")([""], images[:1]) == [None]


def test_a_checkpoint_in_a_folder(scorer, tmp_path, monkeypatch, prompts, images):
    monkeypatch.chdir(tmp_path)
    scorer.save_pretrained("score@new")  # an @ in the name of a folder is no revision
    for name in ("score@new", str(tmp_path / "score@new")):
        loaded = load_reward(name, device="cpu")
        assert loaded.__name__ == "spatial_score"
        assert loaded(prompts, images) == pytest.approx(scorer(prompts, images), abs=1e-6)
    eager = load_reward("score@new", device="cpu", attn_implementation="eager")
    assert {config._attn_implementation for config in (eager.model.config, eager.model.backbone.config)} == {"eager"}
    assert eager(prompts, images) == pytest.approx(scorer(prompts, images), abs=1e-5)


def test_a_checkpoint_on_the_hub_with_a_revision(scorer, tmp_path, monkeypatch, prompts, images):
    """Oracle: two commits in the Hub's cache, of which one has another head."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--ORG--SpatialScore-7B"
    expected = scorer(prompts, images)
    for branch, commit, shift in (("main", "1" * 40, 0.0), ("v2", "2" * 40, 3.0)):
        folder = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        scorer.save_pretrained(folder)
        if shift:
            loaded = SpatialScore.from_pretrained(folder, device="cpu")
            with torch.no_grad():
                [p for p in loaded.model.parameters() if p.shape == (2,)][-1][0] += shift
            shutil.rmtree(folder)
            loaded.save_pretrained(folder)
    assert load_reward("ORG/SpatialScore-7B", device="cpu")(prompts, images) == pytest.approx(expected, abs=1e-6)
    shifted = load_reward("ORG/SpatialScore-7B@v2", device="cpu")(prompts, images)
    assert shifted == pytest.approx([value + 3 for value in expected], abs=1e-5)


@pytest.mark.parametrize(
    "name", ["rule", "SpatialScore-7B", "./nowhere", "a/b/c", "", "my_rewards:", "/x/y:z", "a/b:c"]
)
def test_an_unknown_reward_names_the_forms(name, module_folder):
    with pytest.raises(
        ValueError, match=r"no reward .*SpatialScore checkpoint .*, `rules`, `module:function`, or .* http://HOST:PORT"
    ):
        load_reward(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:redness", "no module 'nowhere' in .*`module:function`"),
        ("my_rewards.deep:redness", "no module 'my_rewards.deep'"),
        ("my_rewards:greenness", "not a function: the functions of my_rewards are redness, Aesthetics, half"),
        ("my_rewards:LIMIT", "not a function"),
    ],
)
def test_mistakes_in_a_modules_name_are_named(name, message, module_folder):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_what_a_module_itself_lacks_is_not_hidden(module_folder):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere") as raised:
        load_reward("broken_rewards:redness")
    assert "the reward broken_rewards:redness" in raised.value.__notes__[0]
    (module_folder / "wrong_rewards.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError) as raised:
        load_reward("wrong_rewards:redness")
    assert "the reward wrong_rewards:redness" in raised.value.__notes__[0]


def test_geneval_with_a_detector_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_detector.py").write_text(
        "from trl_spatial.rewards import Detection\n"
        "def detect(images):\n"
        "    return [[Detection('person', 0.8, (0, 0, 9, 9)), Detection('person', 0.8, (9, 0, 9, 9))] for _ in images]\n"
        "class Colors:\n"
        "    def __call__(self, crop, name):\n"
        "        return 'red'\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("geneval:my_detector:detect,my_detector:Colors")
    row = [{"class": "person", "count": 2, "color": "red"}]
    assert reward(["x"], [Image.new("RGB", (16, 16))], include=[row], tag=["counting"]) == [1.0]
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        load_reward("geneval:nowhere:detect")


def test_geneval_with_the_judges_of_the_flat_world():
    """As `evaluate images --detector flat --colors flat` judges: exactly, by its own classes."""
    reward = load_reward("geneval-strict:flat,flat")
    prompt = "A red circle is left of a blue square."
    images = [
        render_scene(parse_description(text), seed=1, image_size=96)
        for text in (prompt, prompt.replace("left", "right"))
    ]
    include = [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    assert reward([prompt] * 2, images, include=[include] * 2) == [1.0, 0.0]
    with pytest.raises(ValueError, match="does not know the class 'dog'"):
        reward([prompt], images[:1], include=[[{"class": "dog", "count": 1}]])


def test_a_detector_that_has_to_be_told_gets_the_classes_of_each_image(tmp_path, monkeypatch):
    (tmp_path / "told_detector.py").write_text(
        "from trl_spatial.rewards import Detection\n"
        "class Told:\n"
        "    takes_classes = True\n"
        "    def __call__(self, images, classes):\n"
        "        return [[Detection(name, 0.8, (9 * i, 0, 9 * i + 9, 9)) for i, name in enumerate(names)] for names in classes]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="does not count"):
        reward = load_reward("geneval:told_detector:Told")
    rows = [[{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], [{"class": "cat", "count": 2}]]
    assert reward(["x"] * 2, [Image.new("RGB", (16, 16))] * 2, include=rows) == [1.0, 0.5]


def test_the_documented_detector_of_another_library_works(tmp_path, monkeypatch):
    code = re.search(r"```python\n(    import torch\n.*?)```", GenEvalReward.__doc__, re.DOTALL)[1]
    assert len(code.splitlines()) <= 25
    (tmp_path / "documented_detector.py").write_text(textwrap.dedent(code))

    class FasterRCNN(torch.nn.Module):
        """Answers in torchvision's form, which is not installed here: two people beside each other and a doubtful third."""

        def forward(self, images):
            assert all(image.shape[0] == 3 and image.min() >= 0 and image.max() <= 1 for image in images)
            boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
            return [
                {"labels": torch.ones(3, dtype=torch.long), "scores": torch.tensor([0.8, 0.6, 0.4]), "boxes": boxes}
                for _ in images
            ]

    weights = SimpleNamespace(DEFAULT=SimpleNamespace(meta={"categories": ["__background__", "person"]}))
    detection = ModuleType("torchvision.models.detection")
    detection.FasterRCNN_ResNet50_FPN_V2_Weights = weights
    detection.fasterrcnn_resnet50_fpn_v2 = lambda weights: FasterRCNN()
    models, functional = ModuleType("torchvision.models"), ModuleType("torchvision.transforms.functional")
    models.detection = detection
    functional.to_tensor = lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    for module in (models, functional, ModuleType("torchvision"), ModuleType("torchvision.transforms")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)

    reward = load_reward("geneval:documented_detector:Detector")
    assert reward.counting_threshold == 0.5  # the detector's own, of which GenEval's 0.9 would find none
    images = [Image.new("RGB", (64, 64), "white")] * 2
    rows = [[{"class": "person", "count": count}] for count in (2, 3)]
    two, three = reward(["two people", "three people"], images, include=rows, tag=["counting"] * 2)
    assert two == 1.0 and three < 1.0
    with pytest.raises(ValueError, match="does not know the class 'zebra'"):
        reward(["a zebra"], images[:1], include=[[{"class": "zebra", "count": 1}]])
