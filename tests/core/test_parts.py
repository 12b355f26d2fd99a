"""Parts and recipes: round trips, overrides, coercion, functions as parts, and errors of one line."""

import dataclasses
import functools
import random
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.files import to_yaml
from volvelle.core.parts import (Call, Part, Recipe, annotations_of, apply_overrides, from_config, method, parse_overrides, part, preset,
                                 slots_in, slots_in_dict, to_config, walk)
from volvelle.core.registry import Registry, registry
from volvelle.core.run import RunConfig
from volvelle.core.schedule import Cosine, Schedule, Table
from volvelle.core.tasks import Task


class Filling(Part):
    slot = "test-filling"
    call: ClassVar = ("batch",)

    @classmethod
    def from_function(cls, function, call):
        return function


class Crust(Part):
    slot = "test-crust"


@part("jam")
class Jam(Filling):
    sweet: float = 0.5
    pips: Annotated[int, Field(ge=0, le=10)] = 2
    kind: Literal["plum", "quince"] = "plum"


@part("cheese")
class Cheese(Filling):
    age: int | None = None
    names: tuple[str, ...] = ("brie",)
    with_jam: Filling | None = None


@part("short")
class Short(Crust):
    thickness: float | Schedule = 1.0
    folded: bool = False


@part("test-tart")
class Tart(Recipe):
    wing = "test"
    filling: Filling = Jam()
    crust: Crust | None = Short()
    layers: dict[str, Filling] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    title: str = "tart"


quince = preset("quince", Jam(kind="quince", sweet=0.9))
tart = Tart()


def grate(batch, *, fine: bool = False, holes: int = 3):
    return batch


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 1500
    return text


# ------------------------------------------------------------------------------------------------------------------ values

def test_parts_print_compare_and_hash_by_value():
    assert Jam(sweet=0.5) == Jam() and hash(Jam(sweet=0.5)) == hash(Jam())
    assert Jam(sweet=0.4) != Jam() and Jam() != Cheese()
    assert repr(Jam()) == "Jam(sweet=0.5, pips=2, kind='plum')"
    assert {Tart(notes={"a": 1}), Tart(notes={"a": 1})} == {Tart(notes={"a": 1})}  # dict fields do not break the hash
    with pytest.raises(dataclasses.FrozenInstanceError):
        Jam().sweet = 1.0


def test_recipes_are_changed_like_functions():
    changed = tart(filling="cheese", crust=None)
    assert changed.filling == Cheese() and changed.crust is None and tart.filling == Jam()
    assert tart.override("filling=quince", "filling.pips=4").filling == Jam(0.9, 4, "quince")


def test_coercion_follows_the_annotation():
    jam = tart.override("filling.sweet=1e-6", "filling.pips=3").filling
    assert jam.sweet == 1e-6 and isinstance(jam.sweet, float) and jam.pips == 3  # YAML alone would read 1e-6 as text
    assert tart.override("title=on").title == "on"  # and `on` as True
    assert tart.override("title=1e-6").title == "1e-6"
    assert tart.override("title=[a").title == "[a"
    assert tart.override("crust.folded=on").crust.folded is True
    assert tart.override("filling=cheese", "filling.age=none").filling.age is None
    assert tart.override("filling=cheese", "filling.names=[on, 1e-6]").filling.names == ("on", "1e-6")
    assert tart.override("crust=none").crust is None
    assert tart.override("crust.thickness=2").crust.thickness == 2.0
    assert tart.override("crust.thickness=cosine", "crust.thickness.start=3").crust.thickness == Cosine(start=3.0)
    assert tart.override("notes.a=1", "notes.b=2").notes == {"a": 1, "b": 2}
    assert tart.override("layers.top=jam", "layers.top.pips=1").layers == {"top": Jam(pips=1)}
    assert tart(layers={"top": "jam"}).override("layers.top=none").layers == {}
    assert tart(layers={"top": "jam"}).override("layers.top.pips=7").layers == {"top": Jam(pips=7)}


def test_a_swap_carries_no_old_fields_over():
    assert tart(filling=Jam(pips=9)).override("filling=jam").filling == Jam()
    assert tart(filling=Jam(pips=9)).override("filling=quince").filling.pips == 2


# ------------------------------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("words, says", [
    (["filing=jam"], ["'filing'", "filling"]),
    (["filling.swet=1"], ["filling.swet", "filling.sweet"]),
    (["filling.sweet=much"], ["filling.sweet", "'much'", "float"]),
    (["filling.pips=11"], ["filling.pips", "'11'", "10"]),
    (["filling.pips=2.5"], ["filling.pips", "'2.5'"]),
    (["filling.kind=apple"], ["filling.kind", "'apple'", "plum", "quince"]),
    (["filling=jamm"], ["'jamm'", "filling", "did you mean jam"]),
    (["filling=short"], ["'short'", "filling", "test-crust"]),
    (["filling=none"], ["filling", "jam"]),
    (["filling.sweet.more=1"], ["filling.sweet", "no fields"]),
    (["crust=none", "crust.folded=on"], ["crust.folded", "empty"]),
    (["crust.thickness=thick"], ["crust.thickness", "'thick'", "cosine", "float"]),
    (["layers.top.pips=1"], ["layers.top", "layers.top=…"]),
    (["layers=jam"], ["layers", "'jam'", "mapping"]),
    (["filling"], ["'filling'", "path=value"]),
    (["=3"], ["'=3'"]),
    (["filling=quince", "filling.pips=1", "filling.pips=1"], ["filling.pips", "twice"]),
    (["filling=jam", "filling=jam"], ["filling", "twice"]),
    (["filling=cheese", "filling.names=[a, {"], ["filling.names", "YAML"]),
    (["notes.a=many"], ["notes", "many"]),
])
def test_mistakes_are_one_line(words, says):
    with pytest.raises(UserError) as error:
        tart.override(*words)
    text = one_line(error)
    assert [s for s in says if s not in text] == [], text


def test_number_or_schedule_names_the_bound():
    from volvelle.core.trainable import AdamW

    with pytest.raises(UserError) as error:
        AdamW().override("lr=-1")
    text = one_line(error)
    assert "lr" in text and "'-1'" in text and "0" in text and "greater" in text


def test_a_path_is_given_once_however_it_is_given():
    with pytest.raises(UserError, match="twice"):
        tart.override("title=a", title="b")


@pytest.mark.parametrize("changes, says", [
    (dict(filling=3), ["filling", "3"]), (dict(filling=Short()), ["filling", "test-crust"]), (dict(crst=1), ["crst"]), (dict(title=None), ["title"]),
])
def test_mistakes_from_python_are_one_line(changes, says):
    with pytest.raises(UserError) as error:
        tart(**changes)
    text = one_line(error)
    assert all(s in text for s in says), text


def test_needs_come_from_the_vocabulary():
    with pytest.raises(TypeError, match="vibes"):
        @part("vibes")
        class Vibes(Filling):
            needs = frozenset({"vibes"})


# ------------------------------------------------------------------------------------------------------------- round trips

def number(annotation, minimum=-10**6, maximum=10**6):
    base, *extra = annotation.__args__ if hasattr(annotation, "__metadata__") else (annotation,)
    low, high, above, below = minimum, maximum, None, None
    for info in getattr(annotation, "__metadata__", ()):
        for limit in info.metadata:
            low = getattr(limit, "ge", low) if hasattr(limit, "ge") else low
            high = getattr(limit, "le", high) if hasattr(limit, "le") else high
            above = getattr(limit, "gt", above) if hasattr(limit, "gt") else above
            below = getattr(limit, "lt", below) if hasattr(limit, "lt") else below
    if base is int:
        return st.integers(max(low, above + 1 if above is not None else low), min(high, below - 1 if below is not None else high))
    low = above if above is not None else low
    high = below if below is not None else high
    return st.floats(low, high, exclude_min=above is not None, exclude_max=below is not None, allow_nan=False).map(lambda x: x + 0.0)


def values(annotation, depth: int = 3):
    """A strategy for values of an annotation, parts from the registry included."""
    import types
    import typing

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(a, depth) for a in arguments])
    if annotation is type(None):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return parts(annotation, depth - 1)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Annotated or annotation in (int, float):
        return number(annotation)
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.text(max_size=8)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0], depth), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(a, depth) for a in arguments))
    if origin is dict:
        return st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), values(arguments[1], depth), max_size=2 if depth > 0 else 0)
    if annotation is dict:
        return st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers() | st.booleans(), max_size=2)
    raise NotImplementedError(annotation)


@functools.cache
def known(slot):
    return sorted(registry.table(slot).items())


def parts(slot, depth):
    """Parts of a slot: presets as they are, classes with every field drawn; a part that refuses its own fields is drawn again."""
    table = known(slot)
    if not table:
        return st.nothing()
    if depth <= 0:
        leaf = [v for _, v in table if not isinstance(v, type)] or [v() for _, v in table if not required(v)]
        return st.sampled_from(leaf)
    return st.sampled_from([v for _, v in table]).flatmap(lambda v: made(v, depth) if isinstance(v, type) else st.just(v))


def required(cls):
    return [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


@st.composite
def made(draw, cls, depth):
    hints = annotations_of(cls)
    chosen = draw(st.sets(st.sampled_from(sorted(hints)), max_size=len(hints))) if hints else set()
    chosen |= {f.name for f in required(cls)}
    given = {name: draw(values(hints[name], depth)) for name in sorted(chosen)}
    try:
        return cls(**given)
    except UserError:
        reject()


def recipe_classes():
    registry.load()
    return sorted({type(m.recipe) for m in registry.methods.values()} | {Tart}, key=lambda c: c.__qualname__)


@settings(max_examples=40)
@given(st.data())
def test_any_recipe_round_trips_through_yaml(data):
    cls = data.draw(st.sampled_from(recipe_classes()))
    recipe = data.draw(made(cls, 3))
    text = to_yaml(to_config(recipe))
    again = from_config(Recipe, yaml.safe_load(text))
    assert again == recipe and hash(again) == hash(recipe) and repr(again) == repr(recipe)
    assert to_yaml(to_config(again)) == text


def leaves(value, path=""):
    """path -> text of every field below a part that a person could type."""
    for f in dataclasses.fields(value):
        here, inner = f"{path}.{f.name}".lstrip("."), getattr(value, f.name)
        annotation = annotations_of(type(value))[f.name]
        if isinstance(inner, Part):
            yield here, inner.part_name, True
            yield from leaves(inner, here)
        elif inner is None:
            yield here, "none", False
        elif isinstance(inner, bool | int | float) or (isinstance(inner, str) and not slots_in(annotation)):
            yield here, str(inner), False
        elif isinstance(inner, dict) and slots_in_dict(annotation):
            for key, item in inner.items():
                yield f"{here}.{key}", item.part_name, True
                yield from leaves(item, f"{here}.{key}")


@settings(max_examples=40)
@given(st.data())
def test_overrides_rebuild_any_recipe_in_any_order(data):
    """Typing every field of a recipe as an override gives that recipe, whatever the order of the words."""
    recipe = data.draw(made(Tart, 3))
    recipe = recipe.replace(title="plain", filling=recipe.filling if not isinstance(recipe.filling, Cheese) else recipe.filling.replace(names=("brie",)))
    words = [f"{p}={v}" for p, v, _ in leaves(recipe)] + [f"notes.{k}={v}" for k, v in recipe.notes.items()]
    if any("names" in w for w in words) or any(isinstance(p, Cheese) and p.names != ("brie",) for _, p in walk(recipe)):
        return
    if any(isinstance(p, Table) for _, p in walk(recipe)):
        return
    order = data.draw(st.permutations(words))
    made_again = tart.override(*order)  # names new to a mapping stand in the order in which they were given
    assert made_again.replace(notes=dict(sorted(made_again.notes.items())), layers=dict(sorted(made_again.layers.items()))) == \
        recipe.replace(notes=dict(sorted(recipe.notes.items())), layers=dict(sorted(recipe.layers.items())))


def test_overrides_are_order_free():
    words = ["filling=cheese", "filling.age=4", "filling.with_jam=quince", "filling.with_jam.pips=7", "crust.thickness=cosine", "crust.thickness.period=9",
             "layers.a=jam", "layers.a.sweet=2", "title=x"]
    expected = tart.override(*words)
    assert expected.filling.with_jam == Jam(0.9, 7, "quince") and expected.crust.thickness.period == 9
    for seed in range(40):
        shuffled = list(words)
        random.Random(seed).shuffle(shuffled)
        assert tart.override(*shuffled) == expected


def test_every_registered_method_round_trips():
    registry.load()
    for found in registry.methods.values():
        assert from_config(Recipe, yaml.safe_load(to_yaml(to_config(found.recipe)))) == found.recipe, found.key


# --------------------------------------------------------------------------------------------------------------- functions

def test_a_function_is_a_part():
    recipe = tart(filling=grate)
    assert isinstance(recipe.filling, Call) and recipe.filling.portable
    assert recipe == tart(filling=grate) and recipe != tart


def test_keyword_parameters_are_fields():
    target = f"{__name__}:grate"
    import sys

    sys.modules.setdefault(__name__, sys.modules[__name__])
    recipe = tart.override(f"filling={target}", "filling.fine=on", "filling.holes=7")
    assert recipe.filling.kwargs == {"fine": True, "holes": 7}
    again = from_config(Recipe, yaml.safe_load(to_yaml(to_config(recipe))))
    assert again == recipe
    for word, says in (("filling.wide=1", "wide"), ("filling.holes=some", "'some'")):
        with pytest.raises(UserError) as error:
            tart.override(f"filling={target}", word)
        assert says in one_line(error)


@pytest.mark.parametrize("target, says", [
    ("no_such_module_xyz:f", "no_such_module_xyz"), ("json:no_such", "no_such"), ("json:decoder", "not a function"), ("json:dumps", "(batch)"),
    ("math:hypot", "math:hypot"),
])
def test_functions_that_do_not_fit_are_one_line(target, says):
    with pytest.raises(UserError) as error:
        tart.override(f"filling={target}")
    assert says in one_line(error)


def test_functions_with_other_parameters_are_refused():
    with pytest.raises(UserError, match=r"takes \(batch, extra\); a test-filling function takes \(batch\)"):
        tart(filling=lambda batch, extra: batch)


class Grater:
    def __call__(self, batch):
        return batch

    def grate(self, batch):
        return batch


@pytest.mark.parametrize("function", [
    lambda batch: batch, functools.partial(grate, fine=True), Grater(), Grater().grate,
], ids=["lambda", "partial", "object", "bound method"])
def test_what_cannot_be_found_again_is_marked(function):
    """Anything callable runs, but only what its name leads back to counts as portable."""
    recipe = tart(filling=function)
    assert not recipe.filling.portable
    data = yaml.safe_load(to_yaml(to_config(recipe)))
    assert data["filling"]["unportable"] is True and data["filling"]["source"]
    with pytest.raises(UserError, match="resume=path"):
        from_config(Recipe, data)


# ---------------------------------------------------------------------------------------------------------------- registry

def test_names_are_not_given_away_twice():
    found = Registry(loaded=True)
    found.add_part(Filling, "jam", Jam)
    found.add_part(Filling, "jam", Jam)  # the same again is harmless
    with pytest.raises(UserError, match="twice"):
        found.add_part(Filling, "jam", Cheese)
    found.add_part(Filling, "sweet", Jam(sweet=1.0))
    found.add_part(Filling, "sweet", Jam(sweet=1.0))
    with pytest.raises(UserError, match="twice"):
        found.add_part(Filling, "sweet", Jam(sweet=2.0))
    with pytest.raises(UserError, match="twice"):
        found.add_part(Filling, "jam", Jam(sweet=2.0))
    found.add_part(Crust, "jam", Short)  # another slot, another table


@pytest.fixture
def two_wings():
    """The same method name in two wings, as `ppo` is one of language and one of control."""
    @part("test-pie")
    class Pie(Recipe):
        wing = "test-other"

    before = dict(registry.methods)
    method("twin", tart, title="a", source="b", module="one")
    method("twin", Pie(), title="a", source="b", module="two")
    method("lonely", Pie(), title="a", source="b", module="two")
    yield
    registry.methods.clear()
    registry.methods.update(before)


def test_a_bare_name_is_settled_by_the_tasks_wing(two_wings):
    assert registry.method("twin", "test").key == "test/twin"
    assert registry.method("twin", "test-other").key == "test-other/twin"
    assert registry.method("test/twin", "test-other").key == "test/twin"
    assert registry.method("lonely", "test").key == "test-other/lonely"
    assert [m.key for m in registry.find("twin")] == ["test-other/twin", "test/twin"]
    with pytest.raises(UserError, match="test-other/twin, test/twin"):
        registry.method("twin")
    with pytest.raises(UserError, match="unknown method 'twinn'; did you mean twin"):
        registry.method("twinn")
    with pytest.raises(UserError, match="unknown method 'test/lonely'"):
        registry.method("test/lonely")


def test_a_method_is_registered_once(two_wings):
    with pytest.raises(UserError, match="twice"):
        method("twin", tart, title="a", source="b", module="three")


def test_configure_takes_the_tasks_wing(two_wings):
    from volvelle.core.verbs import configure

    @part("test-plate")
    class Plate(Task):
        wing = "test-other"

    assert configure("twin", Plate()).recipe.wing == "test-other"


# --------------------------------------------------------------------------------------------------------------- schedules

def test_run_configuration_round_trips():
    config = RunConfig(recipe=tart(crust=Short(thickness=Table(steps=(0, 3), values=(1.0, 2.0)))), steps=7, track=("tensorboard",))
    data = yaml.safe_load(to_yaml(to_config(config)))
    data.pop("part")
    hints = annotations_of(RunConfig)
    assert RunConfig(**{k: from_config(hints[k], v, k) for k, v in data.items()}) == config


def test_apply_overrides_takes_values_as_well_as_text():
    assert apply_overrides(tart, {"filling": Cheese(age=1), "filling.age": 2}).filling == Cheese(age=2)
    assert parse_overrides(["a.b=c=d"]) == {"a.b": "c=d"}
