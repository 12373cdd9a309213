"""The commands, a module each. Importing this package sets what their dependencies read from the environment (see
[`~cli.prepare_environment`]) and silences notices of theirs that a user can do nothing about."""

import logging
import warnings

from ..cli import prepare_environment


prepare_environment()  # before torch is imported, by recipes too

# PEFT asks transformers by the old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Logger → a part of the message.
_NOTICES = {
    # PEFT imports bitsandbytes wherever it is installed.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Ids for generating text, which a reward model does not.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # Image processors that diffusers imports for pipelines that take images.
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    # A LoRA of the transformer alone has none for the text encoders.
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
}


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return _NOTICES[record.name] not in str(record.msg)


for _name in _NOTICES:
    logging.getLogger(_name).addFilter(_is_worth_showing)
