"""What tests of images share."""

from timm_igkd.data.images import content_key
from timm_igkd.data.items import read_item


def keys(dataset) -> list[str]:
    return [content_key(read_item(dataset, index)[0]) for index in range(len(dataset))]
