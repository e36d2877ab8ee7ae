"""Where the report goes in each kind of metadata, and that the metadata stays valid."""

import json
import struct
from xml.dom import minidom

import numpy as np
import pytest
import tifffile

from xrk import io
from xrk.io import imagej, ome
from xrk.io.description import add_report, find_report, kind_of

REPORT = {"model": "m", "shape": [4, 5], "inner": {"shape": [6]}, "text": "a--b -- \N{DEGREE SIGN} <&>"}
PLAIN = [
    b"",
    b"kV 130, mA 5",
    "Aufnahme \N{LATIN SMALL LETTER A WITH DIAERESIS}".encode(),
    b"caf\xe9 in Latin-1",
    b'{"shape": [2, 3], "a": 1}',
    b'{"broken',
    b"[1, 2]",
    b"<?xml version='1.0'?>\n<MetaData><a>1</a></MetaData>\n",
    b"<OME><BinaryOnly MetadataFile='a'/></OME>",
    b"<OME>&no entity</OME>",
]


@pytest.mark.parametrize("text", PLAIN)
def test_every_description_takes_a_report_and_keeps_its_words(text):
    kind = kind_of(text)
    once, info = add_report(kind, text, "", REPORT)
    assert info == "" and kind_of(once) == kind
    assert find_report(kind, once) == REPORT
    twice, _ = add_report(kind, once, "", {"n": 2})
    assert find_report(kind, twice) == {"n": 2, "input_report": REPORT}
    if text.startswith(b'{"shape'):
        assert json.loads(once) == {"shape": [2, 3], "a": 1, "xrk": REPORT}
    else:
        for line in text.split(b"</")[0].splitlines():
            assert line in once
    if kind_of(text) == "ome" or b"MetaData" in text:
        assert once.rstrip().endswith(text.rstrip()[-4:])
    if b"</" in text and b"&" not in text:
        minidom.parseString(once)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
@pytest.mark.parametrize("description", [None, "words", '{"a": 1}'])
def test_tifffile_reads_a_file_with_a_report(tmp_path, shape, description):
    frames = np.arange(np.prod(shape), dtype="u2").reshape(shape)
    tifffile.imwrite(tmp_path / "in.tif", frames, description=description, metadata=None, photometric="minisblack")
    source = io.read(tmp_path / "in.tif")
    io.write(tmp_path / "out.tif", frames, like=source, report=REPORT)
    assert io.read_report(tmp_path / "out.tif") == REPORT
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), frames)


def test_no_report():
    for text in PLAIN:
        assert find_report(kind_of(text), text) is None
    assert find_report("plain", b'x\n{"xrk": 3}') is None
    assert find_report("plain", b"[" * 100_000) is None
    assert find_report("plain", b'{"a":' * 100_000) is None


@pytest.mark.parametrize("order", "<>")
def test_imagej_entries(order):
    entries = [(b"labl", b"one"), (b"labl", b"two2"), (b"rang", struct.pack(order + "d", 3.5))]
    counts, data = imagej.write(imagej.set_info(entries, "a\N{DEGREE SIGN}", order), order)
    assert counts[0] == 4 + 3 * 8 and sum(counts) == len(data)
    found = imagej.read(counts, data, order)
    assert found[1:] == entries
    assert imagej.get_info(found, order) == "a\N{DEGREE SIGN}"
    assert imagej.get_info(entries, order) == ""
    for bad in [(), (12,), (8, 1), (counts[0], 10**9), (len(data) - len(data) % 8 + 4, 0), counts[:-1]]:
        with pytest.raises(ValueError, match="IJMetadata"):
            imagej.read(bad, data, order)


def test_frames_that_an_imagej_description_states():
    assert imagej.declared_frames(b"ImageJ=1.53\nimages=12\nslices=12") == 12
    assert imagej.declared_frames(b"ImageJ=1.53\nmin=0") == 1
    assert imagej.declared_frames(b"ImageJ=1.53\nimages=" + b"9" * 5000) == 1


def document(year="2016-06", inside="", attributes="", identifier=""):
    space = f"http://www.openmicroscopy.org/Schemas/OME/{year}"
    pixels = f'<Pixels Type="uint16" {attributes}><TiffData IFD="0">{identifier}</TiffData></Pixels>'
    return f'<OME xmlns="{space}" UUID="urn:uuid:1"><Image ID="Image:0">{pixels}</Image>{inside}<ROI ID="ROI:0"/></OME>'


def names(node):
    return [child.localName for child in node.childNodes if child.nodeType == child.ELEMENT_NODE]


def test_ome_annotation_stands_where_the_schema_wants_it():
    root = minidom.parseString(ome.annotate(document(), "{}")).documentElement
    assert names(root) == ["Image", "StructuredAnnotations", "ROI"]
    assert names(root.getElementsByTagName("Image")[0]) == ["Pixels", "AnnotationRef"]
    reference, comment = (root.getElementsByTagName(n)[0] for n in ("AnnotationRef", "CommentAnnotation"))
    assert reference.getAttribute("ID") == comment.getAttribute("ID")


def test_ome_annotations_of_others_stay():
    other = '<StructuredAnnotations><CommentAnnotation ID="Annotation:xrk-0"><Value>v</Value></CommentAnnotation>'
    root = minidom.parseString(ome.annotate(document(inside=other + "</StructuredAnnotations>"), "1")).documentElement
    found = [e.getAttribute("ID") for e in root.getElementsByTagName("CommentAnnotation")]
    assert found == ["Annotation:xrk-0", "Annotation:xrk-1"]
    assert names(root).count("StructuredAnnotations") == 1


def test_ome_before_2016_has_annotations_in_their_own_namespace():
    text = ome.annotate(document("2013-06"), "{}")
    comment = minidom.parseString(text).getElementsByTagNameNS("*", "CommentAnnotation")[0]
    assert comment.namespaceURI == "http://www.openmicroscopy.org/Schemas/SA/2013-06"
    assert ome.annotation(text.decode()) == "{}"


def test_ome_identifier_goes_unless_several_files_share_the_pixels():
    assert b"urn:uuid" not in ome.annotate(document(identifier="<UUID FileName='a.tif'>urn:uuid:1</UUID>"), "{}")
    several = document(identifier="<UUID FileName='b.tif'>urn:uuid:2</UUID>")
    assert ome.annotate(several, "{}").count(b"urn:uuid") == 2


def test_ome_significant_bits():
    assert ome.significant_levels(document(attributes='SignificantBits="12"')) == (0, 4095)
    for attributes in ("", 'SignificantBits="16"', 'SignificantBits="0"', 'SignificantBits="x"'):
        assert ome.significant_levels(document(attributes=attributes)) is None
    assert ome.significant_levels("not xml") is None


def test_hostile_xml():
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb">]><OME><Image ID="1">&b;</Image></OME>'
    deep = "<OME><Image/>" + "<a>" * 5000 + "</a>" * 5000 + "</OME>"
    for text in (bomb, deep):
        assert ome.annotate(text, "{}") is None and ome.annotation(text) is None
        assert ome.significant_levels(text) is None
        assert find_report("ome", add_report("ome", text.encode(), "", REPORT)[0]) == REPORT


def test_of_a_large_ome_document_no_tree_is_made(monkeypatch):
    """A tree takes a hundred times the document's memory, and seconds for each megabyte."""
    wide = document(attributes='SignificantBits="12"', inside="<a/>" * 150_000)
    monkeypatch.setattr(minidom, "parseString", lambda text: pytest.fail("a tree was made"))
    assert ome.significant_levels(wide) == (0, 4095) and ome.annotation(wide) is None
    assert ome.significant_levels(document(attributes='SignificantBits="12"', inside="<a/>" * (1 << 20))) is None
    once, _ = add_report("ome", wide.encode(), "", REPORT)
    assert find_report("ome", once) == REPORT and once.startswith(wide[:-6].encode())
    assert kind_of(once + b" " * (16 << 20)) == "plain" and find_report("ome", once + b" " * (16 << 20)) is None


def test_what_counts_of_an_ome_document():
    """Nothing but elements of these names, whatever their prefix; not comments, and nothing behind damage."""
    for text in ("<a:Pixels xmlns:a='u' {}/>", "<!-- <Pixels Type='uint8'/> --><Pixels {}/>", "<xPixels/><Pixels {}/>"):
        text = "<OME>" + text.format('SignificantBits="10" Type="uint16"') + "</OME>"
        assert ome.significant_levels(text) == (0, 1023) and ome.significant_levels(text[:-1]) is None
    assert ome.significant_levels('<OME><Pixels SignificantBits="10" Type="uint16"/><Pixels/></OME>') is None
    ours = '<CommentAnnotation Namespace="urn:xrk:report">{}</CommentAnnotation>'
    values = "no<b>no</b><s:Value>{<![CDATA[\"a\"]]>:1}</s:Value>no<Value/>no", "<Value>no</Value>"
    text = f"<OME xmlns:s='u'><Value>no</Value>{''.join(ours.format(value) for value in values)}</OME>"
    assert ome.annotation(text) == '{"a":1}' and find_report("ome", text.encode()) == {"a": 1}
