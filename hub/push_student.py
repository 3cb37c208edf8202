"""Publish the student of a run on the Hugging Face Hub, the same as `timm-igkd push-student`.

python hub/push_student.py runs/demo --repo-id user/name
"""

import sys

from timm_igkd.__main__ import entry


def main() -> int:
    """Publish the student; bad input is one line and exit code 2."""
    from timm_igkd.cli.main import main as command

    return command(["push-student", *sys.argv[1:]])


if __name__ == "__main__":
    entry(main)
