"""From a config to data sets: what is built, what is said, and every mistake with its message."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema.config import Config
from megatron.data.blend import BlendedDataset
from megatron.data.build import build_datasets
from megatron.data.gpt import GptDataset
from megatron.data.indexed import IndexedWriter
from megatron.data.members import summaries
from megatron.errors import ConfigError, DataError, DeepyError
from tests.data.files import config_of, write_documents, write_labels


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_documents(tmp_path / "text", [50] * 100)


def fails(config: Config, *texts: str, kind: type[DeepyError] = ConfigError, **facts: object) -> None:
    with pytest.raises(kind) as error:
        build_datasets(config, **facts)
    for text in texts:
        assert text in str(error.value)


def test_one_file_in_three_parts(prefix: str) -> None:
    data = build_datasets(config_of(data_path=prefix, split="90,5,5"), vocab_size=500)
    assert data.train_iters == 10
    assert [(part.documents.start, part.documents.stop) for part in (data.train, data.valid, data.test)] == [
        (0, 90),
        (90, 95),
        (95, 100),
    ]
    assert data.train.read(np.arange(4)).text.shape == (4, 17)


def test_summaries_say_how_often_the_data_is_read(prefix: str) -> None:
    config = config_of(data_path=prefix, split="90,5,5", train_iters=100)
    found = [str(summary).replace(prefix, "text") for summary in build_datasets(config).summaries]
    assert found == [
        "train: 90 documents, 4,500 tokens, 0.711 epochs of text",
        "valid: 5 documents, 250 tokens, 2.69 epochs of text",
        "test: 5 documents, 250 tokens, 0.128 epochs of text",
    ]
    assert [str(summary).replace(prefix, "text") for summary in summaries(config)] == found


def test_summaries_of_a_blend(tmp_path: Path) -> None:
    paths = [write_documents(tmp_path / f"d{number}", [50] * 100) for number in range(2)]
    config = config_of(train_data_paths=paths, train_data_weights=[3, 1], train_iters=1000)
    assert [round(summary.epochs, 2) for summary in summaries(config)] == [4.8, 1.6]


def test_without_validation(prefix: str) -> None:
    data = build_datasets(config_of(data_path=prefix, split="100"))
    assert (data.valid, data.test) == (None, None)
    data = build_datasets(config_of(data_path=prefix, split="90,5,5", eval_iters=0))
    assert (data.valid, data.test) == (None, None)


def test_epochs_give_the_length_of_the_run(prefix: str) -> None:
    data = build_datasets(config_of(data_path=prefix, split="90,5,5", train_epochs=3, gradient_accumulation_steps=2))
    samples = (90 * 50 - 1) // 16 - 1
    assert data.train_iters == samples // 2 * 3 // 2
    assert [summary.epochs for summary in data.summaries] == [3, 1, 1]


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
def test_epochs_of_whole_documents(tmp_path: Path, packing: str) -> None:
    sizes = np.random.RandomState(0).randint(1, 15, 100).tolist()
    prefix = write_documents(tmp_path / "text", sizes)
    data = build_datasets(config_of(data_path=prefix, split="100", train_epochs=1, pack_impl=packing))
    assert sorted(set(data.train.index.documents.tolist())) == list(range(100))


def test_weights_by_number_of_documents(tmp_path: Path) -> None:
    paths = [write_documents(tmp_path / f"d{number}", [50] * count) for number, count in enumerate((30, 10))]
    config = config_of(train_data_paths=paths, weight_by_num_documents=True)
    data = build_datasets(config)
    assert isinstance(data.train, BlendedDataset)
    np.testing.assert_allclose(np.bincount(data.train.index.choices) / len(data.train), [0.75, 0.25], atol=0.01)


def test_labels_and_documents_without_targets(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [9] * 30)
    label = write_labels(tmp_path / "label", prefix, set(range(10)))
    config = config_of(train_data_paths=[prefix], train_label_data_paths=[label], pack_impl="unpacked")
    train = build_datasets(config).train
    assert isinstance(train, GptDataset)
    assert set(train.index.documents.tolist()) <= set(range(10, 30))
    assert (train.read(np.arange(4)).labels[:, 0] == -100).all()


class TestMistakes:
    def test_no_data(self) -> None:
        fails(config_of(), "there is nothing to train on", "Set data_path: data/corpus_text_document")

    def test_missing_file(self, tmp_path: Path, prefix: str) -> None:
        config = config_of(data_path=f"{tmp_path}/tex")
        fails(config, f"data_path = {tmp_path}/tex", "there is no tex.bin and no tex.idx", f"Did you mean {prefix}?",
              kind=DataError)  # fmt: skip

    def test_split_leaves_no_validation(self, tmp_path: Path) -> None:
        prefix = write_documents(tmp_path / "text", [50] * 12)
        config = config_of(data_path=prefix)
        fails(config, 'split = "969, 30, 1": of the 12 documents of', "leaves none for valid", "eval_iters: 0")
        assert build_datasets(config_of(data_path=prefix, eval_iters=0)).valid is None

    def test_split_leaves_no_training(self, tmp_path: Path) -> None:
        prefix = write_documents(tmp_path / "text", [50] * 3)
        fails(config_of(data_path=prefix, split="1,99"), "leaves none for train", 'split: "90, 5, 5"')

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (
                {"train_data_weights": [1.0]},
                "train_data_weights = [1.0]: it has 1 entries, and train_data_paths has 2.",
            ),
            ({"train_data_weights": [1, 0]}, "it holds a weight that is not a positive number. Remove such a data set"),
            ({"train_label_data_paths": ["a"]}, "it has 1 entries, and train_data_paths has 2"),
            ({"valid_label_data_paths": ["a"]}, "it has 1 entries, and valid_data_paths has 0"),
            ({"train_data_weights": [1, 2], "train_epochs": 2}, "train_epochs = 2: it counts passes over every"),
            ({"weight_by_num_documents": True, "train_epochs": 2}, "but they have different weights. Set train_iters"),
        ],
    )
    def test_lists_that_cannot_be(self, keys: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError) as error:
            config_of(train_data_paths=["x", "y"], **keys)
        assert message in str(error.value)

    def test_less_than_one_sample(self, tmp_path: Path) -> None:
        prefix = write_documents(tmp_path / "text", [8, 8])
        config = config_of(data_path=prefix, split="100")
        fails(config, "its 2 documents for train hold 16 tokens, but a sample takes seq_length + 1 = 17",
              "set a smaller seq_length", kind=DataError)  # fmt: skip

    def test_no_tokens_at_all(self, tmp_path: Path) -> None:
        prefix = write_documents(tmp_path / "text", [50] * 5 + [0] * 5)
        fails(config_of(data_path=prefix, split="50,50"), "hold 0 tokens", kind=DataError)

    def test_token_beyond_the_vocabulary(self, prefix: str) -> None:
        config = config_of(data_path=prefix)
        texts = ["token id", f"{prefix}.bin", "vocabulary has 300 entries, ids 0 to 299", "tools/preprocess_data.py"]
        fails(config, *texts, kind=DataError, vocab_size=300)

    def test_negative_tokens(self, tmp_path: Path) -> None:
        with IndexedWriter(tmp_path / "text", np.int32) as writer:
            writer.add_document(np.full(400, -100))
        train = build_datasets(config_of(data_path=str(tmp_path / "text"), split="100"), vocab_size=300).train
        with pytest.raises(DataError, match="token id -100 in"):
            train.read(np.arange(2))

    def test_other_tokenizer(self, prefix: str) -> None:
        sidecar = {
            "tokens": 5000,
            "tokenizer_sha256": "a" * 64,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": "x.json",
        }
        Path(f"{prefix}.json").write_text(json.dumps(sidecar))
        config = config_of(data_path=prefix)
        build_datasets(config, tokenizer_fingerprint="a" * 64)
        texts = [f"tokenizer of {prefix}", "was built with HFTokenizer x.json (sha256 aaaaaaaaaaaa)", "bbbbbbbbbbbb"]
        fails(config, *texts, kind=DataError, tokenizer_fingerprint="b" * 64)

    def test_sidecar_of_other_tokens_is_not_believed(self, prefix: str) -> None:
        Path(f"{prefix}.json").write_text(json.dumps({"tokens": 7, "tokenizer_sha256": "a" * 64}))
        build_datasets(config_of(data_path=prefix), tokenizer_fingerprint="b" * 64)

    def test_no_document_fits(self, prefix: str) -> None:
        config = config_of(data_path=prefix, pack_impl="pack_until_overflow", allow_chopped=False)
        fails(config, "no document is usable with seq_length = 16", "Set allow_chopped: true", kind=DataError)


def test_labels_that_are_all_negative_stop_the_run(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "text", [40] * 10)
    labels = write_labels(tmp_path / "labels", text, ignored_documents=set(range(10)))
    with pytest.raises(DataError, match=r"labels .*every label is negative.*Keep the token ids"):
        build_datasets(config_of(train_data_paths=[text], train_label_data_paths=[labels]))


def test_the_order_of_the_samples_is_told_by_a_hash(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "text", [40] * 100)

    def order(**keys: object) -> str:
        return build_datasets(config_of(data_path=text, split="80,10,10", **keys)).train_order

    assert order() == order(train_iters=20) == order(eval_iters=0) == order(num_workers=2)
    assert len({order(), order(seed=5), order(train_iters=200), order(seq_length=8)}) == 4
