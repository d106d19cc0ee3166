"""Keys and values of all sequences in pages of one pool (vLLM's scheme, Kwon et al. 2023, arXiv 2309.06180).

A full page is known by a name: a digest of its tokens, of all tokens before them, of the adapter version that computed
them, and of the request's `cache_salt`: what one tenant asked another cannot find. Sequences with the same beginning
share its pages; a page that nobody uses keeps its content until another needs the room, least recently used first.

Shapes: P pages, K key/value heads, D head dimension.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PAGE_TOKENS = 16


class KVCache:
    """The tensors. `layers[i]`: [P, PAGE_TOKENS, 2 (key, value), K, D]. Page 0 stays zero: it pads page tables."""

    def __init__(self, heads: Mapping[int, tuple[int, int]], *, num_tokens: int, like: Tensor):
        """`heads`: (K, D) of each layer that attends."""
        self.num_pages = 1 + pages_for(num_tokens)
        pages = (self.num_pages, PAGE_TOKENS, 2)
        self.layers = {index: like.new_zeros(*pages, *own) for index, own in heads.items()}

    def clear(self, pages: list[int]) -> None:
        """For a new owner. What a broken adapter left, infinity or NaN, would come through the mask: 0 * NaN is NaN."""
        for layer in self.layers.values() if pages else ():
            layer.index_fill_(0, torch.tensor(pages, device=layer.device), 0)


class PagePool:
    """Which of the pages 1, 2, ... are free, used (by how many sequences) or kept for a known prefix."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, 0, -1))
        self.num_pages = len(self._free)
        self.unclean: list[int] = []  # allocated since the list was last taken
        self._users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused, with a name; least recently used first

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def allocate(self) -> int | None:
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        self.unclean.append(page)
        return page

    def take_unclean(self) -> list[int]:
        taken, self.unclean = self.unclean, []
        return taken

    def find(self, name: bytes) -> int | None:
        """The page of that name, if it is still here. `share` it before the next `allocate`."""
        return self._page_of.get(name)

    def is_used(self, page: int) -> bool:
        return self._users[page] > 0

    def share(self, page: int) -> None:
        self._kept.pop(page, None)
        self._users[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """The page is full and others may use it. The first page of a name keeps it."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def release(self, pages: Iterable[int]) -> None:
        """Later pages of a sequence are given up for reuse before earlier ones: those are shared more often."""
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._name_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def page_name(parent: bytes, tokens: Iterable[int]) -> bytes:
    """`parent` is the name of the page before, or for the first page the sequence's salt."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
