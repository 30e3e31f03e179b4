"""Check two model folders against each other: a model and its conversion, or one model in two formats."""

from __future__ import annotations

import sys

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.verification.report import VerifySettings, format_report, verify_conversion

USAGE = "verify_conversion.py A B [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (a, b), overrides, file = split_words(argv, USAGE, 2, 2, schema=VerifySettings)
    report = verify_conversion(a, b, load_settings(VerifySettings, overrides, file))
    print(format_report(report))
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
