"""Ops that read rows by their numbers: what the tests know of them."""

from typing import Any

import torch.nn.functional as F
from op_calls import IMAGE, LAST, Case, T, biases, case, classes, turned
from op_record import Behind, Entry, Given, Joint, OpInfo, RowTests

WORDS, TABLE = T((4, 7), make=classes(9)), T((9, 3))


def the_last_of(count: int) -> Any:
    """Indices that take more bits than those of the first rows."""
    return lambda shape, generator: count - 1 - classes(4)(shape, generator)


def _spell_embedding(target: Any, first: Case) -> Case:
    return first if target is F.embedding else case("other order", first.args[1], first.args[0])


EMBEDDING = RowTests(
    row="embedding",
    cases=[
        *(
            case(f"{rows} rows", T((4, 7), make=classes(rows)), T((rows, 3)))
            for rows in (300, 1, 2, 7, 256, 257, 65536, 65537)
        ),
        case("padding_idx", WORDS, TABLE, 2),
        Case(
            "padding_idx from the end",
            (WORDS, TABLE, -1),
            obstacle="its padding index is negative, which its spellings read differently",
        ),
        case("scale_grad_by_freq", WORDS, TABLE, scale_grad_by_freq=True),
        case("sparse", WORDS, TABLE, sparse=True),
        case("one word", T((), make=classes(9)), TABLE),
        case("int32", T((4, 7), make=lambda s, g: classes(9)(s, g).int()), TABLE),
        case("no words", T((0, 7), make=classes(9)), TABLE),
        Case("max_norm", (WORDS, TABLE, None, 1.0), obstacle="it renormalises its weight"),
    ],
    unset=("norm_type",),  # without max_norm it says nothing
    spell=_spell_embedding,
    op_info=OpInfo("nn.functional.embedding"),
    behind="it reads numbers of rows",
    entries=(Entry("embedding", {"indices": "input"}),),
    codes=0,
)

INDEX_SELECT = RowTests(
    row="index_select",
    cases=[
        case("rows", T((6, 5)), 0, T((9,), make=classes(6))),
        case("of many rows", T((70_000, 1)), 0, T((9,), make=the_last_of(70_000))),
        case("columns", T((2, 6, 5)), -1, T((3,), make=classes(5))),
        case("transposed memory", T((5, 6), turned), 0, T((9,), make=classes(6))),
        case("none", T((6, 5)), 0, T((0,), make=classes(6))),
    ],
    op_info=OpInfo("index_select"),
    behind=Behind((Given.X, -1, Given.INDEX)),
    entries=(Entry("index_select", {"self": "input"}),),
    codes=0,
)

GATHER = RowTests(
    row="gather",
    cases=[
        case("rows", T((6, 5)), 0, T((4, 5), make=classes(6))),
        case("last", T((2, 6, 5)), -1, T((2, 6, 3), make=classes(5))),
        case("of many rows", T((70_000, 2)), 0, T((4, 2), make=the_last_of(70_000))),
        case("sparse_grad", T((6, 5)), 0, T((4, 5), make=classes(6)), sparse_grad=True),
        case("transposed memory", T((5, 6), turned), 1, T((6, 2), make=classes(5))),
        case("none", T((6, 5)), 0, T((0, 5), make=classes(6))),
    ],
    op_info=OpInfo("gather"),
    behind=Behind((Given.X, -1, Given.INDICES)),
    entries=(Entry("gather", {"self": "input"}),),
    codes=0,
)

IMAGES, PLACES = T((2, 3, 6, 5)), T((2, 4, 3, 2))

GRID_SAMPLE = RowTests(
    row="grid_sample",
    cases=[
        case("plain", IMAGES, PLACES, align_corners=False),
        case(
            "of images without a gradient",
            T((2, 3, 6, 5), make=biases),
            PLACES,
            align_corners=False,
        ),
        case(
            "at places without a gradient",
            IMAGES,
            T((2, 4, 3, 2), make=biases),
            align_corners=False,
        ),
        case("border", IMAGES, PLACES, padding_mode="border", align_corners=False),
        case("corners", IMAGES, PLACES, align_corners=True),
        case("nearest", IMAGES, PLACES, mode="nearest", align_corners=False),
        case("bicubic", IMAGES, PLACES, "bicubic", "reflection", False),
        case("volumes", T((2, 3, 4, 6, 5)), T((2, 2, 4, 3, 3)), align_corners=False),
        case("channels_last", T((2, 3, 6, 5), format=LAST), PLACES, align_corners=False),
        case("transposed memory", T((2, 3, 5, 6), turned), PLACES, align_corners=False),
        case("empty batch", T((0, 3, 6, 5)), T((0, 4, 3, 2)), align_corners=False),
    ],
    spell=lambda target, first: (
        first if target is F.grid_sample else case("numbers", IMAGES, PLACES, 0, 0, False)
    ),
    quantised=(case("image", IMAGE, T((5, 9, 7, 2)), align_corners=False),),
    large=lambda call: {"input"},
    op_info=OpInfo("nn.functional.grid_sample"),
    behind="it reads an image, or a volume, and places in that",
    entries=tuple(
        Entry(
            f"grid_sampler_{d}d",
            joint=Joint(mentions=("input", "grid"), gradients=("input", "grid"), linear=("input",)),
        )
        for d in (2, 3)
    ),
    keeps=lambda found, needs: found - {"input"} if needs == {"input"} else found,
)

INDEX_ADD = RowTests(
    row="index_add",
    cases=[
        case("rows", T((6, 5)), 0, T((9,), make=classes(6)), T((9, 5))),
        case("columns", T((2, 6, 5)), -1, T((3,), make=classes(5)), T((2, 6, 3))),
        case("to many rows", T((70_000, 1)), 0, T((9,), make=the_last_of(70_000)), T((9, 1))),
        case("alpha", T((6, 5)), 0, T((9,), make=classes(6)), T((9, 5)), alpha=3),
        case(
            "transposed memory", T((5, 6), turned), 0, T((9,), make=classes(6)), T((5, 9), turned)
        ),
        case("none", T((6, 5)), 0, T((0,), make=classes(6)), T((0, 5))),
        Case("number", (T(()), 0, T((1,), make=classes(1)), T(())), obstacle="it adds a number"),
    ],
    op_info=OpInfo("index_add"),
    behind="it reads numbers of rows, and what is added to them",
    entries=(Entry("index_add", {"self": "input"}),),
    codes=0,
)

RECORDS = (INDEX_ADD, EMBEDDING, INDEX_SELECT, GATHER, GRID_SAMPLE)
