"""
Preference training of two processes, whole and in two parts: a script for `tests.launching.run_processes`.

    dpo_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch
from flux import build_flux_pipeline

from tests.diffusion_grpo.test_dpo_trainer import build_trainer, make_rows
from tests.diffusion_grpo.test_resume import StopAt


# Of 8 pairs, which two processes share evenly, half of an epoch in an update
SETTINGS = {"rows": make_rows(8), "per_device_train_batch_size": 1, "save_steps": 1}


def main(folder: Path) -> None:
    build_trainer(build_flux_pipeline(), folder / "whole", **SETTINGS).train()
    build_trainer(build_flux_pipeline(), folder / "parts", callbacks=[StopAt(3)], **SETTINGS).train()
    build_trainer(build_flux_pipeline(), folder / "parts", **SETTINGS).train(resume_from_checkpoint=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
