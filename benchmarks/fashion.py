"""The table of examples/fashion: both searches at equal epochs, on Fashion-MNIST.

    python -m benchmarks.fashion --data fashion_mnist.npz

A DeiT of 6 blocks of width 64 trained for 8 epochs on 12,800 images; every model then gets 6 more epochs, of which a
gate search spends 3 searching. Top-1 on all 10,000 test images.
"""

from __future__ import annotations

from examples.fashion.search import parser, run

from .common import write


def main() -> None:
    args = parser().parse_args()
    write(
        "fashion",
        "python -m benchmarks.fashion --data fashion_mnist.npz",
        args.seed,
        run(args),
        __doc__.split("\n\n")[2],
    )


if __name__ == "__main__":
    main()
