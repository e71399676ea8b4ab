"""Runs jobs of the emulator (see __init__.py) in a process of its own: ``worker.py QUESTION ANSWER``."""

import ctypes
import pickle
import sys

import numpy as np


class Piece(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_size_t), ("size", ctypes.c_size_t), ("data", ctypes.c_void_p)]


class Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("total", ctypes.c_size_t),
        ("writable", ctypes.c_int32),
        ("pieces", ctypes.c_int32),
        ("piece", ctypes.POINTER(Piece)),
    ]


def buffer(name, total, pieces, writable):
    table = (Piece * len(pieces))(
        *[(offset, data.nbytes, data.ctypes.data) for offset, data in pieces.items()]
    )
    return Buffer(name.encode(), total, writable, len(pieces), table)


def launch(library, key, inputs, outputs, grid, threadgroup, shapes, dtypes, known):
    """Runs one launch in both orders; returns its outputs."""
    results = []
    for backwards in (0, 1):
        made = {
            name: np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
            for name, shape, dtype in zip(outputs, shapes, dtypes)
        }
        buffers = [buffer(name, *known[name], 0) for name in inputs]
        buffers += [buffer(name, data.nbytes, {0: data}, 1) for name, data in made.items()]
        getattr(ctypes.CDLL(library), f"run_{key}")(
            len(buffers),
            (Buffer * len(buffers))(*buffers),
            (ctypes.c_int32 * 3)(*grid),
            (ctypes.c_int32 * 3)(*threadgroup),
            backwards,
        )
        results.append(made)
    for name in outputs:
        if not np.array_equal(results[0][name], results[1][name]):
            sys.exit(f"{key}: {name} depends on the order of threads: a data race")
    return {
        name: results[0][name].view(dtype).reshape(shape)
        for name, shape, dtype in zip(outputs, shapes, dtypes)
    }


def main(question, answer):
    with open(question, "rb") as f:
        jobs = pickle.load(f)
    replies = []
    for launches, known in jobs:
        reply = {}
        for step in launches:
            made = launch(*step, known)
            reply.update(made)
            known.update(
                {name: (data.nbytes, {0: np.ascontiguousarray(data)}) for name, data in made.items()}
            )
        replies.append(reply)
    with open(answer, "wb") as f:
        pickle.dump(replies, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
