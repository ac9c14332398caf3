"""Attention with a bias that all images share, as Triton kernels: no atomics, so equal inputs give equal bits.

Tokens, as rows and as keys, come in tiles of TILE and one narrow tile for the rest, so that T = 257 costs 272 keys and
not 384. A head dimension that is no power of two comes in two parts, so that 80 costs 64 + 16 and not 128. The
backward pass writes the gradient of the scores once, in the inputs' dtype. Two kernels read it: one for the query's
gradient, one for the bias's, which adds up the images in their order in float32.

Only `attention.py` imports this, and only where these kernels run: a CPU build of torch has no Triton. Under
TRITON_INTERPRET=1 they run on CPU tensors, slowly.

Letters: B images, T tokens, H heads, D head dimension, P: T rounded up to `attention.ALIGNMENT`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 64
# The smallest side of a tile that Triton multiplies.
SMALLEST = 16
# Elements of the bias's gradient that one program sums.
SUM_ELEMENTS = 1024
LOG2_E = tl.constexpr(1.4426950408889634)


def forward(qkv: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        qkv: [B, T, 3, H, D], contiguous.
        bias: [H, T, T] in the dtype of qkv; rows start at multiples of P.
    Returns: [B, T, H * D]; float32 [B, H, T], logarithms to base 2 of the sums of exponentials.
    """
    batch, tokens, _, heads, dim = qkv.shape
    out, log_sums = qkv.new_empty(batch, tokens, heads * dim), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    strides = bias.stride()[:2]
    _launch(_forward, batch, qkv, bias, out, log_sums, tokens, heads, *strides, dim**-0.5, tiling=_tiling(tokens, dim))
    return out, log_sums


def backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    images: list[slice],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what `forward` was given.

    Args:
        grad_out, out: [B, T, H * D], contiguous.
        images: which are taken together, in order. Their gradients of the scores, [images, H, T, P], are held at once.
    Returns: [B, T, 3, H, D]; float32 [H, T, T].
    """
    batch, tokens, _, heads, dim = qkv.shape
    grad_qkv, grad_bias = torch.empty_like(qkv), bias.new_empty(heads, tokens, tokens, dtype=torch.float32)
    products, padded, tiling = torch.empty_like(log_sums), bias.stride(1), _tiling(tokens, dim)
    _grad_times_out[triton.cdiv(tokens, TILE), heads, batch](grad_out, out, products, tokens, heads, **tiling)
    for some in images:
        part, of_part, count = qkv[some], grad_qkv[some], some.stop - some.start
        grad_scores = bias.new_empty(count, heads, tokens, padded)
        read = (part, bias, grad_out[some], log_sums[some], products[some])
        shape = (tokens, heads, bias.stride(0), padded, dim**-0.5)
        _launch(_grad_keys_values, count, *read, of_part, grad_scores, *shape, tiling=tiling)
        _launch(_grad_queries, count, part, grad_scores, of_part, tokens, heads, padded, dim**-0.5, tiling=tiling)
        elements = heads * tokens * padded
        _sum_images[(triton.cdiv(elements, SUM_ELEMENTS),)](
            grad_scores, grad_bias, count, elements, tokens, padded, ADD=some.start > 0, ELEMENTS=SUM_ELEMENTS
        )
    return grad_qkv, grad_bias


def _launch(kernel, images: int, *arguments, tiling: dict[str, int]) -> None:
    """Run a kernel over all tiles of tokens of all heads and images: the whole tiles, then the narrow ones.

    In one kernel together the code of the narrow tiles would take registers from that of the whole ones, which then
    spills them (seen in what ptxas says for an H200).
    """
    heads = arguments[0].shape[3]
    if tiling["FULL"]:
        kernel[tiling["FULL"], heads, images](*arguments, **tiling, SIZE=TILE, WHOLE=True)
    if tiling["REST"]:
        kernel[1, heads, images](*arguments, **tiling, SIZE=tiling["REST"], WHOLE=False)


def _tiling(tokens: int, dim: int) -> dict[str, int]:
    """How tokens and head dimension are cut. FULL: whole tiles of tokens. REST: tokens of the last tile, 0: none. MAIN
    and SIDE: parts of the head dimension, SIDE 0: none. Sizes are powers of two, and may reach beyond the end.
    """
    rest = tokens % TILE
    main = max(SMALLEST, 2 ** (dim.bit_length() - 1))
    return {
        "DIM": dim,
        "MAIN": main,
        "SIDE": _part(max(0, dim - main)),
        "FULL": tokens // TILE,
        "REST": _part(rest),
        "TILE": TILE,
    }


def _part(size: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(size)) if size else 0


# --------------------------------------------------------------------------------------------- tiles
# SIZE: tokens of a launch's tiles. WHOLE, WHOLE_KEYS: no row, no key of a tile lies beyond the last, so no mask takes
# registers.


@triton.jit
def _first_token(FULL: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Of this program's tile."""
    return tl.program_id(0) * TILE if WHOLE else FULL * TILE


@triton.jit
def _load(
    pointer, rows, row_stride, tokens, FIRST: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, DIM: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of rows; 0 outside."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = pointer + rows[:, None] * row_stride + columns[None, :]
    if WHOLE and FIRST + WIDTH <= DIM:
        values = tl.load(places)
    else:
        values = tl.load(places, mask=(rows < tokens)[:, None] & (columns < DIM)[None, :], other=0.0)
    return values


@triton.jit
def _store(
    pointer,
    values,
    rows,
    row_stride,
    tokens,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
):
    columns = FIRST + tl.arange(0, WIDTH)
    places = pointer + rows[:, None] * row_stride + columns[None, :]
    if WHOLE and FIRST + WIDTH <= DIM:
        tl.store(places, values.to(pointer.dtype.element_ty))
    else:
        inside = (rows < tokens)[:, None] & (columns < DIM)[None, :]
        tl.store(places, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_both(
    pointer, rows, row_stride, tokens, WHOLE: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr
):
    """Both parts of the head dimension; the first twice where there is no second."""
    main = _load(pointer, rows, row_stride, tokens, 0, MAIN, WHOLE, DIM)
    side = main
    if SIDE > 0:
        side = _load(pointer, rows, row_stride, tokens, MAIN, SIDE, WHOLE, DIM)
    return main, side


@triton.jit
def _store_both(
    pointer,
    main,
    side,
    rows,
    row_stride,
    tokens,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    _store(pointer, main, rows, row_stride, tokens, 0, MAIN, WHOLE, DIM)
    if SIDE > 0:
        _store(pointer, side, rows, row_stride, tokens, MAIN, SIDE, WHOLE, DIM)


@triton.jit
def _load_pairs(places, inside, WHOLE: tl.constexpr):
    """What stands for pairs of a row and a key; 0 outside."""
    return tl.load(places) if WHOLE else tl.load(places, mask=inside, other=0.0)


@triton.jit
def _zeros_both(ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    main = tl.full((ROWS, MAIN), 0.0, tl.float32)
    side = main
    if SIDE > 0:
        side = tl.full((ROWS, SIDE), 0.0, tl.float32)
    return main, side


@triton.jit
def _times(a, b, total):
    """total + a b. In float32 never TF32, which would keep 10 bits of an input."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _add_times(a, main, side, to_main, to_side, SIDE: tl.constexpr):
    """a times both parts, added to both sums."""
    to_main = _times(a, main, to_main)
    if SIDE > 0:
        to_side = _times(a, side, to_side)
    return to_main, to_side


@triton.jit
def _products(a, a_side, b, b_side, SIDE: tl.constexpr):
    """a b^T, over both parts."""
    found = _times(a, tl.trans(b), tl.full((a.shape[0], b.shape[0]), 0.0, tl.float32))
    if SIDE > 0:
        found = _times(a_side, tl.trans(b_side), found)
    return found


# ------------------------------------------------------------------------------------------- forward


@triton.jit
def _forward(
    qkv,
    bias,
    out,
    log_sums,
    tokens,
    heads,
    bias_head,
    bias_row,
    scale,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
    FULL: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of rows of one head and image."""
    first = _first_token(FULL, TILE, WHOLE)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = heads * DIM
    qkv += 3 * image * tokens * part + head * DIM
    out += image * tokens * part + head * DIM
    log_sums += (image * heads + head) * tokens
    bias += head.to(tl.int64) * bias_head
    rows = first + tl.arange(0, SIZE)
    query, query_side = _load_both(qkv, rows, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)
    top, total = tl.full((SIZE,), float("-inf"), tl.float32), tl.full((SIZE,), 0.0, tl.float32)
    main, side = _zeros_both(SIZE, MAIN, SIDE)
    for number in range(FULL):
        keys = number * TILE + tl.arange(0, TILE)
        top, total, main, side = _add_keys(
            qkv,
            bias,
            query,
            query_side,
            rows,
            keys,
            tokens,
            part,
            bias_row,
            scale,
            top,
            total,
            main,
            side,
            WHOLE,
            True,
            DIM,
            MAIN,
            SIDE,
        )
    if REST > 0:
        keys = FULL * TILE + tl.arange(0, REST)
        top, total, main, side = _add_keys(
            qkv,
            bias,
            query,
            query_side,
            rows,
            keys,
            tokens,
            part,
            bias_row,
            scale,
            top,
            total,
            main,
            side,
            WHOLE,
            False,
            DIM,
            MAIN,
            SIDE,
        )
    shares = 1.0 / total[:, None]
    _store_both(out, main * shares, side * shares, rows, part, tokens, WHOLE, DIM, MAIN, SIDE)
    tl.store(log_sums + rows, top + tl.log2(total), mask=rows < tokens)


@triton.jit
def _add_keys(
    qkv,
    bias,
    query,
    query_side,
    rows,
    keys,
    tokens,
    part,
    bias_row,
    scale,
    top,
    total,
    main,
    side,
    WHOLE: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One more tile of keys: the rows' largest score, sum of exponentials, and sums of values."""
    key, key_side = _load_both(qkv + part, keys, 3 * part, tokens, WHOLE_KEYS, DIM, MAIN, SIDE)
    value, value_side = _load_both(qkv + 2 * part, keys, 3 * part, tokens, WHOLE_KEYS, DIM, MAIN, SIDE)
    inside = (rows < tokens)[:, None] & (keys < tokens)[None, :]
    added = _load_pairs(bias + rows[:, None] * bias_row + keys[None, :], inside, WHOLE and WHOLE_KEYS)
    # Times log2(e), because exp2 is what the device computes.
    scores = _products(query, query_side, key, key_side, SIDE) * (scale * LOG2_E) + added.to(tl.float32) * LOG2_E
    if not WHOLE_KEYS:
        scores = tl.where((keys < tokens)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    main *= shrink[:, None]
    side *= shrink[:, None]
    main, side = _add_times(weights.to(value.dtype), value, value_side, main, side, SIDE)
    return higher, total, main, side


# ------------------------------------------------------------------------------------------ backward


@triton.jit
def _grad_times_out(
    grad_out,
    out,
    products,
    tokens,
    heads,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
    FULL: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
):
    """products [B, H, T]: of the output and its gradient, summed over D."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, part = tl.program_id(0) * TILE + tl.arange(0, TILE), heads * DIM
    start = image * tokens * part + head * DIM
    grad, grad_side = _load_both(grad_out + start, rows, part, tokens, False, DIM, MAIN, SIDE)
    values, values_side = _load_both(out + start, rows, part, tokens, False, DIM, MAIN, SIDE)
    found = tl.sum(grad.to(tl.float32) * values.to(tl.float32), 1)
    if SIDE > 0:
        found += tl.sum(grad_side.to(tl.float32) * values_side.to(tl.float32), 1)
    tl.store(products + (image * heads + head) * tokens + rows, found, mask=rows < tokens)


@triton.jit
def _grad_keys_values(
    qkv,
    bias,
    grad_out,
    log_sums,
    products,
    grad_qkv,
    grad_scores,
    tokens,
    heads,
    bias_head,
    bias_row,
    scale,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
    FULL: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of keys of one head and image: gradients of keys and values, and of the scores in these columns."""
    first = _first_token(FULL, TILE, WHOLE)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = heads * DIM
    of_head = (image * heads + head) * tokens
    qkv += 3 * image * tokens * part + head * DIM
    grad_qkv += 3 * image * tokens * part + head * DIM
    grad_out += image * tokens * part + head * DIM
    bias += head.to(tl.int64) * bias_head
    log_sums += of_head
    products += of_head
    grad_scores += of_head * bias_row
    keys = first + tl.arange(0, SIZE)
    key, key_side = _load_both(qkv + part, keys, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)
    value, value_side = _load_both(qkv + 2 * part, keys, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)
    grad_key, grad_key_side = _zeros_both(SIZE, MAIN, SIDE)
    grad_value, grad_value_side = _zeros_both(SIZE, MAIN, SIDE)
    for number in range(FULL):
        rows = number * TILE + tl.arange(0, TILE)
        grad_key, grad_value, grad_key_side, grad_value_side = _add_rows(
            qkv,
            bias,
            grad_out,
            log_sums,
            products,
            grad_scores,
            rows,
            keys,
            key,
            value,
            key_side,
            value_side,
            grad_key,
            grad_value,
            grad_key_side,
            grad_value_side,
            tokens,
            part,
            bias_row,
            scale,
            True,
            WHOLE,
            DIM,
            MAIN,
            SIDE,
        )
    if REST > 0:
        rows = FULL * TILE + tl.arange(0, REST)
        grad_key, grad_value, grad_key_side, grad_value_side = _add_rows(
            qkv,
            bias,
            grad_out,
            log_sums,
            products,
            grad_scores,
            rows,
            keys,
            key,
            value,
            key_side,
            value_side,
            grad_key,
            grad_value,
            grad_key_side,
            grad_value_side,
            tokens,
            part,
            bias_row,
            scale,
            False,
            WHOLE,
            DIM,
            MAIN,
            SIDE,
        )
    grad_key *= scale
    grad_key_side *= scale
    _store_both(grad_qkv + part, grad_key, grad_key_side, keys, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)
    _store_both(grad_qkv + 2 * part, grad_value, grad_value_side, keys, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)


@triton.jit
def _add_rows(
    qkv,
    bias,
    grad_out,
    log_sums,
    products,
    grad_scores,
    rows,
    keys,
    key,
    value,
    key_side,
    value_side,
    grad_key,
    grad_value,
    grad_key_side,
    grad_value_side,
    tokens,
    part,
    bias_row,
    scale,
    WHOLE: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One more tile of rows: writes the gradient of its scores, adds to those of keys and values.

    Keys by rows, so that weights and their gradients are left operands of the products as they stand.
    """
    query, query_side = _load_both(qkv, rows, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)
    inside = (keys < tokens)[:, None] & (rows < tokens)[None, :]
    places = rows[None, :] * bias_row + keys[:, None]
    scores = _products(key, key_side, query, query_side, SIDE) * (scale * LOG2_E)
    scores += _load_pairs(bias + places, inside, WHOLE and WHOLE_KEYS).to(tl.float32) * LOG2_E
    weights = tl.exp2(scores - tl.load(log_sums + rows, mask=rows < tokens, other=0.0)[None, :])
    if not (WHOLE and WHOLE_KEYS):
        weights = tl.where(inside, weights, 0.0)
    grad, grad_side = _load_both(grad_out, rows, part, tokens, WHOLE, DIM, MAIN, SIDE)
    grad_value, grad_value_side = _add_times(weights.to(grad.dtype), grad, grad_side, grad_value, grad_value_side, SIDE)
    found = _products(value, value_side, grad, grad_side, SIDE)
    found -= tl.load(products + rows, mask=rows < tokens, other=0.0)[None, :]
    grads = (weights * found).to(query.dtype)
    if WHOLE and WHOLE_KEYS:
        tl.store(grad_scores + places, grads)
    else:
        tl.store(grad_scores + places, grads, mask=inside)
    grad_key, grad_key_side = _add_times(grads, query, query_side, grad_key, grad_key_side, SIDE)
    return grad_key, grad_value, grad_key_side, grad_value_side


@triton.jit
def _grad_queries(
    qkv,
    grad_scores,
    grad_qkv,
    tokens,
    heads,
    padded,
    scale,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
    FULL: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of rows of one head and image: the gradient of the scores times the keys."""
    first = _first_token(FULL, TILE, WHOLE)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = heads * DIM
    qkv += 3 * image * tokens * part + head * DIM
    grad_qkv += 3 * image * tokens * part + head * DIM
    grad_scores += (image * heads + head) * tokens * padded
    rows = first + tl.arange(0, SIZE)
    main, side = _zeros_both(SIZE, MAIN, SIDE)
    for number in range(FULL):
        keys = number * TILE + tl.arange(0, TILE)
        main, side = _add_key_products(
            qkv, grad_scores, rows, keys, tokens, part, padded, main, side, WHOLE, True, DIM, MAIN, SIDE
        )
    if REST > 0:
        keys = FULL * TILE + tl.arange(0, REST)
        main, side = _add_key_products(
            qkv, grad_scores, rows, keys, tokens, part, padded, main, side, WHOLE, False, DIM, MAIN, SIDE
        )
    _store_both(grad_qkv, main * scale, side * scale, rows, 3 * part, tokens, WHOLE, DIM, MAIN, SIDE)


@triton.jit
def _add_key_products(
    qkv,
    grad_scores,
    rows,
    keys,
    tokens,
    part,
    padded,
    main,
    side,
    WHOLE: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    inside = (rows < tokens)[:, None] & (keys < tokens)[None, :]
    grads = _load_pairs(grad_scores + rows[:, None] * padded + keys[None, :], inside, WHOLE and WHOLE_KEYS)
    key, key_side = _load_both(qkv + part, keys, 3 * part, tokens, WHOLE_KEYS, DIM, MAIN, SIDE)
    return _add_times(grads, key, key_side, main, side, SIDE)


@triton.jit
def _sum_images(grad_scores, grad_bias, images, elements, tokens, padded, ADD: tl.constexpr, ELEMENTS: tl.constexpr):
    """grad_bias [H, T, T]: the sum of grad_scores [images, H, T, P], in the order of the images."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    row, column = at // padded, at % padded
    wanted = (at < elements) & (column < tokens)
    places = grad_bias + row * tokens + column
    total = tl.full((ELEMENTS,), 0.0, tl.float32)
    if ADD:
        total = tl.load(places, mask=wanted, other=0.0)
    for _ in range(images):
        total += tl.load(grad_scores + at, mask=wanted, other=0.0).to(tl.float32)
        grad_scores += elements
    tl.store(places, total, mask=wanted)
