"""Dates written in many ways, and the one way of ISO 8601: a translation whose right answers the standard library knows.

Days are drawn from 1969 to 2068, the hundred years that two digits stand for, and written by ``strftime``. In English, whatever the locale.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

FORMATS = (
    "{d.day} %B %Y", "%B {d.day}, %Y", "%A, %B {d.day}, %Y", "%a {d.day} %b %Y", "%m/%d/%y", "%d.%m.%Y", "{d.day}.{d.month}.%y", "%d-%b-%y",
    "%b {d.day} %Y", "%Y/%m/%d", "%Y%m%d", "the {d.day}. of %B '%y", "%A {d.day}. %b. %Y",
)  # fmt: skip
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FILLING, START, END = 0, 1, 2
ALPHABET = "\0\1\2" + "".join(sorted(set("".join(MONTHS + DAYS) + "0123456789 ,./-'theof")))
FIRST, LAST = datetime.date(1969, 1, 1).toordinal(), datetime.date(2068, 12, 31).toordinal()


def written(day: datetime.date, form: str) -> str:
    """The day in one of ``FORMATS``."""
    for sign, name in (("%A", DAYS[day.weekday()]), ("%B", MONTHS[day.month - 1])):  # strftime's depend on the locale
        form = form.replace(sign, name).replace(sign.lower(), name[:3])
    return day.strftime(form.format(d=day))


def encode(texts: Iterable[str]) -> Tensor:
    """Numbers in ``ALPHABET``, int64 [M, the longest], filled up with 0."""
    rows = [torch.tensor([ALPHABET.index(c) for c in text]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=FILLING)


def decode(numbers: Iterable[int]) -> str:
    """The text of numbers up to ``END``."""
    text = "".join(ALPHABET[int(i)] for i in numbers)
    return text.split(ALPHABET[END])[0].strip("".join(ALPHABET[:3]))


@lru_cache(maxsize=4)
def dates(count: int, seed: int = 0, held_out: bool = False, formats: int = len(FORMATS)) -> tuple[list[str], list[str]]:
    """``count`` days as the first ``formats`` write them, and in ISO 8601. Every fifth day of the calendar is held out, and only there."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint((LAST - FIRST) // 5, (count,), generator=generator) * 5
    number += 4 if held_out else torch.randint(4, (count,), generator=generator)
    forms = torch.randint(formats, (count,), generator=generator)
    days = [datetime.date.fromordinal(FIRST + n) for n in number.tolist()]
    return [written(day, FORMATS[form]) for day, form in zip(days, forms.tolist())], [day.isoformat() for day in days]


def pairs(count: int, seed: int = 0, held_out: bool = False, formats: int = len(FORMATS)) -> tuple[Tensor, Tensor]:
    """``dates`` as numbers: source [M, S], and target [M, T] from ``START`` to ``END``."""
    sources, targets = dates(count, seed, held_out, formats)
    return encode(sources), encode(ALPHABET[START] + text + ALPHABET[END] for text in targets)
