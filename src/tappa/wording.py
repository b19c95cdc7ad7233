"""Numbers as people read them: counts with their noun, sizes in memory."""

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def counted(count: int, noun: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def byte_size(count: int) -> str:
    """`640 bytes`, `11.6 MB`: powers of 1000."""
    if count < 1000:
        return counted(count, "byte")
    size, power = float(count), 0
    while size >= 999.95 and power < len(UNITS) - 1:  # what would be shown as 1000.0
        size, power = size / 1000, power + 1
    return f"{size:.1f} {UNITS[power]}"
