"""VQAScore: the probability that a vision-language model says Yes when asked whether an image shows its prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...judges.loading import ModelSettings
from ...judges.vision import VisionModel, load_vision
from .base import Score
from .vision import BUNDLED_MODEL, VisionScorer


class Template(NamedTuple):
    """A question, with `{}` in place of the prompt, and the answer whose probability is the score."""

    question: str
    answer: str


# from t2v_metrics, for chat models
TEMPLATE = Template('Does this figure show "{}"? Please answer Yes or No.', "Yes")
# the bundled model was trained on captions, each followed by " yes" or " no"
BUNDLED_TEMPLATE = Template("{}", " yes")


class VQAScore(VisionScorer):
    """
    VQAScore ([papers/2404.01291](https://huggingface.co/papers/2404.01291)): the probability that the answer to `Does this figure
    show "PROMPT"? Please answer Yes or No.` begins with `Yes`, spelled so. Scores of two models or two questions are not
    comparable.

    Args:
        vision ([`~judges.vision.VisionModel`]):
            The model.
        template ([`Template`], *optional*):
            Question and answer. If not set, those above.

    Raises:
        `ValueError`: If the question has no place for the prompt.
    """

    name = "vqascore"
    trained_on = "questions about images, as the model's card says; no preferences"
    default = str(BUNDLED_MODEL)

    def __init__(self, vision: VisionModel, template: Template = TEMPLATE):
        super().__init__(vision)
        if "{}" not in template.question:
            raise ValueError(f"The question {template.question!r} has no {{}} where the prompt goes.")
        self.template = template

    @classmethod
    def make(cls, reference: str, settings: ModelSettings) -> "VQAScore":
        """See [`PairScorer`]; the bundled model gets the question that it was trained on."""
        is_bundled = Path(reference).resolve() == BUNDLED_MODEL.resolve()
        vision = load_vision(reference, settings)
        return cls(vision, BUNDLED_TEMPLATE if is_bundled else TEMPLATE)

    def ask(self, prompt: str, image: Image.Image) -> Score:
        """
        See [`VisionScorer`].

        Raises:
            `ValueError`: If the answer is more than one token, so that its probability is not that of the first.
        """
        question, answer = self.template.question.replace("{}", prompt), self.template.answer
        reply = self.vision.probabilities(image, question, [answer])
        data: Mapping[str, Any] = reply.data
        if len(tokens := data["tokens"][answer]) != 1:
            raise ValueError(
                f"{self.vision.name} writes {answer!r} as {len(tokens)} tokens, {tokens}: its tokenizer does not have the word. "
                "Use a model that was trained to answer questions."
            )
        # a server returns only the most likely tokens; others have a probability close to 0
        chance = data["probabilities"].get(tokens[0], 0.0)
        return Score(chance, raw=reply.text, cost=reply.cost, served_model=reply.served_model)
