"""The commands, one module each. Importing this package sets environment variables that their dependencies read (see
[`~cli.prepare_environment`]) and silences notices from those that a user can do nothing about."""

import logging
import warnings

from ..cli import prepare_environment


prepare_environment()  # before torch is imported, also when a recipe imports it

# PEFT still uses the old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Logger → part of the message to silence.
_NOTICES = {
    # PEFT imports bitsandbytes whenever it is installed.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # About ids for text generation, which a reward model does not do.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # About image processors that diffusers imports for pipelines with image inputs.
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    # A LoRA for the transformer alone has no keys for the text encoders.
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
}


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return _NOTICES[record.name] not in str(record.msg)


for _name in _NOTICES:
    logging.getLogger(_name).addFilter(_is_worth_showing)
