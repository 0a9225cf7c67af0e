"""Helpers that change directories."""


def write(folder, name, contents=b""):
    (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return folder


def without(folder, pattern):
    for file in folder.glob(pattern):
        file.unlink()
    return folder
