"""The counts of a dataset as `protlm prep` and `protlm inspect` print them."""

from typing import TYPE_CHECKING

from protlm.cli import output

if TYPE_CHECKING:
    from protlm.data.storage.manifest import Manifest


def print_summary(manifest: "Manifest") -> None:
    """Prints the splits as a table on stdout, then all other counts that are not zero."""
    rows = [
        (
            name,
            f"{split.num_records:,}",
            f"{split.num_residues:,}",
            *(f"{split.length_quantiles[quantile]:,}" if split.num_records else "-" for quantile in ("median", "p99")),
        )
        for name, split in manifest.splits.items()
    ]
    output.print_table(("split", "records", "residues", "median length", "p99 length"), rows)
    counts = {
        "duplicates removed, within a split": manifest.duplicates_removed.within_split,
        "duplicates removed, across splits": manifest.duplicates_removed.across_splits,
        **{f"repaired letters, {rule}": count for rule, count in manifest.repairs.items()},
        **{f"rejected records, {reason}": count for reason, count in manifest.rejects.items()},
        **_leaks(manifest),
    }
    if any(counts.values()):
        print()
        output.print_table(("also", "count"), [(name, f"{count:,}") for name, count in counts.items() if count])


def _leaks(manifest: "Manifest") -> dict[str, int]:
    leakage = manifest.leakage
    return {
        **{f"{pair.inner} sequences inside longer ones of {pair.outer}": pair.num_records
           for pair in leakage.substrings or ()},
        **{f"clusters in both {pair.first} and {pair.second}": pair.num_labels for pair in leakage.clusters or ()},
        **{f"families in both {pair.first} and {pair.second}": pair.num_labels for pair in leakage.families or ()},
    }  # fmt: skip


def warn_about(manifest: "Manifest") -> None:
    """Prints a warning line on stderr for everything that a user may not have meant."""
    from protlm.workflows.prep.report_page import warnings_of

    if manifest.rejects:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejects.items())
        output.warn(f"{sum(manifest.rejects.values()):,} records rejected: {counts}")
    for warning in warnings_of(manifest):
        output.warn(warning)
