"""The dataset card of a map store and the picture on it: what the Hub's page and viewer need."""

import io
from dataclasses import replace
from pathlib import Path

from huggingface_hub import DatasetCardData
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from timm_igkd.attribution.ig_options import METHOD_NAMES, METHOD_PAPERS
from timm_igkd.data.images import fit_image, heat_image, shorten
from timm_igkd.data.labels import UNLABELED, evenly_spread, readable_names
from timm_igkd.files import write_atomic
from timm_igkd.hub.cards import citations, hub_dataset_id, is_untouched, public_dataset, public_name, render_card
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.row_format import decode_png, rectify
from timm_igkd.maps.scores import Faithfulness, read_score
from timm_igkd.maps.store_files import rows_at, split_in_names

PICTURE = "maps.png"
_COLUMNS, _MOST_PICTURED, _GAP, _CAPTION = 8, 24, 6, 18
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_store_card(out: Path, provenance: Provenance) -> None:
    """Write README.md beside the shards; one that was edited by hand since stays, and that is said."""
    path = out / "README.md"
    if path.exists() and not is_untouched(path.read_text(encoding="utf-8", errors="replace")):
        tqdm.write(f"{path} was edited by hand and stays; delete it for a new card")
        return
    write_atomic(path, dataset_card(provenance, score=read_score(out, provenance)).encode())


def dataset_card(provenance: Provenance, repo_id: str | None = None, score: Faithfulness | None = None) -> str:
    """Return the card of a store.

    Args:
        provenance: of a finished store.
        repo_id: user/name of the dataset on the Hub, whose card shows the picture and loads by name; None: a folder.
        score: how faithful the maps are, where that was measured.
    """
    options, dataset, teacher = provenance.options, provenance.dataset, provenance.teacher
    n, numbers = provenance.n, provenance.statistics
    steps = str(options.n_steps)
    if steps == "auto":
        steps = f"auto: {numbers.mean_steps:.1f} on average; {numbers.converged} of {n} images converged"
    return render_card(
        "dataset_card.md",
        metadata=_metadata(provenance).to_yaml(),
        repo_id=repo_id,
        split=split_in_names(provenance),
        picture=PICTURE if repo_id and options.has_maps else None,
        pictured=min(n, _MOST_PICTURED),
        dataset=replace(dataset, name=public_dataset(dataset.name, dataset.revision)),
        teacher=replace(teacher, name=public_name(teacher.name)),
        coverage=_coverage(provenance),
        num_classes=len(dataset.class_names or ()),
        steps=steps,
        content=options.content,
        levels=127 if options.signed else 255,
        citations=citations(METHOD_PAPERS[options.method]),
        maps=provenance,
        score=score,
    )


def _coverage(provenance: Provenance) -> str:
    """Return which images of the split have rows, in words."""
    n, total, is_part = provenance.n, provenance.dataset.num_images, provenance.dataset.is_part
    if n < total:
        return f"a prefix, the first {n} of {total} {'chosen ' * is_part}images"
    return f"{total} chosen images" if is_part else f"all {total} images, in order"


def _metadata(provenance: Provenance) -> DatasetCardData:
    dataset, split = provenance.dataset, split_in_names(provenance)
    content = provenance.options.content
    source = hub_dataset_id(dataset.name, dataset.revision)
    kind = [METHOD_NAMES[provenance.options.method].lower(), "attribution"] * provenance.options.has_maps
    return DatasetCardData(
        pretty_name=f"{content[0].upper()}{content[1:]} of {public_name(provenance.teacher.name)}",
        task_categories=["image-classification"],
        size_categories=[next((name for most, name in _SIZES if provenance.n < most), "1M<n<10M")],
        source_datasets=[source] if source else None,
        tags=[*kind, "knowledge-distillation", "timm", "timm-igkd"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]}],
    )


def map_picture(out: Path, provenance: Provenance) -> bytes:
    """Return a PNG grid of evenly spread maps with their classes; it shows no image, which is not ours to pass on."""
    names, maps = readable_names(provenance.dataset.class_names or ()), []
    rows = list(rows_at(out, provenance, evenly_spread(provenance.n, _MOST_PICTURED)))
    for row in rows:
        levels = Image.fromarray(decode_png(row["map"]["bytes"]))
        maps.append(fit_image(heat_image(rectify(levels) if provenance.options.signed else levels)))
    width, height = max(m.width for m in maps), max(m.height for m in maps)
    columns = min(_COLUMNS, len(rows))
    cell_x, cell_y = width + _GAP, height + _GAP + _CAPTION
    grid = Image.new("RGB", (columns * cell_x + _GAP, -(-len(rows) // columns) * cell_y + _GAP), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for number, (row, picture) in enumerate(zip(rows, maps, strict=True)):
        x, y = _GAP + number % columns * cell_x, _GAP + number // columns * cell_y
        grid.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        label = row["label"]
        caption = "no label" if label == UNLABELED else names[label] if 0 <= label < len(names) else str(label)
        draw.text((x, y + height + 1), shorten(caption, draw, font, width), (29, 31, 35), font)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
