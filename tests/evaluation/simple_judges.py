"""Judges of tests, named `simple_judges:NAME` on the command line."""

import hashlib

from trl_spatial.judges import geneval


class Guessing:
    """Answers in the form that a question seems to ask for, always the same to the same question about the same image."""

    def __call__(self, image, text):
        number = hashlib.blake2b(text.encode() + image.tobytes()).digest()[0]
        if "<score>" in text:
            return f"<analysis>It is there.</analysis><score>[{number % 2}]</score>"
        if "multiple-choice" in text:
            return "\n".join(f"{'ABCD'[number % 4]}: so it looks" for _ in range(10))
        return "yes" if number % 3 else "no"


def agreeing(image, text):
    return "yes"


def chances(image, text):
    return {"Yes": 0.7, "No": 0.2, "2": 0.1}


def unsure(images):
    """Two persons in every image, neither of them for sure."""
    return [
        [geneval.Detection("person", score, (0, 0, image.width, image.height)) for score in (0.5, 0.4)]
        for image in images
    ]
