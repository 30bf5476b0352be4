"""FLOPs of documents equal those of their tokens at the documents' lengths."""

from allometry.configs.model import DenseModel
from allometry.scaling.count import document_flops, flops_per_token

MODEL = DenseModel(vocab_size=61, width=24, num_layers=3, num_heads=4, ffn_width=40)


def test_documents_count_each_at_its_length() -> None:
    lengths = (1, 2, 5, 17, 1000)
    wanted = sum(length * flops_per_token(MODEL, length).total for length in lengths)
    assert document_flops(MODEL, lengths) == wanted
    assert document_flops(MODEL, ()) == 0
    whole = document_flops(MODEL, (sum(lengths),))
    assert whole > document_flops(MODEL, lengths), "attention is dearer in one long document"
