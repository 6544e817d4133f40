"""Conversion computes the same logits, loses no bit on the round trip, and refuses what it cannot express."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.errors import ExportError
from megatron.interop import convert, hf_files
from megatron.interop.convert import export_hf, import_hf
from megatron.interop.rules import Same
from tests.interop.models import ROWS, gpt2, gpt_neox, llama, save_model, write_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 500}
MODELS = {
    "pythia": lambda: gpt_neox(),
    "sequential_rotary100": lambda: gpt_neox(use_parallel_residual=False, rotary_pct=1.0),
    "neox_tied_no_attention_bias": lambda: gpt_neox(
        tie_word_embeddings=True, attention_bias=False, rotary_emb_base=500
    ),
    "neox_relu": lambda: gpt_neox(hidden_act="relu", layer_norm_eps=1e-3),
    "neox_tanh_gelu": lambda: gpt_neox(hidden_act="gelu_pytorch_tanh", rotary_pct=0.5),
    "llama_gqa": lambda: llama(num_key_value_heads=2),
    "llama_mha_tied": lambda: llama(
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500}
    ),
    "llama_mqa_biases": lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama_geglu": lambda: llama(hidden_act="gelu"),
    "gpt2": lambda: gpt2(),
    "gpt2_untied_relu": lambda: gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=80),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal_and_logits_agree(tmp_path, name):
    MODELS[name]().save_pretrained(tmp_path / "hf")
    (agreement,) = import_hf(tmp_path / "hf", tmp_path / "ours")
    assert agreement.largest_difference < 1e-4
    exported = export_hf(tmp_path / "ours", tmp_path / "back")
    assert exported[0].largest_difference < 1e-4
    assert exported[0].top1 == 1.0
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "back"))
    chosen_by_us = {"transformers_version", "bos_token_id", "eos_token_id", "n_inner", "resid_pdrop", "embd_pdrop"}
    chosen_by_us |= {"attn_pdrop", "hidden_act", "activation_function", "intermediate_size"}
    same = [key for key in new if key in old and key not in chosen_by_us]
    assert {key: old[key] for key in same} == {key: new[key] for key in same}


OURS = {
    "plain": {},
    "parallel": {"gpt_j_residual": True, "rotary_pct": 0.25},
    "no_biases": {"use_bias_in_mlp": False, "use_bias_in_attn_linear": False, "use_bias_in_norms": False},
    "fused_gelu_tied": {"bias_gelu_fusion": True, "no_weight_tying": False},
    "swiglu": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False},
    "glu_mha": {"norm": "rmsnorm", "activation": "glu"},
    "bilinear": {"norm": "rmsnorm", "activation": "bilinear", "use_bias_in_attn_linear": False},
    "gpt2_no_biases": {"pos_emb": "learned", "use_bias_in_mlp": False, "use_bias_in_attn_linear": False},
    "swish": {"activation": "swish"},
    "mish": {"activation": "mish"},
}


@pytest.mark.parametrize("name", OURS)
def test_our_models_export(tmp_path, name):
    save_model(tmp_path / "run", **OURS[name])
    agreement = export_hf(tmp_path / "run", tmp_path / "hf")[0]
    assert agreement.largest_difference < 1e-4
    assert agreement.losses[0] == pytest.approx(agreement.losses[1], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_stored_precision_is_kept_and_measured(tmp_path, precision):
    save_model(tmp_path / "run", precision=precision)
    exact, stored = export_hf(tmp_path / "run", tmp_path / "hf")
    assert exact.precision == "fp32"
    assert exact.largest_difference < 1e-4
    assert stored.precision == precision
    assert stored.largest_difference < 0.05 * stored.largest_logit
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype in dtypes


def test_fp32_comes_from_the_masters(tmp_path):
    folder = save_model(tmp_path / "run", precision="bf16", masters=True)
    export_hf(tmp_path / "run", tmp_path / "hf", precision="fp32")
    exported = load_file(tmp_path / "hf" / "model.safetensors")["gpt_neox.embed_in.weight"]
    assert torch.equal(exported, CheckpointReader(folder).read("embedding.word_embeddings.weight", "master"))


def test_a_folder_with_tokenizer_and_card(tmp_path):
    vocabulary = write_tokenizer(tmp_path / "tokenizer.json")
    save_model(tmp_path / "run", vocab_file=str(vocabulary), gpt_j_residual=True)
    vocabulary.unlink()
    agreements = export_hf(tmp_path / "run", tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == ROWS
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = tokenizer.decode(model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3)[0])
    assert text.startswith("the")
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in (f"{agreements[0].largest_difference:.2e}", "GPTNeoXForCausalLM", "| steps | 7 |", "2,688", "`hf`"):
        assert fact.strip("`") in card


def test_an_imported_model_brings_its_tokenizer_and_its_keys(tmp_path):
    gpt_neox(vocab_size=384).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf" / "tokenizer.json")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    reader = CheckpointReader(find_checkpoint(tmp_path / "ours"))
    assert reader.manifest.config["model"]["make_vocab_size_divisible_by"] == 128
    assert reader.manifest.progress["iteration"] == 0
    keys = (tmp_path / "ours" / "model.yml").read_text()
    assert f"load: {tmp_path / 'ours'}" in keys
    assert str(tmp_path / "ours" / "global_step0" / "tokenizer" / "tokenizer.json") in keys
    assert (tmp_path / "ours" / "global_step0" / "tokenizer" / "tokenizer.json").is_file()


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 20_000)
    save_model(tmp_path / "run")
    assert export_hf(tmp_path / "run", tmp_path / "hf")[0].largest_difference < 1e-4
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert import_hf(tmp_path / "hf", tmp_path / "again")[0].largest_difference < 1e-4


def test_files_of_the_bare_model_and_old_buffers_are_read(tmp_path):
    gpt2().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, path, metadata={"format": "pt"})
    assert import_hf(tmp_path / "hf", tmp_path / "ours")[0].largest_difference < 1e-4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpt_j_residual": True, "gpt_j_tied": True}, r"gpt_j_tied = True: .*GPTNeoXForCausalLM cannot express it"),
        ({"pos_emb": "alibi"}, r"pos_emb = alibi: .*it knows rotary"),
        ({"norm": "scalenorm"}, r"norm = scalenorm"),
        ({"activation": "softsign"}, r"activation = softsign: .*it knows gelu, relu"),
        ({"num_kv_heads": 2}, r"num_kv_heads = 2"),
        ({"sliding_window_width": 8}, r"sliding_window_width = 8: .*it knows unset"),
        ({"use_qk_layernorm": True}, r"use_qk_layernorm = True"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused_by_key(tmp_path, keys, message):
    save_model(tmp_path / "run", **keys)
    with pytest.raises(ExportError, match=message):
        export_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type = mamba in config.json: .*gpt_neox, llama, gpt2"),
        ({"hidden_act": "quick_gelu"}, r"hidden_act = quick_gelu"),
        ({"model_type": "llama", "hidden_act": "gelu_new", "rope_parameters": {}}, r"hidden_act = gelu_new"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type = yarn"),
        ({"num_hidden_layers": 3}, r"It lacks \['gpt_neox.layers.2"),
        ({"num_hidden_layers": 1}, r"lacks nothing and has \['gpt_neox.layers.1"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, change, message):
    gpt_neox().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_wrong_logits_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    save_model(tmp_path / "run")
    monkeypatch.setattr(Same, "to_hf", lambda _, tensors: [tensor * 1.01 for tensor in tensors])
    with pytest.raises(ExportError, match=r"does not compute the same logits.*largest difference of logits"):
        export_hf(tmp_path / "run", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_output_that_exists_is_not_touched(tmp_path):
    save_model(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").touch()
    with pytest.raises(ExportError, match="already exists"):
        export_hf(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path, monkeypatch):
    save_model(tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / "old.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Same, "to_hf", lambda _, tensors: [tensor * 1.01 for tensor in tensors])
        with pytest.raises(ExportError, match="same logits"):
            export_hf(tmp_path / "run", tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf" / "old.txt").exists(), "a failed export leaves the earlier one"
    export_hf(tmp_path / "run", tmp_path / "hf", overwrite=True)
    assert not (tmp_path / "hf" / "old.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ExportError, match="already exists"):
        export_hf(tmp_path / "run", tmp_path / "other", overwrite=True)


def test_folders_without_safetensors(tmp_path):
    gpt_neox().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pickled .bin files, which are never opened.*save_pretrained"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(ExportError, match="not a Hugging Face model"):
        import_hf(tmp_path / "hf", tmp_path / "ours")


def test_an_export_without_its_tokenizer_says_so(tmp_path):
    vocabulary = write_tokenizer(tmp_path / "tokenizer.json")
    folder = save_model(tmp_path / "run", vocab_file=str(vocabulary))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert "not part of this folder" in (tmp_path / "hf" / "README.md").read_text()
    assert convert.read_config(tmp_path / "hf")["eos_token_id"] is None
