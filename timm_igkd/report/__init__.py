"""What a run tells people: its page, its card, its push."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.report.page import write_report
    from timm_igkd.report.push import push_student

__all__ = ["push_student", "write_report"]

__getattr__, __dir__ = lazy_names(__name__, {"push_student": "push", "write_report": "page"})
