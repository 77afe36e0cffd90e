"""A row of each published format, made up here; what is read of rows, and the line that refuses them."""

import io
import json
from typing import Any

from PIL import Image
from refusals import assert_refusal

from mllm_align.data.readers import records_from


def png(width=3, height=2) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def trl(**fields):
    return {"images": ["a.png"], "prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", **fields}


def povid(chosen=None, rejected=None, **fields):
    chosen = [human("<image>\nWhat?"), gpt("A cat.")] if chosen is None else chosen
    rejected = [*chosen[:-1], gpt("A dog.")] if rejected is None else rejected
    row = {"id": "7", "image": "a.png"}
    return {**row, "conversations": chosen, "rejected_conversations": rejected, **fields}


ORIGIN = {"ds_name": "a set", "origin_dataset": "coco", "origin_split": "{}"}


def rlhfv(**fields):
    text = json.dumps({"question": "What?", "chosen": "A cat.", "rejected": "A dog."})
    image = {"bytes": png(), "path": None}
    return {**ORIGIN, "image": image, "text": text, "idx": 4, "image_path": "a.png", **fields}


def rlaifv(**fields):
    answers = {"question": "What?", "chosen": "A cat.", "rejected": "A dog."}
    image = {"bytes": png(), "path": None}
    return {**ORIGIN, "image": image, **answers, "idx": "4", "image_path": "a.png", **fields}


ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def completion(response, *ratings, model="a model") -> dict[str, Any]:
    ratings = ratings * 3 if len(ratings) == 1 else ratings
    marks = [{"Rating": rating, "Rationale": "as it is"} for rating in ratings]
    return {
        "annotations": dict(zip(ASPECTS, marks, strict=True)),
        "model": model,
        "response": response,
    }


def vlfeedback(*completions, **fields):
    completions = completions or (completion("A cat.", "5"), completion("A dog.", "2"))
    models = [each["model"] for each in completions]
    row = {"id": "v1", "prompt": "What?", "models": models, "completions": list(completions)}
    return {**row, "img_path": "a.png", **fields}


def in_columns(value, rows):
    """A list of equal objects as an object of lists, as `datasets` may store it."""
    if isinstance(value, dict):
        return {name: in_columns(each, [row[name] for row in rows]) for name, each in value.items()}
    return rows


def llavarlhf(preference=1, **fields):
    outputs = {
        "output_1": {"from": "llava", "value": "A cat."},
        "output_2": {"from": "llava", "value": "A dog."},
    }
    asked = [human("<image>\nHello."), gpt("Hello."), human("What?")]
    return {
        "id": "l1",
        "image": "a.png",
        "conversations": asked,
        **outputs,
        "preference": preference,
        **fields,
    }


def nlf(*turns, **fields):
    refined = {"user": "Look again.", "model": "A cat.", "rating": "4", "critique_NLF": "Right."}
    turns = turns or (
        {"user": "What?", "model": "A dog.", "rating": "1", "critique_NLF": "No dog."},
        refined,
    )
    return {"image_id": "a.png", "caption": "A pet.", "interaction": list(turns), **fields}


def sharegpt(**fields):
    talk = [human("<image>What?"), gpt("A pet."), human("Which?"), gpt("A cat.")]
    return {"id": "s1", "image": "a.png", "conversations": talk, **fields}


def sharegpt_pairs(**fields):
    talk = [{"from": "system", "value": "Be brief."}, human("<image>What?")]
    row = {"conversations": talk, "chosen": gpt("A cat."), "rejected": gpt("A dog."), "images": ["a.png"]}
    return {**row, **fields}


ROWS = {
    "trl": trl,
    "povid": povid,
    "rlhfv": rlhfv,
    "rlaifv": rlaifv,
    "vlfeedback": vlfeedback,
    "llavarlhf": llavarlhf,
    "nlf": nlf,
    "sharegpt": sharegpt_pairs,
}


def turns(record):
    """(role, text, how many images) of each message of the prompt."""
    return [(message.role, message.text, message.places) for message in record.messages]


def assert_refused(data, *words, **options):
    """Data are refused in one line that has all these words."""
    return assert_refusal(lambda: records_from(data, **options), *words)
