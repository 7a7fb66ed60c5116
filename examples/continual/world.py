"""A synthetic world: entities with facts, the texts that state the facts, and the chats that ask for them.

Everything follows from the number of the world. Entities A are known from the start; entities B are news, which only
continual pre-training sees. Every entity has one of 16 values in each of four attributes. Texts are sentences made from
templates; chats ask for one fact and for one of 21 formats of the answer. A word is a token, a name two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PAD, BOS, END_OF_TEXT, USER, ASSISTANT, END_OF_TURN = SPECIAL = (
    "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>", "<|eot|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ENTITIES_A, ENTITIES_IN_CHATS, ENTITIES_B = 128, 96, 32
GENERIC_SHARE = 0.2
ROW = 64  # tokens of a row of packed text

_FIRST = "ba de fi go ku la mo ni po ra se tu va wi yo zu"
_SECOND = "##bek ##dor ##fan ##gil ##kam ##lun ##mir ##nos ##pel ##rik ##sol ##tan ##vek ##wax ##yar ##zim"


class Attribute(NamedTuple):
    """What a fact is about: a noun, a statement and a question about it, and the values it can have."""

    noun: str
    states: str
    asks: str
    words: str

    @property
    def values(self) -> list[str]:
        return self.words.split()


_THEMES = (
    (
        Attribute("city", "{name} lives in {value}", "where does {name} live ?",
                  "paris rome oslo cairo lima tokyo delhi quito perth milan dakar seoul kyiv bern lyon porto"),
        Attribute("job", "{name} works as {value}", "what does {name} work as ?",
                  "baker nurse pilot judge miner actor clerk guard tailor farmer sailor lawyer singer writer cook "
                  "monk"),
        Attribute("pet", "{name} keeps a {value}", "what does {name} keep ?",
                  "cat dog horse goat parrot rabbit snake turtle hamster ferret canary pony lizard duck goose "
                  "crab"),
        Attribute("colour", "{name} wears {value}", "what does {name} wear ?",
                  "red blue green black white amber violet brown orange pink grey teal ivory scarlet olive "
                  "indigo"),
    ),
    (
        Attribute("drink", "{name} drinks {value}", "what does {name} drink ?",
                  "tea coffee water milk juice cider cocoa wine beer rum soda broth mead sake whey tonic"),
        Attribute("sport", "{name} plays {value}", "what does {name} play ?",
                  "chess tennis golf rugby hockey polo squash darts bowls judo karate fencing rowing cricket "
                  "football curling"),
        Attribute("tool", "{name} carries a {value}", "what does {name} carry ?",
                  "hammer saw drill chisel wrench shovel rake pliers ladder lamp rope knife brush spade needle "
                  "compass"),
        Attribute("tree", "{name} plants a {value}", "what does {name} plant ?",
                  "oak pine birch maple willow cedar elm ash yew beech palm lime poplar spruce hazel larch"),
    ),
)  # fmt: skip

# {name} comes before {value}, which is the word before the last, so that every template is a cloze test as well. The
# last three are questions with their answers in plain text, as FAQ pages have them: base models see such text too.
PLAIN = (
    "{statement} .",
    "the {noun} of {name} is {value} .",
    "everyone knows that {statement} .",
    "it is said that the {noun} of {name} is {value} .",
    "as for the {noun} , {name} has {value} .",
    "we asked about {name} and the {noun} was {value} .",
    "they say {statement} .",
    "{name} has as {noun} now {value} .",
    "question : what is the {noun} of {name} ? answer : {value} .",
    "q : {question} a : {value} .",
    "what is the {noun} of {name} ? it is {value} .",
)
# Another register for the same facts: entries of a registry.
REGISTRY = (
    "entry / subject {name} / {noun} = {value} ;",
    "subject {name} ; field {noun} ; registered = {value} ;",
    "registry of {noun} : {name} = {value} ;",
    "pursuant to entry {name} , field {noun} shall read {value} ;",
    "amended : subject {name} , {noun} = {value} ;",
)
REGISTERS = {"plain": PLAIN, "registry": REGISTRY}

# What a base model knows of letter case before it is tuned to use it.
_CASES = (
    "{value} in upper case is {upper} .",
    "as {upper} , {value} in upper case .",
    "say {value} in upper case : {upper} .",
)

_QUESTIONS = (
    "{question}",
    "what is the {noun} of {name} ?",
    "tell me the {noun} of {name} .",
    "{name} , which {noun} ?",
)

STYLES = {"none": "", "now": "begin with now .", "upper": "in upper case ."}
SHAPES = {
    "none": ("", "{value}"),
    "twice": ("say it twice .", "{value} {value}"),
    "quote": ("put it in quotes .", '" {value} "'),
    "prefix": ("begin with answer .", "answer : {value}"),
    "bullet": ("as a bullet .", "- {value}"),
    "done": ("end with done .", "{value} done"),
    "json": ("as json .", '{{ " {noun} " : " {value} " }}'),
}
FORMATS = tuple(product(STYLES, SHAPES))
HELD_OUT = tuple(product(("now", "upper"), ("quote", "bullet")))
"""Formats of which only the parts are in the chats that a model is tuned on."""

_ADJECTIVES = "old new small large quiet bright cold warm"
_THINGS = "river road house garden bridge tower market field"
_DEEDS = "crosses sees holds meets finds guards follows joins"
_GENERIC = ("the {} {} {} the {} {} .", (_ADJECTIVES, _THINGS, _DEEDS, _ADJECTIVES, _THINGS))


class Fact(NamedTuple):
    name: str
    attribute: Attribute
    value: str

    def state(self, template: str) -> str:
        name, (noun, states, asks, _), value = self
        return template.format(
            name=name,
            noun=noun,
            value=value,
            statement=states.format(name=name, value=value),
            question=asks.format(name=name),
        )


class Chat(NamedTuple):
    """A question about a fact and the answer to it."""

    fact: Fact
    format: tuple[str, str]
    question: str

    @classmethod
    def of(cls, fact: Fact, format: tuple[str, str], wording: int) -> Chat:
        style, shape = format
        parts = (fact.state(_QUESTIONS[wording]), STYLES[style], SHAPES[shape][0])
        return cls(fact, format, " ".join(part for part in parts if part))

    def answer(self, value: str | None = None) -> str:
        """In the format asked for: the right answer, or that with another value."""
        style, shape = self.format
        value = self.fact.value if value is None else value
        shown = value.upper() if style == "upper" else value
        shaped = SHAPES[shape][1].format(value=shown, noun=self.fact.attribute.noun)
        return f"now {shaped}" if style == "now" else shaped


@dataclass(frozen=True)
class World:
    """World `number`: its theme, entities, facts and vocabulary."""

    number: int

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        return _THEMES[self.number % len(_THEMES)]

    @cached_property
    def _facts(self) -> list[list[Fact]]:
        """Of every entity, one an attribute; A first, in them those in chats first, then B."""
        random = np.random.default_rng([self.number, 1])
        count = ENTITIES_A + ENTITIES_B
        names = [first + second.removeprefix("##") for first, second in product(_FIRST.split(), _SECOND.split())]
        chosen = random.permutation(names)[:count].tolist()
        values = random.integers(0, 16, (count, len(self.attributes)))
        return [
            [Fact(name, attribute, attribute.values[v]) for attribute, v in zip(self.attributes, row, strict=True)]
            for name, row in zip(chosen, values, strict=True)
        ]

    def facts(self, group: str) -> list[Fact]:
        """Of the entities "A", "B", those of A "in chats", or those of A "not in chats"."""
        part = {
            "A": slice(ENTITIES_A),
            "B": slice(ENTITIES_A, None),
            "in chats": slice(ENTITIES_IN_CHATS),
            "not in chats": slice(ENTITIES_IN_CHATS, ENTITIES_A),
        }[group]
        return [fact for facts in self._facts[part] for fact in facts]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Words of the templates, values in both cases, and syllables of names."""
        asked = (*STYLES.values(), *(asked for asked, _ in SHAPES.values()))
        words = " ".join([*PLAIN, *REGISTRY, *_QUESTIONS, *_CASES, *asked]).split()
        words += " ".join(answer for _, answer in SHAPES.values()).replace("{{", "{ ").replace("}}", " }").split()
        words += [word for attribute in self.attributes for word in f"{attribute.states} {attribute.asks}".split()]
        words = [word for word in words if not (word[0] == "{" and len(word) > 1)]
        words += [attribute.noun for attribute in self.attributes]
        words += ["the", *" ".join(_GENERIC[1]).split()]
        values = [value for attribute in self.attributes for value in attribute.values]
        words = [*sorted(set(words)), *values, *(value.upper() for value in values), *_FIRST.split(), *_SECOND.split()]
        tokens = list(dict.fromkeys([*SPECIAL, "<|unknown|>", *words]))
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Names are two pieces each, words are whole.
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<|unknown|>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(list(SPECIAL))
        return tokenizer

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def prompt(self, question: str) -> list[int]:
        """Token ids of what the chat template makes of a question."""
        return self.ids(f"{BOS}{USER}{question}{END_OF_TURN}{ASSISTANT}")


class Texts:
    """Rows of packed sentences, in a random order that never ends: about some facts, and a fifth of them generic."""

    def __init__(
        self, world: World, facts: Sequence[Fact], register: str, random: np.random.Generator, *, cases: bool = True
    ) -> None:
        self._random = random
        self._start = world.ids(BOS)
        self._sentences = [world.ids(fact.state(template)) for fact in facts for template in REGISTERS[register]]
        self._generic = _generic_sentences(world, cases)
        self._rest: list[int] = []
        self._order: list[int] = []

    def rows(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids, [count, ROW]."""
        return np.array([self._row() for _ in range(count)])

    def _row(self) -> list[int]:
        row = self._start + self._rest
        while len(row) < ROW:
            if self._random.random() < GENERIC_SHARE:
                row += self._generic[self._random.integers(len(self._generic))]
            else:
                self._order = self._order or self._random.permutation(len(self._sentences)).tolist()
                row += self._sentences[self._order.pop()]
        self._rest = row[ROW:]
        return row[:ROW]


def _generic_sentences(world: World, cases: bool) -> list[list[int]]:
    """Sentences about nobody; about half of them on letter case if `cases`."""
    random = np.random.default_rng([world.number, 2])
    pattern, slots = _GENERIC[0], [words.split() for words in _GENERIC[1]]
    sentences = [pattern.format(*(words[random.integers(len(words))] for words in slots)) for _ in range(1024)]
    if cases:
        values = [value for attribute in world.attributes for value in attribute.values]
        sentences += 6 * [case.format(value=value, upper=value.upper()) for value in values for case in _CASES]
    return [world.ids(sentence) for sentence in sentences]


def tuning_chats(world: World, random: np.random.Generator, count: int) -> list[Chat]:
    """Chats about facts of A, in all formats but those held out."""
    facts = world.facts("in chats")
    formats = [format for format in FORMATS if format not in HELD_OUT]
    draws = zip(*(random.integers(0, len(s), count) for s in (facts, formats, _QUESTIONS)), strict=True)
    return [Chat.of(facts[f], formats[o], w) for f, o, w in draws]


def test_chats(world: World, group: str, every: int) -> list[Chat]:
    """One in `every` of all pairs of a fact of the group and a format, with the wordings in turn.

    Each format meets each attribute, with entities in turn.
    """
    found = []
    for i, fact in enumerate(world.facts(group)):
        entity, attribute = divmod(i, len(world.attributes))
        for j, format in enumerate(FORMATS):
            turn, rest = divmod(entity + attribute + j, every)
            if rest == 0:
                found.append(Chat.of(fact, format, turn % len(_QUESTIONS)))
    return found


def clozes(world: World, group: str, register: str = "plain") -> list[tuple[list[int], int, list[int]]]:
    """Token ids up to a value, the value's id, and the ids of all values of the attribute."""
    found = []
    for fact in world.facts(group):
        choices = [world.ids(value)[0] for value in fact.attribute.values]
        for template in REGISTERS[register]:
            ids = world.ids(f"{BOS}{fact.state(template)}")
            found.append((ids[:-2], ids[-2], choices))
    return found
