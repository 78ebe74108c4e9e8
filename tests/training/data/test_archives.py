"""Unpacking: what a hostile archive may try, each refused with nothing left behind; and what good ones give."""

import io
import stat
import tarfile
import zipfile

import pytest

from unihema.errors import DatasetError
from unihema.training.data.curation.archives import ArchiveError, ArchiveLimits, unpack, unsafe_members


def write_zip(path, *members, compression=zipfile.ZIP_DEFLATED):
    """Members are (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def zip_info(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def write_tar(path, *members):
    """Members are (TarInfo or name, bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_info(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


HOSTILE_NAMES = ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt", "C:evil.txt"]
HOSTILE_ZIPS = {
    **{name: [(name, b"x")] for name in HOSTILE_NAMES},
    "symbolic link": [(zip_info("link", stat.S_IFLNK | 0o777), b"/etc/passwd")],
    "device or pipe": [(zip_info("pipe", stat.S_IFIFO | 0o644), b"")],
    "control character": [("a\nb.txt", b"x")],
}
HOSTILE_TARS = {
    **{name: [(name, b"x")] for name in HOSTILE_NAMES},
    "link to '/etc/passwd'": [(tar_info("link", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "link to '../../evil'": [(tar_info("a/link", tarfile.SYMTYPE, "../../evil"), b"")],
    "link to 'good.txt'": [("good.txt", b"x"), (tar_info("hard", tarfile.LNKTYPE, "good.txt"), b"")],
    "'null' is a special file": [(tar_info("null", tarfile.CHRTYPE), b"")],
    "'pipe' is a special file": [(tar_info("pipe", tarfile.FIFOTYPE), b"")],
    "occurs twice": [("a.txt", b"x"), ("./a.txt", b"y")],
}


def assert_refused(archive, words, **options):
    folder = archive.parent
    before = sorted(path.relative_to(folder.parent) for path in folder.parent.rglob("*"))
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, folder / "out", **options)
    assert str(archive) in str(caught.value)
    assert all(part in str(caught.value) for part in words), str(caught.value)
    assert sorted(path.relative_to(folder.parent) for path in folder.parent.rglob("*")) == before


@pytest.mark.parametrize("case", HOSTILE_ZIPS)
def test_hostile_zips(tmp_path, case):
    (tmp_path / "in").mkdir()
    archive = write_zip(tmp_path / "in" / "x.zip", *HOSTILE_ZIPS[case])
    words = ["1 unsafe member, so nothing was unpacked", "evil.txt" if case in HOSTILE_NAMES else case]
    assert_refused(archive, words)
    assert len(unsafe_members(archive)) == 1


@pytest.mark.parametrize("case", HOSTILE_TARS)
def test_hostile_tars(tmp_path, case):
    (tmp_path / "in").mkdir()
    archive = write_tar(tmp_path / "in" / "x.tar.gz", *HOSTILE_TARS[case])
    assert_refused(archive, ["unsafe", "evil.txt" if case in HOSTILE_NAMES else case])
    assert len(unsafe_members(archive)) == 1


def test_every_unsafe_member_is_named(tmp_path):
    archive = write_zip(tmp_path / "x.zip", ("good.txt", b"x"), *[(f"../{n}.txt", b"x") for n in range(60)])
    with pytest.raises(
        ArchiveError, match=r"(?s)60 unsafe members.*'\.\./0\.txt' leads out.*'\.\./49\.txt'.*and 10 more"
    ):
        unpack(archive, tmp_path / "out")
    assert len(unsafe_members(archive)) == 60


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_bounded_sizes_and_numbers(tmp_path, write):
    (tmp_path / "in").mkdir()
    members = [(f"{number}.txt", bytes(1000)) for number in range(10)]
    archive = write(tmp_path / "in" / "x.zip" if write is write_zip else tmp_path / "in" / "x.tar.gz", *members)
    assert_refused(archive, ["more than 5 files"], limits=ArchiveLimits(files=5))
    assert_refused(archive, ["more than 4500 bytes"], limits=ArchiveLimits(bytes=4500))
    assert_refused(archive, ["0.txt is larger than 999 bytes"], limits=ArchiveLimits(file_bytes=999))
    with pytest.raises(ArchiveError, match="more than 4500 bytes"):
        unsafe_members(archive, ArchiveLimits(bytes=4500))


def test_sizes_that_lie_are_found_out(tmp_path):
    (tmp_path / "in").mkdir()
    archive = write_zip(tmp_path / "in" / "x.zip", ("big.txt", bytes(100_000)))
    content = archive.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    assert_refused(archive, ["x.zip"], limits=ArchiveLimits(bytes=1000))


def test_claims_that_no_images_make(tmp_path):
    archive = write_zip(tmp_path / "x.zip", ("big.txt", bytes(100_000)))
    content = archive.read_bytes().replace((100_000).to_bytes(4, "little"), (2 << 30).to_bytes(4, "little"))
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match="more than 200 times its size"):
        unsafe_members(archive)


def test_absurd_headers_are_not_read_into_memory(tmp_path):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "x.tar"
    header = tar_info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    header.size = 4 << 30
    archive.write_bytes(header.tobuf() + bytes(2048))
    assert_refused(archive, ["a header of 4294967296 bytes"])


def test_archives_inside_archives_share_the_limits(tmp_path):
    (tmp_path / "in").mkdir()
    inner = write_zip(tmp_path / "inner.zip", ("big.txt", bytes(5000)))
    traversal = write_zip(tmp_path / "traversal.zip", ("../../evil.txt", b"x"))
    archive = write_zip(tmp_path / "in" / "x.zip", ("a/inner.zip", inner.read_bytes()))
    assert_refused(archive, ["unpacks to more than 4000 bytes"], limits=ArchiveLimits(bytes=4000))
    out = unpack(archive, tmp_path / "out")
    assert [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()] == ["a/inner/big.txt"]
    hostile = write_zip(tmp_path / "in" / "y.zip", ("a/inner.zip", traversal.read_bytes()))
    with pytest.raises(ArchiveError, match="evil.txt' leads out"):
        unpack(hostile, tmp_path / "second")
    assert not (tmp_path / "second").exists() and not list(tmp_path.rglob("evil*"))


def test_damaged_and_other_files(tmp_path):
    (tmp_path / "in").mkdir()
    good = write_zip(tmp_path / "good.zip", ("a.txt", b"hello" * 1000), compression=zipfile.ZIP_STORED)
    damaged = tmp_path / "in" / "damaged.zip"
    damaged.write_bytes(good.read_bytes().replace(b"hellohello", b"hellohollo", 1))
    assert_refused(damaged, ["damaged", "Download it again"])
    cut = tmp_path / "in" / "cut.tar.gz"
    cut.write_bytes(write_tar(tmp_path / "good.tar.gz", ("a.txt", bytes(range(256)) * 400)).read_bytes()[:-200])
    assert_refused(cut, ["Download it again"])
    text = tmp_path / "in" / "text.zip"
    text.write_text("<html>404</html>")
    assert_refused(text, ["not a zip or tar archive"])
    rar = tmp_path / "in" / "x.rar"
    rar.write_bytes(b"Rar!")
    assert_refused(rar, [".rar archives are not read", "unpack it yourself"])
    assert_refused(tmp_path / "in" / "gone.zip", ["no such file"])


def test_good_archives(tmp_path):
    members = [("set/a.txt", b"one"), ("set/sub/b.txt", b"two")]
    written = []
    for archive in (write_zip(tmp_path / "x.zip", *members), write_tar(tmp_path / "x.tar.gz", *members)):
        out = unpack(archive, tmp_path / f"out_{archive.suffix}", report=written.append)
        assert {
            path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
        } == dict(members)
        assert unsafe_members(archive) == []
    assert sum(written) == 12
    with pytest.raises(DatasetError, match="is there already"):
        unpack(tmp_path / "x.zip", tmp_path / "out_.zip")
