import bz2
import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from protlm.data.parsing.reader import read_records
from protlm.data.parsing.sources import STDIN, SourceBlocks, expand_inputs, is_protein_file, sniff_format
from protlm.errors import ProtlmError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FASTA = b">a\nMKVLAAGIVGLPLLSACDEFGHIKLMNPQRSTVWY\n>b\nMKW\n"
PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd.compress}
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.fasta"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(params=[1, 2, 7, 1 << 20])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(SourceBlocks, "block_bytes", request.param)
    monkeypatch.setattr(SourceBlocks, "feed_bytes", request.param)


def unpacked(path):
    return b"".join(SourceBlocks(path))


def fault(function, *arguments):
    with pytest.raises(ProtlmError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.usefixtures("block_bytes")
def test_compression_is_told_by_content_not_by_name(write, kind):
    assert unpacked(write(PACK[kind](FASTA), "a.fasta")) == FASTA
    assert unpacked(write(FASTA, "plain.gz")) == FASTA


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.usefixtures("block_bytes")
def test_members_are_joined_and_empty_ones_are_nothing(write, kind):
    pack = PACK[kind]
    assert unpacked(write(pack(b"") + pack(FASTA) + pack(b"") + pack(b">c\n") + pack(b"K\n"))) == FASTA + b">c\nK\n"


@pytest.mark.parametrize("kind", ["gzip", "xz"])
@pytest.mark.usefixtures("block_bytes")
def test_zeros_after_and_between_members_are_padding(write, kind):
    member = PACK[kind](FASTA)
    assert unpacked(write(member + bytes(512) + member + bytes(1024))) == 2 * FASTA


@pytest.mark.usefixtures("block_bytes")
def test_gzip_headers_with_name_and_extra_fields_are_read(write):
    named = io.BytesIO()
    with gzip.GzipFile("a name.fasta", "wb", fileobj=named) as file:
        file.write(FASTA)
    body = gzip.compress(FASTA, mtime=0)[10:]
    extra = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + b"\x06\x00BC\x02\x00ab" + body
    assert unpacked(write(named.getvalue() + extra)) == 2 * FASTA


@pytest.mark.usefixtures("block_bytes")
def test_skippable_zstd_frames_are_skipped_wherever_they_stand(write):
    frame = zstd.compress(FASTA)
    assert unpacked(write(SKIPPABLE_FRAME + frame + SKIPPABLE_FRAME + frame + SKIPPABLE_FRAME)) == 2 * FASTA


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, -4, -1])
def test_data_cut_short_are_an_error_that_names_file_and_kind(write, kind, kept):
    data = PACK[kind](bytes(range(256)) * 40)
    path = write(data[: kept if kept < 0 else int(len(data) * kept)])
    assert fault(unpacked, path) == f"{path}: the {kind} data end too early; copy or download the file again"


@pytest.mark.parametrize("kind", PACK)
def test_no_cut_of_a_file_is_taken_for_a_whole_one(write, kind):
    data = PACK[kind](FASTA)
    for end in range(6, len(data)):
        assert kind in fault(unpacked, write(data[:end]))


@pytest.mark.parametrize("kind", PACK)
def test_flipped_bytes_never_change_the_text_in_silence(write, kind):
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    data = zstd.compress(FASTA, options=checked) if kind == "zstd" else PACK[kind](FASTA)
    num_found = 0
    # The first bytes tell the kind; a gzip header further holds a time and a system that mean nothing.
    for place in range(10, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        path = write(bytes(damaged))
        try:
            assert unpacked(path) == FASTA
        except ProtlmError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 (a flip may also be harmless)
            num_found += 1
    assert num_found > 0.8 * (len(data) - 10)


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("following", [b"rubbish that follows", b"\n>c\nMKV\n", b"<html>", b"x", b"\n\n\nx"])
@pytest.mark.usefixtures("block_bytes")
def test_bytes_after_the_last_member_are_told_as_that(write, kind, following):
    message = fault(unpacked, write(PACK[kind](FASTA) + following))
    assert f"bytes after the end of the {kind} data, which begin '{following.strip()[:1].decode()}" in message


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("following", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.usefixtures("block_bytes")
def test_line_ends_after_the_last_member_are_nothing(write, kind, following):
    assert unpacked(write(PACK[kind](FASTA) + following)) == FASTA


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("kept", [1, 2, 5])
@pytest.mark.usefixtures("block_bytes")
def test_a_second_member_of_which_only_the_beginning_is_left_is_an_error(write, kind, kept):
    assert f"{kind} data" in fault(unpacked, write(PACK[kind](FASTA) + PACK[kind](FASTA)[:kept]))


@pytest.mark.parametrize("kind", ["bzip2", "zstd"])
def test_zeros_are_no_padding_where_the_format_knows_none(write, kind):
    fault(unpacked, write(PACK[kind](FASTA) + bytes(64)))


@pytest.mark.parametrize(
    ("new", "num_bytes"),
    [
        (lambda: zlib.compressobj(1, wbits=31), 1 << 30),
        (zstd.ZstdCompressor, 1 << 30),
        (lambda: lzma.LZMACompressor(preset=0), 1 << 28),
        (lambda: bz2.BZ2Compressor(1), 1 << 28),
    ],
    ids=list(PACK),
)
def test_a_file_that_unpacks_to_far_more_than_itself_takes_little_memory(tmp_path, new, num_bytes):
    path = tmp_path / "bomb"
    compressor, zeros = new(), bytes(1 << 22)
    with path.open("wb") as file:
        for _ in range(num_bytes >> 22):
            file.write(compressor.compress(zeros))
        file.write(compressor.flush())
    tracemalloc.start()
    try:
        lengths = [len(block) for block in SourceBlocks(path)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(lengths) == num_bytes
    assert max(lengths) <= 4 << 20
    assert peak < 30e6


def test_a_frame_that_needs_gigabytes_of_memory_is_refused(write):
    options = {zstd.CompressionParameter.window_log: 30}
    compressor = zstd.ZstdCompressor(options=options)
    path = write(compressor.compress(FASTA) + compressor.flush())
    assert "too much memory" in fault(unpacked, path)


def test_an_xz_file_that_needs_gigabytes_of_memory_is_refused(write):
    data = bytearray(lzma.compress(FASTA))
    header = slice(12, 12 + 4 * (data[12] + 1))
    # The dictionary of its first block is declared as large as the format can say.
    data[header.start + 4] = 40
    data[header.stop - 4 : header.stop] = zlib.crc32(data[header][:-4]).to_bytes(4, "little")
    assert "too much memory" in fault(unpacked, write(bytes(data)))


def archive_of(kind):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("a.fasta", FASTA)
    elif kind == "tar":
        with tarfile.open(fileobj=content, mode="w") as file:
            member = tarfile.TarInfo("a.fasta")
            member.size = len(FASTA)
            file.addfile(member, io.BytesIO(FASTA))
    else:
        content.write(b"\x89HDF\r\n\x1a\n" + bytes(600))
    return content.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "HDF5"])
@pytest.mark.usefixtures("block_bytes")
def test_archives_and_hdf5_are_refused_by_name_packed_or_not(write, kind):
    data = archive_of(kind)
    assert f" {kind} " in fault(unpacked, write(data))
    assert f"gzip data that hold a{'n' if kind == 'HDF5' else ''} {kind}" in fault(
        unpacked, write(gzip.compress(data, mtime=0))
    )
    assert not is_protein_file(write(data))


def test_data_compressed_twice_are_refused(write):
    assert "bzip2 data inside gzip data" in fault(unpacked, write(gzip.compress(bz2.compress(FASTA), mtime=0)))


@pytest.mark.parametrize("data", [FASTA, gzip.compress(FASTA, mtime=0) + bytes(99)])
@pytest.mark.usefixtures("block_bytes")
def test_the_hash_and_the_progress_are_of_the_bytes_on_disk(write, data):
    seen = []
    source = SourceBlocks(write(data), advance=seen.append)
    assert source.sha256 == ""
    assert b"".join(source) == FASTA
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)
    assert source.name == "a.fasta"


@pytest.mark.parametrize(("data", "is_plain"), [(FASTA, True), (gzip.compress(FASTA, mtime=0), False)])
def test_a_source_tells_whether_it_is_compressed_from_the_first_block_on(write, data, is_plain):
    source = SourceBlocks(write(data))
    next(iter(source))
    assert source.is_plain is is_plain


@pytest.mark.parametrize("data", [b"", gzip.compress(b"", mtime=0)])
def test_an_empty_file_has_no_blocks(write, data):
    assert list(SourceBlocks(write(data))) == []


def test_a_name_that_is_no_text_is_written_with_escapes(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.fa")
    with open(path, "wb") as file:
        file.write(FASTA)
    assert SourceBlocks(path).name == "\\xff.fa"
    assert unpacked(path) == FASTA


@pytest.mark.parametrize("data", [FASTA, zstd.compress(FASTA)])
def test_a_dash_is_the_standard_input(data):
    code = (
        "import sys; from protlm.data.parsing.sources import SourceBlocks; source = SourceBlocks('-'); "
        "sys.stdout.buffer.write(b''.join(source) + (source.name + source.sha256).encode())"
    )
    printed = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout
    assert printed == FASTA + b"-" + hashlib.sha256(data).hexdigest().encode()


def test_a_pipe_is_read_like_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for data in (FASTA, gzip.compress(FASTA, mtime=0)):
        writer = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
        writer.start()
        assert expand_inputs([path]).paths == [str(path)]
        source = SourceBlocks(path)
        assert b"".join(source) == FASTA
        # Its parts cannot be read once more.
        assert not source.is_plain
        writer.join()


def test_what_cannot_be_opened_is_an_error_in_one_line(tmp_path):
    assert fault(unpacked, tmp_path / "none") == f"{tmp_path / 'none'}: no such file; check the spelling"
    assert fault(unpacked, tmp_path) == f"{tmp_path}: a folder; expected a file"


def test_inputs_keep_their_order_and_a_folder_is_read_by_name(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.fa", "a.fa.gz", ".hidden.fa"):
        (folder / name).write_bytes(gzip.compress(FASTA, mtime=0) if name.endswith("gz") else FASTA)
    (folder / "README.md").write_bytes(b"text")
    (folder / "sub").mkdir()
    first = tmp_path / "z.fa"
    first.write_bytes(b"not looked at")
    expanded = expand_inputs([first, STDIN, folder])
    assert expanded.paths == [str(first), STDIN, str(folder / "a.fa.gz"), str(folder / "b.fa")]
    assert expanded.left_out == [
        f"{folder / 'README.md'}: text that begins with 'text'",
        f"{folder / 'sub'}: a folder in a folder",
    ]


def test_a_pattern_stands_for_its_matches_unless_a_file_has_that_name(tmp_path):
    names = ["x2.fa", "x1.fa", "x[12].fa", "y.fa"]
    for name in names[:2] + names[3:]:
        (tmp_path / name).write_bytes(FASTA)
    pattern = str(tmp_path / "x[12].fa")
    assert expand_inputs([pattern]).paths == [str(tmp_path / "x1.fa"), str(tmp_path / "x2.fa")]
    (tmp_path / "x[12].fa").write_bytes(FASTA)
    assert expand_inputs([pattern]).paths == [pattern]


def test_inputs_that_lead_nowhere_are_errors(tmp_path):
    link, empty, useless = tmp_path / "link", tmp_path / "empty", tmp_path / "useless"
    link.symlink_to(tmp_path / "gone")
    empty.mkdir()
    useless.mkdir()
    (useless / "notes.txt").write_bytes(b"text")
    for path, message in (
        (tmp_path / "none.fa", "no such file"),
        (tmp_path / "*.none", "no file matches this pattern"),
        (link, f"a link to {tmp_path / 'gone'}, which does not exist"),
        (empty, "an empty folder"),
        (
            useless,
            "a folder without protein files; expected FASTA, UniProtKB or UniRef files in it, "
            "got notes.txt: text that begins with 'text'",
        ),
        ("/dev/null", "a device or a socket"),
    ):
        assert fault(expand_inputs, [path]).startswith(f"{path}: {message}")


def test_a_dangling_link_in_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.fa").write_bytes(FASTA)
    (tmp_path / "b.fa").symlink_to(tmp_path / "gone")
    assert "which does not exist" in fault(expand_inputs, [tmp_path])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FASTA, True),
        (b"\n \r\n>a\nM\n", True),
        (b"#A3M#\n# b\r\n>a\nM\n", True),
        (b"ID   A_B  Reviewed; 1 AA.\n", True),
        (b"<?xml version='1.0'?>\n<!-- <x> -->\n<uniprot xmlns='u'>", True),
        (b"<?xml version='1.0'?><UniRef50 xmlns='u'>", True),
        (b"<html>", False),
        (b"", False),
        (b"name\tlength\n>a\n", False),
        (b"# only a comment", False),
        (b"\n" * 60_000, False),
        (b"\xef\xbb\xbf>a\nM\n", True),
        (b"; a comment\n;\n>a\nM\n", True),
        (b">a\nM\n".decode().encode("utf-16"), False),
    ],
)
def test_protein_files_are_told_by_how_they_begin(write, text, expected):
    assert is_protein_file(write(text)) is expected
    for pack in PACK.values():
        assert is_protein_file(write(pack(text))) is expected


def test_damaged_compressed_data_count_as_a_protein_file_so_that_they_are_reported(write):
    assert is_protein_file(write(b"\x1f\x8b\x08\x00" + b"\xff" * 60))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b">a", "fasta"),
        (b"\n\nID   X", "flatfile"),
        (b"ID\tx", "fasta"),
        (b"", "fasta"),
        (b"\0\1", "fasta"),
        (b"\xff\xfe<\0", "fasta"),
        (b"<uniprot>", "uniprot-xml"),
        (b"<!-- a --><?b?>\n<UniRef\n>", "uniref-xml"),
        (b'<UniRef90 xmlns="u"', "uniref-xml"),
        (b"<!DOCTYPE uniprot [<!ENTITY a 'b'>]><uniprot>", "uniprot-xml"),
    ],
)
def test_the_format_is_told_by_the_first_bytes(head, expected):
    assert sniff_format(head) == expected


def test_xml_of_another_kind_is_an_error_that_names_its_root():
    assert "a.xml: XML with the root element <svg>" in fault(sniff_format, b"<svg lang='en'>", "a.xml")
    assert "no XML root element" in fault(sniff_format, b"<!-- " + b"x" * 70_000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swissprot_sample.fasta.gz", "fasta"),
        ("made_up_uniref.fasta", "fasta"),
        ("made_up.dat", "flatfile"),
        ("made_up_uniprot.xml", "uniprot-xml"),
        ("made_up_uniref50.xml", "uniref-xml"),
        ("swissprot/valid_cluster_5k.fasta.gz", "fasta"),
        ("uniref/uniref100_sample14k.fasta.gz", "fasta"),
        ("flatfile/uniprot_sample.dat.gz", "flatfile"),
        ("flatfile/multi_ex.xml", "uniprot-xml"),
        ("uniref/50_Q9EPS7_Q95604.xml.gz", "uniref-xml"),
        ("uniref/UniRef90_P99999.xml", "uniref-xml"),
    ],
)
def test_files_of_each_format_are_recognised_and_unpacked_as_zlib_does(protein_file, name, expected):
    path = protein_file(name)
    data = path.read_bytes()
    text = unpacked(path)
    assert text == (gzip.decompress(data) if name.endswith("gz") else data)
    assert sniff_format(text[: 1 << 16]) == expected
    assert is_protein_file(path)


CASES = Path(__file__).parents[3] / "data" / "cases"


@pytest.mark.parametrize(
    "text", [b"<!DOCTYPE html>\n<html>", b"<html lang='en'>", b"\n<HTML>", b"<!-- x --><!doctype HTML>"]
)
def test_a_web_page_is_told_by_its_name(text):
    assert "a.fa: a web page (HTML)" in fault(sniff_format, text, "a.fa")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ((CASES / "book.xlsx").read_bytes(), "a spreadsheet"),
        (b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet", "a spreadsheet"),
        (b"PK\x03\x04" + bytes(26) + b"a.fasta", "a zip archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"{\\rtf1\\ansi\n>a\nM}", "a text with formatting"),
    ],
)
def test_documents_are_refused_by_name(write, data, kind):
    assert f"a.fasta: {kind}" in fault(unpacked, write(data))


def test_a_folder_is_read_whatever_its_marks_and_all_else_is_listed_with_the_reason(tmp_path):
    assert expand_inputs([CASES / "folder_bom"]).left_out == []
    for name, data in {
        "a.fa": FASTA,
        "b.xlsx": (CASES / "book.xlsx").read_bytes(),
        "c.html": b"<html>",
        "d.txt": b"",
        "e.bin": b"\0\1",
    }.items():
        (tmp_path / name).write_bytes(data)
    expanded = expand_inputs([tmp_path])
    assert expanded.paths == [str(tmp_path / "a.fa")]
    reasons = ["a spreadsheet", "a web page", "an empty file", "a binary file"]
    assert len(expanded.left_out) == 4
    for reason, told in zip(reasons, expanded.left_out, strict=True):
        assert f": {reason}" in told


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("page.fasta", b"<html>"),
        ("empty.faa.gz", gzip.compress(b"", mtime=0)),
        ("notes.txt", b"my proteins\n>a\nMKV\n"),
        ("wide.txt", b"\xff\xfe" + ">a\nMKV\n".encode("utf-16-le")),
        ("clusters.out", b">a\n>a x\nMKV\n>b\nMKV\n"),
    ],
)
def test_a_file_of_a_folder_that_looks_like_sequences_is_read_and_so_is_an_error(tmp_path, name, data):
    (tmp_path / "a.fa").write_bytes(FASTA)
    (tmp_path / name).write_bytes(data)
    expanded = expand_inputs([tmp_path])
    assert str(tmp_path / name) in expanded.paths
    assert str(tmp_path / name) in fault(lambda paths: list(read_records(*paths)), expanded.paths)
