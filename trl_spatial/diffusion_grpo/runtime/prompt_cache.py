"""Prompt embeddings, computed once per prompt."""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

from ..policies import DiffusionPolicy
from ..policies.base import NEGATIVE_PREFIX, move_embeds


# Limit for the embeddings on the CPU, in each process
DEFAULT_MAX_BYTES = 8 * 2**30


class PromptCache:
    """
    Encodes each distinct prompt once, on `device`, and keeps its embeddings on the CPU. The text encoders are on the
    device only while they encode. `num_encoded` counts the prompts encoded so far, including the negative one.

    Moving them takes longer than encoding. So when a prompt is missing, as many of those announced with
    [`~PromptCache.expect`] as there is room for are encoded, too.

    Prompts are encoded one by one: in a batch, the last bits of an embedding, and for some families its length, would
    depend on the other prompts, and a resumed run would differ from an uninterrupted one.

    Beyond `max_bytes` on the CPU, the least recently used prompts are dropped, with one warning. A prompt of
    FLUX.1 takes 4 MiB at 512 tokens.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        device: str | torch.device,
        *,
        negative_prompt: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.policy = policy
        self.device = torch.device(device)
        self.negative_prompt = negative_prompt
        self.max_bytes = max_bytes
        self.num_encoded = 0
        self._rows: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._has_warned = False
        self._expected: Iterator[str] = iter(())
        self._move_encoders(torch.device("cpu"))

    def expect(self, prompts: Iterable[str]) -> None:
        """
        Announces the prompts that [`~PromptCache.get`] will be asked for, in order, replacing those announced before. They
        are read only when a prompt has to be encoded, and only as many as fit in `max_bytes`.
        """
        self._expected = iter(prompts)

    def get(self, prompts: list[str], *, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """
        Returns embeddings of prompts, which may repeat: tensors of shape `(len(prompts), ...)` on `device`, by default the
        one they are encoded on, with rows in the order of `prompts`; masks stay on the CPU, where they are read. Rows of
        different lengths are padded with zeros on the right. Embeddings of the negative prompt, if there is one, have the same
        names with the prefix `negative_`, and all their rows share the same memory.
        """
        negative = [] if self.negative_prompt is None else [self.negative_prompt]
        needed = list(dict.fromkeys([*negative, *prompts]))
        if not self._rows.keys() >= set(needed):
            self._encode(needed)
        for prompt in needed:
            self._rows.move_to_end(prompt)
        device = self.device if device is None else device
        embeds = self._gather(prompts, device)
        for name, row in self._gather(negative, device).items():
            embeds[f"{NEGATIVE_PREFIX}{name}"] = row.expand(len(prompts), *row.shape[1:])
        self._evict()
        return embeds

    def _gather(self, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Gathers the embeddings of encoded prompts, a row for each; without prompts, the dictionary is empty."""
        positions = {prompt: position for position, prompt in enumerate(dict.fromkeys(prompts))}  # of distinct prompts
        rows = [self._rows[prompt] for prompt in positions]
        index = torch.tensor([positions[prompt] for prompt in prompts])
        embeds = {
            name: pad_sequence([row[name] for row in rows], batch_first=True) for row in rows[:1] for name in row
        }
        return {name: tensor[index.to(tensor.device)] for name, tensor in move_embeds(embeds, device).items()}

    def _encode(self, needed: list[str]) -> None:
        """Encodes the prompts that are needed now, and as many expected ones as fit along with them."""
        self._move_encoders(self.device)
        try:
            sizes = [self._encode_prompt(prompt) for prompt in needed]
            room = self.max_bytes - sum(sizes)
            while room >= max(sizes) and (prompt := next(self._expected, None)) is not None:
                if prompt not in needed:
                    room -= self._encode_prompt(prompt)
                if room >= 0:
                    self._evict()  # drops prompts that are neither needed nor expected
        finally:
            self._move_encoders(torch.device("cpu"))
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()  # the encoders' memory is in pieces that training could not use

    def _encode_prompt(self, prompt: str) -> int:
        """Encodes a prompt unless it is cached, and returns the size of its embeddings in bytes."""
        if prompt not in self._rows:
            embeds = self.policy.encode_prompt([prompt])
            self._rows[prompt] = {name: tensor[0].cpu() for name, tensor in embeds.items()}
            self._num_bytes += _num_bytes(self._rows[prompt])
            self.num_encoded += 1
        self._rows.move_to_end(prompt)
        return _num_bytes(self._rows[prompt])

    def _move_encoders(self, device: torch.device) -> None:
        for encoder in self.policy.encoders:
            encoder.to(device)

    def _evict(self) -> None:
        while self._num_bytes > self.max_bytes:
            if not self._has_warned:
                warnings.warn(
                    f"Embeddings of {len(self._rows)} prompts take more than `max_bytes={self.max_bytes}`: the least "
                    "recently used ones are dropped, and encoded again when their prompts come back. Raise "
                    "`max_bytes`, or lower `max_sequence_length`."
                )
                self._has_warned = True
            _, row = self._rows.popitem(last=False)
            self._num_bytes -= _num_bytes(row)


def _num_bytes(row: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())
