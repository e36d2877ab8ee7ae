"""The few things xrk reads from, and writes into, OME-XML (schemas of 2010 to 2016, openmicroscopy.org)."""

import re
from collections.abc import Callable
from xml.dom import minidom
from xml.parsers import expat

__all__ = ["annotate", "annotation", "significant_levels"]

NAMESPACE = "urn:xrk:report"
MOST_TAGS = 1 << 17  # of a document that is changed: a tree takes about 10 us and 1 kB for each
MOST_READ = 1 << 20  # of one that is read: about 1 us for each


def annotate(text: str, value: str) -> bytes | None:
    """The document with `value` as a CommentAnnotation that every Image refers to; an earlier one is replaced.

    None where the document is no XML, or has no place for an annotation (a file with BinaryOnly metadata), or has
    more than 131072 tags.
    """
    if text.count("<") > MOST_TAGS:
        return None
    try:
        document = _parse(text)
        if document is None or not _elements(document, "Image"):
            return None
        root = document.documentElement
        _remove_annotations(root)
        _add_annotation(document, value)
        _forget_identity(root)
        return document.toxml(encoding="UTF-8")
    except RecursionError:
        return None


def annotation(text: str) -> str | None:
    """The value that `annotate` put in, or None."""
    if NAMESPACE not in text:
        return None
    ours: list[str] | None = None  # the words of its Value
    place = ""

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal ours, place
        if ours is None and _local(name, "CommentAnnotation") and attributes.get("Namespace") == NAMESPACE:
            ours, place = [], "annotation"
        elif place == "annotation" and _local(name, "Value"):
            place = "value"

    def end(name: str) -> None:
        nonlocal place
        if place == "value" and _local(name, "Value"):
            place = "annotation"
        elif place == "annotation" and _local(name, "CommentAnnotation"):
            place = ""

    def words(part: str) -> None:
        if place == "value":
            ours.append(part)

    return "".join(ours) if _walk(text, start, end, words) and ours is not None else None


def significant_levels(text: str) -> tuple[int, int] | None:
    """(0, 2**SignificantBits - 1), where that says less than the type does, and all images of the document agree."""
    if "SignificantBits" not in text:
        return None
    found: set[tuple[int, int] | None] = set()

    def start(name: str, attributes: dict[str, str]) -> None:
        if _local(name, "Pixels"):
            bits = attributes.get("SignificantBits", "")
            container = {"uint8": 8, "uint16": 16}.get(attributes.get("Type", ""), 0)
            known = re.fullmatch(r"[0-9]{1,2}", bits) and 0 < int(bits) < container
            found.add((0, 2 ** int(bits) - 1) if known else None)

    return found.pop() if _walk(text, start) and len(found) == 1 else None


def _walk(text: str, start: Callable, end: Callable | None = None, words: Callable | None = None) -> bool:
    """Calls these of every element's start and end, and of text; False where the document is no XML as OME has it.

    No tree is made, and nothing is called of a document of more than 1048576 tags: a hostile one could have a tree of a
    hundred times its size, and take many seconds.
    """
    if "<!DOCTYPE" in text or text.count("<") > MOST_READ:
        return False
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, words
    try:
        parser.Parse(text.encode("utf-8"), True)
    except (expat.ExpatError, ValueError):
        return False
    return True


def _local(name: str, wanted: str) -> bool:
    """Whether an element has this name, behind whatever prefix."""
    return name.endswith(wanted) and name.rpartition(":")[2] == wanted


def _parse(text: str) -> minidom.Document | None:
    if "<!DOCTYPE" in text:  # OME-XML has none, and its entities could expand without end
        return None
    try:
        return minidom.parseString(text.encode("utf-8"))
    except (expat.ExpatError, ValueError, LookupError):
        return None


def _elements(node: minidom.Node, name: str) -> list[minidom.Element]:
    return node.getElementsByTagNameNS("*", name)


def _text(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text))  # CDATA is Text too


def _add_annotation(document: minidom.Document, value: str) -> None:
    root = document.documentElement
    space = root.namespaceURI or ""
    prefix = f"{root.prefix}:" if root.prefix else ""
    # Up to the schema of 2015-01 annotations have a namespace of their own.
    schema = re.search(r"/OME/(\d{4})-\d{2}$", space)
    separate = schema is not None and int(schema[1]) < 2016
    if separate:
        space, prefix = space.replace("/OME/", "/SA/"), ""

    def add(parent: minidom.Element, name: str, before: minidom.Node | None = None, **attributes: str):
        element = document.createElementNS(space, prefix + name)
        if separate:
            element.setAttribute("xmlns", space)
        for key, attribute in attributes.items():
            element.setAttribute(key, attribute)
        return parent.insertBefore(element, before)

    taken = {element.getAttribute("ID") for element in root.getElementsByTagName("*")}
    name = next(f"Annotation:xrk-{i}" for i in range(len(taken) + 1) if f"Annotation:xrk-{i}" not in taken)
    groups = _elements(root, "StructuredAnnotations")
    # The schema's order of elements: ..., Image, StructuredAnnotations, ROI.
    group = groups[0] if groups else add(root, "StructuredAnnotations", next(iter(_elements(root, "ROI")), None))
    comment = add(group, "CommentAnnotation", ID=name, Namespace=NAMESPACE)
    add(comment, "Value").appendChild(document.createTextNode(value))
    for image in _elements(root, "Image"):
        add(image, "AnnotationRef", ID=name)


def _remove_annotations(root: minidom.Element) -> None:
    for element in _elements(root, "CommentAnnotation"):
        if element.getAttribute("Namespace") == NAMESPACE:
            for reference in _elements(root, "AnnotationRef"):
                if reference.getAttribute("ID") == element.getAttribute("ID"):
                    reference.parentNode.removeChild(reference)
            element.parentNode.removeChild(element)


def _forget_identity(root: minidom.Element) -> None:
    """Drop the unique identifier where the document describes this one file, since the output is another file.

    Both of its places are optional in the schema. Where the pixels lie in several files the identifiers stay: the
    files of such a set find each other by them.
    """
    identifiers = _elements(root, "UUID")
    if len({_text(element).strip() for element in identifiers} | {root.getAttribute("UUID")} - {""}) <= 1:
        for element in identifiers:
            element.parentNode.removeChild(element)
        if root.hasAttribute("UUID"):
            root.removeAttribute("UUID")
