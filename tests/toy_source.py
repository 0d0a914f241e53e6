"""Functions whose digests the tests know by heart."""

FACTOR = 3


def helper(x, /, *rest, flag: bool = True):
    """Not part of the digest."""
    return [x * FACTOR for _ in rest if flag]  # nor is this


def entry(x, y):
    total = helper(x, y, flag=False)
    with open("nowhere") as stream:
        for index, line in enumerate(stream):
            total += [f"{line!r:>{index}}"] if index else [-1.5e3, None, ..., b"x"]
    return lambda z: {**z, "a": total[1:2]}
