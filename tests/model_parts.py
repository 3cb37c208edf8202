"""The smallest of the paper's networks, for tests of loading."""

SMALL = {"drop_blocks": 16}
