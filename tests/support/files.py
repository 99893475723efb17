"""What a folder holds."""


def contents(folder):
    """Every file below a folder: to see that nothing was changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
