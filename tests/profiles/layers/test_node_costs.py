import pytest

from edgeclip.profiles.layers.node_costs import TensorType, is_product, node_bytes, node_flops


def floats(*shapes: tuple[int, ...], kind: str = "float") -> list[TensorType]:
    return [(kind, shape) for shape in shapes]


@pytest.mark.parametrize(
    ("op", "inputs", "output", "flops"),
    [
        ("MatMul", [(1, 65, 128), (128, 384)], (1, 65, 384), 2 * 65 * 128 * 384),
        ("MatMul", [(1, 65, 128)], (1, 65, 384), 2 * 65 * 128 * 384),  # weights left out
        ("MatMul", [(2, 4, 65, 32), (2, 4, 32, 65)], (2, 4, 65, 65), 2 * 8 * 65 * 32 * 65),
        ("MatMul", [(5, 7), (3, 7, 2)], (3, 5, 2), 2 * 3 * 5 * 7 * 2),
        ("MatMul", [(7,), (7, 2)], (2,), 2 * 7 * 2),
        ("MatMul", [(3, 5, 7), (7,)], (3, 5), 2 * 3 * 5 * 7),
        ("FusedMatMul", [(2, 32, 65), (2, 32, 9)], (2, 65, 9), 2 * 2 * 65 * 32 * 9),  # transA
        ("Gemm", [(4, 128), (256, 128), (256,)], (4, 256), 2 * 4 * 128 * 256),  # transB
        ("MatMulNBits", [(1, 9, 64), (32, 2, 16), (64,)], (1, 9, 32), 2 * 9 * 64 * 32),
        ("DynamicQuantizeMatMul", [(9, 64), (64, 32), (1,)], (9, 32), 2 * 9 * 64 * 32),
        ("MatMulInteger", [(9, 64), (64, 32), ()], (9, 32), 2 * 9 * 64 * 32),
        ("QLinearMatMul", [(9, 64), (), (), (64, 32)], (9, 32), 2 * 9 * 64 * 32),
        ("Conv", [(1, 3, 64, 64), (128, 3, 8, 8), (128,)], (1, 128, 8, 8), 2 * 128 * 64 * 192),
        ("FusedConv", [(2, 8, 6, 6), (8, 2, 3, 3)], (2, 8, 6, 6), 2 * 2 * 8 * 36 * 18),  # 4 groups
        ("QLinearConv", [(1, 3, 4, 4), (), (), (5, 3, 1, 1)], (1, 5, 4, 4), 2 * 5 * 16 * 3),
        ("NhwcConv", [(1, 4, 4, 3), (5, 3, 1, 1)], (1, 4, 4, 5), 2 * 5 * 16 * 3),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 2, 3, 3)], (1, 2, 7, 7), 2 * 100 * 18),
        ("Attention", [(1, 9, 16), (16, 48), (48,)], (1, 9, 16), 2 * 9 * 16 * 48 + 4 * 81 * 16),
        ("MultiHeadAttention", [(1, 1, 16), (1, 9, 16), (1, 9, 16)], (1, 1, 16), 4 * 9 * 16),
        ("Attention", [(1, 2, 9, 8)] * 3, (1, 2, 9, 8), 4 * 2 * 81 * 8),
        ("Add", [(4, 5), (5,)], (4, 5), 20),
        ("QLinearAdd", [(4, 5), (), (), (5,)], (4, 5), 20),
        ("Softmax", [(4, 5)], (4, 5), 100),
        ("LayerNormalization", [(4, 5), (5,), (5,)], (4, 5), 140),
        ("SkipLayerNormalization", [(4, 5), (4, 5), (5,), (5,)], (4, 5), 160),
        ("QuickGelu", [(4, 5)], (4, 5), 60),
        ("ReduceMean", [(4, 5), (1,)], (4, 1), 20),
        ("Transpose", [(4, 5)], (5, 4), 0),
        ("Reshape", [(4, 5), (1,)], (20,), 0),
    ],
)
def test_operations(
    op: str, inputs: list[tuple[int, ...]], output: tuple[int, ...], flops: float
) -> None:
    assert node_flops(op, floats(*inputs), floats(output)) == flops


@pytest.mark.parametrize(
    ("op", "inputs", "output"),
    [
        ("Einsum", [(4, 5), (5, 6)], (4, 6)),
        ("TRTKernel_graph_torch_jit_0_0", [(4, 5)], (4, 6)),
        ("Conv", [(1, 3, 64, 64), (128,)], (1, 128, 8, 8)),  # weights left out
        ("Attention", [(1, 9, 16), (48,)], (1, 9, 16)),
        ("MultiHeadAttention", [(1, 9, 2, 3, 8)], (1, 9, 16)),
        ("Gemm", [], (4, 6)),
        ("FusedMatMul", [(4, 5), (3, 6)], (3, 6)),  # no K fits
    ],
)
def test_what_shapes_do_not_tell(
    op: str, inputs: list[tuple[int, ...]], output: tuple[int, ...]
) -> None:
    assert node_flops(op, floats(*inputs), floats(output)) is None


def test_bytes_are_those_of_the_types() -> None:
    assert node_bytes("Add", floats((4, 5), (5,)), floats((4, 5))) == 4 * (20 + 5 + 20)
    assert node_bytes("Cast", [("uint8", (4, 5))], [("float16", (4, 5))]) == 20 + 40
    products = [("float16", (1, 9, 64)), ("float16", (64, 32))]
    assert node_bytes("MatMul", products, [("float16", (1, 9, 32))]) == 2 * (9 * 64 + 64 * 32 + 288)
    packed = [("float", (1, 9, 64)), ("uint8", (32, 2, 16)), ("float", (64,))]
    assert node_bytes("MatMulNBits", packed, floats((1, 9, 32))) == 4 * 576 + 1024 + 256 + 1152
    assert node_bytes("Clip", [("int4x2", (3, 3))], [("int8", (3, 3))]) == 4.5 + 9
    assert node_bytes("Add", [("string", (4,))], floats((4,))) is None


def test_bytes_of_a_product_without_its_weights_are_not_known() -> None:
    assert node_bytes("MatMul", floats((1, 65, 128)), floats((1, 65, 384))) is None
    square = floats((1, 65, 128), (128,))  # a bias, not the weights
    assert node_bytes("MatMulIntegerToFloat", square, floats((1, 65, 128))) is None
    assert node_bytes("MatMulNBits", floats((1, 9, 64), (32,)), floats((1, 9, 32))) is None
    assert node_bytes("Conv", floats((1, 3, 8, 8), (5,)), floats((1, 5, 8, 8))) is None
    assert node_bytes("Einsum", floats((4, 5), (5, 6)), floats((4, 6))) is None
    assert node_bytes("MatMul", floats((3, 5, 7), (7,)), floats((3, 5))) == 4 * (105 + 7 + 15)


def test_a_table_is_not_read_to_its_end() -> None:
    table, picked = floats((2048, 128)), floats((1, 9, 128))
    ids: list[TensorType] = [("int64", (1, 9))]
    assert node_bytes("Gather", [*table, *ids], picked) == 8 * 9 + 2 * 4 * 9 * 128
    assert node_bytes("Reshape", floats((4, 5)), floats((20,))) == 0


def test_products() -> None:
    assert is_product("QLinearConv")
    assert is_product("MatMulNBits")
    assert not is_product("Add")
