"""How an operator finds the process group of a call: operators take the name of a group, not the group."""

from torch.distributed import ProcessGroup, distributed_c10d


def group_name_of(process_group: ProcessGroup | None) -> str:
    """Returns the name by which an operator can look a group up, empty for one process.

    Raises:
        ValueError: An object that is no group, or a group that this process is not in.
    """
    if process_group is None:
        return ""
    if not isinstance(process_group, ProcessGroup):
        raise ValueError(
            f"process_group: expected a torch.distributed.ProcessGroup that this process is in, got {process_group!r}"
        )
    return process_group.group_name if process_group.size() > 1 else ""


def group_of(name: str) -> ProcessGroup:
    """Returns the group of a name."""
    # As torch's functional collectives do; there is no public way from a name to its group.
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group
