"""Publish the student of a run on the Hugging Face Hub, the same as `timm-igkd push-student`.

python hub/push_student.py runs/demo --repo-id user/name
"""

import sys

from timm_igkd.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["push-student", *sys.argv[1:]]))
