"""Embeddings by sentence-transformers, and the same model saved in the layout of the installed version.

Arguments: folder of the model, JSON list of texts, .npy file and folder to write.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main(folder: str, texts: str, vectors: str, again: str) -> None:
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    asked = json.loads(Path(texts).read_text())
    assert max(map(len, model.tokenizer(asked)["input_ids"])) > model.max_seq_length
    np.save(vectors, model.encode(asked, batch_size=4, normalize_embeddings=True))
    model.save(again)


if __name__ == "__main__":
    main(*sys.argv[1:])
