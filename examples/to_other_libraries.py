"""One embedding file in pandas, PyTorch and AnnData, without a conversion.

python examples/to_other_libraries.py [EMBEDDINGS.h5]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from torch.utils.data import DataLoader

import genoembed

GENES = Path(__file__).parent / "data" / "bacterial_genes.fa.gz"


def show(path: Path) -> None:
    """Open the file in each library, and print what is there."""
    with genoembed.open_embeddings(path) as file:
        table = file.to_pandas()
        adata = file.to_anndata()
        dataset = file.to_torch()
    print(f"pandas: {table.shape[0]} rows x {table.shape[1]} features, first {table.index[0]}")
    print(f"anndata: {adata.n_obs} x {adata.n_vars}, columns {', '.join(adata.obs.columns[:3])} ...")
    ids, vectors = next(iter(DataLoader(dataset, batch_size=4)))
    norm = vectors.norm(dim=1).mean()
    print(f"torch: a batch of {tuple(vectors.shape)}, {len(ids)} ids, mean norm {norm:.2f}")


def main(words: list[str]) -> None:
    """Show the file that is named, or embed the example genes."""
    if words:
        show(Path(words[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = genoembed.extract(GENES, layers=28, output=Path(folder, "genes.h5"))
        show(report.output)


if __name__ == "__main__":
    main(sys.argv[1:])
