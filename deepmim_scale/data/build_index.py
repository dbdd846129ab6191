"""From the images of some containers to their index: labels, order and identity.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepmim_scale.data.container_members import Found, Member
from deepmim_scale.data.index import ENTRY, ContainerFile, Index, Names
from deepmim_scale.data.manifest import listing_sha
from deepmim_scale.data.source import printable
from deepmim_scale.errors import UserError

MAX_LABEL = 1 << 20


def build_index(
    data: str,
    files: tuple[ContainerFile, ...],
    members: Sequence[Member],
    notes: Sequence[str],
    class_names: Sequence[str] = (),
) -> Index:
    """The index of one split's images; `data` names it in messages.

    `class_names` say what labels that are numbers mean; a note where they cannot.

    A label is what the container says, else the first folder of the name. Raises UserError if only
    some have one.
    """
    classes, labels = _number_labels(data, members)
    notes = list(notes)
    if class_names and _are_numbers(classes):
        problem = _problem_of(class_names, len(classes))
        classes = classes if problem else tuple(class_names)
        notes += [f"class names are not used: {problem}"] if problem else []
    names = [member.name for member in members]
    order = sorted(range(len(members)), key=lambda i: (labels[i], names[i]))
    # As in a tar that was added to, the last member of a name is the one that counts.
    following = [*order[1:], None]
    kept = [
        i
        for i, j in zip(order, following, strict=True)
        if j is None or (labels[i], names[i]) != (labels[j], names[j])
    ]
    if len(kept) < len(order):
        notes.append(f"{len(order) - len(kept)} images replaced by later ones of the same name")
    ordered = [members[i] for i in kept]
    return index_of(files, classes, [labels[i] for i in kept], ordered, notes)


def index_of(
    files: tuple[ContainerFile, ...],
    classes: tuple[str, ...],
    labels: Sequence[int] | np.ndarray,
    members: Sequence[Member],
    notes: Sequence[str],
) -> Index:
    """The index of images whose order and labels are known."""
    entries = np.empty(len(members), ENTRY)
    entries["file"] = [member.file for member in members]
    entries["label"] = labels
    columns = zip(*(member.found for member in members), strict=True)
    for field, values in list(zip(Found._fields, columns, strict=True))[2:]:
        entries[field] = values
    names = [member.name for member in members]
    sha = _sha(classes, entries["label"], names, entries["size"])
    return Index(files, classes, tuple(notes), sha, entries, Names.pack(names))


def _number_labels(data: str, members: Sequence[Member]) -> tuple[tuple[str, ...], list[int]]:
    """Classes and the number of each image's."""
    told = [member.found.label for member in members]
    if any(label is not None for label in told):
        where = next((member.name for member in members if member.found.label is None), None)
        if where is not None:
            raise UserError(f"data={data}: {printable(where)} has no label, others have; add it")
        if all(isinstance(label, int) for label in told):
            return _number_integers(data, [label for label in told if isinstance(label, int)])
        words = [label for label in told if isinstance(label, str)]
        if len(words) < len(told):
            raise UserError(f"data={data}: labels are numbers and words; use one of them")
    else:
        words = [name.partition("/")[0] if "/" in (name := m.name) else "" for m in members]
        flat = next((m.name for m, word in zip(members, words, strict=True) if not word), None)
        if flat is not None:
            if any(words):
                raise UserError(
                    f"data={data}: {printable(flat)} lies beside class folders; move it into one, "
                    "or give --labels FILE"
                )
            return (".",), [0] * len(members)
    classes = tuple(sorted(set(words)))
    number = {name: i for i, name in enumerate(classes)}
    return classes, [number[word] for word in words]


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether labels were numbers, which stand for themselves."""
    return all(name == str(number) for number, name in enumerate(classes))


def _problem_of(names: Sequence[str], num_labels: int) -> str:
    """Why names cannot stand for labels; "" if they can."""
    if len(names) < num_labels:
        return f"there are {len(names)} for labels up to {num_labels - 1}"
    if len(set(names)) < len(names):
        return "some are equal"
    odd = next((n for n in names if not n or "/" in n or n[0] == "." or not n.isprintable()), None)
    return "" if odd is None else f"{odd!r} cannot be a folder's name"


def _number_integers(data: str, labels: list[int]) -> tuple[tuple[str, ...], list[int]]:
    if not 0 <= min(labels) <= max(labels) < MAX_LABEL:
        raise UserError(
            f"data={data}: labels go from {min(labels)} to {max(labels)}; "
            f"they must lie in [0, {MAX_LABEL})"
        )
    return tuple(map(str, range(max(labels) + 1))), labels


def _sha(classes: tuple[str, ...], labels: np.ndarray, names: list[str], sizes: np.ndarray) -> str:
    """What a folder of the same images has; a name without its class gets it in front."""
    prefixes = [f"{name}/" for name in classes]
    full = (
        name if classes == (".",) or name.startswith(prefixes[label]) else prefixes[label] + name
        for name, label in zip(names, labels.tolist(), strict=True)
    )
    return listing_sha(zip(full, sizes.tolist(), strict=True))
