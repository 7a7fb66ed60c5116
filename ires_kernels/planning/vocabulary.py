"""Rows by token: what becomes of each row of an embedding, a head, or another tensor with a row for each token.

A row belongs to an id, and an id means what the tokenizer of its model says. Rows that mean the same in all models are
merged element by element. A token that instruct has and base has not gets instruct's row, whatever the factor: base's
row at its id is noise. A token that only the target has keeps its row. Other numbers of rows are no difference, for
they are padding. What is not clear is refused, and --vocabulary decides it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ires_kernels.checkpoints import names, parents, roles, tokens
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.manifest import ByToken
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.checkpoints.tokens import Tokens
from ires_kernels.planning.order import Order, listed
from ires_kernels.planning.rows import Deed, Donor, Orders, Split, of_difference, of_merge
from ires_kernels.planning.rules import Rules

_SHOWN = 5
_CHOICE = (
    "--vocabulary target keeps the tokenizer of the target and the rows of its tokens; --vocabulary instruct takes "
    "that of instruct, with the rows of its new tokens; --vocabulary rows merges row by row, whatever the tokens are."
)
_GROWTH = (
    "--vocabulary instruct appends these rows and takes the tokenizer of instruct, into a new folder (-o OUT); "
    "--vocabulary target leaves them out and keeps that of the target."
)
_OTHER = (
    "Take a target with the tokenizer of base. Or merge row by row, whatever the tokens are, with --vocabulary rows; "
    "or leave what has a row for each token as it is, with --skip {skip}."
)
_ROWS = (
    "Take models of one tokenizer; or merge row by row, whatever the tokens are, with vocabulary: rows; or leave what "
    "has a row for each token as it is in the first model, with --skip {skip}."
)
_BY_TEXT = "Leave --vocabulary instruct out: rows are found by the texts of their tokens."
_LEAVE = "--vocabulary target leaves them out, and keeps the tokenizer of the target."
_ONE = "Leave one of them out; or keep the rows of the target with --vocabulary target."
_MISSING = f"Put a tokenizer.json into the folder of each model. Or decide without: {_CHOICE}"
_UNREADABLE = (
    "Put the right tokenizer.json there. Or merge row by row, whatever the tokens are, with --vocabulary rows."
)


class Problem(NamedTuple):
    """Why it cannot be told what rows mean, and the way out."""

    text: str
    advice: str


@dataclass
class Vocabulary:
    """Tells what the rows of tensors are made of. Tokenizers are read when the first tensor needs them."""

    inputs: Mapping[str, Checkpoint]
    rules: Rules
    problems: dict[Problem, None] = field(default_factory=dict)
    grown: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors that get more rows than the target's have: how many it has, and how many they get."""
    taken: dict[int, str] = field(default_factory=dict)
    """Tokens that get the rows of instruct, by id."""
    left: dict[int, str] = field(default_factory=dict)
    """Tokens of instruct that the output does without, by id."""
    names: dict[str, None] = field(default_factory=dict)
    """The tensors that were asked about."""
    reordered: bool = False
    """Whether the target has its tokens in another order than another model, and so keeps its tokenizer."""
    _splits: dict[str, tuple[Split, Mapping[str, int]]] = field(default_factory=dict)
    """By tensor, with the rows that the models have."""
    _orders: dict[str, dict[int, int]] = field(default_factory=dict)
    _known: dict[object, Split | None] = field(default_factory=dict)
    _tables: dict[str, Tokens | None] = field(default_factory=dict)
    _unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> str:
        """The role of the model that gives the output its layout."""
        return "target" if "target" in self.inputs else "instruct"

    def split(self, refs: Mapping[str, Ref]) -> Split | None:
        """What the rows of a tensor are made of; None where all are made alike, each of those of its number.

        refs  by role, what has a row for each token: of the model that gives the layout, and of the others
        """
        self.names[refs[self.own].name] = None
        counts = {role: ref.shape[0] for role, ref in refs.items()}
        stored = {role: known for role, ref in refs.items() if (known := self._stored(role, ref)) is not None}
        key = tuple(counts.items()), tuple(stored.items())
        if key not in self._known:
            same = len(set(counts.values())) == 1 and not stored
            alike = same and (self.rules.vocabulary == "rows" or parents.same_tokens(self.inputs.values()))
            found = None if alike else self._split(refs, stored)
            self._known[key] = None if found is not None and found.is_plain(counts) else found
        split, before = self._known[key], counts[self.own]
        if split is not None:
            self._splits[refs[self.own].name] = split, counts
            if split.rows > before:
                self.grown[refs[self.own].name] = before, split.rows
        return split

    def by_token(self) -> dict[str, dict[str, Any]]:
        """`Manifest.by_token` of a residual, in JSON types."""
        found = {}
        for name, (split, counts) in self._splits.items():
            own = [[piece.first, piece.count] for piece in split.pieces if piece.deed == "taken"]
            found[name] = {"base": counts["base"], "own": own}
        return found

    def notes(self) -> list[str]:
        """How many rows are made in which way, and the tokens that get rows of instruct."""
        kinds: dict[str, list[str]] = {}
        whose = "instruct" if any(map(roles.is_instruct, self.inputs)) else "the residual"
        for name, (split, _) in self._splits.items():
            words: dict[Deed, str] = {
                "added": "are added to",
                "taken": f"are taken from {whose}",
                "kept": "stay as they are",
            }
            if self.own == "instruct":
                words = {"added": "are differences", "taken": "are those of instruct, which base has not"}
            done = [f"{count:,} {text}" for deed, text in words.items() if (count := split.count(deed))]
            kinds.setdefault(f"of {split.rows:,} rows {', '.join(done)}", []).append(name)
        found = [f"{', '.join(each)}: {text}" for text, each in kinds.items()]
        found += [f"rows of {whose} for its new tokens: {listed(self.taken)}"] if self.taken else []
        found += [f"tokens of {whose} that are left out: {listed(self.left)}"] if self.left else []
        return found

    def lacks(self, role: str) -> bool:
        """Whether the target lacks tokens of a model, or has others at their ids."""
        own, theirs = self._tokens("target"), self._tokens(role)
        return own is not None and theirs is not None and not theirs.ids.items() <= own.ids.items()

    def _split(self, refs: Mapping[str, Ref], stored: Mapping[str, ByToken]) -> Split | None:
        counts = {role: ref.shape[0] for role, ref in refs.items()}
        if roles.are_blended(self.inputs):
            self._check_blend(counts)
            return None
        orders = {role: order for role in refs if (order := self._order(role, refs)) is not None}
        if self.own == "instruct":
            new = self._new("instruct", counts, orders)
            self.taken |= new
            return of_difference(counts, new.keys(), orders)
        givers = [each[0] for each in roles.added(refs)]
        donors = [self._donor(role, counts, stored.get(role), orders) for role in givers]
        self.reordered |= bool(orders)
        if orders:
            self._check_order(donors, orders)
        self._check_readable(givers)
        if self.rules.vocabulary is None:
            self._check(donors, counts)
        rows = self._rows([donor for donor in donors if donor.role not in orders], counts["target"])
        donors = [self._decided(donor) for donor in donors]
        for donor in donors:
            new = {id_: token for id_, token in donor.new.items() if id_ < rows and id_ not in donor.lost}
            self.taken = new | self.taken  # of the first who has one
        return of_merge(counts, donors, rows, orders)

    def _check_blend(self, counts: Mapping[str, int]) -> None:
        """Find rows of one number that are of other tokens in another model: their mean would be of neither."""
        own = self._tokens("target")
        for role, rows in counts.items():
            theirs = self._tokens(role)
            if role in self._unreadable:
                self._problem(f"the tokens of {role} cannot be told: {self._unreadable[role]}", _UNREADABLE)
            elif own is not None and theirs is not None and rows == counts["target"]:
                apart = {id_: token for token, id_ in own.ids.items() ^ theirs.ids.items() if id_ < rows}
                if apart:
                    self._problem(
                        f"{role} has other tokens than the target, at {len(apart)} ids: {listed(apart)}", _ROWS
                    )

    def _stored(self, role: str, ref: Ref) -> ByToken | None:
        """What a residual says of its rows, where some of them are no differences."""
        manifest = self.inputs[role].manifest
        if self.inputs[role].kind != "residual" or manifest is None or ref.name not in manifest.by_token:
            return None
        found, end = manifest.by_token[ref.name], 0
        for first, count in found.own:
            if first < end or not count or first + count > ref.shape[0]:
                raise CheckpointError(
                    f"{manifest.path}: by_token of {ref.name!r} has [{first}, {count}], wanted rows of the "
                    f"{ref.shape[0]} in their order. Put the right file back, or extract again."
                )
            end = first + count
        return found

    def _tokens(self, role: str) -> Tokens | None:
        """The tokens of a model; None where it has no tokenizer, where that is no matter, or cannot be read."""
        if self.rules.vocabulary == "rows" or role not in self.inputs:
            return None
        if role not in self._tables:
            self._tables[role] = None
            try:
                found = self._tables[role] = parents.tokens_of(self.inputs[role])
                if found is not None and found.odd:
                    self._problem(f"the tokens of {role} cannot be told: {found.odd}", _UNREADABLE)
            except CheckpointError as error:
                self._unreadable[role] = f"{error}"
        return self._tables[role]

    def _is_known(self) -> bool:
        """Whether there is any tokenizer."""
        found = [self._tokens(role) for role in self.inputs]
        return any(found) or bool(self._unreadable)

    def _problem(self, text: str, advice: str) -> None:
        self.problems.setdefault(Problem(text, advice))

    def _new(self, instruct: str, counts: Mapping[str, int], orders: Orders) -> dict[int, str]:
        """The tokens of instruct that base does not have at their ids; or the target, where base has no tokenizer."""
        below = roles.base_of(instruct)
        theirs, base = self._tokens(instruct), self._tokens(below) or self._tokens("target")
        if theirs is None:
            return {}
        known, rows = base.ids if base else theirs.ids, counts[below]
        if orders:  # of texts, wherever they are
            return {id_: token for token, id_ in theirs.ids.items() if id_ < counts[instruct] and token not in known}
        return {
            id_: token
            for token, id_ in theirs.ids.items()
            if id_ < counts[instruct] and (id_ >= rows or known.get(token) != id_)
        }

    def _donor(self, role: str, counts: Mapping[str, int], stored: ByToken | None, orders: Orders) -> Donor:
        """What there is to know of a model that is added: of one, or of a residual and what it has `stored`."""
        own, theirs = self._tokens("target"), self._tokens(role)
        below = roles.base_of(role) if roles.is_instruct(role) else ""
        base: Tokens | Mapping[str, int] | None = self._tokens(below)
        rows = counts[role]
        if below:
            new = self._new(role, counts, orders)
            known_rows = counts[below]
            apart = {*new, *(() if orders else range(known_rows, rows))}
        else:
            manifest = self.inputs[role].manifest
            base = manifest.renamed_tokens if manifest else None
            apart, known_rows = _rows_of(stored), stored.base if stored else rows
            new = theirs.at(apart) if theirs else {}
        known = own is not None and theirs is not None and role not in orders
        lost = {own.ids[token] for token in tokens.lost(own, theirs, base)} if known and own and theirs else set()
        return Donor(role, rows, known_rows, new, apart, lost, below)

    def _decided(self, donor: Donor) -> Donor:
        """The same as the rule wants it, where tokens are in each other's way."""
        own = self._tokens("target")
        if self.rules.vocabulary == "instruct":
            return replace(donor, lost={id_ for id_ in donor.lost if id_ not in donor.new})
        if self.rules.vocabulary == "target":
            ids = own.ids if own else {}
            there = {id_: token for id_, token in donor.new.items() if ids.get(token) == id_}
            self.left |= {id_: token for id_, token in donor.new.items() if id_ not in there}
            return replace(donor, new=there)
        if self.rules.vocabulary == "rows" and not donor.subtracted:  # rows of a residual that cannot be added
            return replace(donor, new=dict.fromkeys(donor.apart, ""))
        return donor

    def _rows(self, donors: Iterable[Donor], rows: int) -> int:
        """How many rows the output gets where the target has so many."""
        if self.rules.vocabulary in ("target", "rows"):
            return rows
        own = self._tokens("target")
        there = own.ids if own else {}
        unknown = not self._is_known()
        wanted = rows
        for donor in donors:
            table = self._tokens(donor.role)
            ids = table.ids if table else {}
            lacking = {id_: t for t, id_ in ids.items() if rows <= id_ < donor.rows and there.get(t) != id_}
            if lacking and self.rules.vocabulary is None:
                some = f"{len(lacking)} tokens for which" if len(lacking) > 1 else "a token for which"
                self._problem(
                    f"{donor.role} has {some} the target, of {rows} rows, has none: {listed(lacking)}", _GROWTH
                )
            elif lacking or (unknown and any(row >= rows for row in donor.apart)):
                wanted = max(wanted, donor.rows)
        return wanted

    def _check_readable(self, givers: Iterable[str]) -> None:
        """Find tokenizers that would decide, and cannot be read; where none can be, all is as if there were none."""
        found = [self._tokens(role) for role in ("target", *givers)]
        for role, error in self._unreadable.items():
            if not roles.is_base(role) and (any(found) or self.rules.vocabulary is not None):
                self._problem(f"the tokens of {role} cannot be told: {error}", _UNREADABLE)

    def _check(self, donors: Sequence[Donor], counts: Mapping[str, int]) -> None:
        """Find tokens that are in each other's way, and rows of which nobody can tell whose they are."""
        own, rows = self._tokens("target"), counts["target"]
        seen: dict[int, tuple[str, str]] = {}
        for donor in donors:
            role = donor.role
            mine = own.at(donor.lost & donor.new.keys()) if own else {}
            self._clash({id_: (donor.new[id_], token) for id_, token in mine.items()}, role, "target", _CHOICE)
            theirs = {id_: seen[id_] for id_ in donor.new.keys() & seen.keys() if seen[id_][0] != donor.new[id_]}
            for other in dict.fromkeys(role for _, role in theirs.values()):
                pairs = {id_: (donor.new[id_], token) for id_, (token, whose) in theirs.items() if whose == other}
                self._clash(pairs, role, other, _ONE)
            seen |= {id_: (token, role) for id_, token in donor.new.items()}
            further = range(donor.base, donor.rows)
            if self._tokens(role) is None and further and (self._is_known() or donor.base < rows):
                self._problem(
                    f"{role} has {len(further)} rows that base has not, and no tokenizer says whose", _MISSING
                )
            elif own is None and any(donor.base <= id_ < rows for id_ in donor.new):
                self._problem(
                    f"the target has {rows - donor.base} rows that base has not, and no tokenizer says whose", _MISSING
                )

    def _clash(self, pairs: Mapping[int, tuple[str, str]], one: str, two: str, advice: str) -> None:
        if pairs:
            ids = sorted(pairs)
            said = "; ".join(
                f"{id_} is {brief(pairs[id_][0])} in {one}, {brief(pairs[id_][1])} in {two}" for id_ in ids[:_SHOWN]
            )
            more = f"; and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            self._problem(f"{two} and {one} have added other tokens at the same ids: {said}{more}", advice)

    def _order(self, role: str, refs: Mapping[str, Ref]) -> dict[int, int] | None:
        """Where a model has each row of the layout's, by the texts of their tokens; None where it has the same ids."""
        mine, theirs = self._tokens(self.own), self._tokens(role)
        if role == self.own or mine is None or theirs is None or mine.ids == theirs.ids:
            return None
        if roles.is_base(role) and self._orders.get(roles.instruct_of(role)) == {}:  # which has been said
            return None
        if role not in self._orders:
            order = Order.of(theirs, mine)
            if order.is_same:
                return None
            self._orders[role] = {}
            # A bias has too few values of a token to tell.
            ask = {r: names.embedding(self.inputs[r]) or refs[r] for r in (role, self.own)}
            without = _rows_of(self._stored(role, ask[role]))
            look = order.moved and not self.rules.trust_names
            found = order.likeness(self.inputs, (role, self.own), ask, without) if look else None
            if found.agrees if found else order.moved and self.rules.trust_names:
                pairs = ((id_, theirs.ids.get(token)) for token, id_ in mine.ids.items())
                self._orders[role] = {id_: there for id_, there in pairs if there is not None}
            else:
                said = "" if found is None else f"; rows of one token have a cosine of {found.cosine:.2f}"
                self._problem(
                    f"{self.own} has another tokenizer than {role}: {len(order.other)} of {order.words} tokens are at "
                    f"other ids, {listed(order.other)} of {role} among them{said}",
                    _OTHER,
                )
        return self._orders[role] or None

    def _check_order(self, donors: Iterable[Donor], orders: Orders) -> None:
        """Find tokens for which a target with another order has no id, and a tokenizer that does not fit its rows."""
        own = self._tokens("target")
        whose = f"the target has its tokens in another order than {' and '.join(orders)}"
        if self.rules.vocabulary == "instruct":
            self._problem(f"{whose}, whose tokenizer does not fit its rows", _BY_TEXT)
        for donor in donors:
            lacking = {id_: token for id_, token in donor.new.items() if own is None or token not in own.ids}
            if lacking and self.rules.vocabulary is None:
                self._problem(f"{whose}, and lacks tokens of {donor.role}: {listed(lacking)}", _LEAVE)


def _rows_of(stored: ByToken | None) -> set[int]:
    """The rows of a residual that are no differences."""
    return {row for first, count in (stored.own if stored else ()) for row in range(first, first + count)}
