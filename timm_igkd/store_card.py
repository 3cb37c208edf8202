"""The dataset card of a map store: what the Hub's page and viewer need."""

from pathlib import Path
from typing import Any

from timm_igkd.store_files import write_atomic

_CARD = """---
task_categories: [image-classification]
tags: [integrated-gradients, knowledge-distillation, timm-igkd]
configs:
- config_name: default
  data_files:
  - {{split: {split}, path: data/{split}-*.parquet}}
---
# Integrated-gradients maps of `{teacher}`

One row per image of split `{source_split}` of `{dataset}`: {coverage}. Each map belongs to the image whose decoded RGB
pixels hash to `key`; `map` is 8-bit greyscale, in units of `scale` / {levels}.

| | |
|---|---|
| teacher | `{teacher}`, weights sha256 `{weights}` |
| steps | {steps} |
| baseline, target, output, reduction | {baseline}, {target}, {output}, {reduction} |
| engine | {engine}, {dtype} |
| median / p90 of the absolute convergence delta | {delta_median:.3g} / {delta_p90:.3g} |
| keys hash | `{keys_hash}` |

```python
from timm_igkd import IGOverlay, IGOverlayDataset, MapStore

dataset = IGOverlayDataset(your_dataset, MapStore("path/of/this/folder"), IGOverlay(overlay_prob=0.1))
```

Made by [timm-igkd](https://pypi.org/project/timm-igkd/); method: Sundararajan et al. 2017 (arXiv 1703.01365), overlay:
arXiv 2506.14440.
"""


def write_store_card(out: Path, provenance: dict[str, Any]) -> None:
    """Write README.md beside the shards."""
    options, dataset, numbers = provenance["options"], provenance["dataset"], provenance["statistics"]
    n, total = provenance["n"], dataset["num_images"]
    first_shard = sorted((out / "data").glob("*.parquet"))[0].name
    steps = f"{options['n_steps']}"
    if options["n_steps"] == "auto":
        steps += f", {numbers['mean_steps']:.1f} on average, {numbers['converged']} of {n} images converged"
    card = _CARD.format(
        split=first_shard.rpartition("-of-")[0].rpartition("-")[0],
        source_split=dataset["split"],
        dataset=dataset["name"],
        coverage=f"all {total} images, in order" if n == total else f"a prefix, the first {n} of {total} images",
        teacher=provenance["teacher"]["name"],
        weights=provenance["teacher"]["weights_sha256"],
        steps=steps,
        levels="127, offset 128" if options["reduction"] == "sum" else "255",
        engine=provenance["engine"],
        dtype=provenance["dtype"],
        delta_median=numbers["abs_delta_median"],
        delta_p90=numbers["abs_delta_p90"],
        keys_hash=provenance["keys_hash"],
        **{name: options[name] for name in ("baseline", "target", "output", "reduction")},
    )
    write_atomic(out / "README.md", card.encode())
