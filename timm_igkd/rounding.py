"""Numbers rounded for a reader."""


def three_digits(value: float) -> str:
    """Return a number to three digits, from 1,000 on a whole one."""
    return f"{value:.3g}" if abs(float(f"{value:.3g}")) < 1000 else f"{round(value):,}"
