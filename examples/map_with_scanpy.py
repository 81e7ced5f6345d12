"""From an embedding file to clusters on a map with scanpy: neighbors, UMAP and Leiden.

An embedding file is an AnnData file, so that everything of scanpy works on it. Needs scanpy, igraph and
leidenalg: pip install scanpy igraph leidenalg

    python examples/map_with_scanpy.py [EMBEDDINGS.h5 [MAP.tsv]]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import scanpy as sc

import genoembed

PHAGES = Path(__file__).parent / "data" / "phages.fa"


def embed_windows(folder: Path) -> Path:
    """Embed windows of five phages, a vector each."""
    output = folder / "windows.h5"
    genoembed.extract(PHAGES, layers=28, window=1000, stride=1000, per_window=True, output=output)
    return output


def main(words: list[str]) -> None:
    """Cluster, lay out, and write a table that ``genoembed plot --values`` takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else embed_windows(Path(folder))
        with genoembed.open_embeddings(path) as file:
            adata = file.to_anndata()
    sc.pp.scale(adata)
    sc.pp.pca(adata, n_comps=min(20, min(adata.shape) - 1), random_state=0)
    sc.pp.neighbors(adata, n_neighbors=min(15, adata.n_obs - 1), random_state=0)
    sc.tl.umap(adata, random_state=0)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    print(f"{adata.n_obs} rows in {adata.obs['leiden'].nunique()} clusters")
    print(adata.obs["leiden"].value_counts().to_string())
    if len(words) > 1:
        adata.obs[["leiden"]].to_csv(words[1], sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
