"""timm's streaming datasets (`wds/`, `hfids/`) as (image, label) items before their transform.

timm leaves out members of webdataset tars that it cannot read, with a warning that names none: here they are named the
first time and counted. Everything else that cannot be read ends the stream with an error.
"""

import copy
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from PIL import Image
from timm.data import IterableImageDataset

from timm_igkd.data.images import to_rgb
from timm_igkd.data.labels import to_label
from timm_igkd.errors import InputError, first_line
from timm_igkd.hub.errors import without_secrets

_SLOTS = 1 << 20
_MOST_LINES = 10


class StreamReader:
    """Reads a streaming dataset of timm's through the dataset's own reader.

    Args:
        dataset: timm's, of a reader that was not iterated over yet.
        name: what messages call it.
    """

    def __init__(self, dataset: IterableImageDataset, name: str):
        self.dataset, self.name = dataset, name
        self._missed = 0  # by this process, however often each
        # One byte per hash of a name, shared with workers: setting one twice, or at once, counts a member once.
        self._unreadable = torch.zeros(_SLOTS, dtype=torch.bool).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unreadable.share_memory_()  # a copy's is in nobody's memory but its own

    @property
    def num_unreadable(self) -> int:
        """How many members of tars this process and its workers could not read, each counted once."""
        return int(self._unreadable.sum())

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return self._items(self.dataset.reader)

    def first(self) -> tuple[Image.Image, int] | None:
        """Return the first item of an unshuffled pass, None where this process gets none; the dataset stays as it is.

        timm's reader settles its workers when it is iterated over, so a copy is.
        """
        reader = copy.copy(self.dataset.reader)
        reader.is_training = False
        items = self._items(reader)
        try:
            return next(items, None)
        finally:
            items.close()

    def _items(self, reader: Any) -> Generator[tuple[Image.Image, int], None, None]:
        transform, count, missed = self.dataset.target_transform, 0, self._missed

        def name() -> str:
            return f"image {count} of stream {self.name!r}"

        with _telling(self._note):  # in the first pass, in which timm's reader sets itself up for all
            items = iter(reader)
            item = self._next(items, name)
        while item is not None:
            image, label = item
            yield to_rgb(image, name), to_label(label if transform is None else transform(label), name)
            count += 1
            item = self._next(items, name)
        if not count and self._missed > missed:  # in this pass: a worker without a shard gives none either
            raise InputError(
                f"stream {self.name!r} gave no image, timm could read none of its members; expected an image "
                "(.jpg, .png, .webp) and the number of its class (.cls) in each"
            )

    @staticmethod
    def _next(items: Iterator, name: Callable[[], str]) -> Any:
        try:
            return next(items, None)
        except OSError as error:  # of Pillow; with a number: of the network or the disk
            if error.errno is not None:
                raise
            why = without_secrets(first_line(error))
            raise InputError(f"{name()} cannot be read ({why}); repair or remove it") from error

    def _note(self, member: str, place: str, reason: str) -> None:
        self._missed += 1
        slot = xxhash.xxh3_64_intdigest(place.encode()) % _SLOTS
        if not self._unreadable[slot]:
            self._unreadable[slot] = True
            if self.num_unreadable <= _MOST_LINES:
                print(
                    f"timm-igkd: {member} of {self.name!r} cannot be read ({reason}); timm leaves it out",
                    file=sys.stderr,
                )


@contextmanager
def _telling(note: Callable[[str, str, str], None]) -> Iterator[None]:
    """Let webdataset readers of timm's that set themselves up meanwhile tell `note` what they leave out, where and why.

    Where is by the whole address, which no message has: tars of several folders may have one name.
    """
    from timm.data.readers import reader_wds  # not above: it imports webdataset where it is installed

    module: Any = reader_wds
    decode, ignore = module._decode, module.log_and_continue

    def named_decode(sample: dict[str, Any], **options: Any) -> Any:
        try:
            return decode(sample, **options)
        except Exception as error:
            error.add_note(f"{sample['__key__']} in {_tar_name(sample['__url__'])}")
            error.add_note(f"{sample['__key__']} {sample['__url__']}")
            raise

    def tell_and_ignore(error: Exception) -> bool:
        goes_on = ignore(error)  # raises what timm does not ignore
        shard = _shard(error)
        member, place = getattr(error, "__notes__", [_tar_name(shard) if shard else "a part", shard])
        note(member, place, _reason(error))
        return goes_on

    module._decode, module.log_and_continue = named_decode, tell_and_ignore
    try:
        yield
    finally:
        module._decode, module.log_and_continue = decode, ignore


def _shard(error: Exception) -> str:
    """Return the tar that webdataset names in an error, as its last argument or in the text as an open file, or ""."""
    named = [part for part in error.args[1:] if isinstance(part, str)] or re.findall(r" name='(.*)'>$", str(error))
    return named[-1] if named else ""


def _tar_name(shard: str) -> str:
    """Return the tar's own name of a path, an address or a command, which may hold a token behind it."""
    if "://" not in shard and not shard.startswith("pipe:"):
        return os.path.basename(shard)
    named = re.findall(r"[^\s/?&=:'\"]+\.tar\b", shard)
    return named[-1] if named else "a shard"


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no .{error.args[0]}"
    text = getattr(error, "strerror", None) or first_line(Exception(*error.args[:1]))
    return without_secrets(re.sub(r"( @)? <_io\..*", "", text))  # an open file, by its address in memory
