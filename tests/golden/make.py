"""Where the golden numbers come from, and how the files here were cut from the full ones.

Origin: Vortex (Zymrael/vortex, commit cb229ae, package vtx 1.0.8; 1.1.0 gives the same bits), sources
unmodified, on a CPU in float32 with random weights, torch 2.13.0. Three parts of it need CUDA and were
replaced: flash-attn by Vortex's own SDPA path, the Triton rotary kernel by torch with the same rounding,
torch.cuda.device by nothing. ``outputs_bf16`` is Vortex's own ``load_checkpoint`` on
``evo2_golden_*.pt``, run in bfloat16; ``logits_fp32compute`` are the same rounded weights evaluated in
float32. ``test_striped_hyena2_vtx.py`` shows the set-up and repeats the comparison live.

The full files hold whole sequences, 19 MB. This script keeps every tensor and every input but fewer
positions, which are listed under ``<input>/positions``; ``weights``, ``inputs``, ``config.yml`` and the
``.pt`` are copied as they are::

    python tests/golden/make.py FULL_FOLDER

where FULL_FOLDER holds ``a_base`` and ``b_1m``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from torch import Tensor

SETS = {"a_base": "evo2_golden_7bstyle.pt", "b_1m": "evo2_golden_40bstyle.pt"}
MAX_POSITIONS = {"outputs": 20, "outputs_bf16": 64}


def cut_positions(tensors: dict[str, Tensor], *, max_positions: int) -> dict[str, Tensor]:
    """Keep evenly spread positions of each input, first and last among them.

    Args:
        tensors: ``<input>/<module>`` whole, ``<input>/<module>_at`` at ``<input>/positions``.
        max_positions: How many to keep of each input.

    Returns:
        ``<input>/<module>`` at ``<input>/positions``.
    """
    kept: dict[str, Tensor] = {}
    for case in sorted({key.split("/")[0] for key in tensors}):
        entries = {key: value for key, value in tensors.items() if key.startswith(f"{case}/")}
        stored = entries.pop(f"{case}/positions", None)
        if stored is None:
            stored = torch.arange(entries[f"{case}/logits"].shape[1])
        chosen = torch.linspace(0, len(stored) - 1, min(max_positions, len(stored))).round().long()
        kept[f"{case}/positions"] = stored[chosen]
        for key, value in entries.items():
            is_whole = value.shape[1] != len(stored)
            picked = value[:, stored[chosen] if is_whole else chosen]
            kept[key.removesuffix("_at")] = picked.contiguous()
    return kept


def main(full: Path) -> None:
    """Write both sets beside this script."""
    here = Path(__file__).parent
    for name, checkpoint in SETS.items():
        folder = here / name
        folder.mkdir(exist_ok=True)
        for copied in ("config.yml", "weights.safetensors", "inputs.safetensors", checkpoint):
            (folder / copied).unlink(missing_ok=True)
            shutil.copyfile(full / name / copied, folder / copied)
        for file, max_positions in MAX_POSITIONS.items():
            tensors = load_file(full / name / f"{file}.safetensors")
            save_file(cut_positions(tensors, max_positions=max_positions), folder / f"{file}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
