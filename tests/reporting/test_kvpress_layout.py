"""kvpress's layout, read back as its scorer and its leaderboard do."""

import ast
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from sparsekv_pl.reporting import write_kvpress_layout
from sparsekv_pl.reporting.kvpress_layout import _press_name, string_match

NEEDED = {"dataset", "data_dir", "model", "device", "press_name", "compression_ratio"}
MORE = (
    "key_channel_compression_ratio fraction max_new_tokens max_context_length query_aware output_dir log_level "
    "press_init_command model_kwargs seed threshold needle_depth compression_interval target_size "
    "hidden_states_buffer_size fp8"
).split()
"""The keys that the leaderboard takes; another one is an error there."""


def reference_metrics(predictions):
    """RULER's scores, written out: the share of references in the answer, or for qa whether any is in it."""
    scores = {}
    for task in sorted(set(predictions["task"])):
        total, rows = 0.0, 0
        for _, row in predictions[predictions["task"] == task].iterrows():
            said = "".join(letter for letter in str(row["predicted_answer"]).strip() if ord(letter) >= 32).strip()
            hits = [reference.lower() in said.lower() for reference in ast.literal_eval(row["answer"])]
            total += any(hits) if task.startswith("qa") else sum(hits) / len(hits)
            rows += 1
        scores[task] = {"string_match": round(100 * total / rows, 2)}
    return scores


@pytest.fixture
def records(make_records):
    records = make_records(tasks=("niah_multivalue", "qa_1", "text"), lengths=(512, 1024), seeds=3)
    for place, record in enumerate(records):
        if record["task"] != "text":
            record |= {
                "answers": ["Alpha", "beta"],
                "answer": ("alpha\n", "ALPHA and Beta", "no", "al\x00pha")[11 * place // 10 % 4],
            }
    return [*records, {"task": "vt", "variant": "base", "press": "SnapKV", "compression_ratio": 0.5, "error": "Oops"}]


def test_predictions_give_the_metrics_that_stand_beside_them(records, tmp_path):
    folders = write_kvpress_layout(tmp_path, records, "org/model")
    assert len(folders) == 2 * 2 * 5  # lengths, variants, conditions
    assert sorted(folders) == sorted(tmp_path.iterdir())
    for folder in folders:
        predictions = pd.read_csv(folder / "predictions.csv")
        columns = {"question", "answer_prefix", "answer", "task", "max_new_tokens", "predicted_answer"}
        assert set(predictions) == columns | {"compression_ratio"}
        assert len(predictions) == 2 * 9
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == reference_metrics(predictions)
        assert 0 < metrics["niah_multivalue"]["string_match"] < metrics["qa_1"]["string_match"] < 100


def test_the_leaderboard_finds_dataset_model_method_ratio_and_score(records, tmp_path):
    write_kvpress_layout(tmp_path, records, "org/model", trained_name="me/adapter", query_aware=True)
    found = set()
    for folder in tmp_path.iterdir():
        said = yaml.safe_load((folder / "config.yaml").read_text())
        assert NEEDED <= said.keys() <= NEEDED.union(MORE)
        config = SimpleNamespace(**said)
        predictions = pd.read_csv(folder / "predictions.csv")
        ratio = predictions["compression_ratio"].mean().round(2).item() or float(config.compression_ratio)
        assert (config.dataset, config.fraction, config.query_aware) == ("ruler", 1.0, True)
        parts = [config.dataset, config.data_dir, config.model.replace("/", "--"), config.press_name]
        assert folder.name == "__".join([*parts, f"{ratio:.2f}", "query_aware"])
        found.add((config.data_dir, config.model, config.press_name, ratio))
    assert ("1024", "me/adapter", "snapkv", 0.75) in found
    assert ("512", "org/model", "no_press", 0.0) in found


def test_own_tasks_are_a_dataset_of_their_own_and_hosted_models_a_model(make_records, tmp_path):
    records = make_records(tasks=("fact",), presses=[], seeds=1, variants=("base",))
    records += [record | {"press": "hosted gemini/x"} for record in records]
    names = sorted(path.name for path in write_kvpress_layout(tmp_path, records, "org/model"))
    assert names == [
        "sparsekv_pl__512__gemini--x__no_press__0.00",
        "sparsekv_pl__512__org--model__no_press__0.00",
    ]


def test_ratios_that_round_to_the_same_do_not_overwrite_each_other(make_records, tmp_path):
    settings = {"presses": [("SnapKV", True)], "ratios": (0.501, 0.502), "seeds": 1, "variants": ("base",)}
    records = [r for r in make_records(tasks=("vt",), **settings) if r["press"] == "SnapKV"]
    (folder,) = write_kvpress_layout(tmp_path, records, "m")
    ratios = [set(pd.read_csv(path / "predictions.csv")["compression_ratio"]) for path in (folder, folder / "1")]
    assert ratios == [{0.501}, {0.502}]


# As kvpress's evaluate_registry.py calls them.
@pytest.mark.parametrize(
    ("press", "name"),
    [
        ("full cache", "no_press"),
        ("SnapKV", "snapkv"),
        ("StreamingLLM", "streaming_llm"),
        ("ObservedAttention", "observed_attention"),
        ("TOVA", "tova"),
        ("KeyDiff", "keydiff"),
        ("QFilter", "qfilter"),
        ("PyramidKV", "pyramidkv"),
        ("CUR", "cur"),
        ("KVzip", "kvzip"),
        ("FastKVzip", "fastkvzip"),
        ("KVCompose", "kvcompose"),
        ("DuoAttention", "duo_attention"),
        ("AdaKV(SnapKV)", "adakv_snapkv"),
        ("AdaKV(Compactor)", "adakv_compactor"),
        ("AdaKV(ExpectedAttention)", "expected_attention"),
        ("CriticalKV(SnapKV)", "critical_snapkv"),
        ("CriticalAdaKV(SnapKV)", "critical_adakv_snapkv"),
        ("CriticalAdaKV(ExpectedAttention)", "critical_adakv_expected_attention"),
        ("Merging(Knorm)", "merging_knorm"),
    ],
)
def test_presses_have_kvpress_names(press, name):
    assert _press_name(press, "dense") == name


def test_other_prefills_are_not_mixed_with_dense_ones():
    assert _press_name("Knorm", "decoding") == "decoding_knorm"
    assert _press_name("Knorm", "chunks of 128") == "knorm_chunks_of_128"
    assert _press_name("ExpectedAttention", "dense") != "expected_attention"  # that is AdaKV's


def test_string_match_by_hand():
    assert string_match(["one two", "x"], [["One", "three"], ["y"]], "vt") == 25.0
    assert string_match(["one two", "x"], [["One", "three"], ["y"]], "qa_1") == 50.0
