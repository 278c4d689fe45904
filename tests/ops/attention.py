"""Attention: what the tests know of it."""

from typing import Any

import torch
import torch.nn.functional as F
from op_calls import Case, T, biases, case, coins, turned
from op_record import Behind, Calls, Entry, Given, OpInfo, Pairs, RowTests

from dropit_fx.ops.rule import INSIDE

OTHER_KERNEL = "PyTorch chooses the kernel by the strides, and what is unpacked has no gaps"
Q, K, V = T((2, 4, 6, 8)), T((2, 4, 5, 8)), T((2, 4, 5, 8))
BLOCKS = T((2, 6, 9, 16))


def _some_rows(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    mask = coins(shape, generator)
    mask[1::3] = False
    return mask


def _heads(x: Any) -> Any:
    return x.transpose(1, 2)


DROPOUT = [
    case("dropout", Q, K, V, dropout_p=0.3),
    case("dropout whose factor is rounded", Q, K, V, dropout_p=0.15),
    case("dropout, causal", Q, Q, Q, None, 0.1, True),
    case("dropout, causal, longer queries", Q, K, V, dropout_p=0.1, is_causal=True),
    case("dropout, bool mask", Q, K, V, T((6, 5), make=coins), 0.3),
    case("dropout, nothing to attend to", Q, K, V, T((6, 5), make=_some_rows), 0.3),
    case("dropout, float mask", Q, K, V, T((2, 4, 6, 5), make=biases), 0.3),
    case("dropout, float mask, broadcast", Q, K, V, T((1, 1, 6, 5), make=biases), 0.3),
    case("dropout, learned mask", Q, K, V, T((4, 6, 5)), 0.3),
    case("dropout, scale", Q, K, V, dropout_p=0.3, scale=0.2),
    case("dropout, negative scale", Q, K, V, dropout_p=0.3, scale=-0.2),
    case("dropout, grouped-query", Q, *[T((2, 2, 5, 8))] * 2, dropout_p=0.3, enable_gqa=True),
    case("dropout, wider values", Q, K, T((2, 4, 5, 12)), dropout_p=0.3),
    case("dropout, 3-D", T((4, 6, 8)), T((4, 5, 8)), T((4, 5, 8)), dropout_p=0.3),
    case("dropout, 2-D", T((6, 8)), T((5, 8)), T((5, 8)), dropout_p=0.3),
    case("dropout, heads second", *[T((2, 6, 4, 8), _heads)] * 3, dropout_p=0.3),
    case("dropout, keys transposed", Q, T((2, 4, 8, 5), turned), V, dropout_p=0.3),
    case("dropout, slice", T((2, 4, 6, 16), lambda x: x[..., ::2]), K, V, dropout_p=0.3),
    case("dropout, one key for all heads", Q, *[T((2, 1, 5, 8))] * 2, dropout_p=0.3),
    case("dropout, empty batch", *[T((0, 4, 6, 8))] * 3, dropout_p=0.3),
]


def _with_mask(found: Pairs) -> Pairs:
    """A mask that requires grad is added to q k^T: its gradient reads what theirs do."""
    return found | {(operand, "attn_mask") for operand, _ in found}


ATTENTION = RowTests(
    row="scaled_dot_product_attention",
    cases=[
        case("plain", Q, K, V),
        case("causal", Q, Q, Q, is_causal=True),
        case("causal, longer queries", Q, K, V, is_causal=True),
        case("bool mask", Q, K, V, T((6, 5), make=coins)),
        case("bool mask of a batch", Q, K, V, T((2, 1, 6, 5), make=coins)),
        case("float mask", Q, K, V, T((2, 4, 6, 5), make=biases)),
        case("float mask, broadcast", Q, K, V, T((1, 1, 6, 5), make=biases)),
        case("learned mask", Q, K, V, T((4, 6, 5))),
        case("scale", Q, K, V, scale=0.2),
        case("scale and causal", Q, Q, Q, None, 0.0, True, scale=0.2),
        case("grouped-query", Q, T((2, 2, 5, 8)), T((2, 2, 5, 8)), enable_gqa=True),
        case("grouped-query, causal", Q, *[T((2, 2, 6, 8))] * 2, is_causal=True, enable_gqa=True),
        case("wider values", Q, K, T((2, 4, 5, 12))),
        case("3-D", T((4, 6, 8)), T((4, 5, 8)), T((4, 5, 8))),
        case("2-D", T((6, 8)), T((5, 8)), T((5, 8))),
        case("heads second", *[T((2, 6, 4, 8), _heads)] * 3),
        case("heads second, causal", *[T((2, 6, 4, 8), _heads)] * 3, is_causal=True),
        case("keys transposed", Q, T((2, 4, 8, 5), turned), V),
        Case("slice", (T((2, 4, 6, 16), lambda x: x[..., ::2]), K, V), rounds=OTHER_KERNEL),
        case("one key for all heads", Q, T((2, 1, 5, 8), lambda x: x.expand(2, 4, 5, 8)), V),
        case("one query", T((2, 4, 1, 8)), K, V),
        case("empty batch", *[T((0, 4, 6, 8))] * 3),
        *DROPOUT,
    ],
    obstacles=(
        (
            F.scaled_dot_product_attention,
            Case(
                "dropout of everything",
                (*[T((2, 3, 5, 8))] * 3,),
                {"dropout_p": 1.0},
                obstacle="attention dropout that leaves nothing",
            ),
        ),
        (
            F.scaled_dot_product_attention,
            Case(
                "dropout, keys of more batches",
                (T((1, 3, 5, 8)), *[T((2, 3, 5, 8))] * 2),
                {"dropout_p": 0.3},
                obstacle="attention dropout over a batch that is not the query's",
            ),
        ),
    ),
    quantised=(
        case("plain", BLOCKS, BLOCKS, BLOCKS),
        case("causal", *[BLOCKS] * 3, is_causal=True),
        case("mask", *[BLOCKS] * 3, T((9, 9), make=coins)),
        case("learned mask", *[BLOCKS] * 3, T((6, 9, 9))),
        case("grouped-query", BLOCKS, *[T((2, 2, 9, 16))] * 2, enable_gqa=True),
        case("dropout", *[BLOCKS] * 3, T((9, 9), make=coins), 0.3),
    ),
    rounds_quantised="a kernel of our own sums in another order",
    modules=lambda: [
        (
            Calls(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
            (2, 3, 6, 8),
        )
    ],
    op_info=OpInfo("nn.functional.scaled_dot_product_attention", reseeds=True),
    behind=Behind((Given.X, Given.X, Given.X), by_strides=True),
    entries=(
        Entry(
            "_scaled_dot_product_flash_attention_for_cpu",
            {"output": "result", "logsumexp": INSIDE},
            amend=_with_mask,
        ),
    ),
)

RECORDS = (ATTENTION,)
