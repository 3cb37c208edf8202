"""The parts of recipes/study.py, along the way of a number.

config (cells) -> data -> training -> evaluation -> rows -> results (statistics, resampling) -> tables, figures, answers
-> report
"""

from importlib.util import find_spec

from timm_igkd.errors import InputError


def require_report_packages() -> None:
    """Raise InputError, before anything long starts, unless what the report needs is installed."""
    missing = [name for name in ("matplotlib", "scipy", "statsmodels") if find_spec(name) is None]
    if missing:
        raise InputError(f"the study's report needs {missing[0]}; install it with: pip install 'timm-igkd[study]'")
