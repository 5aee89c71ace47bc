"""Values that are rounded for products, and read in float by everything else."""

import onnx

from edgeclip.export.quantizing.edit_graph import GraphEdit


def spare_other_readers(model: onnx.ModelProto) -> None:
    """Let only quantized products read what was rounded for them, in place.

    ONNX Runtime's quantizer hands the rounded value to all readers, the residual sum behind a
    norm of a BERT among them: its whole residual stream then has 8 bits, and no operator is
    faster for it. Chains of convolutions are left alone, where the sums are int8 too.
    """
    edit = GraphEdit(model)
    for node in model.graph.node:
        quantizer = edit.maker(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        value, rounded = quantizer.input[0], node.output[0]
        readers, maker = edit.readers(rounded), edit.maker(value)
        around = [*readers, maker] if maker is not None else readers
        if any(item.op_type == "Conv" for item in around):
            continue
        for reader in readers:
            if not _is_quantized(edit, reader):
                names = [value if name == rounded else name for name in reader.input]
                reader.input[:] = names


def _is_quantized(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Tell whether a node is a product by an int8 weight."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    weight = edit.maker(node.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"
