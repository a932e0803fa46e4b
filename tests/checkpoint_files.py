"""What a checkpoint of ``shampoo.checkpoint`` is on the disk, written down without its code."""

import hashlib
import json
from pathlib import Path


def reseal(place: Path, step: int = 1) -> None:
    """Makes manifest and marker fit the files, as somebody would who has changed them."""
    names = sorted(path.name for path in place.iterdir() if path.is_file())
    files = {}
    for name in names:
        if name not in ("manifest.json", "complete"):
            content = (place / name).read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.dumps({"format": 1, "step": step, "files": files}).encode()
    (place / "manifest.json").write_bytes(manifest)
    (place / "complete").write_text(f"{step}\n{hashlib.sha256(manifest).hexdigest()}\n")


def make_former(place: Path, step: int) -> None:
    """What it was before there were manifests."""
    (place / "manifest.json").unlink()
    (place / "complete").write_text(f"{step}\n")


def listing(folder: Path) -> list[str]:
    """What is in a folder beside its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")
