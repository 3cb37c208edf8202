"""Write the report of one or several studies from their rows: recipes/RESULTS.md with figures, recipes/RESULTS.html.

python recipes/study_report.py recipes/configs/study_real.yaml recipes/configs/study_check.yaml
python recipes/study_report.py --spread top1 recipes/configs/study_real.yaml    # of a complete study, nothing else
"""

import argparse
from pathlib import Path

from studies import require_report_packages
from studies.config import load_study
from timm_igkd.__main__ import entry
from timm_igkd.cli.exit_codes import run_reporting_errors

_HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Write recipes/RESULTS.md, its figures and recipes/RESULTS.html; bad input is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="YAML", help="the studies, in the order of the report")
    parser.add_argument(
        "--markdown", default=str(_HERE / "RESULTS.md"), help="file to write (default: RESULTS.md beside this script)"
    )
    parser.add_argument(
        "--figures",
        default=str(_HERE / "results" / "figures"),
        help="folder of the Markdown's figures (default: results/figures beside this script)",
    )
    parser.add_argument(
        "--html", default=str(_HERE / "RESULTS.html"), help="page to write (default: RESULTS.html beside this script)"
    )
    parser.add_argument(
        "--spread",
        metavar="OUTCOME",
        help="write nothing; print the sd of its paired differences, pooled over the contrasts: a blind look",
    )
    arguments = parser.parse_args(argv)

    def run() -> None:
        require_report_packages()
        if arguments.spread is not None:
            from studies.results import StudyResults  # only here: its packages are an extra

            for path in arguments.configs:
                config = load_study(path)
                print(f"{config.name}: sd {StudyResults.read(config).spread(arguments.spread):.4f}, {arguments.spread}")
            return
        from studies.report import write_report

        configs = [load_study(path) for path in arguments.configs]
        write_report(configs, arguments.markdown, arguments.html, arguments.configs, arguments.figures)
        print(f"report: {arguments.markdown} and {arguments.html}")

    return run_reporting_errors(run, "study_report")


if __name__ == "__main__":
    entry(main)
