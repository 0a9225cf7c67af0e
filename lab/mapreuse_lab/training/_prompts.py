"""The recorded prompts: from installed Debian packages, or downloaded into the cache."""

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mapreuse_lab.training._files import CorpusError, cache_dir

_VOICES = {
    "en": "en_US_f_Allison",
    "fr": "fr_CA_f_June",
    "es": "es_MX_f_Allison",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
ATTRIBUTIONS = {
    "en": "Asterisk core sounds, English: recorded by Allison Smith, © 2003-2010 Allison Smith, CC-BY-SA 3.0",
    "fr": "Asterisk core sounds, French: recorded by June Wallack, © 2006-2008 June Wallack, CC-BY-SA 3.0",
    "es": "Asterisk core sounds, Spanish: recorded by Allison Smith, © 2003-2010 Allison Smith, CC-BY-SA 3.0",
    "it": "Asterisk core sounds, Italian: recorded by Carlo Flora, © 2012 Carlo Flora, CC-BY 3.0",
    "ru": "Asterisk core sounds, Russian: provided by Maxim Topal, © 2010 Maxim, CC-BY 3.0",
}
_SYSTEM = Path("/")
_VERSION = "1.6.1-1"
_SHA256 = {
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-wav": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "asterisk-core-sounds-es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-es-wav": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "asterisk-core-sounds-fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-fr-wav": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "asterisk-core-sounds-it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-it-wav": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "asterisk-core-sounds-ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "asterisk-core-sounds-ru-wav": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}


def read_prompts(language: str) -> list[tuple[str, Path, str]]:
    """(name, path of the wav file, transcript) of every recording of speech, sorted by name.

    Tones and silence, whose whole transcript is in brackets, and recordings without a transcript are left out.

    Raises:
        CorpusError: if the download fails.
    """
    root = _root(language)
    sounds = _voice_dir(root, language)
    prompts = []
    with gzip.open(_transcript_file(root, language), "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            name, separator, text = line.strip().partition(":")
            text = text.strip()
            path = sounds / f"{name.strip()}.wav"
            if line.startswith(";") or not separator or not text or (text[0] in "[(<" and text[-1] in "])>"):
                continue
            if path.is_file():
                prompts.append((name.strip(), path, text))
    return sorted(prompts)


def fetch_packages(packages: list[str], target: Path, purpose: str, remedy: str = "install them") -> Path:
    """Download and unpack Debian packages into a directory, with `apt-get download` and `dpkg-deb`.

    apt verifies the packages by its signed index; packages with a known SHA-256 are verified again. This needs no
    root privileges and does not change the system. Nothing is done if `target` exists.

    Args:
        packages: names of the packages.
        target: the directory; it appears when all packages are unpacked.
        purpose: what needs the packages, for the error message.
        remedy: what the user can do without apt, for the error message.

    Returns:
        `target`.

    Raises:
        CorpusError: if there is no apt, or the download fails.
    """
    if target.exists():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise CorpusError(
            f"{purpose} needs the Debian packages {' and '.join(packages)}, but there is no apt to download them; "
            f"{remedy}"
        )
    print(f"Downloading {', '.join(packages)} with apt-get ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{target.name}-") as work:
        Path(work).chmod(0o755)  # run by root, apt downloads as another user
        _download(packages, Path(work))
        unpacked = Path(work) / "unpacked"
        for archive in sorted(Path(work).glob("*.deb")):
            _verify(archive)
            _run(["dpkg-deb", "-x", str(archive), str(unpacked)], Path(work), f"unpacking {archive.name}")
        if not target.exists():
            unpacked.rename(target)
    return target


def _root(language: str) -> Path:
    """The directory that contains `usr/share/asterisk/sounds/<voice>` and the transcripts: `/`, or in the cache."""
    cached = cache_dir() / f"prompts-{language}"
    for root in (_SYSTEM, cached):
        if _voice_dir(root, language).is_dir() and _transcript_file(root, language).is_file():
            return root
    packages = [f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-wav"]
    remedy = f"install them, or use synthetic speech: make study CORPUS=synthetic:{language}"
    return fetch_packages(packages, cached, f"prompts:{language}", remedy)


def _voice_dir(root: Path, language: str) -> Path:
    return root / "usr/share/asterisk/sounds" / _VOICES[language]


def _transcript_file(root: Path, language: str) -> Path:
    return root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"


def _run(command: list[str], directory: Path, doing: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise CorpusError(f"{doing} failed ({reason}); install the package yourself, or try again later")


def _download(packages: list[str], directory: Path) -> None:
    doing = f"downloading {' and '.join(packages)}"
    try:
        _run(["apt-get", "download", *packages], directory, doing)
    except CorpusError:
        print("apt has no usable package lists; downloading them into the cache ...", file=sys.stderr)
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True)
        private = ["-o", f"Dir::State::Lists={directory}/lists", "-o", f"Dir::Cache={directory}"]
        _run(["apt-get", *private, "update"], directory, "reading the package lists")
        _run(["apt-get", *private, "download", *packages], directory, doing)


def _verify(archive: Path) -> None:
    package, version = archive.name.split("_")[:2]
    if package not in _SHA256:
        return
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if version != _VERSION:
        print(f"{package} is version {version}; the published results used {_VERSION}", file=sys.stderr)
    elif digest != _SHA256[package]:
        raise CorpusError(f"{archive.name}: SHA-256 is {digest}, expected {_SHA256[package]}; try again later")
