"""Plain values as bytes and back: what crosses between judge and candidate. Standard library only.

A message is a tree of nodes in pre-order: a tag, then a leaf's bytes or a container's number of children. Every container has a
number, in the order in which containers open, so a second mention is a reference and sharing is kept; a mention of a
container of the message that is answered is a reference too, so the judge gets its own object back. Nothing recurses. The
bytes of a candidate may be anything: the decoder builds plain data of known types from them, or raises `Garbled`; no name is
looked up but in `NAMED`, and no code runs. Instances of subclasses are sent as the plain value that they stand on.
"""

from .changes import contents, replace, same
from .decoder import Decoder
from .encoder import Encoder
from .tags import BYTES, DEPTH, ITEMS, NAME_OF, NAMED, Garbled, Unsendable

__all__ = [
    "BYTES",
    "DEPTH",
    "ITEMS",
    "NAMED",
    "NAME_OF",
    "Decoder",
    "Encoder",
    "Garbled",
    "Unsendable",
    "contents",
    "replace",
    "same",
]
