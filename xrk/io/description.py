"""Where xrk's report lies inside a file's metadata, and how it is found again.

The report is always one JSON object under the key "xrk", in ASCII:

- no description: it becomes ``{"xrk": ...}``;
- a description that is a JSON object itself (tifffile writes these) gets the key "xrk";
- any other text keeps its words and gets ``{"xrk": ...}`` as a further, last line;
- XML keeps its elements; inside its root, at the end, follows a comment with ``{"xrk": ...}`` on a line of its own;
- an ImageJ file: a further line ``{"xrk": ...}`` in the property Info (Image > Show Info); the description stays;
- an OME file: a CommentAnnotation with the namespace ``urn:xrk:report``, to which every Image of the file refers;
  its Value is the report without the key "xrk".

A report found there already is replaced, and kept inside the new one under "input_report".
"""

import json
import math
import re
from typing import Any

from xrk.io import ome

__all__ = ["add_report", "find_report", "kind_of"]

LARGEST = 1 << 24  # bytes of a text that is looked into


def kind_of(description: bytes) -> str:
    """The family of an ImageDescription: "imagej", "ome" or "plain", as which one of more than 16 MiB counts."""
    if len(description) > LARGEST:
        return "plain"
    text = description.strip(b"\0 \t\r\n")
    if text.startswith(b"ImageJ="):
        return "imagej"
    return "ome" if text.startswith(b"<") and text.endswith(b"OME>") else "plain"


def add_report(kind: str, description: bytes, info: str, report: dict[str, Any]) -> tuple[bytes, str]:
    """The description and ImageJ's Info property, both with the report put in where its kind of file wants it."""
    previous = find_report(kind, description, info)
    report = _plain(report if previous is None else {**report, "input_report": previous})
    line = f'{{"xrk": {_dump(report)}}}'
    if kind == "imagej":
        return description, _append(_without_report(info), line)
    text = description.rstrip(b"\0").decode("utf-8", "surrogateescape")
    annotated = ome.annotate(text, _dump(report)) if kind == "ome" else None
    if annotated is not None:
        return annotated, info
    parsed = _json_object(text)
    if parsed is not None:
        others = json.dumps({key: value for key, value in parsed.items() if key != "xrk"})
        text = line if others == "{}" else f"{others[:-1]}, {line[1:]}"
    elif text.lstrip().startswith("<"):
        text = _comment(_without_report(text), line)
    else:
        text = _append(_without_report(text), line)
    return text.encode("utf-8", "surrogateescape"), info


def find_report(kind: str, description: bytes, info: str = "") -> dict[str, Any] | None:
    """The report in a file's metadata, or None."""
    if len(info if kind == "imagej" else description) > LARGEST:
        return None
    text = info if kind == "imagej" else description.rstrip(b"\0").decode("utf-8", "replace")
    if kind == "ome":
        found = _json_object(ome.annotation(text) or "")
        if found is not None:
            return found
    whole = _json_object(text)
    objects = [whole] if whole is not None else [_json_object(line) for line in reversed(text.splitlines())]
    return next((found["xrk"] for found in objects if found and isinstance(found.get("xrk"), dict)), None)


def _dump(report: dict[str, Any]) -> str:
    # tifffile takes a description that begins with "{" and holds "shape": anywhere for its own, and looks for the
    # frames' shape at its top. The same JSON with one letter escaped is none of that.
    return json.dumps(report, allow_nan=False).replace('"shape":', '"\\u0073hape":')


def _plain(value: Any) -> Any:
    """The value in JSON's own types; what JSON cannot say (NaN, infinity) becomes None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _append(text: str, line: str) -> str:
    return f"{text.rstrip()}\n{line}" if text.strip() else line


def _comment(text: str, line: str) -> str:
    """XML with the line in a comment just before the closing tag, so that its beginning and end stay as they were."""
    # A comment may not hold two hyphens in a row; in JSON they occur in strings only, where one can be escaped.
    comment = "<!-- xrk\n" + line.replace("--", "-\\u002d") + "\n-->"
    closing = re.search(r"</[^<>]*>\s*\Z", text)
    at = closing.start() if closing else len(text)
    return text[:at] + comment + text[at:]


def _without_report(text: str) -> str:
    """The text without the line, or the comment, of an earlier report."""
    text = re.sub(r'<!-- xrk\n\{"xrk": .*\n-->', "", text)
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith('{"xrk": '))
