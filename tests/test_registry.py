"""Things that register themselves by name, and are found."""

import pytest

from rlproxi.registry import Registry

PLUGIN = """
from made_up_home import THINGS
from made_up_home import Base

@THINGS.register("{name}", default={default})
class Thing(Base):
    pass
"""


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A registry of a package with two modules, which register a thing each, and a folder, which is left out."""
    (tmp_path / "made_up_home.py").write_text(
        "from rlproxi.registry import Registry\n"
        "class Base: pass\n"
        "THINGS = Registry('thing', 'made_up_things', 'made_up_home:Base')\n"
    )
    package = tmp_path / "made_up_things"
    (package / "inside").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inside" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (package / "one.py").write_text(PLUGIN.format(name="first", default=True))
    (package / "two.py").write_text(PLUGIN.format(name="second", default=False))
    monkeypatch.syspath_prepend(str(tmp_path))
    import sys

    yield __import__("made_up_home").THINGS
    for name in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[name]


def test_modules_are_discovered_and_one_is_the_default(things):
    assert things.names() == ["first", "second"] and things.default == "first"
    assert things.get("second").__module__ == "made_up_things.two"
    assert things.get("made_up_things.one:Thing") is things.get("first")


@pytest.mark.parametrize(
    "name, words",
    [
        ("secnd", "thing 'secnd' is unknown: did you mean second\\? choose one of first, second, or name a class"),
        ("x", "thing 'x' is unknown: choose one of first, second"),
        ("no_such:Thing", "thing 'no_such:Thing' cannot be imported: ModuleNotFoundError"),
        ("made_up_things.one:Nothing", "cannot be imported: AttributeError"),
        ("pathlib:Path", "thing 'pathlib:Path' is not a subclass of made_up_home.Base"),
    ],
)
def test_what_is_not_there_is_refused_in_words(things, name, words):
    with pytest.raises(ValueError, match=words):
        things.get(name)


def test_a_name_is_given_once(things):
    assert "first" in things.names()
    with pytest.raises(ValueError, match="thing 'first' is registered twice"):
        things.register("first")(object)


def test_without_a_default_there_is_none():
    with pytest.raises(ValueError, match="no thing is registered as the default"):
        _ = Registry("thing", "rlproxi.proximal").default
