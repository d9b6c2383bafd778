"""Recipe keys of the text, its split and its tokens."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mtp_ce.registry import is_class_path
from mtp_ce.training.config.group import Group


class NoiseConfig(Group):
    """Noise planted in the training text, to measure what a scorer does with it; held-out text stays clean."""

    kind: Literal["documents", "spans", "duplicates"] = Field(
        default="documents",
        description="documents: whole documents of permuted tokens; spans: permuted spans of 16 tokens in every "
        "document; duplicates: documents that occur several times",
    )
    share: float = Field(
        default=0.4, gt=0, lt=1, description="expected fraction of the training tokens that are noise, or repeated"
    )
    copies: int | None = Field(
        default=None, ge=2, description="how often a duplicated document occurs, for kind duplicates; null: 8"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="which tokens are noise, and their order")

    @model_validator(mode="after")
    def _copies_reach_the_share(self) -> Self:
        if self.kind != "duplicates" and self.copies is not None:
            raise ValueError(
                f"copies is {self.copies}, but kind {self.kind} copies nothing; give data.noise.copies=null"
            )
        if self.fraction_of_documents > 1:
            raise ValueError(
                f"share {self.share} of repeated tokens needs more than {self.copies_of_documents} copies of every "
                "document; give a smaller data.noise.share or more data.noise.copies"
            )
        return self

    def describe(self) -> str:
        """Return a few words on the noise, for the terminal."""
        what = {
            "documents": "whole documents of permuted tokens",
            "spans": "permuted spans in every document",
            "duplicates": f"documents that occur {self.copies_of_documents} times",
        }
        return what[self.kind]

    @property
    def copies_of_documents(self) -> int:
        """How often a chosen document occurs."""
        return (self.copies or 8) if self.kind == "duplicates" else 1

    @property
    def fraction_of_documents(self) -> float:
        """Fraction of the documents that are chosen: all for spans, and for duplicates those whose repeats make share.

        share = f (copies - 1) / (1 + f (copies - 1))
        """
        if self.kind == "spans":
            return 1.0
        if self.kind == "documents":
            return self.share
        return self.share / ((1 - self.share) * (self.copies_of_documents - 1))


class DataConfig(Group):
    """The text, its split and its tokens."""

    corpus: str = Field(
        default="stdlib",
        min_length=1,
        description="'stdlib' (the source of Python's standard library), a folder of files, a .jsonl, .ndjson, .json, "
        ".csv, .parquet or .txt file, a glob of those, an s3:// address of any of them, or the hub name of a data set",
    )
    reader: str | None = Field(
        default=None,
        description="your own reader for corpus and validation_corpus, as package.module:Class; null: selected by the "
        "address",
    )
    subset: str | None = Field(default=None, min_length=1, description="name of the subset of a hub data set")
    split: str = Field(default="train", min_length=1, description="name of the split of a hub data set")
    suffix: str = Field(
        default=".py",
        min_length=1,
        description="suffix of the files of a folder that are read: each file is a document; each .jsonl, .ndjson, "
        ".json, .csv or .parquet file is a table of documents",
    )
    text_field: str = Field(default="text", min_length=1, description="field of a row that holds the document")
    messages_field: str | None = Field(
        default=None,
        min_length=1,
        description="field of a row that holds the messages of a chat, which the tokenizer's chat template renders; "
        "only the assistant's tokens are supervised; null: no chats",
    )
    prompt_field: str | None = Field(
        default=None,
        min_length=1,
        description="field of a row that holds the prompt, whose tokens are not supervised; null: no prompts",
    )
    input_field: str | None = Field(
        default=None,
        min_length=1,
        description="field of a row that holds a second paragraph of the prompt, such as the input of an instruction; "
        "null: the prompt is prompt_field alone",
    )
    completion_field: str | None = Field(
        default=None, min_length=1, description="field of a row that holds the completion, whose tokens are supervised"
    )
    holdout_fraction: float = Field(
        default=0.04,
        gt=0,
        lt=1,
        description="fraction held out for validation, selected by a hash: of a file's path, or of a row's content",
    )
    validation_corpus: str | None = Field(
        default=None,
        min_length=1,
        description="validation text, named like corpus, all of which is then trained on; null: holdout_fraction",
    )
    noise: NoiseConfig | None = Field(
        default=None, description="noise planted in the training text, for experiments; null: none"
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="a folder, an s3:// address or a hub name; null: that of the pretrained model, or else a "
        "byte-level BPE trained on the corpus",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=257,
        description="V: number of entries of the tokenizer trained here; for a given tokenizer, at least its own "
        "number; null: that of the pretrained model",
    )
    sequence_length: int = Field(default=256, ge=2, description="S: tokens per row")
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed: documents are concatenated and cut into rows; padded: one document per row, truncated or "
        "padded",
    )

    @field_validator("reader")
    @classmethod
    def _reader_is_a_class(cls, reader: str | None) -> str | None:
        if reader is not None and not is_class_path(reader):
            raise ValueError(f"it is '{reader}'; expected a class of your own as package.module:Class, or null")
        return reader

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.prompt_field is None) != (self.completion_field is None):
            present, missing = ("prompt", "completion") if self.prompt_field else ("completion", "prompt")
            raise ValueError(f"{present}_field is given without {missing}_field; data with prompts needs both")
        if self.input_field and not self.prompt_field:
            raise ValueError("input_field is given without prompt_field; it is a part of the prompt")
        if self.messages_field and self.prompt_field:
            raise ValueError(
                "messages_field and prompt_field are given; a row is either a chat, or prompt and completion"
            )
        if self.noise and (self.messages_field or self.prompt_field):
            field = "messages_field" if self.messages_field else "prompt_field"
            raise ValueError(f"noise is given with {field}; it is planted in plain documents: give data.noise=null")
        return self
