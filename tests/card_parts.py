"""What tests of cards share."""

HOSTILE = "a|b`c\n---\n<script>alert(1)</script> [x](y)"


ARXIV = ("2506.14440", "1703.01365", "1503.02531")


def table_row(card, name):
    (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return row
