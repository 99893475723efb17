"""The content of a folder, and damage to it."""

import json


def contents(folder):
    """The content of every file below a folder, to check that nothing was changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(file, place=-5):
    """Change a bit of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def change(file, **values):
    """Change values of a JSON file; None removes one."""
    known = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))
