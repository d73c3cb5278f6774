from pathlib import Path

import pytest

from fedkl.data.messages import place, short, told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b c.png", "a/b c.png"),
        (r"C:\data\x.png", r"C:\data\x.png"),
        ("Känguru/袋鼠.png", "Känguru/袋鼠.png"),
        ("a\nERROR: all is lost", r"a\nERROR: all is lost"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\udcff.png", r"\udcff.png"),
        ("\u202egpj.png", r"\u202egpj.png"),
    ],
)
def test_a_path_stays_in_its_line_and_shows_every_character(name, expected):
    assert place(name) == place(Path(name)) == expected
    assert short(name) == expected
    assert told(OSError(name)) == f"OSError: {expected}"


def test_of_a_long_path_the_end_is_shown_of_a_long_error_the_beginning():
    path = "x/" * 2000 + "image.png"
    assert place(path).endswith("x/x/image.png")
    assert len(place(path)) == 301
    assert told(ValueError("bad: " + path)).startswith("ValueError: bad: x/x/")
    assert len(told(ValueError(path))) == 313
