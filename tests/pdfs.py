"""PDFs made by hand, so that any byte of them can be wrong."""

import zlib

Objects = dict[int, bytes]


def stream(data: bytes, extra: bytes = b"") -> bytes:
    packed = zlib.compress(data, 9)
    return b"<</Length %d/Filter/FlateDecode%s>>stream\n%s\nendstream" % (len(packed), extra, packed)


def write_pdf(objects: Objects, trailer: bytes = b"") -> bytes:
    """Object 1 is the catalogue."""
    out = bytearray(b"%PDF-1.7\n")
    places = {}
    for number, body in objects.items():
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start, size = len(out), max(objects) + 1
    out += b"xref\n0 %d\n" % size
    for number in range(size):
        kind = b"n" if number in places else b"f"
        out += b"%010d 00000 %s \n" % (places.get(number, 0), kind)
    out += b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start)
    return bytes(out)


def page_objects(*texts: str, title: str = "") -> Objects:
    objects = {1: b"<</Type/Catalog/Pages 2 0 R>>", 3: b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"}
    kids = []
    for i, text in enumerate(texts):
        page, content = 5 + 2 * i, 6 + 2 * i
        lines = b" T* ".join(b"(%s) Tj" % line.encode("cp1252") for line in text.split("\n") if line)
        objects[page] = (
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R>>"
            % content
        )
        objects[content] = stream(b"BT /F1 12 Tf 14 TL 72 720 Td %s ET" % lines if lines else b"")
        kids.append(b"%d 0 R" % page)
    objects[2] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (b" ".join(kids), len(kids))
    objects[4] = b"<</Title(%s)>>" % title.encode("cp1252")
    return objects


def make_pdf(*texts: str, title: str = "") -> bytes:
    """One page per text; its lines are the text's."""
    return write_pdf(page_objects(*texts, title=title), b"/Info 4 0 R")


def bombs() -> dict[str, bytes]:
    """Files that cost far more than their size lets expect."""
    deflate = page_objects("x")
    deflate[6] = stream(b" " * 100_000_000)
    operators = page_objects("x")
    operators[6] = stream(b"BT /F1 12 Tf " + b"(a) Tj " * 1_900_000 + b"ET")
    nested = page_objects("x")
    nested[6] = stream(b"[" * 500_000)
    deep = page_objects("x")
    deep[2] = b"<</Type/Pages/Count 1/Kids" + b"[" * 100_000 + b"5 0 R" + b"]" * 100_000 + b">>"
    cyclic = page_objects("x")
    cyclic[2] = b"<</Type/Pages/Kids[2 0 R 2 0 R 5 0 R]/Count 3>>"
    tree = page_objects("x") | {
        i: b"<</Type/Pages/Kids[%s]/Count 1000000000>>" % (b"%d 0 R " % (i + 1) * 10) for i in range(100, 110)
    }
    tree[2], tree[110] = tree[100], tree[5]
    counted = page_objects("x")
    counted[2] = b"<</Type/Pages/Kids[5 0 R]/Count 2000000000>>"
    twice = page_objects("x")
    inner = zlib.compress(zlib.compress(b"\0" * 200_000_000, 9), 9)
    twice[6] = b"<</Length %d/Filter[/FlateDecode/FlateDecode]>>stream\n%s\nendstream" % (len(inner), inner)
    return {
        "deflate": write_pdf(deflate),
        "deflate twice": write_pdf(twice),
        "operators": write_pdf(operators),
        "nested array": write_pdf(nested),
        "deep page tree": write_pdf(deep),
        "cyclic page tree": write_pdf(cyclic),
        "branching page tree": write_pdf(tree),
        "count": write_pdf(counted),
        "endless objects": b"%PDF-1.7\n" + b"".join(b"%d 0 obj<<>>endobj " % i for i in range(300_000)),
        "garbage": b"%PDF-1.7\n" + bytes(range(256)) * 4000,
        "truncated": write_pdf(page_objects(*["text"] * 20))[:1500],
        "only a header": b"%PDF-1.7\n",
        "stream to itself": b"%PDF-1.5\n1 0 obj<</Type/ObjStm/N 1/First 4/Length 1 0 R>>stream\n1 0 \nendstream\n"
        b"endobj trailer<</Root 1 0 R>>\nstartxref\n9\n%%EOF",
    }
